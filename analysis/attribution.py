"""Direct logit attribution: what heads, MLPs and neurons themselves add to the logit difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.analysis.measures import Measure, chance_threshold, top_heads
from subcircuit.analysis.metrics import logit_difference
from subcircuit.analysis.statistics import interval_columns
from subcircuit.analysis.tasks import Task
from subcircuit.engine.blocks import Block
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.answers import answer_directions

ROWS_AT_ONCE = 8
N_SHUFFLES = 50
"""Times that answers are dealt to other prompts for a threshold."""


@dataclass(frozen=True, eq=False)
class Attribution:
    """Terms, in logits, whose sum is each prompt's logit(answer) − logit(wrong) (means of sets, where there are sets).

    The final norm's scale is held at its value in this pass (Elhage et al. 2021, "A Mathematical Framework for
    Transformer Circuits"; Wang et al. 2022, arXiv 2211.00593, section 3.1), so what a component does through later ones
    is not in its term. `neurons` and `mlp_bias` split up `mlps`.
    """

    embeddings: Float[Tensor, " prompt"]
    """Token embedding, and position embedding where there is one."""
    heads: Float[Tensor, "layer head prompt"]
    attn_bias: Float[Tensor, "layer prompt"]
    mlps: Float[Tensor, "layer prompt"]
    neurons: Float[Tensor, "layer neuron prompt"]
    mlp_bias: Float[Tensor, "layer prompt"]
    norm_bias: Float[Tensor, " prompt"]
    logit_difference: Float[Tensor, " prompt"]
    shuffled_heads: Float[Tensor, "draw layer head"]
    """Mean terms of the heads where each prompt has the answers of another."""

    @property
    def total(self) -> Float[Tensor, " prompt"]:
        """The sum of all terms: the logit difference, up to rounding."""
        return self.embeddings + self.heads.sum((0, 1)) + self.attn_bias.sum(0) + self.mlps.sum(0) + self.norm_bias

    def measure(self) -> Measure:
        """The heads' mean terms. Baseline: the mean with answers of other prompts; threshold from these, both signs."""
        null = self.shuffled_heads
        baseline = null.mean(0) if len(null) else torch.zeros_like(self.heads.mean(-1))
        threshold = chance_threshold((null - baseline).abs())
        what = "added to logit(answer) − logit(wrong) directly"
        return Measure("direct effect", self.heads.mean(-1), baseline, threshold, what)

    def table(self, top_neurons: int = 0) -> list[dict[str, Any]]:
        """A row per head and MLP, and for the neurons with the largest terms: name, mean with the ends of its 95 %
        bootstrap interval over prompts (None of one prompt), share."""
        whole = float(self.logit_difference.mean())
        places, terms = [], []

        def add(name: str, kind: str, layer: int, index: int, values: Tensor) -> None:
            places.append({"component": name, "kind": kind, "layer": layer, "index": index})
            terms.append(values)

        for layer in range(len(self.mlps)):
            for head in range(self.heads.shape[1]):
                add(f"a{layer}.h{head}", "head", layer, head, self.heads[layer, head])
            add(f"m{layer}", "mlp", layer, 0, self.mlps[layer])
        for layer, neuron, _ in top_heads(self.neurons.mean(-1).abs(), top_neurons) if top_neurons else ():
            add(f"m{layer}.n{neuron}", "neuron", layer, neuron, self.neurons[layer, neuron])
        values = torch.stack(terms)
        means, ends = values.mean(1).tolist(), interval_columns(values)
        return [
            {**place, "direct": mean, **interval, "share": mean / whole if whole else None}
            for place, mean, interval in zip(places, means, ends, strict=True)
        ]


