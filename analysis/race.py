"""Which sites have the k largest effects, from exact effects of few sites on few prompts.

A site's gradient scores say two things about its exact effects. Their mean size u bounds the mean effect roughly, since
|mean effect| ≤ mean |effect|; and once some prompts have been patched exactly, the mean effect on all of them is about
the mean gradient score, plus the mean of (effect − gradient score) on those prompts: a control variate. So

1. *First look.* Patch the k sites of the largest u, and `n_random` drawn at random from the others, on the first of
   the parts into which the prompts are cut.
2. *Widen*, in the order of u, until no site that is left can be among the k largest: let q be `margin` times the
   largest |estimate| − u, at least 0, among the random sites and the last `n_recent` of the order (the first are a fair
   sample of what the order leaves for last, the others the nearest to what comes next). Stop when the k-th largest
   |estimate| is at least u + q of the next site.
3. *Deepen.* Patch the sites of the k largest |estimates| on all prompts, then any other whose |estimate| is not
   `errors` standard errors below the k-th largest effect that is known in full, on twice as many prompts each time,
   until none is left. The standard error is of drawing prompts without replacement; the deviation in it is the site's
   own, or u times the median over sites of deviation / u where that is larger, since few prompts can agree by chance.

What is certain is thus relative to the observed error. As in the diagnostic of Kramár et al. 2024 (arXiv 2403.00745,
AtP*), random sites bound what the order hides: one that is left falls short by more than all n of them with probability
1 / (n + 1) at most, and `margin` is held against that.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.engine.errors import PatchError

FEWEST_AT_ONCE = 4
"""Sites patched between two looks at the rule, unless so many have been that more cost little."""

Exact = Callable[[Sequence[int], int], Float[Tensor, "chosen part"]]
"""Exact effects of some sites (by index) on the prompts of one part."""


@dataclass(frozen=True)
class Rule:
    """When to stop; see this module. Raises PatchError for numbers below 0, or no recent site."""

    n_random: int = 16
    n_recent: int = 20
    margin: float = 2.0
    errors: float = 5.0

    def __post_init__(self) -> None:
        if min(self.n_random, self.margin, self.errors) < 0 or self.n_recent < 1:
            raise PatchError(f"{self}: expected numbers from 0 up, and n_recent from 1 up")


DEFAULT_RULE = Rule()


class Race:
    """Sites that run for the k largest mean effects by size.

    `gradient` has the sites' gradient scores, prompts in an order that says nothing about them; `parts` are the numbers
    of prompts, from the first on, after which a site's effects are looked at: the last is all of them. `progress` is
    called with (rows patched, rows in all), a row being a site on one prompt.
    """

    def __init__(
        self,
        gradient: Float[Tensor, "site prompt"],
        exact: Exact,
        parts: Sequence[int],
        k: int,
        rule: Rule,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.gradient = gradient.double().cpu()
        self.bound = self.gradient.abs().mean(1)
        self.effects = torch.zeros_like(self.gradient)
        self.n_seen = torch.zeros(len(gradient), dtype=torch.int64)
        self.k, self.rule = min(k, len(gradient)), rule
        self._exact, self._ends, self._progress = exact, [0, *parts], progress
        order = self.bound.argsort(descending=True, stable=True).tolist()
        self._in_order, others = order[: self.k], order[self.k :]
        self._drawn = random.Random(seed).sample(others, min(rule.n_random, len(others)))
        self._left = [site for site in others if site not in self._drawn]

    def run(self) -> list[int]:
        """Patch until the k largest are certain; the sites that were patched on all prompts."""
        n_first, n_all = self._ends[1], self._ends[-1]
        self._patch([*self._in_order, *self._drawn], n_first)
        while True:
            if wider := self._wider():
                self._patch(wider, n_first)
            elif not_known := [site for site in self._leading() if self.n_seen[site] < n_all]:
                self._patch(not_known, n_all)
            elif doubtful := self._doubtful():
                fewest = int(self.n_seen[doubtful].min())
                self._patch(doubtful, next(end for end in self._ends if end > fewest))
            else:
                return (self.n_seen == n_all).nonzero()[:, 0].tolist()

    @property
    def n_rows(self) -> int:
        """Sites patched, each counted once per prompt."""
        return int(self.n_seen.sum())

    @property
    def shortfall(self) -> float:
        """q: by how much a bound is expected to fall short of a mean effect at most."""
        near = [*self._drawn, *self._in_order[-self.rule.n_recent :]]
        return self.rule.margin * max(0.0, float((self._estimate() - self.bound)[near].max()))

    def _patch(self, sites: Sequence[int], n_prompts: int) -> None:
        """Effects of sites on the first `n_prompts` prompts, where they are not known yet."""
        for part, (start, end) in enumerate(pairwise(self._ends)):
            new = [site for site in sites if self.n_seen[site] == start < n_prompts]
            if new:
                self.effects[new, start:end] = self._exact(new, part).double().cpu()
                self.n_seen[new] = end
                if self._progress is not None:
                    self._progress(self.n_rows, self.effects.numel())

    def _wider(self) -> list[int]:
        """The next sites of the order, if one that was not looked at can be among the k largest."""
        known = self._estimate()[self.n_seen > 0].sort(descending=True).values
        if not self._left or known[self.k - 1] >= self.bound[self._left[0]] + self.shortfall:
            return []
        n_more = max(FEWEST_AT_ONCE, int((self.n_seen > 0).sum()) // 16)
        chosen, self._left = self._left[:n_more], self._left[n_more:]
        self._in_order += chosen
        return chosen

    def _leading(self) -> list[int]:
        """The k sites of the largest |estimates|."""
        return self._estimate().topk(self.k).indices.tolist()

    def _doubtful(self) -> list[int]:
        """Sites, not yet patched on all prompts, that could still be among the k largest."""
        estimate, complete = self._estimate(), self.n_seen == self._ends[-1]
        threshold = estimate[complete].topk(self.k).values[-1]
        reach = estimate + self.rule.errors * self._standard_error()
        open_ = ((self.n_seen > 0) & ~complete & (reach >= threshold)).nonzero()[:, 0].tolist()
        return sorted(open_, key=lambda site: -float(estimate[site]))[:FEWEST_AT_ONCE]

    def _missed(self) -> Float[Tensor, "site prompt"]:
        """effect − gradient score, 0 on prompts that were not patched."""
        seen = torch.arange(self._ends[-1]) < self.n_seen[:, None]
        return (self.effects - self.gradient) * seen

    def _estimate(self) -> Float[Tensor, "site"]:
        """|mean effect|, estimated; 0 for sites that were not patched."""
        mean = self.gradient.mean(1) + self._missed().sum(1) / self.n_seen.clamp(min=1)
        return mean.abs() * (self.n_seen > 0)

    def _standard_error(self) -> Float[Tensor, "site"]:
        n_all, n = self._ends[-1], self.n_seen.clamp(min=1)
        missed = self._missed()
        variance = (missed**2).sum(1) / n - (missed.sum(1) / n) ** 2
        deviation = (variance.clamp(min=0) * n / (n - 1).clamp(min=1)).sqrt()
        typical = (deviation / self.bound.clamp(min=torch.finfo(torch.float64).tiny))[self.n_seen > 0].median()
        return torch.maximum(deviation, typical * self.bound) * ((1 - n / n_all) / n).sqrt()
