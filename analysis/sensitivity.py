"""Whether what is said of a circuit depends on how it was measured.

The same circuit under every combination of conventions: what ablated nodes get (source), what is measured (metric), at
which positions they are ablated (scope), on which prompts (tasks drawn with other seeds, and bootstrap resamples of
each). All metrics are read from the same rows. Published findings have turned on such choices (Miller et al. 2024,
arXiv 2407.08734), so each conclusion is a predicate that either holds under a convention or does not:

    recovers      the circuit recovers at least 100 − T points
    beats random  it recovers more than every random circuit of its size
    all matter    every node's loss costs something: all drops are above 0
    same ranking  drops rank the nodes as under the first convention: Spearman's ρ is at least `RANK_AGREES`

Points are 100 · (m(C) − m(∅)) / (m(M) − m(∅)), as in `evaluation`. Where ablating everything does not surely (in
`SURE` of the resamples) take at least `LEAST_AT_STAKE` of the full model's score there is too little to recover, and
nothing is concluded: points are shares of what is at stake, and of next to nothing any noise is many points.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from subcircuit.analysis.ablation import check_threshold, full_metric, share_left
from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.faithfulness import Ablation
from subcircuit.analysis.nodes import candidates_of, random_nodes
from subcircuit.analysis.statistics import percentile_interval, rank_correlation, resampled_means
from subcircuit.analysis.tasks import Task
from subcircuit.engine.errors import PatchError, TaskError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Component
from subcircuit.engine.patching.metric import METRICS, Metric, check_metric
from subcircuit.engine.patching.options import Executor, Precision

SOURCES = ("mean", "corrupted", "zero")
SCOPES = ("all", "from_difference", "members", "last")
CHOICES = ("source", "metric", "scope", "prompts")
CONCLUSIONS = ("recovers", "beats random", "all matter", "same ranking")
SURE = 0.975
LEAST_AT_STAKE = 0.1
"""Of the full model's score (`share_left`): what ablating everything has to take from it."""
RANK_AGREES = 0.7
"""From this Spearman's ρ on two rankings are called the same; half of the variance of one is then in the other."""


@dataclass(frozen=True)
class Convention:
    """One way to measure a circuit."""

    source: str
    metric: str
    scope: str
    prompts: str
    """Which task: its seed, or a name of one's own."""

    def __str__(self) -> str:
        return f"{self.source}, {self.metric}, {self.scope}, {self.prompts}"


@dataclass(frozen=True)
class Outcome:
    """What a circuit comes to under one convention."""

    convention: Convention
    score: float
    """What the circuit keeps of the full model, as `Ablation` defines it for the metric."""
    at_stake: float
    """m(M) − m(∅), in units of the metric: what ablating every node costs; negative for KL."""
    share_at_stake: float
    """The same as a share of the full model's score, whatever the metric: 1 − the score of nothing / 100."""
    recovered: tuple[float, float, float] | None
    """Points with the ends of the bootstrap interval; None where there is too little to recover."""
    random_most: float | None
    """Points of the best random circuit."""
    least_drop: tuple[str, float] | None
    """The node that costs least, and the points it costs."""
    rank_correlation: float | None
    """Of the drops with those under the first convention."""
    holds: Mapping[str, bool | None]
    """Which conclusions hold on these prompts; None where there is nothing to conclude from."""
    resamples: Mapping[str, float | None]
    """In which share of bootstrap resamples of the prompts each holds."""


