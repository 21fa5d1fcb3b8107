"""Sequences that do not count by one: intervals, decreasing and repeated numerals; and tasks with several answers."""

from __future__ import annotations

import itertools
import random
import re

import pytest
import torch

from subcircuit.analysis.metrics import is_top, logit_difference, probability_difference
from subcircuit.analysis.tasks import Task, task
from subcircuit.engine.errors import TaskError
from task_tokenizers import NAMES, tokenizer_of

STEPS = {f"interval_{step}": step for step in (1, 2, 3, 10, 100)} | {"decreasing_numerals": -1, "repeated_numerals": 0}
CANNOT = {
    ("tiny-gpt2", "interval_10"): "needs 4 members in steps of 10",
    ("smollm2-135m", "interval_10"): r"needs 4 members in steps of 10 .* has only: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9;",
    ("llama2", "interval_10"): "needs 4 members in steps of 10",
    ("stories260k", "interval_10"): "needs 4 members in steps of 10",
    ("tiny-gpt2", "interval_100"): "needs 4 members in steps of 100",
    ("smollm2-135m", "interval_100"): "needs 4 members in steps of 100 .* has only: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9;",
    ("llama2", "interval_100"): "needs 4 members in steps of 100",
    ("stories260k", "interval_100"): "needs 4 members in steps of 100",
}


@pytest.mark.parametrize("template", ["all", "bare"])
@pytest.mark.parametrize("tokenizer_name", NAMES)
@pytest.mark.parametrize("name", STEPS)
def test_the_answer_goes_on_in_the_same_steps(name: str, tokenizer_name: str, template: str) -> None:
    tokenizer = tokenizer_of(tokenizer_name)
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    if (tokenizer_name, name) in CANNOT or (tokenizer_name == "stories260k" and template == "all"):
        with pytest.raises(
            TaskError, match=CANNOT.get((tokenizer_name, name), "templates of this task that fit: bare")
        ):
            task(name, tokenizer, template=template)
        return
    made = task(name, tokenizer, n=24, seed=seed, template=template)
    assert made.corrupted is not None
    for i in range(made.n):
        shown = [int(number) for number in re.findall(r"\d+", made.prompts[i])]
        others = [int(number) for number in re.findall(r"\d+", made.corrupted_prompts[i])]
        steps = [after - before for before, after in itertools.pairwise(shown)]
        assert steps == [STEPS[name]] * (len(shown) - 1)
        answer = shown[-1] + STEPS[name]
        wrong = shown[-1] if STEPS[name] else shown[-1] + 1
        tokens = [
            int(tokenizer.token_bytes(int(ids[i])).decode().replace("▁", "")) for ids in (made.answer, made.wrong)
        ]
        assert tokens == [answer, wrong]
        gap = "" if made.prompts[i].endswith(" ") else " "
        assert tokenizer.encode(f"{made.prompts[i]}{gap}{answer}") == [*made.clean[i].tolist(), int(made.answer[i])]
        assert len(set(others)) == len(others) == len(shown)
        assert others[-1] not in (answer, wrong)
        assert others[-1] - others[-2] not in (STEPS[name], others[-2] - others[-3])
        differs = {at for at in range(made.pos) if made.clean[i, at] != made.corrupted[i, at]}
        assert differs <= set(made.member_positions)
        assert differs
    assert made.positions["last"] == (made.pos - 1,)


def sets_task() -> Task:
    """Three prompts of two tokens; the second has one answer only."""
    return Task(
        name="sets",
        clean=torch.tensor([[1, 2], [3, 4], [5, 6]]),
        corrupted=torch.tensor([[1, 9], [3, 9], [5, 9]]),
        answer=torch.tensor([0, 1, 2]),
        wrong=torch.tensor([4, 4, 5]),
        answers=torch.tensor([[0, 1], [1, -1], [2, 3]]),
        wrongs=torch.tensor([[4, -1, -1], [4, 5, 6], [5, 6, -1]]),
    )


def test_metrics_of_sets_are_means_and_sums_over_their_tokens() -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    logits = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    made = sets_task()
    differences, probabilities, top = [], [], []
    for row, answers, wrongs in zip(logits[:, -1], *(ids.tolist() for ids in made.answer_sets), strict=True):
        right, others = ([id for id in ids if id >= 0] for ids in (answers, wrongs))
        p = (row.exp() / row.exp().sum()).tolist()
        differences.append(sum(row[right].tolist()) / len(right) - sum(row[others].tolist()) / len(others))
        probabilities.append(sum(p[id] for id in right) - sum(p[id] for id in others))
        top.append(int(row.argmax()) in right)
    assert logit_difference(logits, *made.answer_sets).tolist() == pytest.approx(differences)
    assert probability_difference(logits, *made.answer_sets).tolist() == pytest.approx(probabilities)
    assert is_top(logits, made.answer_sets[0]).tolist() == top


def test_one_answer_each_is_a_set_of_one() -> None:
    made = task("months", tokenizer_of("tiny-gpt2"), n=6)
    logits = torch.randn(6, 1087, generator=torch.Generator().manual_seed(0))
    assert made.answers is None
    assert torch.equal(logit_difference(logits, *made.answer_sets), logit_difference(logits, made.answer, made.wrong))
    assert torch.equal(is_top(logits, made.answer_sets[0]), is_top(logits, made.answer))


def test_subsets_and_fingerprints_see_the_sets() -> None:
    made = sets_task()
    part = made.subset([2, 0])
    assert part.answer_sets[0].tolist() == [[2, 3], [0, 1]]
    assert part.answer_sets[1].tolist() == [[5, 6, -1], [4, -1, -1]]
    fewer = made.subset(range(3))
    assert fewer.fingerprint() == made.fingerprint()
    assert made.answers is not None
    made.answers[0, 1] = 7
    assert fewer.fingerprint() != made.fingerprint()
