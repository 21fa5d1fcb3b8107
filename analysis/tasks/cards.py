"""Task cards: what a task measures, its prompts, and how well a model does it, as a value and as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from subcircuit.analysis.metrics import final_logits, is_top, logit_difference, probability_difference
from subcircuit.analysis.statistics import ends_of
from subcircuit.analysis.tasks.files import is_file_name
from subcircuit.analysis.tasks.fitting import tokenizer_and_model
from subcircuit.analysis.tasks.registry import about, task, task_names
from subcircuit.analysis.tasks.values import About, Model, Task
from subcircuit.engine.errors import TaskError
from subcircuit.engine.tokenizer import Tokenizer

N_EXAMPLES = 2
N_LISTED = 6
"""Answers that a card spells out where there are many."""
WIDTH = 118
"""Characters per line of a page."""


@dataclass(frozen=True)
class TaskCard:
    """A task for one tokenizer and, where there is a model, how well it does it."""

    name: str
    about: About
    tokenizer: str
    template: str
    n: int
    seed: int
    n_pos: int
    """Tokens per prompt, with BOS if the tokenizer adds one."""
    first_difference: int
    """First position at which a corrupted prompt differs from its clean one; `n_pos` where there is none."""
    positions: dict[str, tuple[int, ...]]
    examples: tuple[dict[str, Any], ...]
    """Clean and corrupted prompt, answers, wrong answers, and the clean prompt's tokens; of a file every row."""
    accuracy: float | None = None
    """Share of prompts whose likeliest token is an answer; None for a tokenizer alone, like what follows."""
    logit_difference: float | None = None
    """Mean over prompts, answers minus wrong answers, in nats."""
    corrupted_logit_difference: float | None = None
    """The same on the corrupted prompts, where the task has them."""
    probability_difference: float | None = None
    """Mean over prompts of Σ P(answers) − Σ P(wrong answers)."""
    intervals: dict[str, list[float] | None] = field(default_factory=dict)
    """Ends of the 95 % bootstrap interval of each of these means, by its name; None of a single prompt."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def task_card(
    name: str, model_or_tokenizer: Model | Tokenizer, n: int = 32, seed: int = 0, template: str = "all"
) -> TaskCard:
    """The card of a task on n prompts. Raises TaskError as `task` does."""
    said = about(name)
    n_examples = n if is_file_name(name) else N_EXAMPLES
    tokenizer, model = tokenizer_and_model(model_or_tokenizer)
    made = task(name, tokenizer, n=n, seed=seed, template=template)
    return TaskCard(
        name=name,
        about=said,
        tokenizer=tokenizer.name,
        template=made.template,
        n=made.n,
        seed=seed,
        n_pos=made.pos,
        first_difference=made.first_difference,
        positions=dict(made.positions),
        examples=tuple(_example(made, i, tokenizer) for i in range(min(n_examples, made.n))),
        **({} if model is None else _measured(made, model)),
    )


def _example(made: Task, row: int, tokenizer: Tokenizer) -> dict[str, Any]:
    answers, wrongs = (
        [tokenizer.decode([token]) for token in tokens[row].tolist() if token >= 0] for tokens in made.answer_sets
    )
    return {
        "clean": made.prompts[row],
        "corrupted": made.corrupted_prompts[row] if made.corrupted_prompts else None,
        "answers": answers,
        "wrongs": wrongs,
        "tokens": [tokenizer.decode([token]) for token in made.clean[row].tolist()],
    }


def _measured(made: Task, model: Model) -> dict[str, Any]:
    logits, (answers, wrongs) = final_logits(model, made.clean), made.answer_sets
    values = {
        "accuracy": is_top(logits, answers).double(),
        "logit_difference": logit_difference(logits, answers, wrongs),
        "probability_difference": probability_difference(logits, answers, wrongs),
    }
    if made.corrupted is not None:
        values["corrupted_logit_difference"] = logit_difference(final_logits(model, made.corrupted), answers, wrongs)
    means: dict[str, Any] = {name: float(each.mean()) for name, each in values.items()}
    return means | {"intervals": {name: ends_of(each) for name, each in values.items()}}


def tasks_page(models: Mapping[str, Model], command: str, n: int = 32, seed: int = 0, names: Sequence[str] = ()) -> str:
    """A Markdown page of the cards of all tasks, or of those named, for models by name.

    command: what made the page; it stands in it.
    """
    intro = (
        f"Made by `{command}`: {n} prompts per task, seed {seed}. *First* is the first position that differs between "
        "clean and corrupted prompts, *top-1* the share of prompts whose likeliest next token is an answer, *logit "
        "difference* the mean over prompts of answer minus wrong answer in nats (of sets, the difference of means) "
        "and *corrupted* the same on the corrupted prompts."
    )
    sections = [_section(name, models, n, seed) for name in names or task_names()]
    return "\n\n".join(["# Tasks", _wrapped(intro), *sections]) + "\n"


def _section(name: str, models: Mapping[str, Model], n: int, seed: int) -> str:
    said = about(name)
    parts = [f"## {name}", said.measures, f"*Corrupted prompts.* {said.corrupted}", f"*Source.* {said.source}"]
    cards: dict[str, TaskCard] = {}
    notes = []
    for model_name, model in models.items():
        try:
            cards[model_name] = task_card(name, model, n, seed)
        except TaskError as error:
            notes.append(f"Not for {model_name}: {error}.")
    parts = [_wrapped(part) for part in parts]
    if cards:
        parts += [_table(cards), *_example_shown(*list(cards.items())[-1])]
    return "\n\n".join([*parts, *map(_wrapped, notes)])


def _table(cards: Mapping[str, TaskCard]) -> str:
    lines = [
        "| model | templates | tokens | first | top-1 | logit difference | corrupted |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model, card in cards.items():
        cells = f"| {model} | {card.template} | {card.n_pos} | {card.first_difference} | {card.accuracy:.0%} | "
        corrupted = "–" if card.corrupted_logit_difference is None else f"{card.corrupted_logit_difference:.2f}"
        lines.append(f"{cells}{card.logit_difference:.2f} | {corrupted} |")
    return "\n".join(lines)


def _example_shown(model: str, card: TaskCard) -> list[str]:
    example = card.examples[0]
    answers, wrongs = (_listed(example[key]) for key in ("answers", "wrongs"))
    shown = [textwrap.indent(example[side], "    ") for side in ("clean", "corrupted") if example[side] is not None]
    beside = "; and its corrupted prompt" if len(shown) > 1 else ""
    return [f"A prompt for {model}, answer {answers}, wrong {wrongs}{beside}:", "\n\n".join(shown)]


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _listed(words: Sequence[str]) -> str:
    shown = ", ".join(f"`{word}`" for word in words[:N_LISTED])
    return shown if len(words) <= N_LISTED else f"{shown}, … ({len(words)} in all)"
