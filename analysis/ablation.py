"""Scores of keep-sets of anything that can be removed, nodes or edges: the core of `Ablation` and `EdgeAblation`."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import Any, Generic, TypeVar

from jaxtyping import Float
from torch import Tensor

from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.statistics import Interval, percentile_interval, resampled_means
from subcircuit.analysis.tasks import Task
from subcircuit.engine.errors import PatchError, TaskError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Effects, Source
from subcircuit.engine.patching.metric import Metric, Metrics, each_metric
from subcircuit.engine.patching.options import Executor, Precision
from subcircuit.engine.patching.sites import source_name

Item = TypeVar("Item", bound=Hashable)


class ItemAblation(ABC, Generic[Item]):
    """Scores of keep-sets of `items` on one task; what is outside a keep-set is replaced by its source.

    A score is what is left of the full model, which has 100. With m the mean of the metric over prompts, it is

    * 100 · m(ablated) / m(full) for `logit_difference` (Lan et al., arXiv 2311.04131; may be negative or above 100) and
      for `accuracy`;
    * 100 · exp(m(ablated) − m(full)) for `log_probability`: the answers' probability, in the geometric mean, as a share
      of what the full model gives them;
    * 100 · exp(−m(ablated)) for `kl`: the same share for tokens drawn from the full model's own predictions; at most
      100.

    `also` are other metrics to be read from the same rows (`values_by_metric`); scores are those of `metric`.

    Raises TaskError when the full model does not prefer the answers (by `accuracy`: gives none), so that there is
    nothing to recover, and PatchError for a metric that does not exist.
    """

    def __init__(
        self,
        model: HookedTransformer,
        task: Task,
        items: Iterable[Item],
        *,
        source: Source,
        executor: Executor,
        precision: Precision,
        metric: Metric,
        also: Sequence[Metric] = (),
        budget_bytes: int | None,
    ) -> None:
        self.model, self.task, self.items, self.metric = model, task, tuple(items), metric
        self.settings: dict[str, Any] = {
            "source": source_name(source),
            "executor": executor,
            "precision": precision,
            "metric": metric,
        }
        self._metrics: Metrics = tuple(dict.fromkeys((metric, *also))) if also else metric
        self._options: dict[str, Any] = {**self.settings, "source": source, "budget_bytes": budget_bytes}
        self._options["metric"] = self._metrics
        self._prepare()
        self.clean_by_metric = self._by_metric(self._effects([()], ()).clean_metric)
        self.clean: Float[Tensor, "prompt"] = self.clean_by_metric[metric]
        self.full = full_metric(self.clean, task, metric)

    @abstractmethod
    def items_of(self, circuit: Circuit) -> list[Item]:
        """What a circuit keeps: its nodes, or its edges."""

    @abstractmethod
    def drawn_like(self, circuit: Circuit, rng: random.Random, match: str) -> set[Item]:
        """What one random circuit keeps that is like the given one; `match` says in what. Raises PatchError for a
        `match` that these items do not know."""

    @abstractmethod
    def _prepare(self) -> None:
        """Make what `_effects` needs, such as a session."""

    @abstractmethod
    def _effects(self, removed: Sequence[Iterable[Item]], base: Iterable[Item]) -> Effects:
        """Effects of removing each set of items, on top of those of `base`."""

    @abstractmethod
    def _check(self, kept: Collection[Item]) -> None:
        """Raises PatchError for an item that cannot be kept."""

    def values(self, removed: Sequence[Iterable[Item]], base: Iterable[Item] = ()) -> Float[Tensor, "set prompt"]:
        """Metric of each prompt for each set of removed items, on top of those of `base`; float64, on the CPU."""
        return self.values_by_metric(removed, base)[self.metric]

    def values_by_metric(
        self, removed: Sequence[Iterable[Item]], base: Iterable[Item] = ()
    ) -> dict[Metric, Float[Tensor, "set prompt"]]:
        """The same for `metric` and each of `also`, all of them from the same rows."""
        changes = self._by_metric(self._effects(removed, base).effects)
        return {metric: self.clean_by_metric[metric] + change for metric, change in changes.items()}

    def kept_values(self, kept: Sequence[Collection[Item]]) -> Float[Tensor, "set prompt"]:
        """Metric of each prompt when only the items of each set are kept. What no set keeps is propagated once."""
        if not kept:
            return self.clean.new_empty(0, len(self.clean))
        base = self.complement(set[Item]().union(*kept))
        gone = set(base)
        rest = [item for item in self.items if item not in gone]
        return self.values([[item for item in rest if item not in chosen] for chosen in map(set, kept)], base)

    def scores(self, removed: Sequence[Iterable[Item]], base: Iterable[Item] = ()) -> list[float]:
        """Score of each set of removed items, on top of those of `base`."""
        return (100 * self.share(self.values(removed, base).mean(1), self.clean.mean())).tolist()

    def score_intervals(self, values: Float[Tensor, "*set prompt"], *, seed: int = 0) -> Interval:
        """Scores of sets whose metric per prompt is `values`, with their 95 % bootstrap intervals over prompts."""
        return percentile_interval(*self.resampled_scores(values, seed=seed))

    def resampled_scores(
        self, values: Float[Tensor, "*set prompt"], *, seed: int = 0
    ) -> tuple[Float[Tensor, "*set"], Float[Tensor, "*set resample"]]:
        """Scores on all prompts, and on each resample of them, relative to the full model on the same ones."""
        drawn, full = (resampled_means(part, seed=seed) for part in (values, self.clean))
        return 100 * self.share(values.mean(-1), self.clean.mean()), 100 * self.share(drawn, full)

    def share(self, ablated: Float[Tensor, "*any"], full: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """What is left of the full model, 1 for all of it, by mean metrics of the ablated and of the full one."""
        return share_left(self.metric, ablated, full)

    def score_of(self, kept: Collection[Item]) -> float:
        """Score of the circuit that consists of the kept items. Raises PatchError for one that cannot be kept."""
        return self.scores([self.complement(kept)])[0]

    def complement(self, kept: Collection[Item]) -> list[Item]:
        """The items outside a keep-set. Raises PatchError when it has one that cannot be kept."""
        self._check(kept)
        chosen = set(kept)
        return [item for item in self.items if item not in chosen]

    def _by_metric(self, values: Float[Tensor, "*any"]) -> dict[Metric, Float[Tensor, "*any"]]:
        """Values of several metrics in a last dimension, or of the one, metric by metric."""
        metrics, values = each_metric(self._metrics), values.double().cpu()
        return dict(zip(metrics, values.unbind(-1) if isinstance(self._metrics, tuple) else (values,), strict=True))


def share_left(metric: Metric, ablated: Float[Tensor, "*any"], full: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """What is left of the full model, 1 for all of it, by mean metrics of the ablated and of the full one: see
    `ItemAblation`."""
    match metric:
        case "kl":
            return (-ablated).exp()
        case "log_probability":
            return (ablated - full).exp()
        case _:
            return ablated / full


def check_threshold(threshold: float, what: str) -> None:
    """Raises PatchError for a threshold that is not positive, or not a number; `what` says what it is of."""
    if not threshold > 0:
        raise PatchError(f"threshold {threshold} must be positive: {what}")


def full_metric(clean: Float[Tensor, "prompt"], task: Task, metric: Metric) -> float:
    """Mean metric of the full model. Raises TaskError where it does not prefer the answers, or by `accuracy` gives
    none."""
    full = float(clean.double().mean())
    if metric in ("logit_difference", "accuracy") and full <= 0:
        raise TaskError(
            f"task '{task.name}': the model does not prefer the answers (mean {metric.replace('_', ' ')} {full:.3f}), "
            "so there is no score relative to it"
        )
    return full
