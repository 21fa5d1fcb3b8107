"""Tasks of frames: aligned, corrupted only where stated, and with the answers that a reader of the text would give."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest
import torch

from subcircuit.analysis.tasks import Task, about, task, task_names
from subcircuit.analysis.tasks.fitting import DoesNotFit
from subcircuit.analysis.tasks.frames import Draw, Frame, Pool, fit
from subcircuit.analysis.tasks.registry import FRAME_TASKS
from subcircuit.engine.errors import TaskError
from subcircuit.engine.tokenizer import Tokenizer
from task_tokenizers import NAMES, tokenizer_of

Solution = tuple[set[str], set[str]]
"""Right and wrong words, read from a prompt's text alone; all that a task names must be among them."""


def solve_ioi(prompt: str) -> Solution:
    first, second = re.findall(r"(\w+) and (\w+)", prompt)[0]
    giver = re.findall(r", (\w+) (?:gave|threw|handed|showed)", prompt)[0]
    return {first, second} - {giver}, {giver}


def solve_greater_than(prompt: str) -> Solution:
    century, year = re.findall(r"from the year (\d\d)(\d\d) to the year (?=\d\d$)", prompt)[0]
    assert prompt.endswith(century)
    later = {f"{number:02}" for number in range(100) if number > int(year)}
    decades = {str(digit) for digit in range(10)}
    later_decades = {digit for digit in decades if digit > year[0]}
    earlier_decades = {digit for digit in decades if digit < year[0]}
    return later | later_decades, ({f"{number:02}" for number in range(100)} - later) | earlier_decades


def solve_colored_objects(prompt: str) -> Solution:
    listed, question = prompt.split("Q: ")[-1].split(". What")
    colors = {thing: color for color, thing in re.findall(r"a (\w+) (\w+)", listed) if thing != "the"}
    asked = re.findall(r"color is the (\w+)", question)[0]
    return {colors[asked]}, {color for thing, color in colors.items() if thing != asked}


def solve_docstring(prompt: str) -> Solution:
    parameters = re.findall(r"\(self, (.*?)\)", prompt)[0].split(", ")
    described = re.findall(r":param (\w+):", prompt)
    assert described == parameters[: len(described)]
    return {parameters[len(described)]}, {parameters[len(described) + 1]}


def solve_induction(prompt: str) -> Solution:
    words = prompt.split()
    follows = words.index(words[-1]) + 1
    return {words[follows]}, set(words[:10]) - {words[follows]}


def edited(name: str, x: list[str], y: list[str]) -> list[str]:
    """What the edit gives for one string, or for two."""
    results: dict[str, Callable[[], list[str]]] = {
        "copy": lambda: x,
        "reverse": lambda: x[::-1],
        "repeat": lambda: x * 2,
        "echo": lambda: [*x, x[-1]],
        "swap": lambda: [x[-1], *x[1:-1], x[0]],
        "remove_first": lambda: y,
        "remove_second": lambda: x,
        "append": lambda: x + y,
        "prepend": lambda: y + x,
    }
    return results[name]()


def solve_edit(prompt: str) -> Solution:
    *examples, query = prompt.split("\n")
    parsed = []
    for line in (*examples, query):
        name, given, written = re.findall(r"^(\w+) (.*) =(.*)$", line)[0]
        operands = [part.split() for part in given.split(",")] + [[]]
        parsed.append((edited(name, operands[0], operands[1]), written.split(), operands[0] + operands[1]))
    assert all(result == written for result, written, _ in parsed[:-1])
    result, written, letters = parsed[-1]
    assert result[: len(written)] == written
    return {result[len(written)]}, set(letters) - {result[len(written)]}


SOLVERS = {
    "greater_than": solve_greater_than,
    "ioi": solve_ioi,
    "ioi_swap": solve_ioi,
    "colored_objects": solve_colored_objects,
    "docstring": solve_docstring,
    "induction": solve_induction,
}
CANNOT = {
    ("tiny-gpt2", "colored_objects"): "needs 4 colors .* has only: red, blue, green",
    ("tiny-gpt2", "docstring"): "needs 5 parameter names .* has only: none",
    ("stories260k", "ioi"): "needs 3 first names",
    ("stories260k", "ioi_swap"): "needs 3 first names",
    ("stories260k", "colored_objects"): "needs 4 colors",
    ("stories260k", "docstring"): "needs 5 parameter names",
}
"""What a vocabulary is too small for, and what it is told."""


