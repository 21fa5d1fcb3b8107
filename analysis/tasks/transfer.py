"""Prompts to be continued freely: does a model still count, add and list months without a circuit's heads?

The kinds of prompts are those of Lan et al. (arXiv 2311.04131); sentences are our own. Nothing is fitted to a
tokenizer: prompts are text without a space at the end (add one where the space is a token of its own), and an
expected completion may be any number of tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from functools import partial

from subcircuit.analysis.tasks.sequences import SEQUENCES
from subcircuit.engine.errors import TaskError

MONTHS = SEQUENCES["months"]
SPANISH_NUMBERS = tuple("uno dos tres cuatro cinco seis siete ocho nueve diez once doce".split())
SPANISH_MONTHS = tuple(
    "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre".split()
)
N_SHOWN = 3
"""Members that a sequence shows before it is to go on."""
INTERVALS = (1, 2, 3, 10, 100)
LAST_START = 50
YEAR = 2023
"""Of the date problems, which do not name it: no leap year, and dates stay within it."""


@dataclass(frozen=True)
class TransferPrompt:
    """A prompt, and what it should be continued with."""

    kind: str
    prompt: str
    expected: str
    """Without the space before it."""

    def is_continued_by(self, completion: str) -> bool:
        """Whether the completion begins with what is expected, as whole words: 100 is not 10."""
        text = " ".join(completion.split())
        return text.startswith(self.expected) and not text[len(self.expected) :][:1].isalnum()


def transfer_kinds() -> tuple[str, ...]:
    """The kinds that `transfer_prompts` knows."""
    return tuple(_KINDS)


def transfer_prompts(kind: str, n: int = 32, seed: int = 0) -> tuple[TransferPrompt, ...]:
    """n different prompts of a kind in an order that the seed decides, or all there are if these are fewer.

    Raises TaskError for a kind that is not known, or n below 1.
    """
    if kind not in _KINDS:
        raise TaskError(f"transfer prompts {kind!r} are not known; expected one of {', '.join(_KINDS)}")
    if n < 1:
        raise TaskError(f"transfer prompts {kind!r}: n is {n}; expected at least one prompt")
    pairs = _KINDS[kind]()
    random.Random(f"{kind} {seed}").shuffle(pairs)
    return tuple(TransferPrompt(kind, prompt, expected) for prompt, expected in pairs[:n])


Pairs = list[tuple[str, str]]
"""All prompts of a kind with what is expected."""


def _interval(step: int) -> Pairs:
    shown = [[start + i * step for i in range(N_SHOWN + 1)] for start in range(1, LAST_START + 1)]
    return [(" ".join(map(str, numbers[:-1])), str(numbers[-1])) for numbers in shown]


def _sums(lowest: int, highest: int) -> Pairs:
    numbers = range(lowest, highest + 1)
    return [(f"{a} + {b} =", str(a + b)) for a in numbers for b in numbers]


def _differences(lowest: int, highest: int) -> Pairs:
    """Of a and b ≤ a, so that no result is negative."""
    return [(f"{a} - {b} =", str(a - b)) for a in range(lowest, highest + 1) for b in range(lowest, a + 1)]


def _continued(members: tuple[str, ...]) -> Pairs:
    starts = range(len(members) - N_SHOWN)
    return [(" ".join(members[i : i + N_SHOWN]), members[i + N_SHOWN]) for i in starts]


def _month_lists() -> Pairs:
    asked = (
        "Q: Which months does a year have, in order? A:",
        "Here are the twelve months from first to last:",
        "The calendar goes through these months:",
    )
    # The first one, two, … members fix the form of the list.
    return [
        (f"{question} {', '.join(MONTHS[:n_told])},", ", ".join(MONTHS[n_told:]))
        for question in asked
        for n_told in (1, 2, 3)
    ]


def _month_problems() -> Pairs:
    """Any month, and one to eleven months on, past the end of the year too."""
    pairs = []
    for i, month in enumerate(MONTHS):
        for passed in range(1, len(MONTHS)):
            months = "month" if passed == 1 else "months"
            question = f"Q: It is {month} now. Which month will it be {passed} {months} from now? A:"
            pairs.append((question, MONTHS[(i + passed) % len(MONTHS)]))
    return pairs


def _date_problems() -> Pairs:
    """Any day, and two to ten days on, past the end of a month too but not of the year."""
    first = date(YEAR, 1, 1)
    days = [first + timedelta(days=i) for i in range(365)]
    return [
        (f"Today is {_written(today)}. In {passed} days it will be", _written(later))
        for today in days
        for passed in range(2, 11)
        if (later := today + timedelta(days=passed)).year == YEAR
    ]


def _written(day: date) -> str:
    return f"{MONTHS[day.month - 1]} {day.day}"


_KINDS: dict[str, Callable[[], Pairs]] = {
    **{f"interval_{step}": partial(_interval, step) for step in INTERVALS},
    "addition_1_digit": partial(_sums, 1, 9),
    "addition_2_digits": partial(_sums, 10, 99),
    "subtraction_1_digit": partial(_differences, 1, 9),
    "subtraction_2_digits": partial(_differences, 10, 99),
    "spanish_number_words": partial(_continued, SPANISH_NUMBERS),
    "spanish_months": partial(_continued, SPANISH_MONTHS),
    "month_lists": _month_lists,
    "month_problems": _month_problems,
    "date_problems": _date_problems,
}
