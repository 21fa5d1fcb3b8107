"""What heads do: attention, OV ranks and QK preferences against plain loops; roles of heads made by hand."""

from __future__ import annotations

import random

import pytest
import torch

from patching_cases import CONFIGS, random_model, random_sequence_task
from subcircuit.analysis import ov
from subcircuit.analysis.attention import attention_lookups, mean_attention, repeated_token_measures
from subcircuit.analysis.heads import ROLES, head_roles, shared_roles
from subcircuit.analysis.ov import ov_scores, qk_scores
from subcircuit.engine.errors import PatchError

SEED = random.randrange(10**6)


@pytest.fixture(params=CONFIGS)
def case(request):
    """A model in float64 and a task of more prompts than are run at once."""
    print(f"seed {SEED}")
    return random_model(CONFIGS[request.param], SEED).double(), random_sequence_task(SEED + 1)


def test_mean_attention_is_the_mean_of_the_patterns(case):
    model, task = case
    weights = torch.rand(2, 11, 9, 9, dtype=torch.float64)
    mean, sums = mean_attention(model, task.clean, weights)
    _, cache = model.run_with_cache(task.clean)
    for layer in range(3):
        pattern = cache["pattern", layer]
        torch.testing.assert_close(mean[layer], pattern.mean(0))
        expected = [[(pattern[:, head] * weight).sum() for head in range(4)] for weight in weights]
        torch.testing.assert_close(sums[:, layer], torch.tensor(expected, dtype=torch.float64))


def test_lookups_add_up_and_equal_a_plain_sum(case):
    model, task = case
    found = attention_lookups(model, task)
    torch.testing.assert_close(found.mass.sum(-1), torch.ones(3, 4, len(found.classes), dtype=torch.float64))
    pattern, _ = mean_attention(model, task.clean)
    expected = sum(float(pattern[1, 2, query, key]) for query in (2, 4, 6) for key in (2, 4, 6) if key != query) / 3
    assert found.of((1, 2), "members", "members") == pytest.approx(expected)
    assert found.of((1, 2), "last", "start") == pytest.approx(float(pattern[1, 2, 8, 0]))


def test_ov_ranks_equal_a_plain_loop_over_heads(case):
    model, task = case
    scores = ov_scores(model, task)
    config = model.config
    resid = model(task.clean, stop_at_layer=1)[:, [2, 4, 6]]
    x = model.blocks[1].ln1(resid)
    chain = torch.cat((task.clean[:, [2, 4, 6]], task.answer[:, None]), 1)
    for layer in range(3):
        attn = model.blocks[layer].attn
        for head in range(4):
            logits = model.unembed_normed(x @ attn.W_V[head // config.group_size] @ attn.W_O[head])
            wanted = logits.gather(2, chain[:, None].expand(-1, 3, -1))
            ranks = (logits[:, :, None] > wanted[..., None]).sum(-1)
            assert torch.equal(scores.ranks[layer, head].long(), ranks)


@pytest.mark.parametrize(("logits_at_once", "compared_at_once"), [(50 * 7, 50 * 3), (50 * 300, 50 * 11), (1, 1)])
def test_ov_ranks_are_the_same_in_tiles_of_any_size(case, monkeypatch, logits_at_once, compared_at_once):
    model, task = case
    whole, steps = ov_scores(model, task, own_norm=True), []
    monkeypatch.setattr(ov, "LOGITS_AT_ONCE", logits_at_once)
    monkeypatch.setattr(ov, "COMPARED_AT_ONCE", compared_at_once)
    tiled = ov_scores(model, task, own_norm=True, progress=lambda done, total: steps.append((done, total)))
    assert torch.equal(tiled.ranks, whole.ranks)
    assert steps[-1] == (3, 3)
    # 4 heads of 11 prompts with 3 members are 132 rows a layer: the second size has room for two layers at once.
    assert len(steps) == (2 if logits_at_once == 50 * 300 else 3)


def test_equal_logits_do_not_count_as_higher():
    logits = torch.tensor([[2.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert ov._n_higher(logits, torch.tensor([[0, 1, 3], [0, 1, 3]])).tolist() == [[1, 3, 0], [0, 0, 0]]


def test_qk_scores_are_shares_of_pairs(case):
    model, task = case
    scores = qk_scores(model, task)
    config = model.config
    attn, x = model.blocks[2].attn, model.blocks[2].ln1(model(task.clean, stop_at_layer=1))
    for head in range(4):
        q = attn.project(x, attn.w_q)[:, :, head]
        k = attn.project(x, attn.w_k)[:, :, head // config.group_size]
        raw = torch.einsum("pd,pkd->pk", q[:, 8], k)
        wins = [
            float((raw[:, member] > raw[:, other]).double().mean()) for member in (2, 4, 6) for other in (1, 3, 5, 7)
        ]
        assert float(scores.last[2, head]) == pytest.approx(sum(wins) / len(wins))


def previous_token_model(model):
    """Head 2 of layer 1 is made to attend to the token before, by positions alone."""

    def pattern(value, name):
        value = value.clone()
        n = value.shape[-1]
        value[:, 2] = torch.eye(n, dtype=value.dtype).roll(1, 0).tril()
        value[:, 2, 0, 0] = 1
        value[:, 2, 0, 1:] = 0
        return value

    return [("blocks.1.attn.hook_pattern", pattern)]


def test_a_head_that_attends_to_the_token_before_is_found(case):
    model, _ = case
    with model.hooks(previous_token_model(model)):
        measures = repeated_token_measures(model, length=12, seed=SEED)
    passed = measures["previous token"].passes.nonzero().tolist()
    assert [1, 2] in passed
    assert float(measures["previous token"].score[1, 2]) == pytest.approx(1)
    assert not bool(measures["induction"].passes[1, 2])


@pytest.mark.parametrize(("back", "name"), [(12, "duplicate token"), (11, "induction")])
def test_a_head_that_attends_so_far_back_whatever_stands_there_is_not_taken_for_one_that_compares(case, back, name):
    model, _ = case

    def pattern(value, _):
        value = value.clone()
        at = torch.arange(value.shape[-1])
        value[:, 2] = 0
        value[:, 2, at, (at - back).clamp(min=0)] = 1
        return value

    with model.hooks([("blocks.1.attn.hook_pattern", pattern)]):
        measure = repeated_token_measures(model, length=12, seed=SEED)[name]
    assert float(measure.score[1, 2]) == float(measure.baseline[1, 2]) == pytest.approx(1)
    assert not bool(measure.passes[1, 2])


def test_roles_follow_from_their_measures_and_are_shared_between_tasks(case):
    model, task = case
    found = head_roles(model, task, seed=SEED)
    for role in ROLES:
        if role.name in found.untested:
            assert found.holders(role.name) == []
            continue
        for head in found.holders(role.name):
            assert role.name in found.of(head)
            assert all(
                float(found.measures[name].excess[head]) * (-1 if sign == "-" else 1) > 0
                for name, sign in role.needs
                if sign != "0"
            )
    assert set(found.with_roles()) == {head for role in ROLES for head in found.holders(role.name)}
    shared = shared_roles({"one": found, "two": found})
    of_task = {(role.name, head) for role in ROLES if role.of_task for head in found.holders(role.name)}
    assert {(row["role"], (row["layer"], row["index"])) for row in shared} == of_task
    with pytest.raises(PatchError, match="role 'copier' is not known"):
        found.holders("copier")
