"""What a circuit's result is worth: random circuits like it, and the circuits of other tasks."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.analysis.ablation import Item, ItemAblation
from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.evaluation import Scale
from subcircuit.analysis.plural import counted
from subcircuit.analysis.statistics import benjamini_hochberg, empirical_p, sign_flip_p, smallest_p
from subcircuit.analysis.sweep import Scores
from subcircuit.engine.errors import PatchError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.threads import is_small

Match = Literal["size", "layers", "nodes"]
ROWS_AT_ONCE = 64
N_RANDOM_OF_SMALL, N_RANDOM_EDGES_OF_SMALL = 1000, 200
"""Random circuits of a small model where no number is given: about 10 s of a core for 32 prompts, or for 8 of edges."""
CALLED = 0.05
"""False discovery rate at which a site is said to have an effect."""


@dataclass(frozen=True)
class Baseline:
    """A circuit beside random ones, in points of what there is to recover (`evaluation`); and their scores."""

    recovered: float
    """Of the circuit."""
    random: Float[Tensor, " draw"]
    """Of each random circuit."""
    scores: Float[Tensor, " draw"]
    """What each random circuit keeps of the full model, as `Ablation` defines it for the metric: the paper's number."""
    match: Match
    n_distinct: int
    """How many of the random circuits differ; few where there are few circuits like it."""

    @property
    def mean(self) -> float:
        return float(self.random.mean())

    @property
    def least(self) -> float:
        return float(self.random.min())

    @property
    def most(self) -> float:
        return float(self.random.max())

    @property
    def middle(self) -> tuple[float, float]:
        """Between which 95 % of the random circuits lie."""
        low, high = self.random.quantile(torch.tensor([0.025, 0.975], dtype=self.random.dtype)).tolist()
        return low, high

    @property
    def p(self) -> float:
        """How likely a random circuit does at least as well, the circuit itself counted among them."""
        return empirical_p(self.recovered, self.random)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        low, high = self.middle
        return {
            "match": self.match,
            "n": len(self.random),
            "n_distinct": self.n_distinct,
            "recovered": self.recovered,
            "mean": self.mean,
            "min": self.least,
            "max": self.most,
            "low": low,
            "high": high,
            "p": self.p,
        }


def random_baseline(
    ablation: ItemAblation[Item],
    circuit: Circuit,
    n: int = 1000,
    *,
    match: Match = "size",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Baseline:
    """The circuit beside n random ones. A circuit drawn twice is evaluated once and counts twice.

    Of nodes, `match="size"` draws as many heads, MLPs and features, `"layers"` as many of them in each layer. Of edges
    (an `EdgeAblation`), `"size"` draws as many from all of the model, `"layers"` as many from each layer to each, and
    `"nodes"` as many from those between the circuit's own nodes: what its choice of edges adds to that of nodes.

    Raises PatchError for another match, no draws, or when there is nothing to recover.
    """
    if match not in get_args(Match):
        raise PatchError(f"match {match!r} is not known; expected one of {', '.join(get_args(Match))}")
    if n < 1:
        raise PatchError(f"{n} random circuits; expected at least 1")
    rng = random.Random(seed)
    drawn = [frozenset(ablation.drawn_like(circuit, rng, match)) for _ in range(n)]
    distinct = list(dict.fromkeys(drawn))
    ends = ablation.kept_values([ablation.items, (), ablation.items_of(circuit)]).mean(1)
    scale = Scale(ends[:1], ends[1:2])
    means = torch.cat([part.mean(1) for part in _evaluated(ablation, distinct, progress)])
    place = {kept: i for i, kept in enumerate(distinct)}
    means = means[[place[kept] for kept in drawn]]
    recovered = float(100 * (ends[2] - ends[1]) / scale.width)
    points = 100 * (means - ends[1]) / scale.width
    return Baseline(recovered, points, 100 * ablation.share(means, ends[0]), match, len(distinct))


def _evaluated(
    ablation: ItemAblation[Item], circuits: list[frozenset[Item]], progress: Callable[[int, int], None] | None
) -> list[Float[Tensor, "set prompt"]]:
    values = []
    for first in range(0, len(circuits), ROWS_AT_ONCE):
        values.append(ablation.kept_values(circuits[first : first + ROWS_AT_ONCE]))
        if progress is not None:
            progress(min(first + ROWS_AT_ONCE, len(circuits)), len(circuits))
    return values


def beside_random(score: float | None, scores: Sequence[float]) -> dict[str, Any]:
    """What a circuit's score is beside those of random ones: their mean, least and best, where 95 % of them lie, and p
    that one does as well; None of all these where there are no random ones."""
    if not scores:
        return {"n_random": 0, **dict.fromkeys(("random_mean", "random_least", "random_best", "random_ends", "p"))}
    found = torch.tensor(scores, dtype=torch.float64)
    return {
        "n_random": len(scores),
        "random_mean": float(found.mean()),
        "random_least": min(scores),
        "random_best": max(scores),
        "random_ends": found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist(),
        "p": None if score is None else empirical_p(score, found),
    }


def suitable_n_random(model: HookedTransformer, otherwise: int, *, of_edges: bool = False) -> int:
    """How many random circuits to draw where no number is given: a thousand of a small model (200 of edges), or
    `otherwise`."""
    if not is_small(model):
        return otherwise
    return N_RANDOM_EDGES_OF_SMALL if of_edges else N_RANDOM_OF_SMALL


def cell_q_values(scores: Scores, *, seed: int = 0) -> Float[Tensor, " site"]:
    """q-value of every site of a sweep: sign-flip tests over prompts, corrected for how many sites there are.

    Which sites with q ≤ 0.05 have an effect is wrong for 5 % of them on average (`statistics.benjamini_hochberg`). With
    fewer than about ten prompts no p can be small, and so no q. NaN for `kl`, which has no sign to flip.
    """
    if scores.metric == "kl":
        return torch.full((len(scores.sites),), float("nan"), dtype=torch.float64)
    return benjamini_hochberg(sign_flip_p(scores.effects, seed=seed))


def table_with_q(scores: Scores, *, seed: int = 0) -> list[dict[str, Any]]:
    """`Scores.table` with the q-value of each site (`cell_q_values`); None for `kl`.

    Of all sites that were asked: of those that a screening chose for their size, q would be too small.
    """
    q_values = cell_q_values(scores, seed=seed).tolist()
    return [row | {"q": None if math.isnan(q) else q} for row, q in zip(scores.table(), q_values, strict=True)]


def called(rows: Sequence[Mapping[str, Any]], n_prompts: int) -> str:
    """How many rows of a table have an effect by their q-values; or that so few prompts cannot tell, of any site or of
    few of them."""
    prompts = counted(n_prompts, "prompt")
    least = smallest_p(n_prompts)
    if least > CALLED:
        needed = next(n for n in itertools.count(n_prompts) if smallest_p(n) <= CALLED)
        return f"With {prompts} no q-value can reach {CALLED}; at least {needed} prompts are needed"
    n_called = sum(row["q"] <= CALLED for row in rows)
    said = f"{n_called} of {len(rows)} sites have an effect, at a false discovery rate of {CALLED:.0%} (q)"
    n_together = math.ceil(least * len(rows) / CALLED)
    if n_called == 0 and n_together > 1:
        said += f"; with {prompts} that takes at least {n_together} sites at once"
    return said
