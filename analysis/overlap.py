"""What circuits have in common, beside what circuits of those sizes have in common by chance.

Chance is a circuit of the same size drawn at random from what circuits may consist of: its overlap with another is
hypergeometric. Heads, MLPs and each kind of features are drawn apart, as `random_nodes` draws them, since a circuit
with most of a model's few MLPs would seem to overlap in any case; edges are drawn from all edges of the model, and, for
what edges add to shared nodes, from those between nodes of both circuits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.analysis.circuit import Circuit, in_order
from subcircuit.analysis.nodes import all_nodes
from subcircuit.analysis.statistics import hypergeometric_pmf, jaccard_mean, tail_p
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import PatchError
from subcircuit.engine.patching import Component
from subcircuit.engine.patching.graph import check_edge, edges_among, n_senders_to, receivers
from subcircuit.engine.patching.sites import FeatureKind
from subcircuit.engine.patching.sites import Kind as NodeKind

Kind = Literal["nodes", "heads", "mlps", "features", "edges", "edges between shared nodes"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_FEATURES: tuple[NodeKind, ...] = get_args(FeatureKind)
_NODES: dict[Kind, tuple[NodeKind, ...]] = {
    "nodes": ("z", "mlp", *_FEATURES),
    "heads": ("z",),
    "mlps": ("mlp",),
    "features": _FEATURES,
}


@dataclass(frozen=True)
class Overlap:
    """Two circuits' common part of one kind, with its chance level."""

    kind: Kind
    n_all: int
    """How many there are to draw from."""
    n_a: int
    n_b: int
    n_both: int
    jaccard: float
    expected_both: float
    """Mean overlap of random circuits of these sizes."""
    expected_jaccard: float
    p: float
    """How likely random circuits of these sizes overlap at least so much."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def overlap(
    a: Circuit, b: Circuit, config: ModelConfig, kind: Kind = "heads", nodes: Collection[Component] | None = None
) -> Overlap:
    """What two circuits of one model share, of one kind.

    `nodes` are what circuits may consist of: every head and MLP unless given. Circuits with features need them
    (`nodes.candidates_of`): how many features could have been drawn, a configuration does not know.

    Raises PatchError for an unknown kind, a node or edge that the model lacks, or a node that is none of `nodes`.
    """
    if kind not in KINDS:
        raise PatchError(f"overlap of {kind!r} is not known; expected one of {', '.join(KINDS)}")
    nodes = all_nodes(config) if nodes is None else nodes
    for circuit in (a, b):
        check_circuit(circuit, config)
        _check_drawn(circuit, nodes)
    if kind in _NODES:
        n_of = Counter(node.kind for node in nodes)
        return _overlap(kind, [_Draw(n_of[sort], _of_kind(a, sort), _of_kind(b, sort)) for sort in _NODES[kind]])
    if kind == "edges":
        return _overlap(kind, [_Draw(n_edges(config), set(a.edges), set(b.edges))])
    heads_and_mlps = (node for node in set(a.nodes) & set(b.nodes) if not node.is_feature)
    possible = set(edges_among(map(str, heads_and_mlps), config))
    return _overlap(kind, [_Draw(len(possible), set(a.edges) & possible, set(b.edges) & possible)])


def overlaps(a: Circuit, b: Circuit, config: ModelConfig, nodes: Collection[Component] | None = None) -> list[Overlap]:
    """What two circuits of one model share, of every kind that both have; `nodes` as in `overlap`."""
    lacking = set() if a.features and b.features else {"features"}
    if not (a.edges and b.edges):
        lacking |= {"edges", "edges between shared nodes"}
    return [overlap(a, b, config, kind, nodes) for kind in KINDS if kind not in lacking]


def overlap_matrix(
    circuits: Sequence[Circuit], config: ModelConfig, kind: Kind = "heads", nodes: Collection[Component] | None = None
) -> list[list[Overlap]]:
    """The overlap of every pair of circuits; `nodes` as in `overlap`."""
    return [[overlap(a, b, config, kind, nodes) for b in circuits] for a in circuits]


def check_circuit(circuit: Circuit, config: ModelConfig) -> None:
    """Raises PatchError for a head, MLP or edge that the model lacks; of features a configuration knows nothing."""
    for node in circuit.nodes:
        if not node.is_feature:
            node.check(config)
    for edge in circuit.edges:
        check_edge(edge, config)


def _check_drawn(circuit: Circuit, nodes: Collection[Component]) -> None:
    other = set(circuit.nodes).difference(nodes)
    if other:
        raise PatchError(
            f"the circuit has '{min(other, key=in_order)}', which is none of the {len(nodes)} nodes that circuits may "
            "consist of here; expected `nodes` with all of them (`candidates_of`)"
        )


def _of_kind(circuit: Circuit, kind: NodeKind) -> set[Component]:
    return {node for node in circuit.nodes if node.kind == kind}


def n_edges(config: ModelConfig) -> int:
    """How many edges a model has, without listing them."""
    return sum(n_senders_to(receiver, config) for receiver in receivers(config))


@dataclass(frozen=True)
class _Draw:
    """Two sets of things drawn from n_all."""

    n_all: int
    a: set[Any]
    b: set[Any]


def _overlap(kind: Kind, draws: Sequence[_Draw]) -> Overlap:
    """Of things of several sorts, each drawn apart: the chance of the sum is the convolution of the sorts' chances."""
    n_a, n_b = sum(len(draw.a) for draw in draws), sum(len(draw.b) for draw in draws)
    n_both = sum(len(draw.a & draw.b) for draw in draws)
    pmf: Float[Tensor, " overlap"] = torch.ones(1, dtype=torch.float64)
    for draw in draws:
        sort = hypergeometric_pmf(draw.n_all, len(draw.a), len(draw.b))
        pmf = torch.from_numpy(np.convolve(pmf.numpy(), sort.numpy()))
    return Overlap(
        kind=kind,
        n_all=sum(draw.n_all for draw in draws),
        n_a=n_a,
        n_b=n_b,
        n_both=n_both,
        jaccard=n_both / (n_a + n_b - n_both) if n_a + n_b else 1.0,
        expected_both=float((pmf * torch.arange(len(pmf))).sum()),
        expected_jaccard=jaccard_mean(pmf, n_a, n_b),
        p=tail_p(n_both, pmf),
    )
