"""What circuits of different tasks share, and how well each does the other tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.analysis.circuit import Circuit, intersection, union
from subcircuit.analysis.faithfulness import Ablation

__all__ = ["cross_task_scores", "intersection", "jaccard_matrix", "union"]


def jaccard_matrix(
    circuits: Sequence[Circuit], nodes: Literal["all", "heads"] = "all"
) -> Float[Tensor, "circuit circuit"]:
    """Jaccard index of every pair of circuits, over all nodes or over the heads."""
    return torch.tensor([[a.jaccard(b, nodes) for b in circuits] for a in circuits])


def cross_task_scores(
    ablations: Sequence[Ablation], circuits: Sequence[Circuit], progress: Callable[[int, int], None] | None = None
) -> Float[Tensor, "task circuit"]:
    """Score of every circuit on every task: row a task (its ablation), column a circuit, as in the paper's table."""
    table = torch.empty(len(ablations), len(circuits), dtype=torch.float64)
    for row, ablation in enumerate(ablations):
        removed = [ablation.complement(set(circuit.nodes)) for circuit in circuits]
        table[row] = torch.tensor(ablation.scores(removed), dtype=torch.float64)
        if progress is not None:
            progress(row + 1, len(ablations))
    return table
