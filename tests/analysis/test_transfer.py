"""Transfer prompts: what is expected, computed anew from the prompt's text."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from datetime import datetime, timedelta

import pytest

from subcircuit.analysis.tasks import TransferPrompt, transfer_kinds, transfer_prompts
from subcircuit.engine.errors import TaskError

MONTHS = [datetime(2023, month, 1).strftime("%B") for month in range(1, 13)]
SPANISH = {
    "spanish_number_words": "uno dos tres cuatro cinco seis siete ocho nueve diez once doce",
    "spanish_months": "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
}


def next_number(prompt: str) -> str:
    numbers = [int(word) for word in prompt.split()]
    steps = {after - before for before, after in itertools.pairwise(numbers)}
    assert len(steps) == 1
    return str(numbers[-1] + steps.pop())


def calculated(prompt: str) -> str:
    a, sign, b = re.fullmatch(r"(\d+) ([+-]) (\d+) =", prompt).groups()
    return str(int(a) + int(b) if sign == "+" else int(a) - int(b))


def after_months(prompt: str) -> str:
    month, passed = re.fullmatch(
        r"Q: It is (\w+) now\. Which month will it be (\d+) months? from now\? A:", prompt
    ).groups()
    return (MONTHS * 2)[MONTHS.index(month) + int(passed)]


def after_days(prompt: str) -> str:
    month, day, passed = re.fullmatch(r"Today is (\w+) (\d+)\. In (\d+) days it will be", prompt).groups()
    later = datetime.strptime(f"{month} {day} 2023", "%B %d %Y") + timedelta(days=int(passed))
    return f"{later:%B} {later.day}"


def rest_of_months(prompt: str) -> str:
    told = re.findall("|".join(MONTHS), prompt)
    assert told == MONTHS[: len(told)]
    return ", ".join(MONTHS[len(told) :])


def solver_of(kind: str) -> Callable[[str], str]:
    if kind in SPANISH:
        members = SPANISH[kind].split()
        return lambda prompt: members[members.index(prompt.split()[-1]) + 1]
    solvers = {"interval": next_number, "addition": calculated, "subtraction": calculated}
    named = {"month_problems": after_months, "date_problems": after_days, "month_lists": rest_of_months}
    return named.get(kind) or solvers[kind.split("_")[0]]


@pytest.mark.parametrize("kind", transfer_kinds())
def test_what_is_expected_is_right(kind: str) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    made = transfer_prompts(kind, n=200, seed=seed)
    assert len({each.prompt for each in made}) == len(made)
    for each in made:
        assert each.kind == kind
        assert each.expected == solver_of(kind)(each.prompt)
        assert each.prompt == each.prompt.strip()
        assert each.is_continued_by(f" {each.expected}. More")
    if kind.startswith("interval"):
        assert next_number(made[0].prompt) == str(int(made[0].prompt.split()[-1]) + int(kind.split("_")[1]))


@pytest.mark.parametrize("kind", transfer_kinds())
def test_the_seed_decides_the_order_and_n_only_how_many(kind: str) -> None:
    assert transfer_prompts(kind, n=9, seed=3)[:4] == transfer_prompts(kind, n=4, seed=3)
    assert transfer_prompts(kind, n=9, seed=3) != transfer_prompts(kind, n=9, seed=4)


def test_a_longer_number_or_another_word_is_not_what_is_expected() -> None:
    ten = TransferPrompt("addition_1_digit", "7 + 3 =", "10")
    assert [ten.is_continued_by(text) for text in ("10", " 10\n", " 10.", " 100", " 1", "")] == [True] * 3 + [False] * 3
    months = TransferPrompt("month_lists", "January,", "February, March")
    assert months.is_continued_by(" February,\nMarch, April")
    assert not months.is_continued_by(" February, May")


def test_a_bad_request_is_one_clear_line() -> None:
    with pytest.raises(TaskError, match="'interval_7' are not known; expected one of interval_1, interval_2"):
        transfer_prompts("interval_7")
    with pytest.raises(TaskError, match="n is 0"):
        transfer_prompts("interval_1", n=0)
