"""What an evaluation of a circuit says, as sentences and tables of a report: of its nodes and of its edges alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from subcircuit.analysis.baselines import Baseline
from subcircuit.analysis.curves import Curve
from subcircuit.analysis.evaluation import Evaluation
from subcircuit.analysis.plural import counted
from subcircuit.analysis.sections import Cell, Table
from subcircuit.analysis.statistics import Interval

ALIKE = {
    "size": "of equal size",
    "layers": "with as many {noun}s in each layer",
    "nodes": "with as many edges between its nodes",
}
"""What random circuits have in common with the circuit, by `match`."""


def judgement(
    found: Evaluation, baseline: Baseline, curve: Curve, noun: str, ranked: str
) -> tuple[tuple[str, ...], tuple[Table, ...], dict[str, Any]]:
    """Sentences, tables and plain values. `noun` is "node" or "edge", `ranked` what the curve's ranking is of."""
    recovered = {
        "recovered by the circuit": found.recovered,
        "destroyed without it": found.destroyed,
        "score": found.score,
    }
    drops = {name: Interval(*(part[i] for part in found.drops)) for i, name in enumerate(found.items)}
    dearest = dict(sorted(drops.items(), key=lambda item: item[1].at(), reverse=True))
    caption = f"Areas under the recovered share of the most important {ranked} (CPR), and under its distance from 1"
    tables = (
        _table("Points of the metric between nothing kept and the full model, with 95 % intervals.", "", recovered),
        _table(f"{caption} (CMD).", "", {"CPR": curve.cpr, "CMD": curve.cmd}, digits=3),
        _table(f"Points of what there is to recover that go with each {noun}, with 95 % intervals.", noun, dearest),
    )
    data = {**found.to_dict(), "curve": curve.to_dict(), "random": baseline.to_dict()}
    return _sentences(found, baseline, noun), tables, data


def _sentences(found: Evaluation, baseline: Baseline, noun: str) -> tuple[str, ...]:
    mean, low, high = found.recovered.at()
    alike = ALIKE[baseline.match].format(noun=noun)
    sentences = [
        f"Alone it recovers {mean:.0f} points ({low:.0f} to {high:.0f}).",
        f"Minimal in {len(found.minimal())} of {counted(len(found.items), noun)}: the 95 % interval of what their loss "
        "costs lies above 0.",
        f"{len(baseline.random)} random circuits {alike} recover {baseline.mean:.0f} on average, 95 % of them "
        f"{baseline.middle[0]:.0f} to {baseline.middle[1]:.0f}, the least {baseline.least:.0f}, the best "
        f"{baseline.most:.0f} (p = {baseline.p:.2g}).",
    ]
    incomplete = found.completeness.incomplete
    if len(incomplete):
        sentences.append(
            f"Complete up to {float(incomplete.mean()):.0f} points on average, {float(incomplete.max()):.0f} at most, "
            f"over {len(incomplete)} random parts knocked out of the circuit and of the model alike."
        )
    return tuple(sentences)


def _table(caption: str, noun: str, rows: Mapping[str, Interval], digits: int = 1) -> Table:
    listed: list[list[Cell]] = [[name, *interval.at()] for name, interval in rows.items()]
    return Table(caption, (noun, "mean", "low", "high"), listed, digits)
