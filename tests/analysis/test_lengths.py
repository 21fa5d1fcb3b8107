"""The next member's probability after each member, against plain runs of the shorter prompts."""

from __future__ import annotations

import random

import pytest
import torch

from subcircuit.analysis.lengths import by_length
from subcircuit.analysis.lens_figures import lengths_figure
from subcircuit.analysis.statistics import bootstrap_mean
from subcircuit.analysis.tasks import SEQUENCES, task
from subcircuit.engine.errors import TaskError
from subcircuit.weights.names import load

SEED = random.randrange(10**6)


@pytest.fixture(scope="module")
def model():
    print(f"seed {SEED}")
    return load("tiny-gpt2")


def test_each_length_is_what_the_model_says_of_the_shorter_prompt(model):
    found = by_length(model, "months", 5, n=6, seed=SEED, template="done")
    assert found.answer.shape == found.is_top.shape == (5, 6)
    assert found.too_long == ""
    months = SEQUENCES["months"]
    for row, prompt in enumerate(found.task.prompts):
        *told, _ = prompt.split(". ")
        words = [part.split()[0] for part in prompt.split(". ")]
        first = months.index(told[0].split()[-1])
        for i in range(5):
            shorter = f"{'. '.join(told[: i + 1])}. {words[i + 1]} done in"
            ids = model.tokenizer.encode(f"{shorter} {months[first + i + 1]}")
            chances = model(torch.tensor([ids[:-1]]))[0, -1].softmax(-1)
            assert float(found.answer[i, row]) == pytest.approx(float(chances[ids[-1]]), rel=1e-4)
            assert bool(found.is_top[i, row]) == (int(chances.argmax()) == ids[-1])


def test_a_row_of_the_table_has_means_and_their_intervals(model):
    found = by_length(model, "numerals", 3, n=8, seed=SEED)
    for i, row in enumerate(found.table()):
        assert (row["task"], row["members"], row["n_prompts"]) == ("numerals", i + 1, 8)
        for name, values in (("answer", found.answer[i]), ("top1", found.is_top[i])):
            expected = bootstrap_mean(values.double(), seed=SEED).at()
            assert [row[name], row[f"{name}_low"], row[f"{name}_high"]] == pytest.approx(expected)
    svg = lengths_figure(found.table(), "the next member")
    assert svg.startswith("<svg")
    assert ">numerals<" in svg


def test_a_filter_takes_prompts_that_the_longest_prompt_answers(model):
    found = by_length(model, "numerals", 3, n=8, seed=SEED, filter=True)
    assert len(found.answer) == 3
    assert bool(found.is_top[-1].all())
    assert found.task.prompts == task("numerals", model, n=8, seed=SEED, members=3, filter=True).prompts
    assert by_length(model, "interval_2", 3, n=8, seed=SEED).task.n == 8
    with pytest.raises(TaskError, match="pass the filter"):
        by_length(model, "interval_2", 3, n=8, seed=SEED, filter=True)


def test_what_is_too_long_is_left_out_and_said(model):
    found = by_length(model, "weekdays", 9, n=2, seed=SEED)
    assert len(found.answer) == 6
    assert "needs 8 members in a row" in found.too_long
    with pytest.raises(TaskError, match="task 'ioi' shows no members of a sequence"):
        by_length(model, "ioi", 3)
    with pytest.raises(TaskError, match="0 members; expected at least one to be shown"):
        by_length(model, "months", 0)
