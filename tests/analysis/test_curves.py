"""Curves of recovered metric against circuit size: by hand, and against one evaluation per point."""

from __future__ import annotations

import random

import pytest
import torch

from circuit_cases import reference_ablation
from patching_cases import CONFIGS, random_model, task_for
from subcircuit.analysis.curves import SHARES, ablation_curve, faithfulness_curve, node_ranking, sized
from subcircuit.analysis.faithfulness import Ablation
from subcircuit.analysis.nodes import all_nodes
from subcircuit.analysis.sweep import sweep
from subcircuit.engine.errors import PatchError

SEED = random.randrange(10**6)


def additive(weights):
    """A model whose metric is the sum of the weights of what is kept, plus 3, the same for four prompts."""

    def evaluate(kept):
        return torch.tensor([[3.0 + sum(weights[item] for item in items)] * 4 for items in kept], dtype=torch.float64)

    return evaluate


def test_areas_are_those_computed_by_hand():
    """Four items worth 4, 3, 2 and -1 of 8: f = 0, 4/8, 7/8, 9/8, 1 at 0, 1/4, 1/2, 3/4, 1."""
    evaluate = additive({"a": 4, "b": 3, "c": 2, "d": -1})
    curve = faithfulness_curve(evaluate, ["a", "b", "c", "d"], shares=(0, 0.25, 0.5, 0.75, 1))
    assert curve.sizes == (0, 1, 2, 3, 4)
    assert curve.recovered.mean.tolist() == pytest.approx([0, 1 / 2, 7 / 8, 9 / 8, 1])
    assert curve.cpr.at()[0] == pytest.approx((0 / 2 + 1 / 2 + 7 / 8 + 9 / 8 + 1 / 2) / 4)
    assert curve.cmd.at()[0] == pytest.approx((1 / 2 + 1 / 2 + 1 / 8 + 1 / 8 + 0 / 2) / 4)
    assert (curve.full, curve.nothing) == (11, 3)
    # prompts that are all alike leave nothing uncertain
    assert curve.cpr.low == pytest.approx(float(curve.cpr.mean))
    assert curve.cmd.high == pytest.approx(float(curve.cmd.mean))


def test_edges_or_anything_else_can_be_ranked():
    edges = [("input", "m0"), ("m0", "logits"), ("input", "logits")]
    curve = faithfulness_curve(additive(dict.fromkeys(edges, 1)), edges, shares=(0.4, 0.7, 1))
    assert curve.sizes == (1, 2, 3)
    assert curve.recovered.mean.tolist() == pytest.approx([1 / 3, 2 / 3, 1])


def test_every_share_keeps_the_items_it_says():
    assert [sized(share, 1000) for share in SHARES] == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    assert [sized(share, 32491) for share in SHARES] == [32, 64, 162, 324, 649, 1624, 3249, 6498, 16245, 32491]
    assert sized(0.29, 100) == 29


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("metric", ["logit_difference", "kl"])
def test_all_points_in_one_batch_are_those_of_one_forward_each(name, metric):
    print(f"seed {SEED}")
    model = random_model(CONFIGS[name], SEED).double()
    task = task_for(model, SEED + 1)
    ranking = all_nodes(model.config)
    random.Random(SEED).shuffle(ranking)
    slow = reference_ablation(model, task, metric=metric)
    fast = Ablation(model, task, metric=metric, precision="fp64")
    curve = ablation_curve(fast, ranking, shares=(0.1, 0.2, 0.5, 1.0), n_resamples=50)
    full, nothing = float(slow.clean.mean()), float(slow.kept_values([[]]).mean())
    expected = []
    for size in (1, 3, 7, 15):
        expected.append((float(slow.kept_values([ranking[:size]]).mean()) - nothing) / (full - nothing))
    assert curve.recovered.mean.tolist() == pytest.approx(expected)
    x = (0.1, 0.2, 0.5, 1.0)
    area = sum((x[i + 1] - x[i]) * (expected[i] + expected[i + 1]) / 2 for i in range(3))
    distance = sum((x[i + 1] - x[i]) * (abs(1 - expected[i]) + abs(1 - expected[i + 1])) / 2 for i in range(3))
    assert curve.cpr.at()[0] == pytest.approx(area)
    assert curve.cmd.at()[0] == pytest.approx(distance)
    assert bool((curve.recovered.low <= curve.recovered.high).all())


def test_a_sweep_ranks_nodes_by_size_or_by_sign():
    model = random_model(CONFIGS["gpt2"], SEED)
    task = task_for(model, SEED + 1)
    scores = sweep(model, task, "heads+mlps")
    ranking = node_ranking(scores)
    sizes = [abs(float(scores.of(node).mean())) for node in ranking]
    assert sizes == sorted(sizes, reverse=True)
    signed = [float(scores.of(node).mean()) for node in node_ranking(scores, signed=True)]
    assert signed == sorted(signed)
    assert set(ranking) == set(all_nodes(model.config))


def test_what_is_no_ranking_is_refused():
    evaluate = additive({"a": 1, "b": 2})
    with pytest.raises(PatchError, match="every item once"):
        faithfulness_curve(evaluate, ["a", "a"])
    with pytest.raises(PatchError, match="must rise"):
        faithfulness_curve(evaluate, ["a", "b"], shares=(0.5, 0.2))
    with pytest.raises(PatchError, match="give the same metric, 3"):
        faithfulness_curve(additive({"a": 1, "b": -1}), ["a", "b"])
    model = random_model(CONFIGS["gpt2"], SEED)
    with pytest.raises(PatchError, match="the ranking leaves out 14 of them, the first 'a0.h1'"):
        ablation_curve(Ablation(model, task_for(model, SEED)), all_nodes(model.config)[:1])
