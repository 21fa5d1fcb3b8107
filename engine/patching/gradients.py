"""Gradients of each prompt's metric with respect to what passes a model's hook points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.answers import answer_directions, token_sets
from subcircuit.engine.patching.sources import AlignedPrompts, PromptChunk

ENTRY = "blocks.0.hook_resid_pre"
"""Where the gradients' graph begins: the embedded prompts."""

_PARTS = ("attn", "mlp")

Gradients = dict[str, Float[Tensor, "prompt pos ..."]]


class MetricPass:
    """One forward of a chunk of prompts that can be differentiated.

    `values` are what passed the named hook points, `metric` is mean logit(answers) − mean logit(wrongs) of each prompt.
    Prompts do not influence each other, so the gradient of the metric's sum holds each prompt's own gradient.
    `entry` replaces the embedded prompts (as integrated gradients want it). With `droppable`, gradients can leave a
    layer out. Parameters get no gradients, whether they ask for them or not.
    """

    def __init__(
        self,
        model: HookedTransformer,
        prompts: AlignedPrompts,
        chunk: PromptChunk,
        names: Sequence[str],
        *,
        entry: Float[Tensor, "#prompt pos d_model"] | None = None,
        droppable: bool = False,
    ) -> None:
        self._entry, self._dropped = entry, -1
        self._graph_values: dict[str, Tensor] = {}
        hooks = [(ENTRY, self._enter), *((name, self._keep) for name in names)]
        n_layers = model.config.n_layers
        outputs = [(f"blocks.{layer}.hook_{part}_out", self._drop) for layer in range(n_layers) for part in _PARTS]
        with torch.enable_grad(), model.hooks([*hooks, *(outputs if droppable else ())]):
            # The logits of two tokens are wanted, so the unembedding of all of them is not run.
            resid = model(prompts.clean[chunk], stop_at_layer=n_layers)
            direction = answer_directions(model.unembed_weight, *(tokens[chunk] for tokens in token_sets(prompts)))
            self._metric: Tensor = (model.ln_final(resid[:, -1]) * direction).sum(-1)
            self._total = self._metric.sum()

    @property
    def values(self) -> Gradients:
        return {name: value.detach() for name, value in self._graph_values.items()}

    @property
    def metric(self) -> Float[Tensor, "prompt"]:
        return self._metric.detach()

    def gradients(self, without_layer: int = -1) -> Gradients:
        """∂metric/∂value at every named hook point; optionally along those paths only that do not run through what
        the heads and the MLP of one layer write to the residual stream."""
        self._dropped = without_layer
        # At the metric's own layer and above its position nothing depends on some values: their gradient is 0.
        found = torch.autograd.grad(
            self._total,
            list(self._graph_values.values()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(self._graph_values, found, strict=True))

    def _enter(self, value: Tensor, name: str) -> Tensor:
        entry = value if self._entry is None else self._entry.to(value).expand_as(value)
        return entry.detach().clone().requires_grad_()

    def _keep(self, value: Tensor, name: str) -> None:
        self._graph_values[name] = value

    def _drop(self, value: Tensor, name: str) -> Tensor:
        layer = int(name.split(".")[1])
        onward = value.view_as(value)  # another tensor, so that the gradient of a kept value is what is left of it
        onward.register_hook(lambda grad: torch.zeros_like(grad) if layer == self._dropped else grad)
        return onward
