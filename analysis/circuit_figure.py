"""A circuit as a diagram: heads with their query, key and value inputs, MLPs, and the edges between, as SVG text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, PathPatch
from matplotlib.path import Path

from subcircuit.analysis.circuit import Circuit, intersection, union
from subcircuit.analysis.drawing import (
    BAND,
    FAINT,
    INK,
    PALETTE,
    SOFT,
    STYLE,
    add_legend,
    boxed,
    svg_text,
    task_colour,
    words,
)
from subcircuit.analysis.plural import counted
from subcircuit.engine.patching import Component
from subcircuit.engine.patching.graph import INPUT, LOGITS, Edge

COLOURS = {"q": PALETTE[0], "k": PALETTE[1], "v": PALETTE[2], "mlp": SOFT}
"""Of an edge, by what it leads to; the logits count with the MLPs."""
LEGEND = {"q": "query", "k": "key", "v": "value", "mlp": "MLP or logits"}

Place = tuple[float, float]
UNIT = 0.62
"""Inches between the middles of two heads of a layer."""
WIDTH, HEIGHT = 0.78, 0.36
"""Of a box, in these units."""


@dataclass(frozen=True)
class _Layout:
    """Where everything stands, one unit per head and per layer with nodes; the first layer is at the bottom.

    Features of one dictionary, of which there may be hundreds, are one box that says how many.
    """

    nodes: dict[str, Place]
    width: float
    height: float

    @classmethod
    def of(cls, circuit: Circuit) -> _Layout:
        layers = sorted({node.layer for node in circuit.nodes})
        most = max((sum(at == layer for at, _ in circuit.heads) for layer in layers), default=1)
        nodes: dict[str, Place] = {}
        for row, layer in enumerate(layers, start=1):
            heads = [node for node in circuit.nodes if node.layer == layer and node.kind == "z"]
            left = (most - len(heads)) / 2
            nodes |= {str(head): (left + i + 0.5, 1.25 * row) for i, head in enumerate(heads)}
            if layer in circuit.mlps:
                # Above its layer's heads, which it reads.
                nodes[f"m{layer}"] = most + 0.9, 1.25 * row + 0.5
            for kind, n in Counter(part.kind for part in circuit.features if part.layer == layer).items():
                above = {"resid_feature": -0.25, "z_feature": 0.0, "mid_feature": 0.5, "mlp_feature": 0.5}[kind]
                x = most / 2 if kind in ("z_feature", "mid_feature") else most + 0.9
                nodes[f"{n} × {Component(layer, kind)}".removesuffix("0")] = x, 1.25 * row + above
        height = 1.25 * (len(layers) + 1) + 0.35
        middle = (most + 1.4) / 2
        return cls({INPUT: (middle, 0.0), LOGITS: (middle, height), **nodes}, most + 1.9, height)


def circuit_figure(circuit: Circuit, title: str, group_size: int = 1) -> str:
    """A circuit's nodes by layer, from the embeddings at the bottom to the logits, and its edges.

    An edge has the colour of the input it leads to, and the width of its score where the circuit has one; it is dashed
    where that is negative. Nodes without an edge are faint. `group_size` is the number of heads that share a key.
    """
    layout = _Layout.of(circuit)
    joined = {name for edge in circuit.edges for name in _ends(circuit, edge, group_size)}
    with mpl.rc_context(STYLE):
        figure, axes = _laid_out(circuit, layout, title, below=0.45)
        _draw_edges(axes, circuit, layout, group_size)
        for name, place in layout.nodes.items():
            if name in joined or name not in (INPUT, LOGITS):
                _draw_node(axes, name, place, name in joined or not circuit.edges)
        _draw_inputs(axes, circuit, layout, group_size)
        for i, (kind, word) in enumerate(LEGEND.items()):
            x, y = (0.45 + 0.75 * i) / figure.get_figwidth(), 0.18 / figure.get_figheight()
            figure.text(x, y, f"— {word}", color=COLOURS[kind], va="center", fontsize=8.5, fontweight="bold")
        return svg_text(figure)


def overlay_diagram(circuits: Mapping[str, Circuit], title: str, group_size: int = 1, n_edges: int = 80) -> str:
    """The circuits of several tasks as one diagram: every node has a dot in the colour of each task that has it.

    Of edges the strongest are drawn, `n_edges` and at least half of them such that every circuit has, where there are:
    these dark, in the task's colour those of one, grey those of some. Their strength is the largest score that any task
    gives.
    """
    whole, common = union(list(circuits.values())), set(intersection(list(circuits.values())).edges)
    strength = {
        edge: max(abs(circuit.edge_scores.get(edge, 0.0)) for circuit in circuits.values() if edge in circuit.edges)
        for edge in whole.edges
    }
    strongest = sorted(strength, key=lambda edge: -strength[edge])
    shared = [edge for edge in strongest if edge in common]
    n_others = min(len(strongest) - len(shared), n_edges // 2)
    drawn = shared[: n_edges - n_others] + [edge for edge in strongest if edge not in common][:n_others]
    whole = replace(whole, edges=tuple(drawn), edge_scores={edge: strength[edge] for edge in drawn})
    members = [(task_colour(i), circuit) for i, circuit in enumerate(circuits.values())]
    colour_of = {}
    for edge in drawn:
        having = [colour for colour, circuit in members if edge in circuit.edges]
        colour_of[edge] = having[0] if len(having) == 1 else INK if edge in common else SOFT
    layout = _Layout.of(whole)
    with mpl.rc_context(STYLE):
        named = zip(circuits, members, strict=True)
        lines = [(colour, f"{words(task)}: {_counted(circuit)}") for task, (colour, circuit) in named]
        lines.append((INK, f"in every circuit: {len(common)} edges; of {len(strength)} in any, {len(drawn)} are drawn"))
        figure, axes = _laid_out(whole, layout, title, below=0.45 + 0.22 * len(lines))
        _draw_edges(axes, whole, layout, group_size, colour_of)
        ends = {name for edge in drawn for name in edge}
        for name, place in layout.nodes.items():
            if name in (INPUT, LOGITS) and name not in ends:
                continue
            _draw_node(axes, name, place, True)
            having = [colour for colour, circuit in members if name in map(str, circuit.nodes)]
            dots = [(place[0] + 0.16 * (i - (len(having) - 1) / 2), place[1] + HEIGHT / 2) for i in range(len(having))]
            for dot, colour in zip(dots, having, strict=True):
                axes.add_patch(Circle(dot, 0.07, facecolor=colour, edgecolor="white", linewidth=0.5, zorder=4))
        _draw_inputs(axes, whole, layout, group_size, dict.fromkeys(COLOURS, SOFT))
        add_legend(figure, lines)
        return svg_text(figure)


def _counted(circuit: Circuit) -> str:
    sizes = {"head": len(circuit.heads), "MLP": len(circuit.mlps), "edge": len(circuit.edges)}
    return ", ".join(counted(n, noun) for noun, n in sizes.items())


def _laid_out(circuit: Circuit, layout: _Layout, title: str, below: float) -> tuple[Figure, Axes]:
    size = UNIT * layout.width, UNIT * (layout.height + 0.6)
    figure, axes = boxed(max(size[0], 3.6), size[1], title, 0.8, 0.2, below)
    spare = max(0.0, 3.6 / UNIT - layout.width) / 2
    axes.set(xlim=(-spare, layout.width + spare), ylim=(-0.3, layout.height + 0.3), xticks=[])
    axes.set_yticks(*_layer_ticks(circuit, layout))
    return figure, axes


def _layer_ticks(circuit: Circuit, layout: _Layout) -> tuple[list[float], list[str]]:
    heights = {node.layer: 0.0 for node in circuit.nodes}
    for row, layer in enumerate(heights, start=1):
        heights[layer] = 1.25 * row
    return list(heights.values()), [f"layer {layer}" for layer in heights]


def _ends(circuit: Circuit, edge: Edge, group_size: int) -> Iterator[str]:
    """The nodes that an edge joins: its sender, and what its receiver belongs to."""
    sender, receiver = edge
    yield sender
    if receiver.startswith("a"):
        yield from map(str, circuit.readers(receiver, group_size))
    else:
        yield receiver


def _draw_edges(
    axes: Axes, circuit: Circuit, layout: _Layout, group_size: int, colour_of: Mapping[Edge, str] | None = None
) -> None:
    """Strong edges above weak ones, in the colour of what they lead to unless colours are given."""
    scores = circuit.edge_scores
    most = max(map(abs, scores.values()), default=0.0) or 1.0
    for edge in sorted(circuit.edges, key=lambda edge: abs(scores.get(edge, 0.0))):
        sender, *readers = _ends(circuit, edge, group_size)
        kind = Component.parse(edge[1]).kind if edge[1] != LOGITS else "mlp"
        for reader in readers:
            start, end = layout.nodes[sender], layout.nodes[reader]
            start, end = (start[0], start[1] + HEIGHT / 2), (end[0] + _port(kind), end[1] - HEIGHT / 2)
            share = abs(scores[edge]) / most if edge in scores else 0.3
            style = "--" if scores.get(edge, 0.0) < 0 else "-"
            axes.add_patch(
                PathPatch(
                    _curve(start, end),
                    facecolor="none",
                    edgecolor=COLOURS[kind] if colour_of is None else colour_of[edge],
                    linewidth=0.5 + 3 * share,
                    alpha=0.45 + 0.45 * share,
                    linestyle=style,
                    zorder=1,
                )
            )


def _draw_inputs(
    axes: Axes, circuit: Circuit, layout: _Layout, group_size: int, colours: Mapping[str, str] = COLOURS
) -> None:
    """The queries, keys and values into which edges lead."""
    for receiver in sorted({receiver for _, receiver in circuit.edges if receiver.startswith("a")}):
        kind = Component.parse(receiver).kind
        for reader in circuit.readers(receiver, group_size):
            x, y = layout.nodes[str(reader)]
            at = x + _port(kind), y - HEIGHT / 2
            axes.add_patch(Circle(at, 0.1, facecolor=colours[kind], edgecolor="white", linewidth=0.6, zorder=4))
            axes.text(*at, kind, ha="center", va="center_baseline", fontsize=6, color="white", zorder=5)


def _port(kind: str) -> float:
    """How far from the middle of its box an input is drawn."""
    return {"q": -WIDTH / 3.2, "k": 0.0, "v": WIDTH / 3.2, "mlp": 0.0}[kind]


def _curve(start: Place, end: Place) -> Path:
    """Up out of one box, up into the other; to the right of the boxes between, where they stand in one column."""
    rise = max(end[1] - start[1], 0.3)
    bend = 0.45 * rise
    aside = 0.3 * rise**0.5 if abs(end[0] - start[0]) < 0.05 and rise > 1 else 0.0
    points = [start, (start[0] + aside, start[1] + bend), (end[0] + aside, end[1] - bend), end]
    return Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])


def _draw_node(axes: Axes, name: str, place: Place, joined: bool) -> None:
    width = WIDTH * (1.3 if _is_text(name) else 1)
    corner = place[0] - width / 2, place[1] - HEIGHT / 2
    box = FancyBboxPatch(
        corner,
        width,
        HEIGHT,
        boxstyle="round,pad=0,rounding_size=0.1",
        facecolor=BAND if joined else "white",
        edgecolor=INK if joined else FAINT,
        linewidth=0.8,
        zorder=2,
    )
    axes.add_patch(box)
    ink = INK if joined else SOFT
    axes.text(*place, _label(name), ha="center", va="center", fontsize=8, color=ink, zorder=3)


def _is_text(name: str) -> bool:
    """Whether a box is named for what stands in it: embeddings, logits, features."""
    return name in (INPUT, LOGITS) or "×" in name


def _label(name: str) -> str:
    """`4.4` for a head, `MLP 3`, or the name itself."""
    if _is_text(name):
        return name
    part = Component.parse(name)
    return f"{part.layer}.{part.index}" if part.kind == "z" else f"MLP {part.layer}"
