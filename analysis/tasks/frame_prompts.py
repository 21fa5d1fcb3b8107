"""Which prompts a task of frames consists of: drawn one by one from a seed, or those of them that a model answers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

import torch

from subcircuit.analysis.tasks.filters import answered
from subcircuit.analysis.tasks.fitting import DoesNotFit
from subcircuit.analysis.tasks.frames import FittedFrame, FrameTask, Row, fit
from subcircuit.analysis.tasks.values import Model, Task, padded
from subcircuit.engine.errors import TaskError
from subcircuit.engine.tokenizer import Tokenizer

DRAWS_TRIED = 100
"""How often a prompt is drawn anew where the tokenizer splits it unlike the others."""
PROMPTS_TRIED = 16
"""How many prompts the filter tries for each one it needs before it gives up."""


def frame_task(
    name: str, task: FrameTask, tokenizer: Tokenizer, model: Model | None, n: int, seed: int, template: str
) -> Task:
    """n prompt pairs of a task of frames; only those that `model` answers, if one is given.

    Raises TaskError where the template is not known or does not fit the tokenizer, or too few prompts are answered.
    """
    fitted = _fitted(name, task, tokenizer, template)
    drawn = _rows(name, task, fitted, seed)
    rows = list(islice(drawn, n)) if model is None else _answered(name, drawn, n, model)
    used = _names(fitted)
    answers, wrongs = padded([row.answers for row in rows]), padded([row.wrongs for row in rows])
    has_sets = answers.shape[1] > 1 or wrongs.shape[1] > 1
    return Task(
        name=name,
        clean=torch.tensor([row.clean for row in rows]),
        corrupted=torch.tensor([row.corrupted for row in rows]),
        answer=answers[:, 0],
        wrong=wrongs[:, 0],
        prompts=tuple(row.prompt for row in rows),
        corrupted_prompts=tuple(row.corrupted_prompt for row in rows),
        template="all" if set(used) == {frame.name for frame in task.frames} else "+".join(used),
        seed=seed,
        positions=_shared_positions(fitted, rows),
        filtered=model is not None,
        answers=answers if has_sets else None,
        wrongs=wrongs if has_sets else None,
    )


def _fitted(name: str, task: FrameTask, tokenizer: Tokenizer, template: str) -> list[FittedFrame]:
    """The frames to mix: those asked for that fit and, of these, the ones of the most common shape.

    Of one shape are frames of one length whose slots of each pool stand at the same positions, in whatever order.
    """
    known = dict.fromkeys(frame.name for frame in task.frames)
    asked = list(known) if template == "all" else list(dict.fromkeys(template.split("+")))
    if not set(asked) <= set(known):
        raise TaskError(f"task {name!r}: unknown template {template!r}; expected all, {', '.join(known)}")
    fitting: list[FittedFrame] = []
    reasons: list[str] = []
    for frame in task.frames:
        if frame.name in asked:
            try:
                fitting.append(fit(frame, task.pools, tokenizer))
            except DoesNotFit as reason:
                reasons.append(f"template {frame.name!r} {reason}")
    if not fitting:
        raise TaskError(f"task {name!r}: {reasons[0]}")
    shape = Counter(each.shape for each in fitting).most_common(1)[0][0]
    aligned = [each for each in fitting if each.shape == shape]
    missing = [each for each in asked if each not in _names(aligned)]
    if missing and template != "all":
        why = next((reason for reason in reasons if repr(missing[0]) in reason), "")
        why = why or f"templates {template!r} do not line up for {tokenizer.name}"
        raise TaskError(f"task {name!r}: {why}; templates that fit together: {', '.join(_names(aligned))}")
    return aligned


def _names(fitted: Sequence[FittedFrame]) -> list[str]:
    return list(dict.fromkeys(each.frame.name for each in fitted))


def _rows(name: str, task: FrameTask, fitted: Sequence[FittedFrame], seed: int) -> Iterator[Row]:
    """Prompt pairs without end; the i-th depends on nothing but seed and i."""
    i = 0
    while True:
        rng = random.Random(f"{name} {seed} {i}")
        frame = fitted[i % len(fitted)]
        drawn = (frame.row(task.draw(rng, frame.frame, frame.words)) for _ in range(DRAWS_TRIED))
        row = next((row for row in drawn if row is not None), None)
        if row is None:
            text, splits = frame.frame.text, f"{frame.tokenizer.name} splits its prompts each in another way"
            raise TaskError(f"task {name!r}: {splits}; expected one token for each slot of {text!r}")
        yield row
        i += 1


def _answered(name: str, drawn: Iterator[Row], n: int, model: Model) -> list[Row]:
    kept: list[Row] = []
    for _ in range(PROMPTS_TRIED):
        rows = list(islice(drawn, n))
        answers, wrongs = padded([row.answers for row in rows]), padded([row.wrongs for row in rows])
        passes = answered(model, torch.tensor([row.clean for row in rows]), answers, wrongs).tolist()
        kept += [row for row, passed in zip(rows, passes, strict=True) if passed]
        if len(kept) >= n:
            return kept[:n]
    raise TaskError(
        f"task {name!r}: the model answers {len(kept)} of {PROMPTS_TRIED * n} prompts, too few for n = {n}; "
        "expected a smaller n, another template, or filter=False"
    )


def _shared_positions(fitted: Sequence[FittedFrame], rows: Sequence[Row]) -> dict[str, tuple[int, ...]]:
    """The classes that stand at the same positions in all frames; `changed` where all prompts differ in the same."""
    first, *others = [each.positions for each in fitted]
    shared = {name: at for name, at in first.items() if all(other.get(name) == at for other in others)}
    changed = {row.changed for row in rows}
    return {**shared, "changed": tuple(sorted(changed.pop()))} if len(changed) == 1 else shared