@dataclass(frozen=True)
class Sensitivity:
    """A circuit under every convention; the first is the one that the others are compared with."""

    circuit: Circuit
    outcomes: tuple[Outcome, ...]
    threshold: float
    n_random: int
    notes: tuple[str, ...] = ()
    """Conventions that were left out, and why."""

    def survival(self) -> dict[str, tuple[int, int]]:
        """Per conclusion, under how many conventions it holds, and of how many that allow a conclusion."""
        return _counts(self.outcomes)

    def survival_by(self, choice: str) -> dict[str, dict[str, tuple[int, int]]]:
        """The same for every `source`, `metric`, `scope` or `prompts` apart: which choice a conclusion hangs on."""
        groups: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes:
            groups.setdefault(getattr(outcome.convention, choice), []).append(outcome)
        return {value: _counts(outcomes) for value, outcomes in groups.items()}

    def surviving(self) -> list[str]:
        """Conclusions that hold under every convention that allows one."""
        return [name for name, (n_hold, n_all) in self.survival().items() if n_all and n_hold == n_all]

    def weakest(self, conclusion: str) -> tuple[str, str, int, int] | None:
        """The choice (`metric`, say) and its value under which a conclusion holds least often, and how often of how
        many; None for one that holds under all conventions or under none."""
        n_hold, n_all = self.survival()[conclusion]
        if n_hold in (0, n_all):
            return None
        found = [
            (counts[conclusion][0] / counts[conclusion][1], choice, value, *counts[conclusion])
            for choice in CHOICES
            for value, counts in self.survival_by(choice).items()
            if counts[conclusion][1]
        ]
        return min(found, key=lambda each: each[0])[1:]

    def meaning(self, conclusion: str) -> str:
        """A conclusion's name and what it says of the circuit."""
        says = {
            "recovers": f"at least {100 - self.threshold:.0f} points",
            "beats random": f"more than each of {self.n_random} random circuits of its size",
            "all matter": "losing any of its nodes costs something",
            "same ranking": f"what they cost ranks its nodes alike, ρ ≥ {RANK_AGREES}",
        }
        return f"“{conclusion}” ({says[conclusion]})"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "circuit": self.circuit.to_dict() | {"trace": []},
            "threshold": self.threshold,
            "n_random": self.n_random,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
            "survival": {name: list(counts) for name, counts in self.survival().items()},
            "survival_by": {choice: self.survival_by(choice) for choice in CHOICES},
            "surviving": self.surviving(),
            "notes": list(self.notes),
        }


def _counts(outcomes: Sequence[Outcome]) -> dict[str, tuple[int, int]]:
    verdicts = {name: [each.holds[name] for each in outcomes if each.holds[name] is not None] for name in CONCLUSIONS}
    return {name: (sum(map(bool, found)), len(found)) for name, found in verdicts.items()}


