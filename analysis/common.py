"""What the circuits that a study found have in common: in one model, and between models, as the run's files hold it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from subcircuit.analysis.circuit import Circuit, intersection, union
from subcircuit.analysis.compare import cross_task_scores, jaccard_matrix
from subcircuit.analysis.depth import align_depths
from subcircuit.analysis.faithfulness import Ablation
from subcircuit.analysis.overlap import Kind, overlap_matrix
from subcircuit.engine.config import ModelConfig


def in_common(circuits: Mapping[str, Circuit], config: ModelConfig) -> dict[str, Any]:
    """What circuits of several tasks share and what any of them has, how large that is and would be by chance."""
    every = list(circuits.values())
    shared, either = intersection(every), union(every)
    kinds: dict[str, Kind] = {"overlap_heads": "heads", "overlap_nodes": "nodes"}
    if all(circuit.edges for circuit in every):
        kinds |= {"overlap_edges": "edges", "overlap_edges_between_shared": "edges between shared nodes"}
    overlaps = {
        name: [[each.to_dict() for each in row] for row in overlap_matrix(every, config, kind)]
        for name, kind in kinds.items()
    }
    return {
        "tasks": list(circuits),
        "jaccard_heads": jaccard_matrix(every, "heads").tolist(),
        "jaccard_nodes": jaccard_matrix(every).tolist(),
        **overlaps,
        "shared": {"heads": shared.heads, "mlps": shared.mlps, "edges": shared_edges(circuits)},
        "union": {"heads": either.heads, "mlps": either.mlps, "edges": len(either.edges)},
    }


def shared_edges(circuits: Mapping[str, Circuit]) -> list[list[Any]]:
    """Sender, receiver and what the edge is worth to each task, in points of score, of every edge that all circuits
    have; first what is worth most to the task to which it is worth least."""
    rows = [
        [*edge, [circuit.edge_scores.get(edge) for circuit in circuits.values()]]
        for edge in intersection(list(circuits.values())).edges
    ]
    return sorted(rows, key=lambda row: -min((abs(points) for points in row[2] if points is not None), default=0.0))


def crossed(
    circuits: Mapping[str, Circuit],
    ablation_of: Callable[[str], Ablation],
    seed: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Score of every circuit, of what all share and of what any has, on every task, with intervals over prompts.

    Each task's ablation is made when it is its turn: it holds that task's clean activations.
    """
    every = list(circuits.values())
    columns, table = [*every, intersection(every), union(every)], []
    for name in circuits:
        table.append(cross_task_scores([ablation_of(name)], columns, seed=seed))
        progress(len(table), len(circuits))
    scores, low, high = (torch.cat(part) for part in zip(*table, strict=True))
    return {
        "cross_task": scores.tolist(),
        "cross_task_intervals": torch.stack((low, high), -1).tolist(),
        "cross_task_columns": [*circuits, "shared", "union"],
    }


def aligned(models: Sequence[tuple[str, ModelConfig, Mapping[str, Circuit]]]) -> list[dict[str, Any]]:
    """How far apart in relative depth the heads of every two circuits of different models lie (`depth`)."""
    return [
        {"models": [name_a, name_b], "tasks": [task_a, task_b], **align_depths(a, config_a, b, config_b).to_dict()}
        for (name_a, config_a, of_a), (name_b, config_b, of_b) in itertools.combinations(models, 2)
        for (task_a, a), (task_b, b) in itertools.product(of_a.items(), of_b.items())
        if a.heads and b.heads
    ]
