"""The figures of a study, as SVG text: pure functions of numbers, the same bytes for the same numbers.

Colours stay apart for colour-blind readers (Okabe and Ito's palette, a red-blue scale). A deep model lies on its side,
layers from left to right, in the heat map and in the overlay alike; a shallow one stands on its first layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from subcircuit.analysis.circuit import Circuit, TraceStep, intersection
from subcircuit.analysis.curves import Curve
from subcircuit.analysis.drawing import (
    BAND,
    FAINT,
    INK,
    LETTER_INCHES,
    PALETTE,
    SOFT,
    STYLE,
    add_legend,
    boxed,
    colour_bar_axes,
    inches,
    interval_errors,
    marks,
    segments,
    stacked,
    svg_text,
    task_colour,
    words,
)
from subcircuit.analysis.overlap import Overlap
from subcircuit.analysis.plural import counted

DEEP = 16
"""From so many layers on a model is drawn on its side."""
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def heatmap_figure(heads: Sequence[Sequence[float]], mlps: Sequence[float], title: str, n_labels: int = 10) -> str:
    """Mean effects [layer, head] and [layer] on one scale around 0, the MLPs apart; the largest are written out.

    The colours span what heads do: an MLP that does more is darkest, with its number in it. NaN is left blank.
    """
    grid = np.column_stack([np.asarray(heads, float), np.asarray(mlps, float)])
    n_layers, n_heads = grid.shape[0], grid.shape[1] - 1
    finite = np.nan_to_num(np.abs(grid))
    limit = float(finite[:, :n_heads].max(initial=0.0)) or float(finite.max(initial=0.0)) or 1.0
    beyond = bool((finite > limit).any())
    with mpl.rc_context(STYLE):
        cell = (0.31, 0.3) if n_layers >= DEEP else (0.4, 0.3)
        figure, axes, deep = _layer_grid(n_layers, n_heads, title, cell=cell, below=0.6, right=0.8)
        edges = [*(np.arange(n_heads + 1) - 0.5), n_heads, n_heads + 1]
        cells = np.insert(np.ma.masked_invalid(grid), n_heads, np.ma.masked, axis=1)
        layers, colours = np.arange(n_layers + 1) - 0.5, Normalize(-limit, limit)
        mesh = (layers, edges, cells.T) if deep else (edges, layers, cells)
        scale = axes.pcolormesh(*mesh, cmap="RdBu", norm=colours, edgecolors="white", linewidth=0.6)
        for layer, column in sorted(np.ndindex(grid.shape), key=lambda at: -finite[at])[:n_labels]:
            value = float(grid[layer, column])
            if abs(value) >= 0.02 * limit:
                ink = "white" if abs(value) > 0.6 * limit else INK
                place = _place(layer, column, n_heads, deep)
                axes.text(*place, _short(value), ha="center", va="center", fontsize=6.5, color=ink)
        bar = colour_bar_axes(figure, axes)
        figure.colorbar(scale, cax=bar, extend="both" if beyond else "neither")
        bar.tick_params(labelsize=8, length=0)
        return svg_text(figure)


def overlay_figure(circuits: Mapping[str, Circuit], n_layers: int, n_heads: int, title: str) -> str:
    """Circuits of several tasks on one grid of heads and MLPs: a colour per task, nodes of all tasks ringed. Features,
    of which there may be thousands, are counted below it."""
    legend = [(task_colour(i), _legend_text(task, circuit)) for i, (task, circuit) in enumerate(circuits.items())]
    several = len(circuits) > 1
    cell = 0.34 if n_layers >= DEEP or n_heads > 8 else 0.44
    n_lines = len(legend) + several
    widest = max((len(text) for _, text in legend), default=0)
    with mpl.rc_context(STYLE):
        figure, axes, deep = _layer_grid(
            n_layers,
            n_heads,
            title,
            cell=(cell, cell),
            below=0.62 + 0.22 * n_lines,
            min_width=0.6 + LETTER_INCHES * widest,
        )
        nodes = {
            (layer, column): [i for i, circuit in enumerate(circuits.values()) if _has(circuit, layer, column, n_heads)]
            for layer in range(n_layers)
            for column in range(n_heads + 1)
        }
        where = {at: _place(*at, n_heads, deep) for at in nodes}
        size = 72 * cell * 0.74
        shared = [where[at] for at, tasks in nodes.items() if several and len(tasks) == len(circuits)]
        _bands(axes, n_layers, n_heads, deep)
        marks(axes, [where[at] for at, tasks in nodes.items() if not tasks], size * 0.22, facecolor=FAINT)
        for tasks in sorted({tuple(tasks) for tasks in nodes.values()} - {()}):
            places = [where[at] for at, of in nodes.items() if tuple(of) == tasks]
            segments(axes, places, size, [task_colour(i) for i in tasks])
        marks(axes, shared, size * 1.16, facecolor="none", edgecolor=INK, linewidth=1.7)
        add_legend(figure, legend, _shared_text(nodes, circuits, n_heads) if several else None)
        return svg_text(figure)


def matrix_figure(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    fmt: str = "{:.2f}",
    intervals: Sequence[Sequence[Sequence[float] | None]] | None = None,
) -> str:
    """A small matrix [row, column] with its numbers written in the cells, and their intervals below them."""
    grid = np.asarray(values, float).reshape(len(rows), len(columns))
    finite = grid[np.isfinite(grid)]
    low = min(0.0, float(finite.min(initial=0.0)))
    high = max(float(finite.max(initial=0.0)), 1e-9)
    row_names, column_names = [stacked(name) for name in rows], [stacked(name) for name in columns]
    width = max(0.75, 0.1 + inches(column_names))
    with mpl.rc_context(STYLE):
        figure, axes = boxed(width * len(columns), 0.46 * len(rows), title, 0.25 + inches(row_names), 0.15, 0.5)
        axes.pcolormesh(grid, cmap="GnBu", vmin=low, vmax=high * 1.15, edgecolors="white", linewidth=1)
        axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
        axes.set_xticks(np.arange(len(columns)) + 0.5, column_names)
        axes.set_yticks(np.arange(len(rows)) + 0.5, row_names)
        for (row, column), value in np.ndenumerate(grid):
            text = fmt.format(value).replace("-", "−") if math.isfinite(value) else "–"
            ink = "white" if value > low + 0.7 * (high - low) else INK
            ends = intervals[row][column] if intervals is not None else None
            axes.text(column + 0.5, row + (0.36 if ends else 0.5), text, ha="center", va="center", color=ink)
            if ends:
                below = " to ".join(map(fmt.format, ends)).replace("-", "−")
                axes.text(column + 0.5, row + 0.76, below, ha="center", va="center", color=ink, fontsize=6.5)
        return svg_text(figure)


def overlap_figure(
    overlaps: Sequence[Sequence[Overlap]], names: Sequence[str], title: str, significant: float = 0.05
) -> str:
    """Jaccard index of every pair of circuits, with what chance gives below it; ringed where p is small."""
    labels = [stacked(name) for name in names]
    size = (max(0.95, 0.1 + inches(labels)), 0.62)
    n = len(names)
    with mpl.rc_context(STYLE):
        left, height = 0.25 + inches(labels), size[1] * n
        figure, axes = boxed(size[0] * n, height, title, left, 0.15, 0.75)
        grid = np.array([[each.jaccard for each in row] for row in overlaps], float)
        axes.pcolormesh(grid, cmap="GnBu", vmin=0, vmax=1.15, edgecolors="white", linewidth=1)
        axes.set(xlim=(0, n), ylim=(n, 0))
        axes.set_xticks(np.arange(n) + 0.5, labels)
        axes.set_yticks(np.arange(n) + 0.5, labels)
        for (row, column), value in np.ndenumerate(grid):
            ink, middle = "white" if value > 0.7 else INK, (column + 0.5, row + 0.5)
            apart = row != column
            place = (middle[0], middle[1] - 0.17 * apart)
            axes.text(*place, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=10)
            if apart:
                each = overlaps[row][column]
                below = f"chance {each.expected_jaccard:.2f}\n{_p_text(each.p)}"
                axes.text(middle[0], middle[1] + 0.2, below, ha="center", va="center", color=ink, fontsize=6.5)
                if each.p <= significant:
                    frame = (column + 0.04, row + 0.05)
                    axes.add_patch(Rectangle(frame, 0.92, 0.9, fill=False, edgecolor=INK, linewidth=1.1))
        whole = figure.get_size_inches()
        note = f"framed: p ≤ {significant:g} beside random circuits"
        figure.text(0.1 / whole[0], 0.1 / whole[1], note, color=SOFT, fontsize=8)
        return svg_text(figure)


def curve_figure(curves: Mapping[str, Curve], title: str) -> str:
    """Recovered share of the metric against circuit size, with intervals; CPR and CMD in the legend."""
    with mpl.rc_context(STYLE):
        figure, axes = boxed(5.2, 2.6, title, 0.65, 0.2, 0.55)
        for level in (0, 1):
            axes.axhline(level, color=FAINT, linewidth=1, zorder=0)
        low, high = 0.0, 1.0
        for i, (name, curve) in enumerate(curves.items()):
            x, colour = [100 * share for share in curve.shares], task_colour(i)
            mean, lower, upper = (part.tolist() for part in curve.recovered)
            axes.fill_between(x, lower, upper, color=colour, alpha=0.15, linewidth=0)
            areas = f"CPR {float(curve.cpr.mean):.2f}, CMD {float(curve.cmd.mean):.2f}".replace("-", "−")
            axes.plot(x, mean, "-o", color=colour, markersize=3.5, linewidth=1.5, label=f"{words(name)}: {areas}")
            low, high = min(low, *mean), max(high, *mean)
        axes.set(xlim=(0, 101), ylim=(low - 0.08, high + 0.08))
        axes.set_xlabel("share of all items kept, the most important first (%)")
        axes.set_ylabel("recovered share")
        axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.16))
        return svg_text(figure)


def _p_text(p: float) -> str:
    if p >= 1e-3:
        return f"p {p:.2f}" if p >= 0.095 else f"p {p:.1g}"
    factor, power = f"{p:.0e}".split("e-")
    return f"p {factor} · 10⁻{str(int(power)).translate(_RAISED)}"


def drops_figure(
    drops: Mapping[str, float],
    title: str,
    intervals: Mapping[str, tuple[float, float] | None] | None = None,
    n_most: int = 30,
) -> str:
    """Points of score that a circuit loses without each of its nodes, the dearest first, with their intervals."""
    dearest = sorted(drops.items(), key=lambda item: -item[1])[:n_most]
    more = f" (the {n_most} dearest of {len(drops)})" if len(drops) > n_most else ""
    with mpl.rc_context(STYLE):
        figure, axes = boxed(max(0.29 * len(dearest), 3.0), 1.6, title + more, 0.6, 0.15, 0.65)
        for kind, colour in (("head", PALETTE[0]), ("MLP", PALETTE[1])):
            at = [x for x, (node, _) in enumerate(dearest) if node.startswith("m") == (kind == "MLP")]
            if at:
                heights = [dearest[x][1] for x in at]
                ends = [(intervals or {}).get(dearest[x][0]) or (None, None) for x in at]
                errors = interval_errors(heights, ends)
                axes.bar(at, heights, 0.72, color=colour, yerr=errors, ecolor=SOFT, capsize=1.5, label=kind)
        axes.axhline(0, color=SOFT, linewidth=0.6)
        axes.set_xticks(range(len(dearest)), [node for node, _ in dearest], rotation=60, fontsize=8)
        axes.set_xlim(-0.6, max(len(dearest), 10) - 0.4)
        axes.set_ylabel("points lost")
        if dearest:
            axes.legend(frameon=False, loc="upper right")
        return svg_text(figure)


def trace_figure(trace: Sequence[TraceStep], title: str, threshold: float | None = None) -> str:
    """A discovery, candidate by candidate: what the score would be without it (dots), and the score so far (line)."""
    x = np.arange(1, len(trace) + 1)
    without = np.array([step.score_without for step in trace], float)
    removed = np.array([step.removed for step in trace], bool)
    so_far = [100.0]
    for step in trace:
        so_far.append(step.score_without if step.removed else so_far[-1])
    # One candidate may cost thousands of points; the line is what is looked for.
    low = min(0.0, *so_far) - 6
    with mpl.rc_context(STYLE):
        figure, axes = boxed(8.7, 1.9, title, 0.6, 0.15, 0.55)
        for boundary in [i for i in range(1, len(trace)) if trace[i].sweep != trace[i - 1].sweep]:
            axes.axvline(boundary + 0.5, color=FAINT, linewidth=1, linestyle=":")
        if threshold is not None:
            axes.axhline(100 - threshold, color=SOFT, linewidth=0.8, linestyle="--")
        shown = np.maximum(without, low + 2)
        axes.plot(x[removed], shown[removed], "o", color=PALETTE[4], markersize=3, label="removed")
        axes.plot(x[~removed], shown[~removed], "o", color=PALETTE[5], markersize=3, label="kept")
        axes.step([0, *x], so_far, where="post", color=INK, linewidth=1.2, zorder=1, label="score of what is left")
        axes.set(xlim=(0, len(trace) + 1), ylabel="score")
        axes.set_ylim(bottom=low)
        axes.set_xlabel("candidate (dotted lines: a new sweep; dashed: the threshold)")
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower left")
        return svg_text(figure)


def random_figure(scores: Mapping[str, float], baselines: Mapping[str, Sequence[float]], title: str) -> str:
    """Each task's circuit (diamond) beside random circuits of the same size: all of them on a thin line, the middle
    95 % on a thick one, their mean a dot."""
    names = [stacked(task) for task in scores]
    with mpl.rc_context(STYLE):
        figure, axes = boxed(3.7, 0.46 * len(scores), title, 0.25 + inches(names), 0.4, 0.55)
        axes.axvline(0, color=FAINT, linewidth=1, zorder=0)
        axes.axvline(100, color=FAINT, linewidth=1, zorder=0)
        for row, (task, score) in enumerate(scores.items()):
            values = [value for value in baselines.get(task, ()) if math.isfinite(value)]
            if values:
                middle = np.quantile(values, [0.025, 0.975])
                for ends, width in (((min(values), max(values)), 1), (middle, 5)):
                    axes.plot(ends, [row, row], color="#8a90a0", linewidth=width, solid_capstyle="butt")
                axes.plot([np.mean(values)], [row], "o", color="white", markeredgecolor="#8a90a0", markersize=5)
            axes.plot([score], [row], "D", color=task_colour(row), markersize=8)
            axes.annotate(f"{score:.0f}", (score, row), (9, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(scores)), names)
        axes.set_ylim(len(scores) - 0.5, -0.5)
        axes.set_xlabel("score (diamond: found; lines: random, thick for 95 %)")
        return svg_text(figure)


def bars_figure(values: Mapping[str, float], title: str, unit: str, n_first: int = 0) -> str:
    """A horizontal bar per name with its number, the first `n_first` of them in a colour of their own."""
    names = list(values)
    highest = max(values.values(), default=0.0) or 1.0
    left = 0.25 + LETTER_INCHES * max((len(name) for name in names), default=0)
    with mpl.rc_context(STYLE):
        figure, axes = boxed(4.2, 0.27 * len(names), title, left, 0.75, 0.45)
        colours = [PALETTE[0] if i < n_first else SOFT for i in range(len(names))]
        axes.barh(range(len(names)), list(values.values()), color=colours, height=0.7)
        for row, value in enumerate(values.values()):
            text = f"{value:,.{0 if value >= 10 else 1}f}"
            axes.annotate(text, (value, row), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(names)), names)
        axes.set(xlim=(0, highest), ylim=(len(names) - 0.5, -0.5), xlabel=unit)
        return svg_text(figure)


def _layer_grid(
    n_layers: int,
    n_heads: int,
    title: str,
    *,
    cell: tuple[float, float],
    below: float,
    right: float = 0.2,
    min_width: float = 0.0,
) -> tuple[Figure, Axes, bool]:
    """Axes of layers against heads with the MLPs apart, a cell of given inches; whether layers run to the right."""
    deep = n_layers >= DEEP
    across = n_heads + 1.5
    n_x, n_y = (n_layers, across) if deep else (across, n_layers)
    width, height = cell[0] * n_x, cell[1] * n_y
    margin = max(right, min_width - width - 0.75)
    figure, axes = boxed(width, height, title, 0.75, margin, below)
    columns = [_place(0, column, n_heads, deep)[1 if deep else 0] for column in range(n_heads + 1)]
    step = 1 if n_heads <= 16 else 2 if n_heads <= 32 else 4
    column_ticks = [*columns[:-1:step], columns[-1]]
    column_names = [*map(str, range(0, n_heads, step)), "MLP"]
    layer_ticks = range(0, n_layers, 1 if n_layers <= 40 else 4)
    along, other = (axes.xaxis, axes.yaxis) if deep else (axes.yaxis, axes.xaxis)
    along.set_ticks(layer_ticks)
    other.set_ticks(column_ticks, column_names)
    axes.set(xlim=(-0.5, n_x - 0.5), ylim=(-0.5, n_y - 0.5))
    axes.set(xlabel="layer" if deep else "head", ylabel="head" if deep else "layer")
    return figure, axes, deep


def _place(layer: int, column: int, n_heads: int, deep: bool) -> tuple[float, float]:
    """Where a head (column < n_heads) or an MLP (column n_heads, half a cell apart) is drawn."""
    across = column if column < n_heads else n_heads + 0.5
    return (layer, across) if deep else (across, layer)


def _has(circuit: Circuit, layer: int, column: int, n_heads: int) -> bool:
    return (layer, column) in circuit.heads if column < n_heads else layer in circuit.mlps


def _bands(axes: Axes, n_layers: int, n_heads: int, deep: bool) -> None:
    """Every second layer on a faint ground, so that the eye can follow it."""
    for layer in range(0, n_layers, 2):
        corner, size = (layer - 0.5, -0.5), (1.0, n_heads + 1.5)
        if not deep:
            corner, size = corner[::-1], size[::-1]
        axes.add_patch(Rectangle(corner, *size, facecolor=BAND, linewidth=0, zorder=0))


def _legend_text(task: str, circuit: Circuit) -> str:
    kept = f", {circuit.score:.0f} % of the logit difference" if circuit.score is not None else ""
    heads, mlps = counted(len(circuit.heads), "head"), counted(len(circuit.mlps), "MLP")
    features = f", {counted(len(circuit.features), 'feature')} (not drawn)" if circuit.features else ""
    return f"{words(task)}: {heads} and {mlps}{features}{kept}"


def _shared_text(
    nodes: Mapping[tuple[int, int], Sequence[int]], circuits: Mapping[str, Circuit], n_heads: int
) -> tuple[list[str], str]:
    columns = [column for (_, column), tasks in nodes.items() if len(tasks) == len(circuits)]
    n_mlps = columns.count(n_heads)
    text = f"in every circuit: {counted(len(columns) - n_mlps, 'head')} and {counted(n_mlps, 'MLP')}"
    if any(circuit.features for circuit in circuits.values()):
        text += f", {counted(len(intersection(list(circuits.values())).features), 'feature')}"
    return [task_colour(i) for i in range(len(circuits))], text


def _short(value: float) -> str:
    """Two figures, with the sign that a minus has in print."""
    digits = 0 if abs(value) >= 9.95 else 1 if abs(value) >= 0.995 else 2
    return f"{value:.{digits}f}".replace("-", "−")
