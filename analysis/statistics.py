"""How sure a mean over prompts is, and how far a number is from chance."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

MOST_FLIPS = 2**14
"""Sign flips that are enumerated, or, where there are more, drawn."""
SITES_AT_ONCE = 1024
"""Of which all sums under sign flips (128 MiB), or all resampled means, are held at once."""


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval, each of the same shape."""

    mean: Float[Tensor, "*site"]
    low: Float[Tensor, "*site"]
    high: Float[Tensor, "*site"]

    def at(self, *index: int) -> tuple[float, float, float]:
        """Mean, low and high of one site, as plain numbers."""
        mean, low, high = (float(part[index]) for part in self)
        return mean, low, high


def bootstrap_mean(
    values: Float[Tensor, "*site prompt"], *, confidence: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean over prompts (the last dimension) with its percentile bootstrap interval (Efron, 1979).

    Prompts are drawn with replacement n_resamples times, the same draws for every site, from a generator of its
    own: the seed decides, the global random state does not. One prompt gives an interval of width 0.

    Raises ValueError when there is no prompt, or for a confidence outside 0…1.
    """
    n_prompts = _check(values, n_resamples, confidence)
    weights = _resampling_weights(n_prompts, n_resamples, seed)
    parts = [
        percentile_interval(sites.mean(-1), sites @ weights, confidence)
        for sites in _exact(values).reshape(-1, n_prompts).split(SITES_AT_ONCE)
    ]
    shape = values.shape[:-1]
    return Interval(*(torch.cat(part).view(shape).to(values.dtype) for part in zip(*parts, strict=True)))


def ends_of(values: Float[Tensor, " prompt"], seed: int = 0) -> list[float] | None:
    """Low and high of the mean's 95 % bootstrap interval; None of a single prompt, which does not say how others
    differ."""
    return None if len(values) == 1 else list(bootstrap_mean(values, seed=seed).at()[1:])


def interval_columns(
    values: Float[Tensor, "site prompt"], prefix: str = "", seed: int = 0
) -> list[dict[str, float | None]]:
    """`low` and `high` of each site's 95 % bootstrap interval, as columns of a table, their names after `prefix`.

    None of a single prompt, which does not say how others differ.
    """
    if values.shape[-1] == 1:
        return [{f"{prefix}low": None, f"{prefix}high": None} for _ in values]
    _, low, high = bootstrap_mean(values.double(), seed=seed)
    ends = zip(low.tolist(), high.tolist(), strict=True)
    return [{f"{prefix}low": below, f"{prefix}high": above} for below, above in ends]


def bootstrap_ratio(
    numerator: Float[Tensor, "*site prompt"],
    denominator: Float[Tensor, "*site prompt"],
    *,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of one thing over the mean of another, measured on the same prompts, with its percentile bootstrap interval.

    Both means are of the same drawn prompts, so that what they have in common does not widen the interval. float64.

    Raises ValueError as `bootstrap_mean`.
    """
    _check(numerator, n_resamples, confidence)
    above, below = (resampled_means(part, n_resamples=n_resamples, seed=seed) for part in (numerator, denominator))
    mean = _exact(numerator).mean(-1) / _exact(denominator).mean(-1)
    return percentile_interval(mean, above / below, confidence)


def resampled_means(
    values: Float[Tensor, "*site prompt"], *, n_resamples: int = 2000, seed: int = 0
) -> Float[Tensor, "*site resample"]:
    """Mean over prompts drawn with replacement, for each of n_resamples draws; float64, on the CPU.

    The draws depend on the seed and the number of prompts alone: what was measured on the same prompts is resampled
    together. Raises ValueError when there is no prompt or no resample.
    """
    n_prompts = _check(values, n_resamples)
    return _exact(values) @ _resampling_weights(n_prompts, n_resamples, seed)


def _resampling_weights(n_prompts: int, n_resamples: int, seed: int) -> Float[Tensor, "prompt resample"]:
    """What each prompt counts in the mean of each resample, so that all of these are one matrix product."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n_prompts, (n_resamples, n_prompts), generator=generator)
    share = torch.zeros(n_resamples, n_prompts, dtype=torch.float64)
    return share.scatter_add_(1, drawn, torch.full_like(share, 1 / n_prompts)).T


def percentile_interval(
    mean: Float[Tensor, "*site"], drawn: Float[Tensor, "*site resample"], confidence: float = 0.95
) -> Interval:
    """An estimate with the middle `confidence` (0…1) of what the resamples gave."""
    tail = (1 - confidence) / 2
    if not drawn.numel():
        return Interval(mean, mean, mean)
    # torch.quantile takes no more than 16 million values.
    low, high = torch.from_numpy(np.quantile(drawn.numpy(), [tail, 1 - tail], axis=-1))
    return Interval(mean, low, high)


def _check(values: Tensor, n_resamples: int, confidence: float = 0.95) -> int:
    n_prompts = values.shape[-1] if values.ndim else 0
    if n_prompts == 0 or not 0 < confidence < 1 or n_resamples < 1:
        raise ValueError(
            f"bootstrap of {n_prompts} prompts, confidence {confidence}, {n_resamples} resamples; "
            "expected at least one prompt, a confidence between 0 and 1, at least one resample"
        )
    return n_prompts


def sign_flip_p(
    values: Float[Tensor, "*site prompt"], *, n_flips: int = MOST_FLIPS, seed: int = 0
) -> Float[Tensor, "*site"]:
    """Two-sided p of each site's mean over prompts, if its values were as likely to have the other sign.

    Fisher's randomization test: the share of sign patterns with a mean at least as far from 0. All patterns are
    enumerated where there are at most `n_flips`, so the smallest p is 2 / 2^prompts; else so many are drawn, and the
    observed one is counted among them (Phipson and Smyth, 2010), so that no p is 0.

    Raises ValueError when there is no prompt.
    """
    n_prompts = values.shape[-1] if values.ndim else 0
    if n_prompts == 0 or n_flips < 1:
        raise ValueError(f"sign flips of {n_prompts} prompts, {n_flips} times; expected at least one of each")
    exact = _exact(values)
    enumerated = 2**n_prompts <= n_flips
    if enumerated:
        patterns = torch.arange(2**n_prompts)[:, None] >> torch.arange(n_prompts) & 1
    else:
        patterns = torch.randint(2, (n_flips, n_prompts), generator=torch.Generator().manual_seed(seed))
    signs = (1.0 - 2.0 * patterns.double()).T
    n_as_far = torch.cat([_as_far(sites, signs) for sites in exact.reshape(-1, n_prompts).split(SITES_AT_ONCE)])
    p = n_as_far / len(patterns) if enumerated else (n_as_far + 1) / (n_flips + 1)
    return p.double().view(exact.shape[:-1])


def smallest_p(n_prompts: int, n_flips: int = MOST_FLIPS) -> float:
    """The smallest p that `sign_flip_p` can give with so many prompts: of values that all have one sign."""
    return 2 / 2**n_prompts if 2**n_prompts <= n_flips else 1 / (n_flips + 1)


def _as_far(values: Float[Tensor, "site prompt"], signs: Float[Tensor, "prompt flip"]) -> Int[Tensor, " site"]:
    """How many sign patterns give a sum at least as far from 0."""
    # Equal sums taken in another order differ in their last digits.
    observed = values.sum(-1).abs() - 1e-12 * values.abs().sum(-1)
    return ((values @ signs).abs() >= observed[:, None]).sum(-1)


def benjamini_hochberg(p: Float[Tensor, "*site"]) -> Float[Tensor, "*site"]:
    """q-value of each test: the false discovery rate at which it would just be called (Benjamini and Hochberg, 1995).

    Calling every site with q ≤ 0.05 lets at most 5 % of those called be false, on average, for independent or
    positively dependent tests.
    """
    flat = _exact(p).flatten()
    order = flat.argsort(descending=True)
    n = len(flat)
    ranks = torch.arange(n, 0, -1, dtype=torch.float64)
    stepped = (flat[order] * n / ranks).cummin(0).values
    return torch.empty_like(flat).index_put_((order,), stepped).clamp(max=1).view(p.shape)


def empirical_p(observed: float, null: Float[Tensor, " draw"]) -> float:
    """How likely a draw of chance is at least as high: (1 + draws ≥ observed) / (1 + draws), never 0."""
    return (1 + int((null >= observed).sum())) / (1 + null.numel())


def hypergeometric_pmf(n_all: int, n_a: int, n_b: int) -> Float[Tensor, " overlap"]:
    """P(overlap = 0, 1, …, min(n_a, n_b)) of two sets of n_a and n_b drawn independently from n_all things, float64.

    Raises ValueError for a set larger than what it is drawn from.
    """
    if not (0 <= n_a <= n_all and 0 <= n_b <= n_all):
        raise ValueError(
            f"sets of {n_a} and {n_b} from {n_all} things; expected none larger than what it is drawn from"
        )
    logs = [
        _log_choose(n_a, k) + _log_choose(n_all - n_a, n_b - k) - _log_choose(n_all, n_b)
        for k in range(min(n_a, n_b) + 1)
    ]
    return torch.tensor(logs, dtype=torch.float64).exp()


def tail_p(overlap: int, pmf: Float[Tensor, " overlap"]) -> float:
    """P(at least `overlap`) by a distribution over 0, 1, …; of `hypergeometric_pmf` that is Fisher's exact test."""
    return min(1.0, float(pmf[overlap:].sum()))


def jaccard_mean(pmf: Float[Tensor, " overlap"], n_a: int, n_b: int) -> float:
    """Mean Jaccard index of sets of n_a and n_b under a distribution of their overlap."""
    if n_a + n_b == 0:
        return 1.0
    overlap = torch.arange(len(pmf), dtype=torch.float64)
    return float((pmf * overlap / (n_a + n_b - overlap)).sum())


def rank_correlation(a: Float[Tensor, "*row item"], b: Float[Tensor, " item"]) -> Float[Tensor, "*row"]:
    """Spearman's ρ of each row of `a` with `b`, equal values sharing their mean rank; NaN where all are equal."""
    centred = [_ranks(_exact(part)) - (part.shape[-1] - 1) / 2 for part in (a, b)]
    products = (centred[0] * centred[1]).sum(-1)
    return products / (centred[0].square().sum(-1) * centred[1].square().sum(-1)).sqrt()


def _ranks(values: Float[Tensor, "*row item"]) -> Float[Tensor, "*row item"]:
    values = values.contiguous()
    ordered = values.sort().values
    below, up_to = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (below + up_to - 1).double() / 2


def _log_choose(n: int, k: int) -> float:
    if not 0 <= k <= n:
        return -math.inf
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _exact(values: Tensor) -> Tensor:
    return values.detach().to(device="cpu", dtype=torch.float64)
