"""The logit lens and direct logit attribution against the activation cache's own, on fresh random models."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from patching_cases import CONFIGS, random_model, random_sequence_task
from subcircuit.analysis.attribution import attribution
from subcircuit.analysis.lens import lens
from subcircuit.analysis.statistics import bootstrap_mean
from subcircuit.engine.errors import TaskError

SEED = random.randrange(10**6)


@pytest.fixture(params=CONFIGS)
def case(request):
    """A model in float64 and a task of more prompts than are run at once."""
    print(f"seed {SEED}")
    return random_model(CONFIGS[request.param], SEED).double(), random_sequence_task(SEED + 1)


def test_every_stage_reads_as_the_cache_does(case):
    model, task = case
    read = lens(model, task, top=4)
    _, cache = model.run_with_cache(task.clean)
    stages = [(layer, part) for layer in range(3) for part in ("mid", "post")]
    residuals = [cache["resid_pre", 0], *(cache[f"resid_{part}", layer] for layer, part in stages)]
    assert read.stages == ("0_pre", *(f"{layer}_{part}" for layer, part in stages))
    rows = torch.arange(task.n)
    for i, residual in enumerate(residuals):
        logits = model.unembed_normed(residual[:, -1])
        probabilities = logits.softmax(-1)
        top = probabilities.topk(4)
        torch.testing.assert_close(read.top_probabilities[i, :, 0], top.values)
        torch.testing.assert_close(read.top_tokens[i, :, 0], top.indices)
        torch.testing.assert_close(read.answer[i, :, 0], probabilities[rows, task.answer])
        torch.testing.assert_close(read.wrong[i, :, 0], probabilities[rows, task.wrong])
        newest = task.clean[:, 6]
        torch.testing.assert_close(read.rival[i, :, 0], probabilities[rows, newest])
        for rank, tokens in ((read.answer_rank, task.answer), (read.rival_rank, newest)):
            order = logits.argsort(-1, descending=True)
            assert rank[i, :, 0].tolist() == [order[row].tolist().index(tokens[row]) for row in rows]
        torch.testing.assert_close(read.lead[i, :, 0], logits[rows, task.answer] - logits[rows, newest])
    torch.testing.assert_close(logits, model(task.clean)[:, -1])


def test_tables_have_the_intervals_of_their_means(case):
    model, task = case
    read, terms = lens(model, task), attribution(model, task)
    is_answer = read.top_tokens[:, :, -1, 0] == task.answer
    for i, row in enumerate(read.table()):
        for name, values in (("top1", is_answer), ("answer", read.answer[..., -1]), ("lead", read.lead[..., -1])):
            expected = bootstrap_mean(values[i].double()).at()
            assert [row[name], row[f"{name}_low"], row[f"{name}_high"]] == pytest.approx(expected)
    for row in terms.table():
        values = terms.mlps[row["layer"]] if row["kind"] == "mlp" else terms.heads[row["layer"], row["index"]]
        assert [row["direct"], row["low"], row["high"]] == pytest.approx(bootstrap_mean(values).at())


def test_takeover_is_where_the_answer_is_ahead_for_good(case):
    model, task = case
    read = lens(model, task)
    for row, stage in enumerate(read.takeover().tolist()):
        ahead = (read.lead[:, row, -1] > 0).tolist()
        assert all(ahead[stage:])
        assert stage == 0 or not ahead[stage - 1]


def test_handovers_count_prompts_whose_layer_turns_a_member_into_the_answer(case):
    model, task = case
    read = lens(model, task)
    tokens = read.top_tokens
    tokens[0, :, -1, 0] = task.clean[:, 4]  # before layer 0 a member, after it the answer in the first three prompts
    tokens[2, :, -1, 0] = (task.answer + 1) % 50
    tokens[2, :3, -1, 0] = task.answer[:3]
    assert read.handovers()[0] == pytest.approx(3 / 11)
    assert read.best_handover() == (0, pytest.approx(3 / 11))


def test_the_rank_of_several_answers_is_that_of_the_best(case):
    model, task = case
    answers = torch.stack((task.answer, (task.answer + 3) % 50, torch.full_like(task.answer, -1)), 1)
    answers[::2, 2] = (task.answer[::2] + 9) % 50
    read = lens(model, replace(task, answers=answers))
    single = [lens(model, replace(task, answer=(task.answer + shift) % 50)).answer_rank for shift in (0, 3, 9)]
    expected = torch.minimum(single[0], single[1])
    expected[:, ::2] = torch.minimum(expected, single[2])[:, ::2]
    assert torch.equal(read.answer_rank, expected)


def test_positions_are_each_or_those_asked_for(case):
    model, task = case
    every, some = lens(model, task, positions="each"), lens(model, task, positions=[-1, 2])
    assert some.positions == (2, 8)
    torch.testing.assert_close(every.answer[:, :, [2, 8]], some.answer)
    with pytest.raises(TaskError, match="position 9 is not there"):
        lens(model, task, positions=[9])


def test_direct_terms_equal_the_cache_s_and_add_up(case):
    model, task = case
    terms = attribution(model, task)
    logits, cache = model.run_with_cache(task.clean)
    expected, labels = cache.logit_attribution(task.answer, task.wrong, by_head=True)
    by_label = dict(zip(labels, expected, strict=True))
    for layer in range(3):
        torch.testing.assert_close(terms.mlps[layer], by_label[f"m{layer}"])
        neurons = terms.neurons[layer].sum(0) + terms.mlp_bias[layer]
        torch.testing.assert_close(neurons, terms.mlps[layer])
        for head in range(4):
            torch.testing.assert_close(terms.heads[layer, head], by_label[f"a{layer}.h{head}"])
    rows = torch.arange(task.n)
    difference = logits[rows, -1, task.answer] - logits[rows, -1, task.wrong]
    torch.testing.assert_close(terms.logit_difference, difference)
    torch.testing.assert_close(terms.total, difference)
