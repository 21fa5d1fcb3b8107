"""Figures of what heads do, as SVG text: mean attention, roles by task, what heads write for members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.patches import Rectangle
from torch import Tensor

from subcircuit.analysis.drawing import (
    BAND,
    FAINT,
    INK,
    PALETTE,
    SOFT,
    STYLE,
    add_legend,
    boxed,
    colour_bar_axes,
    inches,
    segments,
    svg_text,
    task_colour,
    words,
)
from subcircuit.analysis.head_profile import ov_shares
from subcircuit.analysis.heads import ROLES, HeadRoles
from subcircuit.engine.tokenizer import Tokenizer


def token_texts(tokens: Sequence[int], tokenizer: Tokenizer | None) -> list[str]:
    """Tokens as labels: spaces as dots, line ends as signs; ids where there is no tokenizer."""
    if tokenizer is None:
        return [str(token) for token in tokens]
    texts = [tokenizer.decode([token]) for token in tokens]
    return [text.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥") or "∅" for text in texts]


def attention_figure(pattern: Float[Tensor, "query key"], tokens: Sequence[str], title: str) -> str:
    """A head's attention averaged over prompts, with the first prompt's tokens beside it: queries down, keys across.

    The first key, where idle heads attend, is drawn like the others, but colours span what the other keys get.
    """
    grid = pattern.double().numpy()
    n_pos = len(grid)
    allowed = np.tril(np.ones_like(grid, dtype=bool))
    limit = float(grid[:, 1:].max(initial=0.0)) or 1.0
    labels = inches(tokens)
    with mpl.rc_context(STYLE):
        figure, axes = boxed(0.24 * n_pos, 0.24 * n_pos, title, 0.35 + labels, 0.75, 0.45 + labels)
        cells = np.ma.masked_where(~allowed, grid)
        scale = axes.pcolormesh(cells, cmap="Blues", vmin=0, vmax=limit, edgecolors="white", linewidth=0.4)
        for query, key in sorted(np.argwhere(allowed).tolist(), key=lambda at: -grid[tuple(at)])[: 2 * n_pos]:
            if grid[query, key] >= 0.1:
                ink = "white" if grid[query, key] > 0.6 * limit else INK
                text = f"{grid[query, key]:.2f}".lstrip("0")
                axes.text(key + 0.5, query + 0.5, text, ha="center", va="center", fontsize=5, color=ink)
        axes.set(xlim=(0, n_pos), ylim=(n_pos, 0), xlabel="attended to", ylabel="from")
        axes.set_xticks(np.arange(n_pos) + 0.5, tokens, rotation=90, fontsize=8)
        axes.set_yticks(np.arange(n_pos) + 0.5, tokens, fontsize=8)
        bar = colour_bar_axes(figure, axes)
        figure.colorbar(scale, cax=bar, extend="max" if float(grid.max()) > limit else "neither")
        bar.tick_params(labelsize=8, length=0)
        return svg_text(figure)


def roles_figure(
    found: Mapping[str, HeadRoles], heads: Mapping[str, Sequence[tuple[int, int]]], title: str, n_most: int = 40
) -> str:
    """Roles against heads: a disc where a head has a role, in the colours of the tasks in which it has it.

    found: what `head_roles` gave, by task. heads: those to show, by task, the clearest first; of heads without a role,
    and of all beyond the first n_most, nothing is drawn.
    """
    held = {
        (role, head): [i for i, task in enumerate(found) if head in heads[task] and role in found[task].of(head)]
        for role in (role.name for role in ROLES)
        for head in dict.fromkeys(head for task in found for head in heads[task])
    }
    held = {at: tasks for at, tasks in held.items() if tasks}
    chosen = [head for head in _interleaved(list(heads.values())) if any(head == other for _, other in held)]
    columns = sorted(chosen[:n_most])
    rows = [role.name for role in ROLES if any(name == role.name and head in columns for name, head in held)]
    names = [f"{layer}.{head}" for layer, head in columns]
    cell = 0.34
    with mpl.rc_context(STYLE):
        below = 0.75 + 0.22 * len(found)
        size = cell * max(len(columns), 1), cell * max(len(rows), 1)
        figure, axes = boxed(*size, title, 0.3 + inches(rows), 0.3, below)
        for y in range(0, len(rows), 2):
            axes.add_patch(Rectangle((-0.5, y - 0.5), len(columns), 1, facecolor=BAND, linewidth=0, zorder=0))
        for tasks in sorted({tuple(tasks) for tasks in held.values()}):
            places = [
                (float(columns.index(head)), float(rows.index(role)))
                for (role, head), of in held.items()
                if tuple(of) == tasks and head in columns
            ]
            segments(axes, places, 72 * cell * 0.74, [task_colour(i) for i in tasks])
        axes.set_xticks(range(len(columns)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(rows)), rows)
        axes.set(xlim=(-0.5, max(len(columns), 1) - 0.5), ylim=(max(len(rows), 1) - 0.5, -0.5), xlabel="head")
        add_legend(figure, [(task_colour(i), words(task)) for i, task in enumerate(found)])
        return svg_text(figure)


def _interleaved(lists: Sequence[Sequence[tuple[int, int]]]) -> list[tuple[int, int]]:
    """The first of every list, then the second, …, each once."""
    longest = max(map(len, lists), default=0)
    return list(dict.fromkeys(each[i] for i in range(longest) for each in lists if i < len(each)))


def ov_figure(found: HeadRoles, title: str, n_most: int = 24, marked: Sequence[tuple[int, int]] = ()) -> str:
    """OV scores per head: bars for writing the next member and the member itself, the highest first.

    Dashed lines are the means over all heads. marked: heads (of a circuit) whose names are set in bold. Without OV
    scores, or where no head has any, the plot is empty.
    """
    shares = {name: share for name, share in ov_shares(found).items() if name in ("next", "copy")}
    heads = [(i, j) for i in range(found.config.n_layers) for j in range(found.config.n_heads)]
    best = {head: max((float(share[head]) for share in shares.values()), default=0.0) for head in heads}
    key = "next" if "next" in shares else "copy"
    ranked = sorted((head for head in heads if best[head] > 0), key=lambda head: (-float(shares[key][head]), head))
    shown = ranked[:n_most]
    with mpl.rc_context(STYLE):
        figure, axes = boxed(max(0.36 * len(shown), 3.4), 1.8, title, 0.75, 0.2, 0.9)
        for i, (name, share) in enumerate(shares.items()):
            colour = PALETTE[{"next": 0, "copy": 1}[name]]
            x = np.arange(len(shown)) + (i - (len(shares) - 1) / 2) * 0.38
            label = {"next": "writes the next member", "copy": "writes the member itself"}[name]
            axes.bar(x, [float(share[head]) for head in shown], 0.36, color=colour, label=label)
            axes.axhline(float(share.mean()), color=colour, linewidth=0.9, linestyle="--", zorder=0)
        axes.axhline(0, color=SOFT, linewidth=0.6)
        axes.axhline(1, color=FAINT, linewidth=0.8, zorder=0)
        axes.set_xticks(range(len(shown)), [f"{layer}.{head}" for layer, head in shown], rotation=60, fontsize=8)
        for label_text, head in zip(axes.get_xticklabels(), shown, strict=True):
            label_text.set_fontweight("bold" if head in marked else "normal")
        axes.set(xlim=(-0.6, max(len(shown), 9) - 0.4), ylim=(0, 1.05), ylabel="share of members")
        axes.set_xlabel("head (bold: in the circuit; dashed: mean of all heads)" if marked else "head (dashed: mean)")
        if shares:
            axes.legend(frameon=False, fontsize=8, loc="upper right")
        return svg_text(figure)
