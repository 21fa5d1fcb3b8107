"""Circuits of models of different size, aligned by relative depth.

Layer l of a model of L layers stands at depth (l + ½) / L, so that models of any size span 0…1. Two circuits are
compared by where their heads lie: the earth mover's (Wasserstein-1) distance between the two distributions of depths is
the mean share of the model by which one circuit's heads must be moved to lie where the other's do. Chance is a circuit
with as many heads anywhere in each model; p is how likely such two lie at least so close.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.overlap import check_circuit
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import PatchError

N_BINS = 10


@dataclass(frozen=True)
class DepthAlignment:
    """How far apart in depth the heads of two circuits lie."""

    distance: float
    """Earth mover's distance of their depths, 0 to 1."""
    expected_distance: float
    """Its mean for circuits with as many heads at random."""
    p: float
    """How likely random ones lie at least so close."""
    shares: tuple[tuple[float, ...], tuple[float, ...]]
    """Share of each circuit's heads in every tenth of its model."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def depth(layer: int | Tensor, n_layers: int) -> Any:
    """Relative depth of a layer, or of many: (l + ½) / L."""
    return (layer + 0.5) / n_layers


def align_depths(
    a: Circuit, config_a: ModelConfig, b: Circuit, config_b: ModelConfig, *, n_random: int = 2000, seed: int = 0
) -> DepthAlignment:
    """Align the heads of two circuits by depth. Raises PatchError for a circuit without heads, or not of its model."""
    for circuit, config in ((a, config_a), (b, config_b)):
        check_circuit(circuit, config)
        if not circuit.heads:
            raise PatchError("a circuit without heads has no depths; expected at least one head")
    depths = [head_depths(a, config_a), head_depths(b, config_b)]
    distance = float(earth_movers_distance(depths[0][None], depths[1][None])[0])
    generator = torch.Generator().manual_seed(seed)
    sizes = zip(depths, (config_a, config_b), strict=True)
    random = [_random_depths(len(part), config, n_random, generator) for part, config in sizes]
    chance = earth_movers_distance(*random)
    p = (1 + int((chance <= distance + 1e-12).sum())) / (1 + n_random)
    return DepthAlignment(distance, float(chance.mean()), p, (_shares(depths[0]), _shares(depths[1])))


def head_depths(circuit: Circuit, config: ModelConfig) -> Float[Tensor, " head"]:
    """Relative depth of every head of a circuit, in order."""
    layers: Tensor = torch.tensor([layer for layer, _ in circuit.heads], dtype=torch.float64)
    found: Tensor = depth(layers, config.n_layers)
    return found


def role_depths(roles: Mapping[str, Sequence[tuple[int, int]]], n_layers: int) -> dict[str, tuple[float, float, float]]:
    """Mean, least and greatest depth of the heads `(layer, head)` of each role that has any.

    Roles that stand in the same order at like depths in two models are what its circuits have in common.
    """
    found = {role: [depth(layer, n_layers) for layer, _ in heads] for role, heads in roles.items() if heads}
    return {role: (sum(depths) / len(depths), min(depths), max(depths)) for role, depths in found.items()}


def earth_movers_distance(a: Float[Tensor, "row n"], b: Float[Tensor, "row m"]) -> Float[Tensor, " row"]:
    """Wasserstein-1 distance of two samples in each row: the area between their quantile functions."""
    cuts = torch.cat([torch.arange(1, part.shape[1] + 1, dtype=torch.float64) / part.shape[1] for part in (a, b)])
    cuts = cuts.sort().values
    widths = cuts.diff(prepend=cuts.new_zeros(1))
    middles = cuts - widths / 2
    at = [(middles * part.shape[1]).long().clamp(max=part.shape[1] - 1) for part in (a, b)]
    quantiles = [part.sort(1).values[:, index] for part, index in zip((a, b), at, strict=True)]
    return ((quantiles[0] - quantiles[1]).abs() * widths).sum(1)


def _random_depths(
    n: int, config: ModelConfig, n_random: int, generator: torch.Generator
) -> Float[Tensor, "draw head"]:
    """Depths of n heads drawn without replacement, many times."""
    n_heads = config.n_layers * config.n_heads
    drawn = torch.rand(n_random, n_heads, generator=generator).argsort(1)[:, :n]
    found: Tensor = depth((drawn // config.n_heads).double(), config.n_layers)
    return found


def _shares(depths: Float[Tensor, " head"]) -> tuple[float, ...]:
    counts = torch.histc(depths, N_BINS, 0, 1)
    return tuple((counts / len(depths)).tolist())
