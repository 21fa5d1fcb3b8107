"""Figures of the lens, as SVG text: the answer against the last member by layer, likeliest tokens, direct terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from subcircuit.analysis.drawing import (
    FAINT,
    INK,
    PALETTE,
    SOFT,
    STYLE,
    boxed,
    inches,
    interval_errors,
    svg_text,
    task_colour,
    words,
)
from subcircuit.analysis.head_figures import token_texts
from subcircuit.analysis.lens import Lens

ANSWER, RIVAL = PALETTE[0], PALETTE[1]


def lens_figure(read: Lens, title: str) -> str:
    """Probability (above) and rank (below) of the answer and of what it has to overtake, layer by layer.

    Both are read at the last of the lens's positions. Lines are means of probabilities and medians of ranks, bands hold
    the middle half of the prompts. A dotted line marks the stage from which the answer leads for good in half of them.
    """
    rival = "last member" if read.newest is not None else "wrong answer"
    n_stages = len(read.stages)
    x = torch.arange(n_stages) / 2
    with mpl.rc_context(STYLE):
        width = max(0.14 * n_stages, 3.6)
        figure, upper, lower = _two_plots(width, title)
        for values, colour, label in ((read.answer, ANSWER, "answer"), (read.rival, RIVAL, rival)):
            _band(upper, x, values[..., -1], colour, label, middle=values[..., -1].double().mean(1))
        for ranks, colour in ((read.answer_rank, ANSWER), (read.rival_rank, RIVAL)):
            _band(lower, x, 1 + ranks[..., -1], colour)
        upper.set(ylim=(-0.02, 1.02), ylabel="probability")
        lower.set_yscale("log")
        lower.invert_yaxis()
        lower.minorticks_off()
        lower.yaxis.set_major_formatter(lambda rank, _: f"{rank:,.0f}")
        lower.set(ylabel="rank", xlabel="layers done (half a step: after the attention)")
        half = float(read.takeover().double().quantile(0.5))
        for axes in (upper, lower):
            axes.grid(axis="y", color=FAINT, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.set_xlim(-0.2, float(x[-1]) + 0.2)
            step = 1 if n_stages <= 34 else 2 if n_stages <= 80 else 4
            axes.set_xticks(range(0, n_stages // 2 + 1, step))
            if 0 < half < n_stages:
                axes.axvline(half / 2, color=SOFT, linewidth=0.9, linestyle=":")
        upper.legend(frameon=False, fontsize=8, loc="upper left")
        return svg_text(figure)


def lengths_figure(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Mean probability (above) of the next member, and how often it is the likeliest token (below), by how many members
    are shown: rows of `ByLength.table`, a line per task with its 95 % intervals."""
    tasks, longest = list(dict.fromkeys(row["task"] for row in rows)), max(row["members"] for row in rows)
    with mpl.rc_context(STYLE):
        figure, *plots = _two_plots(max(0.36 * longest, 3.6), title)
        for axes, which, label in zip(plots, ("answer", "top1"), ("probability", "share top-1"), strict=True):
            for i, task in enumerate(tasks):
                own, colour = [row for row in rows if row["task"] == task], task_colour(i)
                x, means = [row["members"] for row in own], [row[which] for row in own]
                axes.plot(x, means, "-o", color=colour, markersize=3.5, linewidth=1.5, label=words(task))
                low, high = interval_errors(means, [(row[f"{which}_low"], row[f"{which}_high"]) for row in own])
                axes.fill_between(x, means - low, means + high, color=colour, alpha=0.15, linewidth=0)
            axes.grid(axis="y", color=FAINT, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.set(xlim=(0.7, longest + 0.3), ylim=(-0.03, 1.03), ylabel=label)
            axes.set_xticks(range(1, longest + 1))
        plots[0].legend(frameon=False, fontsize=8, loc="lower right")
        plots[1].set_xlabel("members shown")
        return svg_text(figure)


def _two_plots(width: float, title: str) -> tuple[Figure, Axes, Axes]:
    """A figure with a plot above another, of a width in inches."""
    figure, upper = boxed(width, 3.4, title, 0.75, 0.25, 0.55)
    box = upper.get_position()
    upper.set_position((box.x0, box.y0 + 0.55 * box.height, box.width, 0.45 * box.height))
    lower = figure.add_axes((box.x0, box.y0, box.width, 0.45 * box.height))
    lower.spines[["top", "right", "left", "bottom"]].set_visible(False)
    lower.tick_params(length=0)
    return figure, upper, lower


def _band(
    axes: Axes,
    x: Tensor,
    values: Float[Tensor, "stage prompt"],
    colour: str,
    label: str | None = None,
    middle: Tensor | None = None,
) -> None:
    quarters = values.double().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=1)
    axes.fill_between(x.numpy(), quarters[0].numpy(), quarters[2].numpy(), color=colour, alpha=0.18, linewidth=0)
    line = quarters[1] if middle is None else middle
    axes.plot(x.numpy(), line.numpy(), color=colour, linewidth=1.6, label=label)


