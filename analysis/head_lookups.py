"""Attention look-ups of chosen heads, prompt by prompt: from class to class of positions, from member to member."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.analysis.attention import ROWS_AT_ONCE, class_mass, position_classes
from subcircuit.analysis.statistics import interval_columns
from subcircuit.analysis.tasks import Task
from subcircuit.engine.model import HookedTransformer

Head = tuple[int, int]
UNNAMED = ("start", "rest")
"""Classes of positions that no task names: shown as what is attended to, not as what attends."""
LOOKUPS = ("from a position of a class to all positions of another", "from member to member")
"""What `lookup_tables` are of."""


def head_lookups(model: HookedTransformer, task: Task, heads: Sequence[Head], seed: int = 0) -> list[dict[str, Any]]:
    """A row per head and look-up: `attention` averaged over the clean prompts, with the ends of its 95 % bootstrap
    interval (`low`, `high`; None of one prompt).

    Of `kind` class it is from a position of one class to all positions of another, or to `itself`; of kind member from
    each member to the one before, and from the last token to the newest member.

    Lan et al. (arXiv 2311.04131) report 0.34 from " 3" to " 2" for head 4.4 of GPT-2 Small.
    """
    classes = position_classes(task)
    names = [("class", query, key) for query in classes for key in (*classes, "itself")]
    members = task.member_positions
    names += [("member", f"member {i + 1}", f"member {i}") for i in range(1, len(members))]
    names += [("member", "last token", "newest member")] if members else []
    patterns = _patterns(model, task, heads)
    rows = []
    for head in heads:
        pattern = patterns[head]
        values = [class_mass(pattern, classes).flatten(1), pattern[:, list(members[1:]), list(members[:-1])]]
        if members:
            values.append(pattern[:, -1, members[-1], None])
        attention = torch.cat(values, 1).T
        found = zip(names, attention.mean(1).tolist(), interval_columns(attention, seed=seed), strict=True)
        rows += [
            {"head": f"a{head[0]}.h{head[1]}", "kind": kind, "from": query, "to": key, "attention": mean, **ends}
            for (kind, query, key), mean, ends in found
        ]
    return rows


@torch.no_grad()
def _patterns(
    model: HookedTransformer, task: Task, heads: Sequence[Head]
) -> dict[Head, Float[Tensor, "prompt query key"]]:
    parts: dict[Head, list[Tensor]] = {head: [] for head in heads}

    def keep(pattern: Tensor, name: str) -> None:
        layer = int(name.split(".")[1])
        for head in heads:
            if head[0] == layer:
                parts[head].append(pattern[:, head[1]].detach().to("cpu", torch.float64))

    layers = sorted({layer for layer, _ in heads})
    hooks = [(f"blocks.{layer}.attn.hook_pattern", keep) for layer in layers]
    for first in range(0, task.n if heads else 0, ROWS_AT_ONCE):
        model.run_with_hooks(task.clean[first : first + ROWS_AT_ONCE], hooks, stop_at_layer=layers[-1] + 1)
    return {head: torch.cat(part) for head, part in parts.items()}


def lookup_tables(rows: Sequence[dict[str, Any]]) -> list[tuple[list[str], list[list[str]]]]:
    """Columns and rows of tables to be read: what each class attends to, a row per head and class; and look-ups of
    single members, a row per head. Cells are `0.34 [0.30, 0.38]`."""
    of_class = [row for row in rows if row["kind"] == "class" and row["from"] not in UNNAMED]
    of_member = [row for row in rows if row["kind"] == "member"]
    keys = list(dict.fromkeys(row["to"] for row in of_class))
    pairs = list(dict.fromkeys(f"{row['from']} → {row['to']}" for row in of_member))
    tables = [
        (["head", "from", *(f"→ {key}" for key in keys)], _grouped(of_class, len(keys), 2)),
        (["head", *pairs], _grouped(of_member, len(pairs), 1)),
    ]
    return [table for table in tables if table[1]]


def _grouped(rows: Sequence[dict[str, Any]], n: int, n_named: int) -> list[list[str]]:
    """n look-ups to a row, after the first names of these."""
    names = ("head", "from")[:n_named]
    parts = [rows[i : i + n] for i in range(0, len(rows), n)] if n else []
    return [[*(part[0][name] for name in names), *map(_cell, part)] for part in parts]


def _cell(row: dict[str, Any]) -> str:
    ends = "" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]"
    return f"{row['attention']:.2f}{ends}"
