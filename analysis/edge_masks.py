"""Subnetwork search over edges: a learned gate on every edge (`gates`), then exact scores.

A receiver r reads input + Σ over senders s of (1 − m_sr) · (source_s − current_s): of each sender m times what it
writes and 1 − m times what its source would. That is edge pruning (Bhaskar et al. 2024, arXiv 2406.16778), with the
share of open edges weighed in the loss in place of a target for it, and gates on edges alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Unpack, cast

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.analysis.ablation import check_threshold
from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.eap import connected
from subcircuit.analysis.edge_ablation import EdgeAblation
from subcircuit.analysis.gates import Learning, Masks, learn_gates, near_enough, smallest_prefix
from subcircuit.analysis.tasks import Task
from subcircuit.engine.blocks import Block
from subcircuit.engine.hooks import Hook, HookFunction
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Patch, Site, Source
from subcircuit.engine.patching.edge_delta import sender
from subcircuit.engine.patching.edge_reference import input_name, output_name
from subcircuit.engine.patching.graph import INPUT, Edge, EdgeIndex, edges
from subcircuit.engine.patching.metric import Metric
from subcircuit.engine.patching.options import Executor, Precision
from subcircuit.engine.patching.sources import PromptChunk, Sources

SIZES_AT_ONCE = 16
"""Sizes of circuits that are scored in one call."""


def learn_edge_masks(
    model: HookedTransformer,
    task: Task,
    *,
    source: Source = "corrupted",
    progress: Callable[[int, int], None] | None = None,
    **learning: Unpack[Learning],
) -> Masks[Edge]:
    """Gates for all edges of a model, learned on a task's prompts as `learn_gates` says.

    A step keeps every sender's output for every layer that reads it, about n_layers / 2 · n_senders · d_model values
    per token.

    Raises PatchError for an unknown loss or source, or a number that must be positive and is not.
    """
    index, every = EdgeIndex(model.config), edges(model.config)
    receivers, senders = (torch.tensor(places, device=model.device) for places in index.places(every))
    patches = tuple(Patch(Site(sender(name))) for name in index.senders)

    def hooks(gates: Tensor, sources: Sources, prompts: PromptChunk) -> list[Hook]:
        nothing = gates.new_zeros(len(index.receivers), len(index.senders))
        return gated_edges(model, index, nothing.index_put((receivers, senders), 1 - gates), sources, prompts)

    return learn_gates(model, task, every, patches, hooks, source=source, progress=progress, **learning)


def edge_mask_circuit(
    model: HookedTransformer,
    task: Task,
    *,
    threshold: float = 20.0,
    both_sides: bool = False,
    source: Source = "corrupted",
    metric: Metric = "logit_difference",
    executor: Executor = "torch",
    precision: Precision = "fp32",
    budget_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **learning: Unpack[Learning],
) -> Circuit:
    """The circuit of edges that learned gates lead to: the first edges, in the gates' order, that score
    100 − `threshold`.

    With `both_sides` the score may not exceed 100 + `threshold` either, which keeps edges that work against the answer.
    Scores are exact (`EdgeAblation`), those of `metric`, and computed by `executor` in `precision` within
    `budget_bytes`; how many edges it takes is searched from coarse to fine (`smallest_prefix`). None of these three
    touch the learning, which is gradient descent through full forwards in the model's own dtype. Of the first edges
    only those count that lie on a path from `input` to the logits. The circuit's `edge_scores` are the gates. The other
    options are those of `learn_gates`, whose steps `progress` counts.

    Raises PatchError as `learn_edge_masks` does, and before any learning for a threshold that is not positive, or an
    executor or precision that does not exist; TaskError when the model does not do the task.
    """
    check_threshold(threshold, "points of score that the circuit may lose")
    ablation = EdgeAblation(
        model, task, source=source, metric=metric, executor=executor, precision=precision, budget_bytes=budget_bytes
    )
    masks = learn_edge_masks(model, task, source=source, progress=progress, **learning)
    about = {"threshold": threshold, "both_sides": both_sides, **learning}
    return circuit_of_edge_masks(masks, ablation, threshold, both_sides, about)


def circuit_of_edge_masks(
    masks: Masks[Edge],
    ablation: EdgeAblation,
    threshold: float = 20.0,
    both_sides: bool = False,
    settings: Mapping[str, object] | None = None,
) -> Circuit:
    """The first edges, in the order of their gates, whose exact score is near enough to the full model's 100."""
    ranking, config = masks.ranking(), ablation.model.config

    def removed(size: int) -> list[Edge]:
        kept = set(connected(ranking[:size], config))
        return [edge for edge in masks.items if edge not in kept]

    def scores_of(sizes: Sequence[int]) -> list[float]:
        return ablation.scores([removed(size) for size in sizes])

    size, score = smallest_prefix(scores_of, len(ranking), SIZES_AT_ONCE, near_enough(threshold, both_sides))
    kept, gates = connected(ranking[:size], config), dict(zip(masks.items, masks.gates.tolist(), strict=True))
    return Circuit.of_nodes(
        {name for name, _ in kept} - {INPUT},
        edges=tuple(kept),
        edge_scores={edge: gates[edge] for edge in kept},
        model=config.name,
        task=ablation.task.name,
        method="edge-masks",
        score=score,
        settings={**ablation.settings, **(settings or {})},
    )


def gated_edges(
    model: HookedTransformer,
    index: EdgeIndex,
    closed: Float[Tensor, "receiver sender"],
    sources: Sources,
    prompts: PromptChunk,
) -> list[Hook]:
    """Hooks for one forward of some prompts, in which every receiver reads 1 − m of each sender from the source.

    closed: 1 − m of every edge, 0 elsewhere, by the places of the index. A hook serves all receivers at its hook point:
    one each would copy the inputs of a layer's heads once per head.
    """
    changes: list[Float[Tensor, "prompt pos sender d_model"]] = []
    """What senders would write by their source, less what they write: as far as the forward has come."""

    def note(source: Tensor) -> HookFunction:
        def hook(value: Tensor, _: str) -> None:
            changes.append(source - value.reshape(*value.shape[:2], -1, value.shape[-1]))

        return hook

    def mix(rows: slice) -> HookFunction:
        def hook(value: Tensor, _: str) -> Tensor:
            changes[:] = [torch.cat(changes, 2)]  # once for all that read the same senders
            written = changes[0]
            read = torch.einsum("rs,ptsd->ptrd", closed[rows, : written.shape[2]], written)
            return value + read.reshape(value.shape)

        return hook

    sender_names = groupby(index.senders, key=lambda name: output_name(sender(name)))
    receiver_names = groupby(index.receivers, key=lambda name: input_name(name, model.config))
    writes = [(name, note(_written(model, sources, next(group), prompts))) for name, group in sender_names]
    return [*writes, *((name, mix(rows)) for name, rows in _places(receiver_names))]


def _written(
    model: HookedTransformer, sources: Sources, name: str, prompts: PromptChunk
) -> Float[Tensor, "#prompt pos sender d_model"]:
    """What the senders at one hook point would write to the residual stream by their source."""
    part = sender(name)
    value = sources.value(sources.key(None), part.hook_name, prompts)
    if part.kind != "z":
        return value[:, :, None]
    return torch.einsum("pthk,hkd->pthd", value, cast(Block, model.blocks[part.layer]).attn.W_O)


def _places(groups: Iterator[tuple[str, Iterator[str]]]) -> Iterator[tuple[str, slice]]:
    """Where the members of each group stand, one group behind the other."""
    end = 0
    for name, members in groups:
        start, end = end, end + sum(1 for _ in members)
        yield name, slice(start, end)
