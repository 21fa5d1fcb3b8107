"""Subnetwork search over nodes: a learned gate on every head, MLP and feature (`gates`), then exact scores.

A node of gate m has the value m · its own + (1 − m) · its source's. Such masks have found subnetworks since Cao et al.
2021 (arXiv 2104.03514); circuit probing (Lepori et al. 2023, arXiv 2311.04354) does it for circuits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.analysis.ablation import check_threshold
from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.faithfulness import Ablation
from subcircuit.analysis.gates import Learning, Masks, learn_gates, near_enough, smallest_prefix
from subcircuit.analysis.tasks import Task
from subcircuit.engine.hooks import Hook
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Component, Patch, Site, Source
from subcircuit.engine.patching.metric import Metric
from subcircuit.engine.patching.options import Executor, Precision
from subcircuit.engine.patching.sources import PromptChunk, Sources


def learn_masks(
    model: HookedTransformer,
    task: Task,
    nodes: Sequence[Component],
    *,
    source: Source = "mean",
    progress: Callable[[int, int], None] | None = None,
    **learning: Unpack[Learning],
) -> Masks[Component]:
    """Gates for nodes (heads, MLPs and features), learned on a task's prompts as `learn_gates` says.

    Raises PatchError for an unknown loss or source, or a number that must be positive and is not.
    """
    patches = tuple(Patch(Site(node)) for node in nodes)

    def hooks(gates: Tensor, sources: Sources, prompts: PromptChunk) -> list[Hook]:
        return gated(nodes, gates, sources, prompts)

    return learn_gates(model, task, nodes, patches, hooks, source=source, progress=progress, **learning)


def mask_circuit(
    model: HookedTransformer,
    task: Task,
    *,
    nodes: Iterable[Component] | None = None,
    threshold: float = 20.0,
    both_sides: bool = False,
    source: Source = "mean",
    metric: Metric = "logit_difference",
    executor: Executor = "torch",
    precision: Precision = "fp32",
    budget_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **learning: Unpack[Learning],
) -> Circuit:
    """The circuit that learned gates lead to: the fewest nodes, in the gates' order, that score 100 − `threshold`.

    With `both_sides` the score may not exceed 100 + `threshold` either, which keeps nodes that work against the answer.
    Scores are exact (`faithfulness.Ablation`, which says what `nodes` there are), those of `metric`, and computed by
    `executor` in `precision` within `budget_bytes`. None of these three touch the learning, which is gradient descent
    through full forwards in the model's own dtype; the other options are those of `learn_gates`.

    Raises PatchError as `learn_masks` does, and before any learning for a threshold that is not positive, or an
    executor or precision that does not exist; TaskError when the model does not do the task.
    """
    check_threshold(threshold, "points of score that the circuit may lose")
    options: dict[str, Any] = {"source": source, "metric": metric, "executor": executor, "precision": precision}
    ablation = Ablation(model, task, nodes=nodes, budget_bytes=budget_bytes, **options)
    masks = learn_masks(model, task, ablation.nodes, source=source, progress=progress, **learning)
    about = {"threshold": threshold, "both_sides": both_sides, **learning}
    return circuit_of_masks(masks, ablation, threshold, both_sides, about)


def circuit_of_masks(
    masks: Masks[Component],
    ablation: Ablation,
    threshold: float = 20.0,
    both_sides: bool = False,
    settings: Mapping[str, object] | None = None,
) -> Circuit:
    """The fewest nodes, in the order of their gates, whose exact score is near enough to the full model's 100."""
    ranking = masks.ranking()

    def scores_of(sizes: Sequence[int]) -> list[float]:
        return ablation.scores([ranking[size:] for size in sizes])

    size, score = smallest_prefix(scores_of, len(ranking), len(ranking) + 1, near_enough(threshold, both_sides))
    return Circuit.of_nodes(
        ranking[:size],
        model=ablation.model.config.name,
        task=ablation.task.name,
        method="masks",
        score=score,
        settings={**ablation.settings, **(settings or {})},
    )


def gated(
    nodes: Sequence[Component], gates: Float[Tensor, " node"], sources: Sources, prompts: PromptChunk
) -> list[Hook]:
    """Hooks that put each node between its own value and its source's."""
    at_hook: dict[str, dict[int, int]] = {}
    for i, node in enumerate(nodes):
        at_hook.setdefault(node.hook_name, {})[node.index] = i
    return [
        (name, _mixer(gates, indices, sources.value(sources.key(None), name, prompts)))
        for name, indices in at_hook.items()
    ]


def _mixer(gates: Tensor, indices: Mapping[int, int], source: Tensor) -> Callable[[Tensor, str], Tensor]:
    def mix(value: Tensor, name: str) -> Tensor:
        if name.endswith("hook_mlp_out"):
            gate = gates[indices[0]]
        else:
            # Of every head, [prompt, pos, head, d_head], or feature, [prompt, pos, feature].
            of_each = gates.new_ones(value.shape[2])
            at = torch.tensor(list(indices), device=gates.device)
            gate = of_each.index_put((at,), gates[list(indices.values())])
            gate = gate[:, None] if value.ndim == 4 else gate
        return source + gate * (value - source)

    return mix