def sensitivity(
    model: HookedTransformer,
    tasks: Mapping[str, Task],
    circuit: Circuit,
    *,
    sources: Sequence[str] = SOURCES,
    metrics: Sequence[Metric] = METRICS,
    scopes: Sequence[str] = SCOPES,
    threshold: float = 20.0,
    n_random: int = 100,
    n_resamples: int = 1000,
    seed: int = 0,
    executor: Executor = "torch",
    precision: Precision = "fp32",
    progress: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """A circuit under every source × metric × scope × task.

    `tasks` are the same task on several draws of prompts, by what to call them. `scopes` are `all`, `from_difference`
    (from the first position on at which clean and corrupted prompts differ) or names of the task's classes of
    positions, such as `members` and `last`. The first of each makes the convention that rankings are compared with.
    The same random circuits are used everywhere. `progress` counts conventions.

    What cannot be measured is left out with a note: a scope that a task does not have, the source `corrupted` without
    corrupted prompts, a metric by which the full model does not do the task. Raises PatchError for an unknown metric or
    source, a scope that is none of `SCOPES` and that no task has, a threshold that is not positive, an empty circuit,
    or when nothing is left.
    """
    if not circuit.nodes:
        raise PatchError("a circuit without nodes has no sensitivity; expected at least one")
    for metric in metrics:
        check_metric(metric)
    check_threshold(threshold, "points of score that the circuit may lose")
    known = {*SCOPES, *(scope for task in tasks.values() for scope in task.positions)}
    for unknown in [scope for scope in scopes if scope not in known]:
        scope_positions(next(iter(tasks.values())), unknown)
    nodes = candidates_of(model, tasks.values(), sources)
    sets = _Sets.drawn(nodes, circuit, n_random, seed)
    options: dict[str, Any] = {"executor": executor, "precision": precision, "also": metrics}
    outcomes: list[Outcome] = []
    notes: list[str] = []
    first_drops: Tensor | None = None
    n_done, n_all = 0, len(tasks) * len(sources) * len(scopes) * len(metrics)
    for (name, task), source in itertools.product(tasks.items(), sources):
        possible, reasons = _possible(task, source, scopes)
        notes += reasons
        if possible:
            # KL asks nothing of the full model, so it can be measured where another metric cannot.
            ablation = Ablation(model, task, nodes=nodes, source=source, metric="kl", **options)
            measurable, reasons = _measurable(ablation, metrics)
            notes += [f"{name}: {reason}" for reason in reasons]
        for scope, positions in possible.items():
            values = sets.values(ablation.at(positions))
            for metric in measurable:
                measured = _Measured.of(values[metric], metric, len(circuit), n_resamples, seed)
                if first_drops is None and measured.concludes:
                    first_drops = measured.drops[:, 0]
                convention = Convention(source, metric, scope, name)
                outcomes.append(measured.outcome(convention, circuit, threshold, first_drops))
            n_done += len(metrics)
            if progress is not None:
                progress(n_done, n_all)
    notes = list(dict.fromkeys(notes))
    if not outcomes:
        raise PatchError(f"no convention is left to measure the circuit under: {'; '.join(notes) or 'none given'}")
    return Sensitivity(circuit, tuple(outcomes), threshold, n_random, tuple(notes))


def scope_positions(task: Task, scope: str) -> tuple[int, ...] | None:
    """Positions of a scope; None is all of them. Raises PatchError for a scope that the task does not have."""
    if scope == "all":
        return None
    if scope == "from_difference" and task.first_difference < task.pos:
        return tuple(range(task.first_difference, task.pos))
    if scope == "last":
        return (task.pos - 1,)
    if scope not in task.positions:
        known = ", ".join(dict.fromkeys(["all", "from_difference", "last", *task.positions]))
        raise PatchError(f"scope {scope!r} is none of task '{task.name}'; it has {known}")
    return tuple(task.positions[scope])


def _possible(task: Task, source: str, scopes: Sequence[str]) -> tuple[dict[str, tuple[int, ...] | None], list[str]]:
    """Positions of the scopes that a task has, by scope; and what it lacks."""
    if source == "corrupted" and task.corrupted is None:
        return {}, [f"source 'corrupted': task '{task.name}' has no corrupted prompts"]
    found: dict[str, tuple[int, ...] | None] = {}
    lacking = []
    for scope in scopes:
        try:
            found[scope] = scope_positions(task, scope)
        except PatchError as error:
            lacking.append(str(error))
    return found, lacking


def _measurable(ablation: Ablation, metrics: Sequence[Metric]) -> tuple[list[Metric], list[str]]:
    """Metrics by which the full model does the task; and why the others are none of them."""
    found: list[Metric] = []
    reasons = []
    for metric in metrics:
        try:
            full_metric(ablation.clean_by_metric[metric], ablation.task, metric)
            found.append(metric)
        except TaskError as error:
            reasons.append(str(error))
    return found, reasons


@dataclass(frozen=True)
class _Sets:
    """What is kept in the rows of a convention."""

    nodes: list[Component]
    """Those of the circuit."""
    draws: list[list[Component]]
    """Random circuits."""

    @classmethod
    def drawn(cls, nodes: list[Component], circuit: Circuit, n_random: int, seed: int) -> _Sets:
        """With random circuits drawn from `nodes`."""
        rng = random.Random(seed)
        return cls(circuit.nodes, [sorted(random_nodes(nodes, circuit, rng, "size")) for _ in range(n_random)])

    def values(self, ablation: Ablation) -> dict[Metric, Float[Tensor, "set prompt"]]:
        """Each metric with everything kept, nothing, the circuit, the circuit without each node, random circuits."""
        parts = [
            ablation.values_by_metric([(), ablation.complement(())]),
            # What the circuit lacks is removed once: without a node too, only the layers from it on are computed.
            ablation.values_by_metric([(), *([node] for node in self.nodes)], ablation.complement(self.nodes)),
            ablation.values_by_metric([ablation.complement(draw) for draw in self.draws]),
        ]
        return {metric: torch.cat([part[metric] for part in parts]) for metric in parts[0]}


@dataclass(frozen=True)
class _Measured:
    """Means on the prompts (column 0) and on each bootstrap resample of them (the others), in points."""

    score: float
    at_stake: float
    share_at_stake: float
    usable: Bool[Tensor, " draw"]
    """Whether there is enough to recover: ablating everything takes at least `LEAST_AT_STAKE` of the score."""
    recovered: Float[Tensor, " draw"]
    drops: Float[Tensor, "node draw"]
    random: Float[Tensor, "circuit draw"]

    @classmethod
    def of(
        cls, values: Float[Tensor, "set prompt"], metric: Metric, n_nodes: int, n_resamples: int, seed: int
    ) -> _Measured:
        """From the values of `_Sets`, of a circuit of so many nodes."""
        drawn = resampled_means(values, n_resamples=n_resamples, seed=seed)
        means = torch.cat([values.mean(1, keepdim=True), drawn], 1)
        full, nothing, kept = means[:3]
        points = 100 * (means[2:] - nothing) / (full - nothing)
        # KL counts what is lost: the full model has least of it. Shares say nothing where the full model's is negative.
        is_worse = nothing > full if metric == "kl" else full > nothing
        taken = 1 - share_left(metric, nothing, full)
        return cls(
            score=float(100 * share_left(metric, kept[0], full[0])),
            at_stake=float(full[0] - nothing[0]),
            share_at_stake=float(taken[0]),
            usable=is_worse & (taken >= LEAST_AT_STAKE),
            recovered=points[0],
            drops=points[0] - points[1 : n_nodes + 1],
            random=points[n_nodes + 1 :],
        )

    @property
    def concludes(self) -> bool:
        """Whether there surely is enough to recover."""
        return bool(self.usable[0]) and float(self.usable[1:].double().mean()) >= SURE

    def outcome(
        self, convention: Convention, circuit: Circuit, threshold: float, first_drops: Float[Tensor, " node"] | None
    ) -> Outcome:
        stake = self.at_stake, self.share_at_stake
        if first_drops is None or not self.concludes:
            nothing = dict.fromkeys(CONCLUSIONS)
            return Outcome(convention, self.score, *stake, None, None, None, None, nothing, nothing)
        drawn = self.usable.clone()
        drawn[0] = False  # the prompts themselves are no resample
        agreement = rank_correlation(self.drops.T, first_drops)
        verdicts = self._verdicts(threshold, agreement)
        least = int(self.drops[:, 0].argmin())
        return Outcome(
            convention,
            self.score,
            *stake,
            percentile_interval(self.recovered[0], self.recovered[drawn]).at(),
            float(self.random[:, 0].max()) if len(self.random) else None,
            (str(circuit.nodes[least]), float(self.drops[least, 0])),
            float(agreement[0]) if agreement[0].isfinite() else None,
            {name: None if found is None else bool(found[0]) for name, found in verdicts.items()},
            {name: None if found is None else float(found[drawn].double().mean()) for name, found in verdicts.items()},
        )

    def _verdicts(self, threshold: float, agreement: Float[Tensor, " draw"]) -> dict[str, Bool[Tensor, " draw"] | None]:
        """Whether each conclusion holds, on the prompts and on each resample; None without what it needs."""
        return {
            "recovers": self.recovered >= 100 - threshold,
            "beats random": (self.recovered > self.random).all(0) if len(self.random) else None,
            "all matter": (self.drops > 0).all(0),
            "same ranking": agreement >= RANK_AGREES if agreement[0].isfinite() else None,
        }
