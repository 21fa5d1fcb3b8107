"""Circuits of edges judged: keep-sets against plain removal in float64, evaluation, chance and set operations."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from patching_cases import CONFIGS, random_model, task_for
from subcircuit.analysis.baselines import random_baseline
from subcircuit.analysis.circuit import Circuit, intersection
from subcircuit.analysis.curves import ablation_curve
from subcircuit.analysis.eap import edge_scores
from subcircuit.analysis.edge_ablation import EdgeAblation, edge_score
from subcircuit.analysis.edges import edges_between, edges_kept, prune_edges
from subcircuit.analysis.evaluation import evaluate_circuit
from subcircuit.analysis.faithfulness import Ablation, score
from subcircuit.engine.errors import PatchError
from subcircuit.engine.patching.edges import edge_effects
from subcircuit.engine.patching.graph import edges, layer_of

SEED = random.randrange(10**6)
EXACT = {"executor": "reference", "precision": "fp64"}
NODES = Circuit(heads=[(0, 1), (0, 2), (1, 0), (1, 3)], mlps=[0, 1])


@pytest.fixture(params=CONFIGS)
def case(request):
    print(f"seed {SEED}")
    model = random_model(replace(CONFIGS[request.param], n_layers=2), SEED).double()
    return model, task_for(model, SEED + 1)


def kept_plainly(model, task, kept, source):
    """Metric of each prompt with all other edges removed one by one, in full forwards."""
    gone = [edge for edge in edges(model.config) if edge not in set(kept)]
    found = edge_effects(model, task, [gone], source=source, **EXACT)
    return found.effects[0] + found.clean_metric


@pytest.mark.parametrize("source", ["mean", "corrupted", "zero"])
def test_kept_edges_give_what_removing_all_others_gives(case, source):
    model, task = case
    ablation, rng = EdgeAblation(model, task, source=source, precision="fp64"), random.Random(SEED)
    every = edges(model.config)
    whole = edges_kept(replace(NODES, edges=tuple(edges_between(NODES, model.config, from_input=True))), model.config)
    # Among few edges most nodes are silent, among many hardly any; in a circuit without one, its node falls silent.
    sets = [rng.sample(every, n) for n in (0, 3, len(every) // 2, len(every) - 2)]
    sets += [whole, *([edge for edge in whole if edge[0] != name] for name in ("a0.h1", "m0", "input"))]
    for kept, values in zip(sets, ablation.kept_values(sets), strict=True):
        torch.testing.assert_close(values, kept_plainly(model, task, kept, source).double())
    drops = [[edge for edge in whole if edge != left_out] for left_out in whole[::5]]
    for kept, values in zip(drops, ablation.kept_values(drops), strict=True):
        torch.testing.assert_close(values, kept_plainly(model, task, kept, source).double())


def test_a_circuit_keeps_the_edges_that_its_search_did_not_judge(case):
    model, task = case
    loose = prune_edges(model, task, NODES, threshold=-1e9, precision="fp64")
    assert not loose.edges
    unjudged = set(edges_between(NODES, model.config, from_input=True, same_layer=True))
    assert set(edges_kept(loose, model.config)) == unjudged - set(edges_between(NODES, model.config))
    found = prune_edges(model, task, NODES, threshold=1.0, precision="fp64")
    assert edge_score(model, task, found, precision="fp64") == pytest.approx(found.settings["edges"]["score"])
    assert found.faithfulness(model, task, precision="fp64") == pytest.approx(found.settings["edges"]["score"])
    assert NODES.faithfulness(model, task, precision="fp64") == pytest.approx(
        score(model, task, NODES, precision="fp64")
    )
    both = intersection([found, replace(found, task="again")])
    assert edges_kept(both, model.config) == edges_kept(found, model.config)
    strict = prune_edges(model, task, NODES, threshold=1.0, from_input=True, precision="fp64")
    assert not intersection([found, strict]).settings


def test_a_circuit_of_edges_is_judged_by_its_edges(case):
    model, task = case
    found = prune_edges(model, task, NODES, threshold=1.0, from_input=True, same_layer=True, precision="fp64")
    exact = EdgeAblation(model, task, **EXACT)
    judged = evaluate_circuit(EdgeAblation(model, task, precision="fp64"), found, n_knockouts=3, greedy=1, seed=SEED)
    full, nothing = (exact.kept_values([kept]).mean() for kept in (exact.items, ()))
    alone = exact.kept_values([found.edges]).mean()
    rest = exact.kept_values([exact.complement(found.edges)]).mean()
    points = 100 / (full - nothing)
    assert judged.recovered.at()[0] == pytest.approx(float(points * (alone - nothing)))
    assert judged.destroyed.at()[0] == pytest.approx(float(points * (full - rest)))
    assert judged.items == tuple(" -> ".join(edge) for edge in found.edges)
    for i in random.Random(SEED).sample(range(len(found.edges)), 3):
        without = exact.kept_values([found.edges[:i] + found.edges[i + 1 :]]).mean()
        assert judged.drops.at(i)[0] == pytest.approx(float(points * (alone - without)), abs=1e-9)
    assert len(judged.completeness.knockouts) == 4


@pytest.mark.parametrize("match", ["size", "layers", "nodes"])
def test_random_circuits_of_edges_are_like_the_circuit(case, match):
    model, task = case
    config = model.config
    found = prune_edges(model, task, NODES, threshold=1.0, precision="fp64")
    ablation = EdgeAblation(model, task, precision="fp64")
    kept = edges_kept(found, config)
    baseline = random_baseline(ablation, found, 5, match=match, seed=SEED)
    rng = random.Random(SEED)
    drawn = [ablation.drawn_like(found, rng, match) for _ in range(5)]
    scores = torch.tensor([EdgeAblation(model, task, **EXACT).score_of(each) for each in drawn], dtype=torch.float64)
    torch.testing.assert_close(baseline.scores, scores)
    assert {len(each) for each in drawn} == {len(kept)}
    if match == "layers":
        pairs = [sorted((layer_of(a, config), layer_of(b, config)) for a, b in each) for each in (kept, *drawn)]
        assert all(each == pairs[0] for each in pairs)
    if match == "nodes":
        among = set(edges_between(NODES, config, from_input=True, same_layer=True))
        assert all(set(kept) - set(found.edges) <= each <= among for each in drawn)
    with pytest.raises(PatchError, match="'nodes' are of edges"):
        random_baseline(Ablation(model, task), NODES, 1, match="nodes")


def test_a_ranking_of_edges_has_a_curve(case):
    model, task = case
    ablation = EdgeAblation(model, task, source="corrupted", precision="fp64")
    ranking = [edge for edge, _ in edge_scores(model, task, "eap-ig", precision="fp64").top(len(ablation.items))]
    curve = ablation_curve(ablation, ranking, shares=(0.1, 0.5, 1.0))
    assert curve.recovered.mean[-1] == pytest.approx(1)
    exact = EdgeAblation(model, task, source="corrupted", **EXACT).kept_values([ranking[: curve.sizes[1]]]).mean()
    expected = (float(exact) - curve.nothing) / (curve.full - curve.nothing)
    assert float(curve.recovered.mean[1]) == pytest.approx(expected)