@torch.no_grad()
def attribution(model: HookedTransformer, task: Task, *, seed: int = 0) -> Attribution:
    """Direct logit attribution on a task's clean prompts. `seed` decides how answers are dealt for the threshold."""
    directions = answer_directions(model.unembed_weight, *task.answer_sets)
    parts = [_batch(model, task, directions, slice(i, i + ROWS_AT_ONCE)) for i in range(0, task.n, ROWS_AT_ONCE)]
    terms = {name: torch.cat([part[name] for part in parts], -1) for name in parts[0] if name != "crossed"}
    crossed = torch.cat([part["crossed"] for part in parts], -2)
    return Attribution(**terms, shuffled_heads=_shuffled(crossed, task, seed))


def _batch(
    model: HookedTransformer, task: Task, directions: Float[Tensor, "prompt d_model"], rows: slice
) -> dict[str, Tensor]:
    """Terms of some prompts by name, and in `crossed` those of the heads for every prompt's answers."""
    last: dict[str, Tensor] = {}

    def keep(value: Tensor, name: str) -> None:
        last[name] = value[:, -1]

    names = ("blocks.0.hook_resid_pre", "*.hook_z", "*.hook_mlp_out", "*.mlp.hook_post", "ln_final.hook_scale")
    logits = model.run_with_hooks(task.clean[rows], [(name, keep) for name in names])
    norm = model.ln_final
    scale = last["ln_final.hook_scale"].to(directions)
    # Taking out the mean is a symmetric map: done once to the directions, it need not be done to every term.
    seen = directions * norm.weight
    seen = seen - seen.mean(-1, keepdim=True) if norm.centred else seen
    towards = seen[rows] / scale
    answers, wrongs = (tokens[rows] for tokens in task.answer_sets)
    terms = {
        "logit_difference": logit_difference(logits, answers, wrongs),
        "embeddings": (last["blocks.0.hook_resid_pre"] * towards).sum(-1),
        "norm_bias": _of_bias(norm.bias, directions[rows]),
    }
    by_layer = [_layer_terms(model, layer, last, towards, seen, scale) for layer in range(model.config.n_layers)]
    terms |= {name: torch.stack([layer[name] for layer in by_layer]) for name in by_layer[0]}
    return {name: (value if value.dtype == torch.float64 else value.float()).cpu() for name, value in terms.items()}


def _layer_terms(
    model: HookedTransformer, layer: int, last: dict[str, Tensor], towards: Tensor, seen: Tensor, scale: Tensor
) -> dict[str, Tensor]:
    """Terms of one layer. seen: every prompt's direction `[prompt, d_model]`; towards: a batch's own, over `scale`."""
    block, name = cast(Block, model.blocks[layer]), f"blocks.{layer}"
    outputs = torch.einsum("pah,ahd->apd", last[f"{name}.attn.hook_z"], block.attn.W_O)
    return {
        "heads": (outputs * towards).sum(-1),
        "crossed": outputs / scale @ seen.T,
        "attn_bias": _of_bias(block.attn.w_o.bias, towards),
        "mlps": (last[f"{name}.hook_mlp_out"] * towards).sum(-1),
        "neurons": (last[f"{name}.mlp.hook_post"] * (towards @ block.mlp.w_out.weight)).T,
        "mlp_bias": _of_bias(block.mlp.w_out.bias, towards),
    }


def _of_bias(bias: Tensor | None, directions: Float[Tensor, "prompt d_model"]) -> Float[Tensor, " prompt"]:
    return directions.new_zeros(len(directions)) if bias is None else directions @ bias


def _shuffled(
    crossed: Float[Tensor, "layer head prompt direction"], task: Task, seed: int
) -> Float[Tensor, "draw layer head"]:
    """Mean terms where every prompt gets the answers of another that has other ones; no draw where there is none."""
    others = (task.answer[:, None] != task.answer).double()
    if not bool(others.any(1).all()):
        return crossed.new_empty(0, *crossed.shape[:2])
    drawn = torch.multinomial(others, N_SHUFFLES, True, generator=torch.Generator().manual_seed(seed))
    return torch.stack([crossed[..., torch.arange(task.n), each].mean(-1) for each in drawn.T])
