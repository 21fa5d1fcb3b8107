"""Tasks by name."""

from __future__ import annotations

from collections.abc import Sequence

from subcircuit.analysis.tasks.fitting import tokenizer_and_model
from subcircuit.analysis.tasks.sequence_prompts import sequence_task
from subcircuit.analysis.tasks.sequences import RULES
from subcircuit.analysis.tasks.values import Model, Task
from subcircuit.engine.errors import TaskError
from subcircuit.engine.tokenizer import Tokenizer


def task_names() -> tuple[str, ...]:
    """The names that `task` knows."""
    return tuple(RULES)


def task(
    name: str,
    model_or_tokenizer: Model | Tokenizer,
    n: int = 32,
    seed: int = 0,
    template: str = "all",
    filter: bool = False,
    starts: Sequence[int] | None = None,
) -> Task:
    """Build n prompt pairs of a task for a model's tokenizer.

    name: one of `task_names()`.
    model_or_tokenizer: a HookedTransformer with a tokenizer, or the tokenizer alone.
    n: how many prompts; their start values and templates are balanced, each count differing by one at most. The bare
        sequence has one clean prompt per start value, so for larger n these repeat with other corrupted prompts.
    seed: decides words and corrupted members. The first rows do not depend on n (without filter), and tasks with the
        same start values get the same words.
    template: `done`, `lost`, `born`, `bare`, several joined by `+`, or `all` for the three with words. `all` leaves
        out a template that does not fit the tokenizer or does not line up with the others; `Task.template` tells.
    filter: the paper's: keep a prompt only if the model's top token is the answer and P(answer) > 2 P(wrong), and
        words only if that holds from all start values (number words and months: in both tasks, where the other can be
        built). For `bare`, keep the start values that pass.
    starts: start values to use, counted from 1; all that the tokenizer allows, if not given. A small model may never
        get some of them right, and then no words pass from all.

    Raises TaskError where the name, template or a start value is not known, the tokenizer has too few single-token
    members or words, or too few prompts pass the filter.
    """
    tokenizer, model = tokenizer_and_model(model_or_tokenizer)
    if n < 1:
        raise TaskError(f"task {name!r}: n is {n}; expected at least one prompt")
    if name not in RULES:
        raise TaskError(f"task {name!r} is not known; expected one of {', '.join(task_names())}")
    if filter and model is None:
        raise TaskError(f"task {name!r}: filter=True asks a model what it predicts; got a tokenizer alone")
    return sequence_task(name, tokenizer, model if filter else None, n, seed, template, starts)
