"""What circuits have in common, beside what circuits of those sizes have in common by chance.

Chance is a circuit of the same size drawn at random from the model: its overlap with another is hypergeometric. Heads
and MLPs are drawn apart, since a circuit with most of a model's few MLPs would seem to overlap in any case; edges are
drawn from all edges of the model, and, for what edges add to shared nodes, from those between nodes of both circuits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.analysis.circuit import Circuit, check_no_features
from subcircuit.analysis.statistics import hypergeometric_pmf, jaccard_mean, tail_p
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import PatchError
from subcircuit.engine.patching.graph import check_edge, edges_among, n_senders_to, receivers

Kind = Literal["nodes", "heads", "mlps", "edges", "edges between shared nodes"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Overlap:
    """Two circuits' common part of one kind, with its chance level."""

    kind: Kind
    n_all: int
    """How many the model has."""
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


def overlap(a: Circuit, b: Circuit, config: ModelConfig, kind: Kind = "heads") -> Overlap:
    """What two circuits of one model share, of one kind.

    Raises PatchError for an unknown kind, or a node or edge that the model lacks.
    """
    check_circuit(a, config)
    check_circuit(b, config)
    heads = (_Draw(config.n_layers * config.n_heads, set(a.heads), set(b.heads)),)
    mlps = (_Draw(config.n_layers, set(a.mlps), set(b.mlps)),)
    if kind in ("heads", "mlps", "nodes"):
        return _overlap(kind, {"heads": heads, "mlps": mlps, "nodes": heads + mlps}[kind])
    if kind == "edges":
        return _overlap(kind, (_Draw(n_edges(config), set(a.edges), set(b.edges)),))
    if kind == "edges between shared nodes":
        possible = set(edges_among(map(str, set(a.nodes) & set(b.nodes)), config))
        return _overlap(kind, (_Draw(len(possible), set(a.edges) & possible, set(b.edges) & possible),))
    raise PatchError(f"overlap of {kind!r} is not known; expected one of {', '.join(KINDS)}")


def overlaps(a: Circuit, b: Circuit, config: ModelConfig) -> list[Overlap]:
    """What two circuits of one model share, of every kind that both have."""
    kinds = KINDS if a.edges and b.edges else KINDS[:3]
    return [overlap(a, b, config, kind) for kind in kinds]


def overlap_matrix(circuits: Sequence[Circuit], config: ModelConfig, kind: Kind = "heads") -> list[list[Overlap]]:
    """The overlap of every pair of circuits."""
    return [[overlap(a, b, config, kind) for b in circuits] for a in circuits]


def check_circuit(circuit: Circuit, config: ModelConfig) -> None:
    """Raises PatchError for a node or edge that the model lacks, and for features, of which a configuration knows
    nothing: there is no chance level without their number."""
    check_no_features(circuit, "a comparison with chance")
    for node in circuit.nodes:
        node.check(config)
    for edge in circuit.edges:
        check_edge(edge, config)


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
