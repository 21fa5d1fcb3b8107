"""How much of a metric is recovered as a circuit grows along a ranking, and the areas that sum it up.

For the first k items of a ranking, f = (m(C) − m(∅)) / (m(M) − m(∅)): m(C) is the mean metric over prompts with only
those items kept, m(M) that of the full model, m(∅) with nothing kept. Sizes are shares of all items. As in the circuit
track of MIB (Mueller et al. 2025, arXiv 2504.13151) the areas are trapezoids over the linear share, from the smallest
share to the largest:

    CPR = ∫ f          how much is recovered (more is better)
    CMD = ∫ |1 − f|    how far from the full model, in either direction (less is better)

The items may be nodes, edges or anything that can be kept or not; all points are evaluated in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.analysis.ablation import Item, ItemAblation
from subcircuit.analysis.statistics import Interval, percentile_interval, resampled_means
from subcircuit.analysis.sweep import Scores
from subcircuit.engine.errors import PatchError
from subcircuit.engine.patching import Component

Evaluate = Callable[[Sequence[Collection[Item]]], Float[Tensor, "set prompt"]]
"""Metric of each prompt when only the items of each set are kept; `ItemAblation.kept_values` is one."""

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Sizes at which MIB evaluates a circuit, as shares of all items."""


@dataclass(frozen=True)
class Curve:
    """Recovered share of a metric against circuit size, with intervals over prompts.

    In a model of few nodes several shares round down to the same circuit, as they do in MIB.
    """

    shares: tuple[float, ...]
    sizes: tuple[int, ...]
    """Items kept at each share."""
    recovered: Interval
    """f at each share; 1 is the full model, 0 nothing kept."""
    cpr: Interval
    cmd: Interval
    full: float
    """Mean metric of the full model."""
    nothing: float
    """Mean metric with nothing kept."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; an interval is [mean, low, high]."""
        return {
            "shares": list(self.shares),
            "sizes": list(self.sizes),
            "recovered": [self.recovered.at(i) for i in range(len(self.shares))],
            "cpr": self.cpr.at(),
            "cmd": self.cmd.at(),
            "full": self.full,
            "nothing": self.nothing,
        }


def faithfulness_curve(
    evaluate: Evaluate[Item],
    ranking: Sequence[Item],
    *,
    shares: Sequence[float] = SHARES,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Curve:
    """The curve of a ranking of all items, the most important first.

    At a share s the first ⌊s · n⌋ items are kept; the full model is what keeps them all. Prompts are resampled
    together for all points, so CPR and CMD have intervals too.

    Raises PatchError when the ranking repeats an item, when shares do not rise within 0…1, or when the full model and
    the one with nothing kept do not differ: then there is nothing to recover.
    """
    if not ranking or len(set(ranking)) < len(ranking):
        raise PatchError("a ranking needs at least one item, and every item once")
    if len(shares) < 2 or list(shares) != sorted(set(shares)) or shares[0] < 0 or shares[-1] > 1:
        raise PatchError(f"shares {tuple(shares)} must rise, at least two of them, within 0 and 1")
    sizes = [sized(share, len(ranking)) for share in shares]
    distinct = sorted({0, *sizes, len(ranking)})
    values = dict(zip(distinct, evaluate([ranking[:size] for size in distinct]), strict=True))
    points = torch.stack([values[0], values[len(ranking)], *(values[size] for size in sizes)]).double()
    nothing, full = points[0].mean(), points[1].mean()
    if torch.isclose(nothing, full, rtol=1e-9, atol=1e-12):
        raise PatchError(f"keeping nothing and keeping everything give the same metric, {float(full):.4g}")
    drawn = resampled_means(points, n_resamples=n_resamples, seed=seed)
    f, f_drawn = recovered_share(points.mean(1)), recovered_share(drawn)
    at = torch.tensor(shares, dtype=torch.float64)
    areas = [(_area(f, at), _area(f_drawn, at)), (_area((1 - f).abs(), at), _area((1 - f_drawn).abs(), at))]
    cpr, cmd = (percentile_interval(mean, draws, confidence) for mean, draws in areas)
    recovered = percentile_interval(f, f_drawn, confidence)
    return Curve(tuple(shares), tuple(sizes), recovered, cpr, cmd, float(full), float(nothing))


def ablation_curve(ablation: ItemAblation[Item], ranking: Sequence[Item], **options: float | Sequence[float]) -> Curve:
    """The curve of a ranking of nodes (`node_ranking`) or of edges (of `EdgeScores`, by an `EdgeAblation`), which must
    name all of the ablation's: `faithfulness_curve` says the rest.

    Raises PatchError for a ranking that leaves out a node or edge, or has one that the model lacks.
    """
    missing = ablation.complement(set(ranking))
    if missing:
        raise PatchError(f"the ranking leaves out {len(missing)} of them, the first '{missing[0]}'")
    return faithfulness_curve(ablation.kept_values, ranking, **options)  # type: ignore[arg-type]


def node_ranking(scores: Scores, *, signed: bool = False) -> list[Component]:
    """Heads, MLPs and features of a sweep at all positions, the most important first.

    Importance is the size of the mean effect; `signed`, how much patching lowers the metric, so that nodes that work
    against the task come last.
    """
    nodes = [
        (float(effect), site.component)
        for site, effect in zip(scores.sites, scores.mean, strict=True)
        if site.positions is None and (site.component.kind in ("z", "mlp") or site.component.is_feature)
    ]
    return [node for effect, node in sorted(nodes, key=lambda pair: pair[0] if signed else -abs(pair[0]))]


def sized(share: float, n_items: int) -> int:
    """⌊share · n⌋, without losing an item to how a share like 0.29 is stored."""
    return int(share * n_items + 1e-9)


def recovered_share(points: Float[Tensor, "point *draw"]) -> Float[Tensor, "recovered *draw"]:
    """f of the points after the first two, which are the metric with nothing kept and that of the full model."""
    return (points[2:] - points[0]) / (points[1] - points[0])


def _area(f: Float[Tensor, "point *draw"], shares: Float[Tensor, " point"]) -> Float[Tensor, "*draw"]:
    return torch.trapezoid(f, shares, dim=0)
