"""Numbers per head that say what a head does, each with what it would be without the thing it looks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Measure:
    """A number of every head, its baseline in the same head, and by how much the one must exceed the other.

    The threshold is not chosen by hand: it is the excess that one head of the model would be expected to reach if the
    classes (positions, offsets, tokens) meant nothing, taken from the same numbers for classes drawn at random.
    """

    name: str
    score: Float[Tensor, "layer head"]
    baseline: Float[Tensor, "layer head"]
    threshold: float
    what: str = ""
    """What the score is, in a few words for a table."""

    @property
    def excess(self) -> Float[Tensor, "layer head"]:
        """Score minus baseline."""
        return self.score - self.baseline

    @property
    def passes(self) -> Bool[Tensor, "layer head"]:
        """Which heads exceed their baseline by more than the threshold."""
        return self.excess > self.threshold

    @property
    def fails_opposite(self) -> Bool[Tensor, "layer head"]:
        """Which heads fall short of their baseline by more than the threshold: the same effect with the other sign."""
        return -self.excess > self.threshold


LEAST_SHARE = 0.1
"""Of attention, or of tokens: what is less is not called a role, however unlikely it is by chance."""


def chance_threshold(null: Float[Tensor, "draw layer head"], least: float = 0.0) -> float:
    """The excess that one head of the model would be expected to pass by chance: the quantile 1 − 1/n_heads of a null.

    null: excesses of all heads for classes that mean nothing; infinite where there are none.
    least: what the threshold is at least.
    """
    values = null.detach().double().flatten()
    values = values[values.isfinite()].sort().values
    if not len(values):
        return float("inf")
    n_heads = null.shape[-1] * null.shape[-2]
    rank = min(len(values) - 1, int(len(values) * (1 - 1 / n_heads)))
    return max(least, float(values[rank]))


def top_heads(score: Float[Tensor, "layer head"], k: int = 10) -> list[tuple[int, int, float]]:
    """The k heads with the largest finite scores, as (layer, head, score)."""
    flat = torch.where(score.isfinite(), score, -torch.inf).flatten()
    values, order = flat.topk(min(k, flat.numel()))
    n_heads = score.shape[1]
    found = zip(order.tolist(), values.tolist(), strict=True)
    return [(at // n_heads, at % n_heads, value) for at, value in found if value > -torch.inf]


def select(score: Float[Tensor, "layer head"], heads: Sequence[tuple[int, int]]) -> Float[Tensor, " head"]:
    """The scores of some heads, in their order."""
    layers, indices = zip(*heads, strict=True) if heads else ((), ())
    return score[list(layers), list(indices)]
