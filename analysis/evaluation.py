"""How good a circuit is: faithful, complete, minimal, each per prompt and with an interval over prompts.

With m the mean metric over prompts, M the full model, C the circuit and everything outside a kept set ablated:

    recovered     100 · (m(C) − m(∅)) / (m(M) − m(∅))          what the circuit alone does
    destroyed     100 · (m(M) − m(M∖C)) / (m(M) − m(∅))        what the rest cannot do
    incomplete    100 · |m(C∖K) − m(M∖K)| / |m(M) − m(∅)|      for parts K of the circuit (completeness)
    drop of v     100 · (m(C) − m(C∖v)) / (m(M) − m(∅))        for each of its nodes or edges (minimality)

as Wang et al. 2022 (arXiv 2211.00593, section 4) define them, in points of what there is to recover, so that they mean
the same under every metric, also under KL, of which less is better. The score of a circuit, a share of the full model
alone (`Ablation`), is given beside them.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.analysis.ablation import Item, ItemAblation
from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.curves import Evaluate
from subcircuit.analysis.statistics import Interval, bootstrap_mean, bootstrap_ratio
from subcircuit.engine.errors import PatchError


@dataclass(frozen=True)
class Scale:
    """What there is to recover: the metric of each prompt in the full model and with nothing kept.

    Raises PatchError where their means are equal.
    """

    full: Float[Tensor, " prompt"]
    nothing: Float[Tensor, " prompt"]
    seed: int = 0
    """Of the resampled prompts."""

    def __post_init__(self) -> None:
        if torch.isclose(self.full.mean(), self.nothing.mean(), rtol=1e-9, atol=1e-12):
            metric = float(self.full.mean())
            raise PatchError(f"keeping nothing and keeping everything give the same metric, {metric:.4g}")

    @classmethod
    def of(cls, evaluate: Evaluate[Item], everything: Collection[Item], seed: int = 0) -> Scale:
        """From one evaluation of everything and nothing."""
        full, nothing = evaluate([everything, ()])
        return cls(full, nothing, seed)

    @property
    def width(self) -> Float[Tensor, " prompt"]:
        return self.full - self.nothing

    def recovered(self, values: Float[Tensor, "*set prompt"]) -> Interval:
        """Metric values as points: 0 with nothing kept, 100 in the full model."""
        return self.points(values - self.nothing)

    def points(self, differences: Float[Tensor, "*set prompt"]) -> Interval:
        """Differences of the metric as points of what there is to recover."""
        return bootstrap_ratio(100 * differences, self.width.expand_as(differences), seed=self.seed)


@dataclass(frozen=True)
class Completeness:
    """The circuit and the full model after the same knock-outs: a complete circuit changes as the model does."""

    knockouts: tuple[tuple[str, ...], ...]
    """The parts of the circuit that were knocked out, each by the names of its nodes or edges."""
    circuit: Interval
    """Points that C∖K recovers, for each knock-out."""
    model: Interval
    """Points that M∖K recovers."""
    difference: Interval
    """Points of C∖K minus those of M∖K."""

    @property
    def incomplete(self) -> Float[Tensor, " knockout"]:
        """|difference| of each knock-out, in points."""
        return self.difference.mean.abs()

    @property
    def worst(self) -> int:
        """The knock-out that tells the circuit from the model best."""
        return int(self.incomplete.argmax())


@dataclass(frozen=True)
class Evaluation:
    """A circuit judged on one task, under one metric and source."""

    metric: Interval
    """Mean metric of the full model, the circuit, the model without the circuit, and nothing; in this order."""
    values: Float[Tensor, "kept prompt"]
    """The same per prompt."""
    score: Interval
    """What the circuit keeps of the full model, as `Ablation` defines it for the metric."""
    recovered: Interval
    destroyed: Interval
    drops: Interval
    """Points lost without each item of the circuit."""
    items: tuple[str, ...]
    """Names of the items whose loss is measured, in the order of `drops`."""
    completeness: Completeness
    settings: dict[str, Any]

    def minimal(self) -> list[str]:
        """Items whose loss costs more than nothing: the whole interval of their drop lies above 0."""
        return [name for name, low in zip(self.items, self.drops.low.tolist(), strict=True) if low > 0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; an interval is [mean, low, high]."""
        kept = ("full", "circuit", "without", "nothing")
        knockouts = self.completeness
        return {
            "settings": self.settings,
            "metric": {name: self.metric.at(i) for i, name in enumerate(kept)},
            "values": {name: row.tolist() for name, row in zip(kept, self.values, strict=True)},
            "score": self.score.at(),
            "recovered": self.recovered.at(),
            "destroyed": self.destroyed.at(),
            "drops": {name: self.drops.at(i) for i, name in enumerate(self.items)},
            "completeness": [
                {
                    "knocked_out": list(names),
                    "circuit": knockouts.circuit.at(i),
                    "model": knockouts.model.at(i),
                    "difference": knockouts.difference.at(i),
                }
                for i, names in enumerate(knockouts.knockouts)
            ],
        }


