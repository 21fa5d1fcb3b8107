"""Task cards: what they measure is what the model's logits say."""

from __future__ import annotations

import json

import pytest
import torch

from subcircuit.analysis.tasks import task
from subcircuit.analysis.tasks.cards import task_card, tasks_page
from subcircuit.engine.errors import TaskError
from subcircuit.engine.model import HookedTransformer
from subcircuit.weights.names import load
from task_tokenizers import tokenizer_of


@pytest.fixture(scope="module")
def tiny() -> HookedTransformer:
    return load("tiny-gpt2")


@pytest.mark.parametrize("name", ["months", "decreasing_numerals", "greater_than"])
def test_a_card_measures_the_model(name: str, tiny: HookedTransformer) -> None:
    card = task_card(name, tiny, n=11, seed=2)
    made = task(name, tiny, n=11, seed=2)
    assert made.corrupted is not None
    answers, wrongs = ([[id for id in row if id >= 0] for row in ids.tolist()] for ids in made.answer_sets)
    n_right, difference, corrupted, probability = 0, 0.0, 0.0, 0.0
    with torch.no_grad():
        for i in range(11):
            clean_logits, corrupted_logits = (
                tiny(ids[i : i + 1])[0, -1].double() for ids in (made.clean, made.corrupted)
            )
            n_right += int(clean_logits.argmax()) in answers[i]
            difference += float(clean_logits[answers[i]].mean() - clean_logits[wrongs[i]].mean())
            corrupted += float(corrupted_logits[answers[i]].mean() - corrupted_logits[wrongs[i]].mean())
            p = clean_logits.softmax(-1)
            probability += float(p[answers[i]].sum() - p[wrongs[i]].sum())
    assert card.accuracy == pytest.approx(n_right / 11)
    assert card.logit_difference == pytest.approx(difference / 11, abs=1e-4)
    assert card.corrupted_logit_difference == pytest.approx(corrupted / 11, abs=1e-4)
    assert card.probability_difference == pytest.approx(probability / 11, abs=1e-5)
    assert (card.n, card.n_pos, card.first_difference) == (11, made.pos, made.first_difference)
    assert "".join(card.examples[0]["tokens"]) == made.prompts[0]
    assert json.loads(json.dumps(card.to_dict()))["about"]["source"] == card.about.source


def test_the_model_does_what_it_was_trained_on_and_not_what_it_was_not(tiny: HookedTransformer) -> None:
    trained, new = task_card("months", tiny, n=16), task_card("ioi", tiny, n=16)
    assert trained.accuracy == 1.0
    assert trained.logit_difference is not None
    assert trained.logit_difference > 4
    assert new.accuracy is not None
    assert new.accuracy < 0.5


def test_a_tokenizer_alone_gives_a_card_without_measurements() -> None:
    card = task_card("ioi", tokenizer_of("gpt2"), n=4)
    assert card.accuracy is None
    assert card.n_pos == 14
    with pytest.raises(TaskError, match="'colours' is not known"):
        task_card("colours", tokenizer_of("gpt2"))


def test_a_page_has_a_row_per_model_and_says_where_a_task_does_not_fit(tiny: HookedTransformer) -> None:
    page = tasks_page({"tiny": tiny, "again": tiny}, "make page", n=3, names=["months", "docstring"])
    assert "Made by `make page`: 3 prompts per task" in page
    assert page.count("| 23 | 3 | 100% |") == 2
    assert page.count("Not for tiny: task 'docstring'") == 1
    assert max(map(len, page.splitlines())) <= 120
