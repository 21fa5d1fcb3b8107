"""How sure a mean over prompts is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval, each of the same shape."""

    mean: Float[Tensor, "*site"]
    low: Float[Tensor, "*site"]
    high: Float[Tensor, "*site"]


def bootstrap_mean(
    values: Float[Tensor, "*site prompt"], *, confidence: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean over prompts (the last dimension) with its percentile bootstrap interval (Efron, 1979).

    Prompts are drawn with replacement n_resamples times, the same draws for every site, from a generator of its
    own: the seed decides, the global random state does not. One prompt gives an interval of width 0.

    Raises ValueError when there is no prompt, or for a confidence outside 0…1.
    """
    n_prompts = values.shape[-1] if values.ndim else 0
    if n_prompts == 0 or not 0 < confidence < 1 or n_resamples < 1:
        raise ValueError(
            f"bootstrap of {n_prompts} prompts, confidence {confidence}, {n_resamples} resamples; "
            "expected at least one prompt, a confidence between 0 and 1, at least one resample"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n_prompts, (n_resamples, n_prompts), generator=generator)
    share = torch.zeros(n_resamples, n_prompts, dtype=torch.float64)
    share.scatter_add_(1, drawn, torch.full_like(share, 1 / n_prompts))
    exact = values.detach().to(device="cpu", dtype=torch.float64)
    # A resample's mean is a weighted mean of the prompts, so all of them are one matrix product.
    means = exact @ share.T
    tail = (1 - confidence) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=-1)
    return Interval(*(part.to(values.dtype) for part in (exact.mean(-1), low, high)))