def top_tokens_figure(read: Lens, title: str, prompt: int = 0) -> str:
    """The likeliest token after every layer (rows, the last on top) at every position read, for one prompt.

    The prompt's own tokens stand below; cells are darker the likelier their token is.
    """
    tops, sure = read.top_tokens[::2, prompt, :, 0], read.top_probabilities[::2, prompt, :, 0].double()
    labels = [token_texts(row.tolist(), read.tokenizer) for row in tops]
    below = token_texts(read.task.clean[prompt, list(read.positions)].tolist(), read.tokenizer)
    cell = max(0.5, 0.12 + 0.8 * inches([text[:12] for row in labels for text in row]))
    names = ["embedding", *(f"layer {layer}" for layer in range(len(labels) - 1))]
    with mpl.rc_context(STYLE):
        size = cell * len(below), 0.24 * len(labels)
        figure, axes = boxed(*size, title, 0.2 + inches(names), 0.15, 0.4 + 0.75 * inches(below))
        axes.pcolormesh(sure.numpy(), cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=0.6)
        for row, texts in enumerate(labels):
            for column, text in enumerate(texts):
                ink = "white" if float(sure[row, column]) > 0.6 else INK
                shown = text if len(text) <= 12 else text[:11] + "…"
                axes.text(column + 0.5, row + 0.5, shown, ha="center", va="center", fontsize=7, color=ink)
        axes.set_yticks(np.arange(len(labels)) + 0.5, names, fontsize=8)
        axes.set_xticks(np.arange(len(below)) + 0.5, below, fontsize=8, rotation=45, ha="right", rotation_mode="anchor")
        return svg_text(figure)


def attribution_figure(rows: Sequence[Mapping[str, Any]], title: str, n_most: int = 24) -> str:
    """Direct terms of the logit difference, from the rows of `Attribution.table`: the largest, with their intervals."""
    largest = sorted(rows, key=lambda row: -abs(row["direct"]))[:n_most]
    colours = {"head": PALETTE[0], "mlp": PALETTE[1], "neuron": PALETTE[2]}
    names = {"head": "head", "mlp": "MLP", "neuron": "neuron (part of its MLP)"}
    with mpl.rc_context(STYLE):
        figure, axes = boxed(max(0.3 * len(largest), 3.4), 1.8, title, 0.75, 0.2, 0.75)
        for kind, colour in colours.items():
            at = [i for i, row in enumerate(largest) if row["kind"] == kind]
            if at:
                heights = [largest[i]["direct"] for i in at]
                errors = interval_errors(heights, [(largest[i]["low"], largest[i]["high"]) for i in at])
                axes.bar(at, heights, 0.72, color=colour, yerr=errors, ecolor=SOFT, capsize=1.5, label=names[kind])
        axes.axhline(0, color=SOFT, linewidth=0.6)
        axes.set_xticks(range(len(largest)), [row["component"] for row in largest], rotation=60, fontsize=8)
        axes.set(xlim=(-0.6, max(len(largest), 10) - 0.4), ylabel="logits")
        if largest:
            axes.legend(frameon=False, fontsize=8, loc="upper right")
        return svg_text(figure)
