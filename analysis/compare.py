"""What circuits of different tasks and models share, and how well each does the other tasks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.analysis.circuit import Circuit, intersection, union
from subcircuit.analysis.depth import DepthAlignment, align_depths
from subcircuit.analysis.faithfulness import Ablation
from subcircuit.analysis.overlap import Overlap, check_circuit, overlaps
from subcircuit.analysis.statistics import Interval
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import PatchError
from subcircuit.engine.patching import Component

__all__ = ["Comparison", "Pair", "compare_circuits", "cross_task_scores", "intersection", "jaccard_matrix", "union"]


@dataclass(frozen=True)
class Pair:
    """Two circuits beside each other."""

    a: str
    b: str
    overlaps: tuple[Overlap, ...]
    """Of every kind that both have; none between circuits of different models."""
    depths: DepthAlignment | None
    """None where one has no heads."""


@dataclass(frozen=True)
class Comparison:
    """Circuits by name, every pair of them, and what all and any of a model's circuits have."""

    circuits: Mapping[str, Circuit]
    pairs: tuple[Pair, ...]
    shared: Mapping[str, Circuit]
    """By model name, for models with several circuits: what all of these have."""
    union: Mapping[str, Circuit]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "circuits": {name: _bare(circuit) for name, circuit in self.circuits.items()},
            "pairs": [
                {
                    "a": pair.a,
                    "b": pair.b,
                    "overlaps": [each.to_dict() for each in pair.overlaps],
                    "depths": None if pair.depths is None else pair.depths.to_dict(),
                }
                for pair in self.pairs
            ],
            "shared": {model: _bare(circuit) for model, circuit in self.shared.items()},
            "union": {model: _bare(circuit) for model, circuit in self.union.items()},
        }


def compare_circuits(
    circuits: Mapping[str, tuple[Circuit, ModelConfig]],
    nodes: Mapping[ModelConfig, Collection[Component]] | None = None,
) -> Comparison:
    """Compare circuits, each given with the configuration of its model, under names of one's own.

    Circuits of one model are compared by their nodes and edges, all by the depths at which their heads lie. `nodes` are
    what circuits of a model may consist of, where that is not every head and MLP: with features they have to be given
    (`nodes.candidates_of`).

    Raises PatchError for fewer than two circuits, a node or edge that a circuit's model lacks, or one that is none of
    its model's `nodes`.
    """
    nodes = nodes or {}
    if len(circuits) < 2:
        given = ", ".join(circuits) or "none"
        raise PatchError(f"circuits to compare: {given}; expected at least two")
    for circuit, config in circuits.values():
        check_circuit(circuit, config)
    pairs = tuple(_pair(a, b, *circuits[a], *circuits[b], nodes) for a, b in itertools.combinations(circuits, 2))
    of_model: dict[ModelConfig, list[Circuit]] = {}
    for circuit, config in circuits.values():
        of_model.setdefault(config, []).append(circuit)
    groups = {config.name: group for config, group in of_model.items() if len(group) > 1}
    return Comparison(
        {name: circuit for name, (circuit, _) in circuits.items()},
        pairs,
        {model: intersection(group) for model, group in groups.items()},
        {model: union(group) for model, group in groups.items()},
    )


def _pair(
    a: str,
    b: str,
    first: Circuit,
    config_a: ModelConfig,
    second: Circuit,
    config_b: ModelConfig,
    nodes: Mapping[ModelConfig, Collection[Component]],
) -> Pair:
    shared = tuple(overlaps(first, second, config_a, nodes.get(config_a))) if config_a == config_b else ()
    depths = align_depths(first, config_a, second, config_b) if first.heads and second.heads else None
    return Pair(a, b, shared, depths)


def _bare(circuit: Circuit) -> dict[str, Any]:
    """A circuit without how it was found."""
    values = circuit.to_dict()
    return {name: values[name] for name in ("model", "task", "score", "heads", "mlps", "features", "edges")}


def jaccard_matrix(
    circuits: Sequence[Circuit], nodes: Literal["all", "heads", "features"] = "all"
) -> Float[Tensor, "circuit circuit"]:
    """Jaccard index of every pair of circuits, over all nodes, the heads or the features."""
    return torch.tensor([[a.jaccard(b, nodes) for b in circuits] for a in circuits])


def cross_task_scores(
    ablations: Sequence[Ablation],
    circuits: Sequence[Circuit],
    progress: Callable[[int, int], None] | None = None,
    *,
    seed: int = 0,
) -> Interval:
    """Score of every circuit on every task `[task, circuit]`, as in the paper's table, each with its 95 % bootstrap
    interval over the task's prompts."""
    rows = []
    for row, ablation in enumerate(ablations):
        removed = [ablation.complement(set(circuit.nodes)) for circuit in circuits]
        rows.append(ablation.score_intervals(ablation.values(removed), seed=seed))
        if progress is not None:
            progress(row + 1, len(ablations))
    return Interval(*map(torch.stack, zip(*rows, strict=True)))