def evaluate_circuit(
    ablation: ItemAblation[Item],
    circuit: Circuit,
    *,
    n_knockouts: int = 20,
    greedy: int = 0,
    asked: Sequence[Item] | None = None,
    seed: int = 0,
) -> Evaluation:
    """Faithfulness, completeness and minimality of a circuit on the ablation's task: of its nodes, or by an
    `EdgeAblation` of its edges.

    `n_knockouts` random parts of the circuit are knocked out, and `greedy` more that grow by the node or edge that
    makes the circuit least like the model. `asked` are the items whose drops are measured, all of the circuit's unless
    given. The seed draws the knock-outs, and the prompts of the intervals.

    Raises PatchError for an empty circuit, a node or edge that the model lacks, or when there is nothing to recover.
    """
    items, everything = ablation.items_of(circuit), ablation.items
    if not items:
        raise PatchError("a circuit without nodes or edges to keep cannot be evaluated; expected at least one")
    asked = items if asked is None else asked
    rest = ablation.complement(set(items))
    values = ablation.kept_values([everything, items, rest, ()])
    scale = Scale(values[0], values[3], seed)
    parts = random_parts(items, n_knockouts, seed)
    if greedy:
        parts += greedy_parts(ablation.kept_values, everything, items, greedy)
    return Evaluation(
        metric=bootstrap_mean(values, seed=seed),
        values=values,
        score=ablation.score_intervals(values[1], seed=seed),
        recovered=scale.recovered(values[1]),
        destroyed=scale.points(values[0] - values[2]),
        drops=drops(ablation.kept_values, items, scale, asked),
        items=tuple(map(_name, asked)),
        completeness=completeness(ablation.kept_values, everything, items, parts, scale),
        settings={**ablation.settings, "n_prompts": len(values[0]), "seed": seed},
    )


def drops(
    evaluate: Evaluate[Item], circuit: Sequence[Item], scale: Scale, asked: Sequence[Item] | None = None
) -> Interval:
    """Points that a circuit loses without each of its items, nodes or edges, or of those asked for."""
    asked = circuit if asked is None else asked
    whole, *without = evaluate([circuit, *(leave_out(circuit, {item}) for item in asked)])
    return scale.points(whole - torch.stack(without))


def completeness(
    evaluate: Evaluate[Item],
    everything: Sequence[Item],
    circuit: Sequence[Item],
    parts: Sequence[Collection[Item]],
    scale: Scale,
) -> Completeness:
    """Circuit and full model after knocking out the same parts of the circuit."""
    kept = [leave_out(whole, part) for whole in (circuit, everything) for part in parts]
    values = evaluate(kept) if kept else scale.full.new_empty(0, len(scale.full))
    of_circuit, of_model = values.view(2, len(parts), len(scale.full))
    return Completeness(
        tuple(tuple(map(_name, part)) for part in parts),
        scale.recovered(of_circuit),
        scale.recovered(of_model),
        scale.points(of_circuit - of_model),
    )


def random_parts(circuit: Sequence[Item], n: int, seed: int = 0) -> list[list[Item]]:
    """n random parts of a circuit: each item is in it or not with the same chance; none is empty."""
    rng = random.Random(seed)
    parts: list[list[Item]] = []
    while len(parts) < n:
        part = [item for item in circuit if rng.random() < 0.5]
        if part:
            parts.append(part)
    return parts


def greedy_parts(
    evaluate: Evaluate[Item], everything: Sequence[Item], circuit: Sequence[Item], n: int
) -> list[list[Item]]:
    """Parts of 1, 2, …, n items, each the one before and the item that makes |m(C∖K) − m(M∖K)| largest."""
    parts: list[list[Item]] = []
    for _ in range(min(n, len(circuit))):
        before = parts[-1] if parts else []
        candidates = [[*before, item] for item in circuit if item not in before]
        kept = [leave_out(whole, part) for whole in (circuit, everything) for part in candidates]
        means = evaluate(kept).mean(1).view(2, -1)
        parts.append(candidates[int((means[0] - means[1]).abs().argmax())])
    return parts


def leave_out(whole: Sequence[Item], part: Collection[Item]) -> list[Item]:
    gone = set(part)
    return [item for item in whole if item not in gone]


def _name(item: object) -> str:
    return " -> ".join(item) if isinstance(item, tuple) else str(item)


def circuits_scored(
    ablation: ItemAblation[Item], circuits: Mapping[str, Circuit], *, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """Points that each circuit recovers on the ablation's task, with interval: unions, intersections, other tasks'."""
    values = ablation.kept_values([ablation.items, (), *(ablation.items_of(circuit) for circuit in circuits.values())])
    points = Scale(values[0], values[1], seed).recovered(values[2:])
    return {name: points.at(i) for i, name in enumerate(circuits)}
