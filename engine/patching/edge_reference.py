"""Removed edges and paths as full forwards with hooks: slow, plain, the oracle of `edge_delta` and `path_delta`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.engine.config import ModelConfig
from subcircuit.engine.hooks import Hook
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.edge_delta import EdgeSet, sender
from subcircuit.engine.patching.graph import INPUT, LOGITS, Edge, senders
from subcircuit.engine.patching.metric import Metric
from subcircuit.engine.patching.path_delta import Freeze
from subcircuit.engine.patching.reference import last_logits, metric_of, patch_hooks
from subcircuit.engine.patching.sites import Component, PatchSet
from subcircuit.engine.patching.sources import AlignedPrompts, PromptChunk, Sources

Values = dict[str, Tensor]
"""What senders write to the residual stream, or what receivers read from it, by name: [prompt, pos, d_model]."""


class EdgeReference:
    """Metrics of a chunk of prompts, from full forwards in the model's own dtype."""

    def __init__(
        self,
        model: HookedTransformer,
        prompts: AlignedPrompts,
        chunk: PromptChunk,
        sources: Sources,
        base: PatchSet,
        metric: Metric,
    ) -> None:
        self.model, self.prompts, self.chunk, self.sources, self.metric = model, prompts, chunk, sources, metric
        self.clean_logits = last_logits(model, prompts, chunk)
        self.base = self._patches(base)
        # Before any forward: a source that came to be measured within a hook would set that hook off again.
        self._sources = {name: self._source(name) for name in senders(model.config)}

    def clean(self) -> Float[Tensor, "prompt"]:
        return self._metric([])

    def without_edges(self, edge_set: EdgeSet) -> Float[Tensor, "prompt"]:
        """One forward in which receivers read the source values of the senders that they are cut off from."""
        written: Values = {}
        by_receiver: dict[str, set[str]] = {}
        for name, receiver in edge_set.removed:
            by_receiver.setdefault(receiver, set()).add(name)

        def cut(receiver: str, value: Tensor) -> Tensor:
            return value + sum((self._sources[name] - written[name] for name in by_receiver[receiver]), torch.zeros(()))

        hooks = [*self.base, *self._patches(edge_set.patches)]
        hooks += self._write_hooks({name for name, _ in edge_set.removed}, written)
        hooks += [_input_hook(self.model, receiver, cut) for receiver in by_receiver]
        return self._metric(hooks)

    def along_path(self, edge: Edge, freeze: Freeze) -> Float[Tensor, "prompt"]:
        """Three forwards: what is frozen, what the receiver reads then, and what comes of it."""
        name, receiver = edge
        frozen: Values = {}
        stay = [other for other in senders(self.model.config) if other not in (INPUT, name) and freeze != "none"]
        stay = [other for other in stay if freeze == "heads+mlps" or sender(other).kind == "z"]
        self._metric([*self.base, *self._write_hooks(stay, frozen)])
        read: Values = {}

        def keep(of: str, value: Tensor) -> Tensor:
            read[of] = value
            return value

        fixed = {**frozen, name: self._sources[name]}
        self._metric([*self.base, *self._output_hooks(fixed), _input_hook(self.model, receiver, keep)])
        return self._metric([*self.base, _input_hook(self.model, receiver, lambda of, _: read[of])])

    def _metric(self, hooks: Sequence[Hook]) -> Float[Tensor, "prompt"]:
        logits = last_logits(self.model, self.prompts, self.chunk, hooks)
        return metric_of(logits, self.clean_logits, self.prompts, self.chunk, self.metric)

    def _patches(self, patch_set: PatchSet) -> list[Hook]:
        return patch_hooks(self.model, patch_set, self.sources, self.chunk, self.prompts.clean.shape[1])

    def _source(self, name: str) -> Float[Tensor, "#prompt pos d_model"]:
        """A sender's source value as it writes it to the residual stream."""
        part = sender(name)
        value = self.sources.value(self.sources.key(None), part.hook_name, self.chunk)
        return value[:, :, part.index] @ self.model.W_O[part.layer, part.index] if part.kind == "z" else value

    def _write_hooks(self, names: Sequence[str] | set[str], written: Values) -> list[Hook]:
        """Hooks that note what senders write."""

        def note(name: str) -> Hook:
            part = sender(name)

            def hook(value: Tensor, _: str) -> None:
                written[name] = value[:, :, part.index] if part.kind == "z" else value

            return output_name(part), hook

        return [note(name) for name in names]

    def _output_hooks(self, values: Values) -> list[Hook]:
        """Hooks that put values in place of what senders write."""

        def put(name: str) -> Hook:
            part = sender(name)

            def hook(value: Tensor, _: str) -> Tensor:
                value = value.clone()
                at = (slice(None), slice(None), part.index) if part.kind == "z" else ...
                value[at] = values[name]
                return value

            return output_name(part), hook

        return [put(name) for name in values]


def output_name(part: Component) -> str:
    """The hook point of what a sender writes to the residual stream."""
    return f"blocks.{part.layer}.attn.hook_result" if part.kind == "z" else part.hook_name


def input_name(receiver: str, config: ModelConfig) -> str:
    """The hook point of what a receiver reads of the residual stream, which heads of a layer share."""
    if receiver == LOGITS:
        return f"blocks.{config.n_layers - 1}.hook_resid_post"
    part = Component.parse(receiver)
    return f"blocks.{part.layer}.hook_mlp_in" if part.kind == "mlp" else f"blocks.{part.layer}.hook_{part.kind}_input"


def _input_hook(model: HookedTransformer, receiver: str, replace: Callable[[str, Tensor], Tensor]) -> Hook:
    """A hook that lets a receiver read `replace(receiver, what it read)`."""
    name = input_name(receiver, model.config)
    if not name.endswith(("q_input", "k_input", "v_input")):
        return name, lambda value, _: replace(receiver, value)
    head = Component.parse(receiver).index

    def hook(value: Tensor, _: str) -> Tensor:
        value = value.clone()
        value[:, :, head] = replace(receiver, value[:, :, head].clone())
        return value

    return name, hook
