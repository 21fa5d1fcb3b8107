"""The figures of a study, as SVG text. Colours stay apart for colour-blind readers (Okabe and Ito's palette)."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Wedge

from subcircuit.analysis.circuit import Circuit

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999933", "#882255")
INK, FAINT = "#1f2430", "#d9dce3"

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "subcircuit",  # the same picture twice is the same file
    "axes.edgecolor": FAINT,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    return figure, axes


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def heatmap_figure(heads: Sequence[Sequence[float]], mlps: Sequence[float], title: str, n_labels: int = 8) -> str:
    """Mean effects by layer (rows, the first at the bottom) and head, with the MLPs as a last column."""
    with mpl.rc_context(_STYLE):
        grid = np.column_stack([np.asarray(heads, float), np.full(len(mlps), np.nan), np.asarray(mlps, float)])
        n_layers, n_columns = grid.shape
        figure, axes = _figure(2.2 + 0.34 * n_columns, 1.5 + 0.22 * n_layers)
        limit = np.nanmax(np.abs(grid)) or 1.0
        image = axes.imshow(grid, cmap="RdBu", vmin=-limit, vmax=limit, origin="lower", aspect="auto")
        axes.set_xticks([*range(n_columns - 2), n_columns - 1], [*(str(head) for head in range(n_columns - 2)), "MLP"])
        axes.set_yticks(range(0, n_layers, max(1, n_layers // 15)))
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        axes.set_title(title, loc="left", fontsize=10)
        for index in np.argsort(-np.abs(np.nan_to_num(grid)), axis=None)[:n_labels]:
            row, column = np.unravel_index(index, grid.shape)
            value = grid[row, column]
            colour = "white" if abs(value) > 0.55 * limit else INK
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=6.5, color=colour)
        figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, label="change of the logit difference")
        return _svg(figure)


def overlay_figure(circuits: Mapping[str, Circuit], n_layers: int, n_heads: int, title: str) -> str:
    """Circuits of several tasks on one grid of heads and MLPs: a colour per task, nodes of all tasks ringed."""
    with mpl.rc_context(_STYLE):
        wide = n_layers > 16
        # A deep model lies on its side: layers from left to right.
        columns = n_heads + 1.5
        size = (1.2 + 0.33 * n_layers, 1.6 + 0.33 * columns) if wide else (1.6 + 0.42 * columns, 1.7 + 0.42 * n_layers)
        figure, axes = _figure(max(size[0], 5.2), size[1])
        colours = dict(zip(circuits, PALETTE, strict=False))
        for layer in range(n_layers):
            for head in range(n_heads + 1):
                column = head if head < n_heads else n_heads + 0.5
                centre = (layer, column) if wide else (column, layer)
                of = [
                    task
                    for task, circuit in circuits.items()
                    if ((layer, head) in circuit.heads if head < n_heads else layer in circuit.mlps)
                ]
                _node(axes, centre, [colours[task] for task in of], len(of) == len(circuits) > 1)
        heads, mlp = [str(head) for head in range(n_heads)], n_heads + 0.5
        layers = range(0, n_layers, max(1, n_layers // 15))
        if wide:
            axes.set(xticks=layers, xlabel="layer", ylabel="head", yticks=[*range(n_heads), mlp])
            axes.set_yticklabels([*heads, "MLP"])
            axes.set(xlim=(-0.7, n_layers - 0.3), ylim=(-0.7, n_heads + 1.2))
        else:
            axes.set(yticks=layers, ylabel="layer", xlabel="head", xticks=[*range(n_heads), mlp])
            axes.set_xticklabels([*heads, "MLP"])
            axes.set(ylim=(-0.7, n_layers - 0.3), xlim=(-0.7, n_heads + 1.2))
        axes.set_aspect("equal")
        axes.set_title(title, loc="left", fontsize=10)
        for task, circuit in circuits.items():
            score = f", score {circuit.score:.0f}" if circuit.score is not None else ""
            label = f"{task.replace('_', ' ')}: {len(circuit.heads)} heads, {len(circuit.mlps)} MLPs{score}"
            axes.plot([], [], "o", color=colours[task], label=label)
        if len(circuits) > 1:
            axes.plot([], [], "o", color="white", markeredgecolor=INK, markeredgewidth=1.4, label="in every circuit")
        figure.legend(loc="outside lower left", frameon=False, fontsize=8, ncols=2)
        return _svg(figure)


def _node(axes: Axes, centre: tuple[float, float], colours: Sequence[str], shared: bool) -> None:
    if not colours:
        axes.add_patch(Circle(centre, 0.1, color=FAINT, linewidth=0))
        return
    step = 360 / len(colours)
    for i, colour in enumerate(colours):
        axes.add_patch(Wedge(centre, 0.36, 90 + i * step, 90 + (i + 1) * step, color=colour, linewidth=0))
    if shared:
        axes.add_patch(Circle(centre, 0.4, fill=False, edgecolor=INK, linewidth=1.4))


def matrix_figure(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], title: str, fmt: str = "{:.2f}"
) -> str:
    """A small matrix with its numbers written in the cells."""
    with mpl.rc_context(_STYLE):
        grid = np.asarray(values, float)
        figure, axes = _figure(1.9 + 0.95 * len(columns), 1.2 + 0.5 * len(rows))
        low, high = min(0.0, float(grid.min())), max(float(grid.max()), 1e-9)
        axes.imshow(grid, cmap="GnBu", vmin=low, vmax=high * 1.15, aspect="auto")
        axes.set_xticks(range(len(columns)), [name.replace("_", " ") for name in columns])
        axes.set_yticks(range(len(rows)), [name.replace("_", " ") for name in rows])
        axes.set_title(title, loc="left", fontsize=10)
        for (row, column), value in np.ndenumerate(grid):
            dark = value > low + 0.7 * (high - low)
            axes.text(column, row, fmt.format(value), ha="center", va="center", color="white" if dark else INK)
        return _svg(figure)


def drops_figure(drops: Mapping[str, float], title: str, n_most: int = 24) -> str:
    """Points of score that a circuit loses without each of its nodes, the dearest first."""
    with mpl.rc_context(_STYLE):
        largest = sorted(drops.items(), key=lambda item: -item[1])[:n_most]
        figure, axes = _figure(1.5 + 0.3 * max(len(largest), 8), 2.4)
        colours = [PALETTE[1] if name.startswith("m") else PALETTE[0] for name, _ in largest]
        axes.bar([name for name, _ in largest], [drop for _, drop in largest], color=colours)
        axes.axhline(0, color=INK, linewidth=0.6)
        axes.tick_params(axis="x", rotation=60)
        axes.set_ylabel("points lost")
        axes.set_title(title, loc="left", fontsize=10)
        return _svg(figure)


def random_figure(scores: Mapping[str, float], baselines: Mapping[str, Sequence[float]], title: str) -> str:
    """Each task's circuit (line) beside random circuits of the same size (dots)."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(5.4, 0.9 + 0.5 * len(scores))
        for row, (task, score) in enumerate(scores.items()):
            values = [value for value in baselines.get(task, ()) if math.isfinite(value)]
            axes.plot(values, [row] * len(values), "o", color="#8a90a0", alpha=0.5, markersize=5, markeredgewidth=0)
            axes.plot([score], [row], "D", color=PALETTE[row % len(PALETTE)], markersize=8)
        axes.set_yticks(range(len(scores)), [task.replace("_", " ") for task in scores])
        axes.set_ylim(len(scores) - 0.5, -0.5)
        axes.axvline(0, color=FAINT, linewidth=1, zorder=0)
        axes.axvline(100, color=FAINT, linewidth=1, zorder=0)
        axes.set_xlabel("score: the circuit found (diamond), random circuits of equal size (dots)")
        axes.set_title(title, loc="left", fontsize=10)
        return _svg(figure)
