from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from patching_cases import CONFIGS, random_model, random_task
from subcircuit.analysis.statistics import bootstrap_mean
from subcircuit.analysis.sweep import sweep
from subcircuit.engine.errors import PatchError

SEED = random.randrange(10**6)


@pytest.fixture(scope="module")
def case():
    print(f"seed {SEED}")
    model = random_model(CONFIGS["llama-gqa"], SEED)
    return model, random_task(SEED + 1)


def test_scores_hold_an_effect_per_site_and_prompt_and_grids_by_layer(case):
    model, task = case
    scores = sweep(model, task, "heads+mlps")
    assert scores.effects.shape == (15, 5)
    assert scores.heads().shape == (3, 4)
    assert scores.mlps().shape == (3,)
    assert scores.heads()[1, 2] == pytest.approx(float(scores.of("a1.h2").mean()))
    assert scores.mlps()[2] == pytest.approx(float(scores.of("m2").mean()))
    reference = sweep(model, task, "heads+mlps", executor="reference", precision="fp64")
    torch.testing.assert_close(scores.effects.double(), reference.effects, rtol=1e-3, atol=1e-4)
    logits = model(task.clean)[:, -1]
    rows = torch.arange(5)
    torch.testing.assert_close(scores.clean_metric, logits[rows, task.answer] - logits[rows, task.wrong])


def test_families_and_positions_name_their_sites(case):
    model, task = case
    assert [str(site) for site in sweep(model, task, "keys+groups").sites[:3]] == ["a0.k0", "a0.k1", "a1.k0"]
    each = sweep(model, task, ["a0.h1", "m2"], positions="each")
    assert [str(site) for site in each.sites[:2]] == ["a0.h1@0", "a0.h1@1"]
    assert each.effects.shape == (2 * 9, 5)
    last = sweep(model, task, "heads", positions=[-1])
    assert str(last.sites[0]) == "a0.h0@-1"
    assert last.heads().isnan().all()


def test_patching_the_whole_residual_stream_with_the_corrupted_one_gives_the_corrupted_metric(case):
    model, task = case
    scores = sweep(model, task, ["r0"], precision="fp64")
    logits = model.double()(task.corrupted)[:, -1]
    rows = torch.arange(5)
    corrupted = logits[rows, task.answer] - logits[rows, task.wrong]
    torch.testing.assert_close(scores.effects[0] + scores.clean_metric, corrupted)
    model.float()


def test_the_table_and_the_top_agree_with_the_effects(case):
    model, task = case
    scores = sweep(model, task, "heads")
    (best, effect), *_ = scores.top(3)
    assert abs(effect) == pytest.approx(float(scores.mean.abs().max()))
    row = next(row for row in scores.table() if row["site"] == str(best))
    assert row["effect"] == pytest.approx(effect)
    assert row["share"] == pytest.approx(effect / float(scores.clean_metric.mean()))
    _, low, high = bootstrap_mean(scores.of(best).double())
    assert (row["low"], row["high"]) == (pytest.approx(float(low)), pytest.approx(float(high)))
    assert row["low"] < row["effect"] < row["high"]
    alone = replace(scores, effects=scores.effects[:, :1]).table()
    assert {(row["low"], row["high"]) for row in alone} == {(None, None)}


def test_every_metric_says_its_name_and_only_those_with_a_whole_have_shares(case):
    model, task = case
    task = replace(task, answer=model(task.clean)[:, -1].argmax(-1))
    for metric in ("log_probability", "kl", "accuracy"):
        scores = sweep(model, task, "heads", source="zero", metric=metric)
        reference = sweep(model, task, "heads", source="zero", metric=metric, executor="reference", precision="fp64")
        assert scores.metric == scores.settings["metric"] == metric
        torch.testing.assert_close(scores.effects.double(), reference.effects, rtol=1e-3, atol=1e-4)
        shares = [row["share"] for row in scores.table()]
        assert (shares == [None] * 12) == (metric != "accuracy")
    old = replace(scores, settings={})
    assert old.metric == "logit_difference"
    with pytest.raises(PatchError, match="metric 'loss' is not known"):
        sweep(model, task, "heads", metric="loss")


def test_unknown_components_and_positions_are_named(case):
    model, task = case
    with pytest.raises(PatchError, match="components 'attention' is not known"):
        sweep(model, task, "attention")
    with pytest.raises(PatchError, match="positions 'all' is not understood"):
        sweep(model, task, "heads", positions="all")
    with pytest.raises(PatchError, match="'a9.h0' does not exist"):
        sweep(model, task, ["a9.h0"])
    with pytest.raises(PatchError, match="is not in this sweep"):
        sweep(model, task, "heads").of("m0")
