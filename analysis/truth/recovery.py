"""How well what a method found agrees with what is true: sets by precision and recall, rankings by their areas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.sweep import Scores
from subcircuit.analysis.truth.build import Truth
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import TaskError
from subcircuit.engine.patching.graph import INPUT, Edge, edges, senders

Item = TypeVar("Item", str, Edge)
"""A node or an edge."""

FIGURES = ("precision", "recall", "f1", "auroc", "average_precision")
"""What a `Recovery` says, in this order."""


@dataclass(frozen=True)
class Found:
    """What a method says of a model: nodes and edges by name, as a set, as a ranking, or both; None where it says
    nothing. Scores rank by their size, whatever their sign."""

    nodes: Set[str] | None = None
    node_scores: Mapping[str, float] | None = None
    edges: Set[Edge] | None = None
    edge_scores: Mapping[Edge, float] | None = None

    @classmethod
    def of_circuit(cls, circuit: Circuit, config: ModelConfig) -> Found:
        """A circuit's nodes, and its edges where it has any; both as a ranking too where its trace says what candidates
        cost (`Circuit.costs`).

        An edge that was never evaluated, as none into a node that nothing reads, costs nothing. A search on one side
        lets go of all that works against the answer, so there what has the least cost ranks last, however negative.
        """
        nodes = {str(node) for node in circuit.nodes}
        costs = circuit.costs()
        if any("->" in candidate for candidate in costs):
            edge_costs = {edge: costs.get("->".join(edge), 0.0) for edge in edges(config)}
            return cls.of_edges(circuit.edges, _by_rule(edge_costs, circuit))
        return cls(nodes, _by_rule(costs, circuit) if costs else None, set(circuit.edges) or None)

    @classmethod
    def of_edges(cls, found: Iterable[Edge], scores: Mapping[Edge, float]) -> Found:
        """Edges and scores of all edges; with that, the nodes that the edges lead out of, each ranked by the largest
        size of a score of an edge out of it."""
        chosen, nodes = set(found), dict[str, float]()
        for (sender, _), score in scores.items():
            nodes[sender] = max(nodes.get(sender, 0.0), abs(score))
        nodes.pop(INPUT, None)
        return cls({sender for sender, _ in chosen} - {INPUT}, nodes, chosen, scores)

    @classmethod
    def of_scores(cls, scores: Scores, share: float = 0.05) -> Found:
        """A sweep's ranking, and as a set the nodes whose mean effect is at least `share` of the clean metric."""
        ranking = {str(site): float(value) for site, value in zip(scores.sites, scores.share, strict=True)}
        return cls(nodes={node for node, value in ranking.items() if abs(value) >= share}, node_scores=ranking)


@dataclass(frozen=True)
class Recovery:
    """Agreement with the truth, each figure from 0 to 1; None for what was not given.

    `precision` is the share of what was found that is true, `recall` the share of what is true that was found, `f1`
    their harmonic mean; all are 0 where nothing was found. `auroc` is the chance that a true item ranks above another
    one, `average_precision` the mean, over the true items, of the precision down to them.
    """

    precision: float | None = None
    recall: float | None = None
    f1: float | None = None
    auroc: float | None = None
    average_precision: float | None = None
    missed: tuple[str | Edge, ...] = ()
    extra: tuple[str | Edge, ...] = ()


def truth_report(found: Found | Circuit | Scores, truth: Truth) -> dict[str, Recovery]:
    """Agreement of what was found with a known model's circuit: under `nodes` (heads and MLPs) and, where edges were
    found, under `edges`.

    Raises TaskError for a node or edge that the model does not have, or a ranking that leaves some out.
    """
    if isinstance(found, Circuit):
        found = Found.of_circuit(found, truth.model.config)
    elif isinstance(found, Scores):
        found = Found.of_scores(found)
    config = truth.model.config
    true_nodes = {str(node) for node in truth.circuit.nodes}
    report = {}
    if found.nodes is not None or found.node_scores is not None:
        report["nodes"] = _recovery(found.nodes, found.node_scores, true_nodes, set(senders(config)[1:]))
    if found.edges is not None or found.edge_scores is not None:
        every_edge = set(edges(config))
        report["edges"] = _recovery(found.edges, found.edge_scores, set(truth.circuit.edges), every_edge)
    return report


def _by_rule(costs: Mapping[Item, float], circuit: Circuit) -> dict[Item, float]:
    """Scores whose sizes rank candidates as the rule that the circuit was found by looks at their costs."""
    least = 0.0 if circuit.settings.get("both_sides") else min(costs.values())
    return {item: cost - least for item, cost in costs.items()}


def _recovery(
    found: Set[Item] | None, scores: Mapping[Item, float] | None, true: Set[Item], every: Set[Item]
) -> Recovery:
    unknown = ((found or set()) | set(scores or ())) - every
    if unknown:
        raise TaskError(f"{_name(min(unknown, key=str))} was found, which the known model does not have")
    figures: dict[str, float] = {}
    if found is not None:
        hits = len(found & true)
        figures |= {
            "precision": hits / len(found) if found else 0.0,
            "recall": hits / len(true),
            "f1": 2 * hits / (len(found) + len(true)),
        }
    if scores is not None:
        if len(scores) < len(every):
            left_out = _name(min(every - set(scores), key=str))
            raise TaskError(f"a ranking has {len(scores)} of {len(every)}; {left_out} is left out")
        figures |= {"auroc": auroc(scores, true), "average_precision": average_precision(scores, true)}
    missed, extra = (true - found, found - true) if found is not None else (set(), set())
    return Recovery(**figures, missed=tuple(sorted(missed)), extra=tuple(sorted(extra)))


def _name(item: object) -> str:
    return " -> ".join(item) if isinstance(item, tuple) else str(item)


def auroc(scores: Mapping[Item, float], true: Set[Item]) -> float:
    """Area under the receiver operating characteristic: of all pairs of a true and another item, the share in which the
    true one has the larger |score|, ties counted as half (Mann and Whitney 1947).

    Raises TaskError where all or none are true.
    """
    n_true = len(true & scores.keys())
    n_other = len(scores) - n_true
    if not n_true or not n_other:
        raise TaskError(f"{n_true} of {len(scores)} ranked items are true; a ranking needs some of each")
    below, won = 0, 0.0
    for tied in reversed(_tied_ranks(scores)):
        tied_true = len(tied & true)
        tied_other = len(tied) - tied_true
        won += tied_true * (below + tied_other / 2)
        below += tied_other
    return won / (n_true * n_other)


def average_precision(scores: Mapping[Item, float], true: Set[Item]) -> float:
    """Σ (recallₖ − recallₖ₋₁) · precisionₖ down the ranking by |score|, items of one score taken together."""
    n_true, n_seen, n_hit, total = len(true & scores.keys()), 0, 0, 0.0
    for tied in _tied_ranks(scores):
        n_seen, gained = n_seen + len(tied), len(tied & true)
        n_hit += gained
        total += gained * n_hit / n_seen
    return total / n_true


def _tied_ranks(scores: Mapping[Item, float]) -> list[set[Item]]:
    """Items of equal |score| together, the largest first."""
    ordered = sorted(scores, key=lambda item: -abs(scores[item]))
    return [set(tied) for _, tied in groupby(ordered, key=lambda item: abs(scores[item]))]
