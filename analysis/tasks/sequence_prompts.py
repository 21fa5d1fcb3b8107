"""Which prompts a sequence task consists of: balanced over start values and templates, or those a model answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch

from subcircuit.analysis.tasks.filters import answered
from subcircuit.analysis.tasks.fitting import DoesNotFit
from subcircuit.analysis.tasks.sequences import (
    FILTERED_TOGETHER,
    MIXED,
    Layout,
    layout_of,
    layouts_of,
    names_of,
    rule_of,
    with_starts,
)
from subcircuit.analysis.tasks.values import Model, Task
from subcircuit.engine.errors import TaskError
from subcircuit.engine.tokenizer import Tokenizer

WORD_SETS_TRIED = 16
"""How many word sets the filter tries for each one it needs before it gives up."""


def sequence_task(
    name: str,
    tokenizer: Tokenizer,
    model: Model | None,
    n: int,
    seed: int,
    template: str,
    starts: Sequence[int] | None,
    members: int | None = None,
) -> Task:
    """n prompt pairs of a sequence; only those that `model` answers, if one is given. Raises TaskError as `task`."""
    layouts = layouts_of(name, template, tokenizer, members)
    if starts is not None:
        layouts = [with_starts(layout, starts) for layout in layouts]
    first_members = layouts[0].starts
    words: dict[str, list[tuple[str, ...]]] = {}
    if model is not None:
        if layouts[0].template.words:
            words = _words_that_pass(layouts, n, seed, model)
        else:
            first_members = _starts_that_pass(layouts[0], model)
    schedule = _schedule(n, first_members, layouts)
    rows = []
    for i, (start, layout, turn) in enumerate(schedule):
        chosen = words[layout.template.name][turn] if words else layout.draw_words(seed, i)
        rows.append(layout.pair(chosen, start, layout.draw_corrupted(seed, i, start)))
    clean, corrupted, answer, wrong, prompts, corrupted_prompts = zip(*rows, strict=True)
    used = names_of(layouts)
    return Task(
        name=name,
        clean=torch.tensor(clean),
        corrupted=torch.tensor(corrupted),
        answer=torch.tensor(answer),
        wrong=torch.tensor(wrong),
        prompts=prompts,
        corrupted_prompts=corrupted_prompts,
        template="all" if used == "+".join(MIXED) else used,
        seed=seed,
        starts=tuple(start + 1 for start, _, _ in schedule),
        positions=layouts[0].positions,
        filtered=model is not None,
    )


def _schedule(n: int, starts: Sequence[int], layouts: Sequence[Layout]) -> list[tuple[int, Layout, int]]:
    """Start, layout, and how often this combination came before, for each prompt.

    Each start and each layout comes up equally often (± 1) for any n, and so does each combination of them.
    """
    period = math.lcm(len(starts), len(layouts))
    before: Counter[tuple[int, str]] = Counter()
    schedule = []
    for i in range(n):
        # After a period the layouts move on by one: else a start would always meet the same layout.
        start, layout = starts[i % len(starts)], layouts[(i + i // period) % len(layouts)]
        key = (start, layout.template.name)
        schedule.append((start, layout, before[key]))
        before[key] += 1
    return schedule


def _words_that_pass(layouts: Sequence[Layout], n: int, seed: int, model: Model) -> dict[str, list[tuple[str, ...]]]:
    """Per template, as many word sets as the schedule needs, each passing from every start value."""
    name = layouts[0].task_name
    needed: Counter[str] = Counter()
    for _, layout, turn in _schedule(n, layouts[0].starts, layouts):
        needed[layout.template.name] = max(needed[layout.template.name], turn + 1)
    found: dict[str, list[tuple[str, ...]]] = {}
    n_tried: Counter[str] = Counter()
    n_passes: Counter[int] = Counter()
    for layout in layouts:
        template = layout.template.name
        others = _filtered_together(layout)
        found[template] = []
        while len(found[template]) < needed[template] and n_tried[template] < WORD_SETS_TRIED * needed[template]:
            words = layout.draw_words(seed, n_tried[template])
            n_tried[template] += 1
            passes = _passes(model, layout, words)
            n_passes.update(start for start, passed in zip(layout.starts, passes, strict=True) if passed)
            if all(passes) and all(all(_passes(model, other, words)) for other in others):
                found[template].append(words)
    if any(len(found[template]) < count for template, count in needed.items()):
        told = ", ".join(
            f"{template} {len(found[template])} of {count} ({n_tried[template]} tried)"
            for template, count in needed.items()
        )
        hard = [str(start + 1) for start in layouts[0].starts if n_passes[start] < n_tried.total() / 2]
        raise TaskError(
            f"task {name!r}: too few word sets pass the filter from all {len(layouts[0].starts)} start values: "
            f"{told}; start values that mostly fail: {', '.join(hard) or 'none'}; "
            "expected a smaller n, another template, other starts, or filter=False"
        )
    return found


def _filtered_together(layout: Layout) -> list[Layout]:
    """The other task's layout where the two are filtered together, from the same start values."""
    name = FILTERED_TOGETHER.get(layout.task_name)
    if name is None:
        return []
    try:
        other = layout_of(name, layout.template, layout.tokenizer, rule_of(name, layout.rule.n_shown))
    except DoesNotFit:
        return []
    shared = tuple(start for start in other.starts if start in layout.starts)
    return [replace(other, starts=shared)] if shared else []


def _starts_that_pass(layout: Layout, model: Model) -> tuple[int, ...]:
    passes = _passes(model, layout, ())
    starts = tuple(start for start, passed in zip(layout.starts, passes, strict=True) if passed)
    if not starts:
        raise TaskError(
            f"task {layout.task_name!r}, template 'bare': no start value of {len(layout.starts)} passes the filter; "
            "expected a model that continues the sequence, or filter=False"
        )
    return starts


def _passes(model: Model, layout: Layout, words: Sequence[str]) -> list[bool]:
    """Whether the model's top token is the answer and P(answer) > 2 P(wrong), for each start value."""
    rows = [layout.pair(words, start, layout.rule.shown(start)) for start in layout.starts]
    clean, answer, wrong = (torch.tensor([row[i] for row in rows]) for i in (0, 2, 3))
    return cast(list[bool], answered(model, clean, answer, wrong).tolist())
