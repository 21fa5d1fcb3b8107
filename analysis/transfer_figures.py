"""Bars by kind of prompt: what the whole model answers, and what is left without a circuit's heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import BarContainer

from subcircuit.analysis.drawing import (
    FAINT,
    LETTER_INCHES,
    SOFT,
    STYLE,
    boxed,
    interval_errors,
    svg_text,
    task_colour,
    words,
)

RANDOM = "#8a90a0"


def transfer_figure(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Shares of right continuations by kind of prompt, from the rows of `Transfer.table`, as SVG text.

    The outlined bar is the whole model's share of all prompts asked. Filled bars are of those that it answers: in a
    colour what is left without a circuit's heads, in grey beside it without as many random ones, each with its
    interval. Kinds of which the whole model answers nothing have the outlined bar alone.
    """
    kinds, circuits = (list(dict.fromkeys(row[key] for row in rows)) for key in ("kind", "circuit"))
    at = {(row["kind"], row["circuit"]): row for row in rows}
    bar = 0.15
    group = bar * (1 + 2 * len(circuits)) + 0.25
    names = [words(kind) for kind in kinds]
    legend_inches = 0.19 * (2 + len(circuits))
    below = 0.3 + 0.6 * LETTER_INCHES * max(map(len, names)) + legend_inches
    with mpl.rc_context(STYLE):
        width = max(group * len(kinds), 3.4)
        figure, axes = boxed(width, 2.0, title, 0.75, 0.3, below)
        left = np.arange(len(kinds)) * group
        full = [at[kind, circuits[0]]["full"] for kind in kinds]
        handles: list[Any] = [axes.bar(left, full, bar, facecolor="white", edgecolor=SOFT)]
        labels = ["whole model, of all prompts"]
        for i, circuit in enumerate(circuits):
            found = [(place, at[kind, circuit]) for place, kind in zip(left, kinds, strict=True)]
            handles.append(_bars(axes, found, "share", bar * (2 * i + 1), bar, task_colour(i)))
            labels.append(f"without the heads of {words(circuit)}")
            random = _bars(axes, found, "random", bar * (2 * i + 2), bar, RANDOM)
        for y in (0.5, 1.0):
            axes.axhline(y, color=FAINT, linewidth=0.8, zorder=0)
        axes.axhline(0, color=SOFT, linewidth=0.6)
        axes.set_xticks(left + bar * len(circuits), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set(ylim=(0, 1.04), xlim=(-0.2, max(group * len(kinds), width) - 0.2), ylabel="share right")
        axes.set_yticks([0, 0.5, 1.0], ["0", "50 %", "100 %"])
        handles, labels = [*handles, random], [*labels, "without as many random heads"]
        figure.legend(handles, labels, loc="lower left", frameon=False, fontsize=8, bbox_to_anchor=(0.0, 0.0))
        return svg_text(figure)


def _bars(
    axes: Axes, found: Sequence[tuple[float, Mapping[str, Any]]], which: str, shift: float, width: float, colour: str
) -> BarContainer:
    """Shares with their intervals, each at its kind's place and some inches on; an empty one is marked by a 0."""
    there = [(place + shift, row) for place, row in found if row[which] is not None]
    places, shares = [place for place, _ in there], [row[which] for _, row in there]
    error = interval_errors(shares, [(row[f"{which}_low"], row[f"{which}_high"]) for _, row in there])
    for place, share in zip(places, shares, strict=True):
        if share == 0:
            axes.text(place, 0.015, "0", ha="center", color=colour, fontsize=7)
    return axes.bar(places, shares, width * 0.9, color=colour, yerr=error, ecolor=SOFT, capsize=1.5)
