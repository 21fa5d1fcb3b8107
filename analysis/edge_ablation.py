"""Scores of sets of edges: what is left of a task when every other edge of the model is removed.

An edge is removed when its sender's value in the receiver's input is replaced by the source's; everything else is
computed as always (`engine.patching.edges`). Scores are those of circuits of nodes (`ItemAblation`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from subcircuit.analysis.ablation import ItemAblation
from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.edges import edges_kept
from subcircuit.analysis.tasks import Task
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import PatchError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Effects, Patch, Site, Source
from subcircuit.engine.patching.compile import MaskArray
from subcircuit.engine.patching.edge_delta import EdgeSet, sender
from subcircuit.engine.patching.edge_session import NOTHING, EdgeSession
from subcircuit.engine.patching.edges import edge_effects
from subcircuit.engine.patching.graph import (
    LOGITS,
    Edge,
    EdgeIndex,
    check_edge,
    edges,
    edges_among,
    layer_of,
    readers,
)
from subcircuit.engine.patching.metric import Metric
from subcircuit.engine.patching.options import Executor, Precision


class EdgeAblation(ItemAblation[Edge]):
    """Scores of keep-sets of edges on one task, sharing a clean run, as `Ablation` gives those of nodes.

    A node whose every edge is removed is patched instead, and edges into what nothing reads are left alone: the same
    values for less work.

    Raises TaskError when the full model does not prefer the answers, so that there is nothing to recover, and
    PatchError for a metric that does not exist.
    """

    def __init__(
        self,
        model: HookedTransformer,
        task: Task,
        *,
        source: Source = "mean",
        executor: Executor = "torch",
        precision: Precision = "fp32",
        metric: Metric = "logit_difference",
        budget_bytes: int | None = None,
    ) -> None:
        options: dict[str, Any] = {"source": source, "executor": executor, "precision": precision, "metric": metric}
        super().__init__(model, task, edges(model.config), budget_bytes=budget_bytes, **options)

    def items_of(self, circuit: Circuit) -> list[Edge]:
        return edges_kept(circuit, self.model.config)

    def drawn_like(self, circuit: Circuit, rng: random.Random, match: str) -> set[Edge]:
        config, kept = self.model.config, edges_kept(circuit, self.model.config)
        if match == "nodes":
            fixed = set(kept).difference(circuit.edges)
            among = [edge for edge in edges_among(map(str, circuit.nodes), config) if edge not in fixed]
            return {*fixed, *rng.sample(among, len(circuit.edges))}
        groups: dict[tuple[int, int], list[Edge]] = {}
        for edge in self.items:
            groups.setdefault(_layers(edge, config) if match == "layers" else (0, 0), []).append(edge)
        n_of = Counter(_layers(edge, config) if match == "layers" else (0, 0) for edge in kept)
        return {edge for group, n in n_of.items() for edge in rng.sample(groups[group], n)}

    def _prepare(self) -> None:
        self._session: EdgeSession | None = None
        if self._options["executor"] != "reference":
            self._session = EdgeSession(self.model, self.task, **self._options)
            self._reduction = _Reduction(self.model.config)

    def _effects(self, removed: Sequence[Iterable[Edge]], base: Iterable[Edge]) -> Effects:
        if self._session is None:
            sets, shared = [EdgeSet(tuple(chosen)) for chosen in removed], EdgeSet(tuple(base))
            return edge_effects(self.model, self.task, sets, base=shared, **self._options)
        of_base = self._reduction.mask(base)
        shared = self._reduction.of(of_base)
        return self._session.edge_effects(
            [self._reduction.of(of_base | self._reduction.mask(chosen), shared) for chosen in removed], shared
        )

    def _check(self, kept: Collection[Edge]) -> None:
        for edge in set(kept).difference(self.items):
            check_edge(edge, self.model.config)


def _layers(edge: Edge, config: ModelConfig) -> tuple[int, int]:
    return layer_of(edge[0], config), layer_of(edge[1], config)


class _Reduction:
    """Removed edges as patches of the nodes that lose all of theirs, and the rest of the edges."""

    def __init__(self, config: ModelConfig) -> None:
        self._index = EdgeIndex(config)
        n = len(self._index.receivers), len(self._index.senders)
        self._exists = np.zeros(n, dtype=bool)
        self._exists[*self._index.places(edges(config))] = True
        at = self._index.sender_at
        self._readers = [
            [at[name] for name in readers(receiver, config) if name != LOGITS] for receiver in self._index.receivers
        ]

    def mask(self, removed: Iterable[Edge]) -> MaskArray:
        """Edges as a matrix [receiver, sender]. Raises PatchError for one that the model lacks."""
        mask = np.zeros_like(self._exists)
        mask[*self._index.places(list(removed))] = True
        return mask

    def of(self, removed: MaskArray, shared: EdgeSet = NOTHING) -> EdgeSet:
        """What a row that lacks these edges takes away, beside what is `shared` with all rows."""
        kept = self._exists & ~removed
        silent = np.zeros(kept.shape[1], dtype=bool)
        # From the last sender down: whether one is heard depends on what hears it alone.
        for place in range(len(silent) - 1, -1, -1):
            silent[place] = not any(self._is_heard(int(row), silent) for row in np.flatnonzero(kept[:, place]))
        dead = [bool(heads) and all(silent[heads]) for heads in self._readers]
        left = removed & ~silent & ~np.array(dead)[:, None]
        names = self._index
        cut = [(names.senders[column], names.receivers[row]) for row, column in zip(*np.nonzero(left), strict=True)]
        patches = [Patch(Site(sender(names.senders[place]))) for place in np.flatnonzero(silent)]
        done, patched = set(shared.removed), set(shared.patches)
        return EdgeSet(
            tuple(edge for edge in cut if edge not in done), tuple(patch for patch in patches if patch not in patched)
        )

    def _is_heard(self, receiver: int, silent: MaskArray) -> bool:
        heads = self._readers[receiver]
        return not heads or not all(silent[heads])


def edge_score(
    model: HookedTransformer,
    task: Task,
    circuit: Circuit,
    *,
    source: Source = "mean",
    executor: Executor = "torch",
    precision: Precision = "fp32",
    metric: Metric = "logit_difference",
    budget_bytes: int | None = None,
) -> float:
    """100 · LD(circuit) / LD(full), or the score of another metric as `Ablation` defines it: what a circuit of edges
    recovers when every other edge of the model is removed (`edges.edges_kept`).

    Raises PatchError for a circuit without edges or with one that the model lacks, TaskError when the full model does
    not prefer the answers.
    """
    if not circuit.edges:
        raise PatchError("the circuit has no edges to score; `score` takes circuits of nodes")
    options: dict[str, Any] = {"source": source, "executor": executor, "precision": precision, "metric": metric}
    return EdgeAblation(model, task, budget_bytes=budget_bytes, **options).score_of(edges_kept(circuit, model.config))
