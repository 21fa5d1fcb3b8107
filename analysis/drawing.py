"""What all figures are drawn with: colours, a plot with a title, discs, a legend, and the SVG text in the end."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.transforms import Affine2D, IdentityTransform

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999933", "#882255")
"""A colour per task, in the order of the tasks; after eight they come again."""
INK, SOFT, FAINT, BAND = "#1f2430", "#6b7280", "#d5d9e2", "#f4f6fa"

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a name is one
    "svg.hashsalt": "subcircuit",  # the same picture twice is the same file
    "axes.edgecolor": FAINT,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "xtick.color": INK,
    "ytick.color": INK,
}
"""matplotlib's settings while a figure is drawn."""
LETTER_INCHES = 0.085
"""Width of a letter of 9 points, enough for any sans-serif font."""


def task_colour(index: int) -> str:
    """The colour of a figure's task, by its place among them."""
    return PALETTE[index % len(PALETTE)]


def words(name: str) -> str:
    """A task's name as it is read."""
    return name.replace("_", " ")


def boxed(width: float, height: float, title: str, left: float, right: float, below: float) -> tuple[Figure, Axes]:
    """A figure with a title and one plot of width × height inches, with given margins or as much as the title needs."""
    whole = (max(left + width + right, 0.2 + 1.2 * LETTER_INCHES * len(title)), below + height + 0.42)
    figure = Figure(figsize=whole, facecolor="white")
    FigureCanvasSVG(figure)
    axes = figure.add_axes((left / whole[0], below / whole[1], width / whole[0], height / whole[1]))
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.set_facecolor("none")
    axes.tick_params(length=0)
    figure.text(0.1 / whole[0], 1 - 0.12 / whole[1], title, ha="left", va="top", fontsize=10.5, fontweight="bold")
    return figure, axes


def add_legend(figure: Figure, lines: Sequence[tuple[str, str]], shared: tuple[list[str], str] | None = None) -> None:
    """Lines at the foot of the figure, each a colour and a text, with a disc like those of the grid.

    shared: colours and text of a last line whose disc has them all, ringed.
    """
    width, height = figure.get_size_inches()
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    entries: list[tuple[list[str], str, bool]] = [([colour], text, False) for colour, text in lines]
    if shared is not None:
        entries.append((*shared, True))
    for i, (colours, text, ringed) in enumerate(reversed(entries)):
        place = (0.32, 0.2 + 0.22 * i)
        segments(axes, [place], 9, colours)
        if ringed:
            marks(axes, [place], 11, facecolor="none", edgecolor=INK, linewidth=1.5)
        axes.text(0.5, place[1], text, va="center_baseline")


def marks(axes: Axes, places: Sequence[tuple[float, float]], points: float, **style: Any) -> None:
    """Discs of a diameter in points."""
    _stamp(axes, Path.circle(radius=0.5), places, points, **({"linewidth": 0} | style))


def segments(axes: Axes, places: Sequence[tuple[float, float]], points: float, colours: Sequence[str]) -> None:
    """Discs of a diameter in points, split evenly between colours, from the top to the right."""
    for i, colour in enumerate(colours):
        end, start = 90 - 360 * i / len(colours), 90 - 360 * (i + 1) / len(colours)
        whole = Path.wedge(start, end) if len(colours) > 1 else Path.circle()
        wedge = whole.transformed(Affine2D().scale(0.5))
        _stamp(axes, wedge, places, points, facecolor=colour, edgecolor="white", linewidth=0.7 * (len(colours) > 1))


def _stamp(axes: Axes, path: Path, places: Sequence[tuple[float, float]], points: float, **style: Any) -> None:
    # One shape used many times: a fifth of the text of separate patches.
    if places:
        stamps = PathCollection(
            [path],
            sizes=[points**2],
            offsets=places,
            offset_transform=axes.transData,
            transform=IdentityTransform(),
            zorder=2,
            **style,
        )
        axes.add_collection(stamps, autolim=False)


def colour_bar_axes(figure: Figure, axes: Axes) -> Axes:
    """A place for a colour bar to the right of a plot, at half its height."""
    box = axes.get_position()
    width, height = figure.get_size_inches()
    tall = min(box.height, 2.6 / height)
    return figure.add_axes((box.x1 + 0.18 / width, box.y0 + (box.height - tall) / 2, 0.13 / width, tall))


def stacked(name: str) -> str:
    """A task's name, a word a line."""
    return name.replace("_", "\n")


def inches(names: Sequence[str]) -> float:
    """Width that the longest line of some names needs."""
    return LETTER_INCHES * max((len(line) for name in names for line in name.split("\n")), default=0)


def interval_errors(
    values: Sequence[float], ends: Sequence[tuple[float | None, float | None]]
) -> Float[np.ndarray, "2 value"]:
    """Lengths of error bars below and above values whose intervals have these ends; 0 where there is no interval."""
    lows, highs = np.array(ends, dtype=float).reshape(-1, 2).T
    # Resampling may leave a mean a rounding error outside its interval.
    lengths: np.ndarray = np.nan_to_num(np.clip([values - lows, highs - values], 0, None))
    return lengths


def svg_text(figure: Figure) -> str:
    """The figure as SVG, without the date and the programs that made it."""
    text = io.StringIO()
    save: Callable[..., None] = figure.savefig
    save(text, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    svg = text.getvalue()
    # matplotlib repeats every text as a comment.
    return re.sub(r"\s*<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