def texts(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    return [tokenizer.token_bytes(token).decode().replace("▁", " ").strip() for token in tokens if token >= 0]


def assert_sound(made: Task, tokenizer: Tokenizer) -> None:
    """Every claim about the rows, from the texts and the tokenizer alone."""
    assert made.corrupted is not None
    assert made.clean.shape == made.corrupted.shape == (made.n, made.pos)
    solve = SOLVERS.get(made.name, solve_edit)
    answers, wrongs = made.answer_sets
    assert torch.equal(answers[:, 0], made.answer)
    assert torch.equal(wrongs[:, 0], made.wrong)
    stated = set(made.positions["changed"])
    for i in range(made.n):
        clean, corrupted = made.clean[i].tolist(), made.corrupted[i].tolist()
        assert {at for at in range(made.pos) if clean[at] != corrupted[at]} == stated
        right, wrong = texts(tokenizer, answers[i].tolist()), texts(tokenizer, wrongs[i].tolist())
        solution = solve(made.prompts[i])
        assert right
        assert set(right) <= solution[0]
        assert wrong
        assert set(wrong) <= solution[1]
        if made.answers is None:
            assert set(right) == solution[0]
        gap = "" if made.prompts[i].endswith(" ") or made.name == "greater_than" else " "
        named = [token for token in (*answers[i].tolist(), *wrongs[i].tolist()) if token >= 0]
        for word, token in zip((*right, *wrong), named, strict=True):
            assert tokenizer.encode(f"{made.prompts[i]}{gap}{word}") == [*clean, token]
        assert tokenizer.encode(f"{made.corrupted_prompts[i]}{gap}{right[0]}") == [*corrupted, named[0]]


@pytest.mark.parametrize("tokenizer_name", NAMES)
@pytest.mark.parametrize("name", FRAME_TASKS)
def test_prompts_are_aligned_and_answered_right(name: str, tokenizer_name: str) -> None:
    tokenizer = tokenizer_of(tokenizer_name)
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    if (tokenizer_name, name) in CANNOT:
        with pytest.raises(TaskError, match=CANNOT[tokenizer_name, name]) as caught:
            task(name, tokenizer, n=16, seed=seed)
        assert "\n" not in str(caught.value)
        return
    made = task(name, tokenizer, n=16, seed=seed)
    assert_sound(made, tokenizer)
    assert len(set(made.prompts)) > 8
    assert made.positions["last"] == (made.pos - 1,)


@pytest.mark.parametrize("name", FRAME_TASKS)
def test_the_seed_decides_and_first_rows_do_not_depend_on_n(name: str) -> None:
    tokenizer = tokenizer_of("gpt2")
    few, many = task(name, tokenizer, n=5, seed=4), task(name, tokenizer, n=9, seed=4)
    assert few.fingerprint() == task(name, tokenizer, n=5, seed=4).fingerprint()
    assert few.fingerprint() != task(name, tokenizer, n=5, seed=5).fingerprint()
    assert few.prompts == many.prompts[:5]
    assert few.corrupted_prompts == many.corrupted_prompts[:5]
    assert few.fingerprint() == many.subset(range(5)).fingerprint() or few.answers is not None


def test_every_later_year_is_an_answer_and_no_year_is_left_out() -> None:
    made = task("greater_than", tokenizer_of("gpt2"), n=30, seed=1)
    answers, wrongs = made.answer_sets
    assert made.answers is not None
    n_years = (answers >= 0).sum(1) + (wrongs >= 0).sum(1)
    assert (n_years >= 60).all()
    assert (made.clean[:, made.positions["YY"][0]] == made.wrong).all(), "the wrong one to compare is the year itself"


def test_single_digits_ask_for_the_decade() -> None:
    made = task("greater_than", tokenizer_of("llama2"), n=30, seed=1)
    answers, wrongs = made.answer_sets
    decade = made.positions["D"][0]
    for i in range(made.n):
        digits = sorted(texts(tokenizer_of("llama2"), [*answers[i].tolist(), *wrongs[i].tolist()]))
        shown = texts(tokenizer_of("llama2"), [int(made.clean[i, decade])])
        assert sorted([*digits, *shown]) == list("0123456789")


def test_ioi_templates_say_who_stands_first() -> None:
    tokenizer = tokenizer_of("gpt2")
    abba, baba = (task("ioi", tokenizer, n=8, template=template) for template in ("abba", "baba"))
    assert (abba.positions["IO"], abba.positions["S1"]) == (baba.positions["S1"], baba.positions["IO"])
    assert (abba.clean[:, abba.positions["IO"][0]] == abba.answer).all()
    assert (baba.clean[:, baba.positions["S1"][0]] == baba.wrong).all()
    both = task("ioi", tokenizer, n=8)
    assert both.template == "all"
    assert both.positions["name"] == abba.positions["name"]
    assert "IO" not in both.positions


def test_swapped_ioi_asks_for_the_other_name() -> None:
    tokenizer = tokenizer_of("gpt2")
    made = task("ioi_swap", tokenizer, n=12, seed=3)
    for prompt, wrong in zip(made.corrupted_prompts, made.wrong.tolist(), strict=True):
        assert solve_ioi(prompt)[0] == {tokenizer.decode([wrong]).strip()}


def test_names_that_are_no_single_tokens_are_not_used() -> None:
    frame = Frame("only", "When {A:name} met {answer:name}")
    tokenizer = tokenizer_of("gpt2")
    fitted = fit(frame, {"name": Pool(("Tom", "Xanthippe", "Mary"), 2, "names")}, tokenizer)
    assert fitted.words == {"name": ("Tom", "Mary")}
    with pytest.raises(DoesNotFit, match=r"needs 3 names that are single tokens after 'When '.* has only: Tom, Mary"):
        fit(frame, {"name": Pool(("Tom", "Xanthippe", "Mary"), 3, "names")}, tokenizer)


def test_a_row_that_the_tokenizer_splits_otherwise_is_not_made() -> None:
    """`13` is one token after `12` in the text the frame was fitted with; after `19` the four digits are one token."""
    frame = Frame("only", "in {C:century}{Y:year} and {answer:year}")
    tokenizer = tokenizer_of("gpt2")
    pools = {"century": Pool(("13", "19"), 2, "centuries"), "year": Pool(("47", "99"), 2, "years")}
    fitted = fit(frame, pools, tokenizer)
    assert len(tokenizer.encode("in 1999")) == 2
    assert fitted.row(Draw({"C": "13", "Y": "47"}, {}, ("99",), ("47",))) is not None
    assert fitted.row(Draw({"C": "19", "Y": "99"}, {}, ("99",), ("47",))) is None


class Liked:
    """A model that gives the answers of the prompts whose first token is even, and nothing of the others."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*tokens.shape, self.tokenizer.n_vocab)
        for row, ids in enumerate(tokens.tolist()):
            answer = self.tokenizer.encode(f" {next(iter(solve_ioi(self.tokenizer.decode(ids))[0]))}", bos=False)[-1]
            logits[row, -1, answer] = 5.0 if answer % 2 == 0 else -5.0
        return logits


def test_the_filter_keeps_answered_prompts_and_gives_up_after_a_while() -> None:
    model = Liked(tokenizer_of("gpt2"))
    kept = task("ioi", model, n=10, filter=True)
    assert kept.filtered
    assert kept.n == 10
    assert (kept.answer % 2 == 0).all()
    assert_sound(kept, model.tokenizer)
    assert (task("ioi", model, n=30).answer % 2 == 1).any()
    with pytest.raises(TaskError, match="answers 0 of 64 prompts, too few for n = 4"):
        task("ioi_swap", Nothing(model.tokenizer), n=4, filter=True)


class Nothing(Liked):
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*tokens.shape, self.tokenizer.n_vocab)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"template": "xyz"}, "unknown template 'xyz'; expected all, abba, baba"),
        ({"starts": [1]}, "'ioi' has no start values; they belong to numerals"),
        ({"n": 0}, "n is 0"),
        ({"filter": True}, "got a tokenizer alone"),
    ],
)
def test_a_bad_request_is_one_clear_line(arguments: dict, message: str) -> None:
    with pytest.raises(TaskError, match=message) as caught:
        task("ioi", tokenizer_of("gpt2"), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", task_names())
def test_every_task_says_what_it_measures(name: str) -> None:
    said = about(name)
    for text in (said.measures, said.corrupted, said.source):
        assert len(text) > 20
        assert "{" not in text
        assert not re.search(r"  |None", text)
