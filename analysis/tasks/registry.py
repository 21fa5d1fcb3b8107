"""Tasks by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from subcircuit.analysis.tasks.colored_objects import COLORED_OBJECTS_TASKS
from subcircuit.analysis.tasks.docstring import DOCSTRING_TASKS
from subcircuit.analysis.tasks.files import file_about, is_file_name, task_from_file
from subcircuit.analysis.tasks.filters import answered
from subcircuit.analysis.tasks.fitting import tokenizer_and_model
from subcircuit.analysis.tasks.frame_prompts import frame_task
from subcircuit.analysis.tasks.frames import FrameTask
from subcircuit.analysis.tasks.greater_than import GREATER_THAN_TASKS
from subcircuit.analysis.tasks.induction import INDUCTION_TASKS
from subcircuit.analysis.tasks.ioi import IOI_TASKS
from subcircuit.analysis.tasks.sequence_about import sequence_about
from subcircuit.analysis.tasks.sequence_prompts import sequence_task
from subcircuit.analysis.tasks.sequences import RULES
from subcircuit.analysis.tasks.string_edits import STRING_EDIT_TASKS
from subcircuit.analysis.tasks.values import About, Model, Task
from subcircuit.engine.errors import TaskError
from subcircuit.engine.tokenizer import Tokenizer

FRAME_TASKS: dict[str, FrameTask] = {
    **GREATER_THAN_TASKS,
    **IOI_TASKS,
    **COLORED_OBJECTS_TASKS,
    **INDUCTION_TASKS,
    **DOCSTRING_TASKS,
    **STRING_EDIT_TASKS,
}


def task_names() -> tuple[str, ...]:
    """The names that `task` knows."""
    return *RULES, *FRAME_TASKS


def about(name: str) -> About:
    """What a task measures, what its corrupted prompts differ in, and where it is from. TaskError if not known."""
    if is_file_name(name):
        return file_about(name)
    check_known(name)
    return sequence_about(name) if name in RULES else FRAME_TASKS[name].about


def task(
    name: str,
    model_or_tokenizer: Model | Tokenizer,
    n: int = 32,
    seed: int = 0,
    template: str = "all",
    filter: bool = False,
    starts: Sequence[int] | None = None,
    members: int | None = None,
) -> Task:
    """Build n prompt pairs of a task for a model's tokenizer.

    name: one of `task_names()`; `about(name)` says what it measures. Or a `.csv` or `.json` file (`task_from_file`).
    model_or_tokenizer: a HookedTransformer with a tokenizer, or the tokenizer alone.
    n: how many prompts; of a file its first n, or all if it has fewer. Of a sequence, start values and templates are
        balanced, each count differing by one at most; the bare sequence has one clean prompt per start value, so for
        larger n these repeat with other corrupted ones.
    seed: decides the words and the corrupted prompts. The first rows do not depend on n (without filter), and sequence
        tasks with the same start values get the same words.
    template: one of the task's templates, several joined by `+`, or `all`; for sequences `done`, `lost`, `born`,
        `bare`, where `all` are the three with words. `all` leaves out a template that does not fit the tokenizer or
        does not line up with the others; `Task.template` tells.
    filter: keep a prompt only if the model's top token is the answer and P(answer) > 2 P(wrong), as in Lan et al.; of a
        sequence, words only if that holds from all start values (number words and months: in both tasks, where the
        other can be built), and for `bare` the start values that pass.
    starts: start values of a sequence to use, counted from 1; all that the tokenizer allows, if not given. A small
        model may never get some of them right, and then no words pass from all.
    members: how many members of a sequence a prompt shows before it asks for the next; four (of intervals, three) if
        not given.

    Raises TaskError where the name, template or a start value is not known, the tokenizer has too few single-token
    members or words, or too few prompts pass the filter.
    """
    if members is not None and (is_file_name(name) or name in FRAME_TASKS):
        raise TaskError(f"task {name!r} shows no members of a sequence; expected one of {', '.join(RULES)}")
    if is_file_name(name):
        return _from_file(name, model_or_tokenizer, n, template, filter, starts)
    tokenizer, model = tokenizer_and_model(model_or_tokenizer)
    if n < 1:
        raise TaskError(f"task {name!r}: n is {n}; expected at least one prompt")
    check_known(name)
    asked = _needed(name, model) if filter else None
    if name in RULES:
        return sequence_task(name, tokenizer, asked, n, seed, template, starts, members)
    if starts is not None:
        raise TaskError(f"task {name!r} has no start values; they belong to {', '.join(RULES)}")
    return frame_task(name, FRAME_TASKS[name], tokenizer, asked, n, seed, template)


def _from_file(
    path: str,
    model_or_tokenizer: Model | Tokenizer,
    n: int,
    template: str,
    filter: bool,
    starts: Sequence[int] | None,
) -> Task:
    if template != "all" or starts is not None or n < 1:
        raise TaskError(f"task file {path} has neither templates nor start values, and n must be at least 1")
    made = task_from_file(path, model_or_tokenizer)
    if filter:
        _, model = tokenizer_and_model(model_or_tokenizer)
        passes = answered(_needed(path, model), made.clean, *made.answer_sets).nonzero()[:, 0].tolist()
        if not passes:
            raise TaskError(f"task file {path}: the model answers none of its {made.n} prompts")
        made = replace(made.subset(passes), filtered=True)
    return made.subset(range(min(n, made.n)))


def _needed(name: str, model: Model | None) -> Model:
    if model is None:
        raise TaskError(f"task {name!r}: filter=True asks a model what it predicts; got a tokenizer alone")
    return model


def check_known(name: str) -> None:
    """Raises TaskError for a name that no task has."""
    if name not in task_names():
        raise TaskError(
            f"task {name!r} is not known; expected one of {', '.join(task_names())}, or a .csv or .json file"
        )
