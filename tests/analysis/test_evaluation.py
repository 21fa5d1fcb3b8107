"""Faithfulness, completeness and minimality against forwards one at a time, and random circuits as a baseline."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
import torch

from circuit_cases import random_circuit, reference_ablation
from patching_cases import CONFIGS, random_model, task_for
from subcircuit.analysis.baselines import called, cell_q_values, random_baseline, table_with_q
from subcircuit.analysis.circuit import Circuit, intersection, union
from subcircuit.analysis.evaluation import (
    Scale,
    circuits_scored,
    completeness,
    drops,
    evaluate_circuit,
    greedy_parts,
    leave_out,
    random_parts,
)
from subcircuit.analysis.faithfulness import Ablation, node_drops
from subcircuit.analysis.nodes import all_nodes, random_nodes
from subcircuit.analysis.statistics import benjamini_hochberg, resampled_means, sign_flip_p
from subcircuit.analysis.sweep import sweep
from subcircuit.engine.errors import PatchError

SEED = random.randrange(10**6)


@pytest.fixture(params=CONFIGS)
def case(request):
    print(f"seed {SEED}")
    model = random_model(CONFIGS[request.param], SEED).double()
    return model, task_for(model, SEED + 1), random_circuit(model.config, SEED + 2)


@pytest.mark.parametrize("source", ["mean", "corrupted", "zero"])
@pytest.mark.parametrize("metric", ["logit_difference", "kl"])
def test_an_evaluation_is_what_single_forwards_give(case, source, metric):
    model, task, circuit = case
    slow = reference_ablation(model, task, source=source, metric=metric)
    fast = Ablation(model, task, source=source, metric=metric, precision="fp64")
    found = evaluate_circuit(fast, circuit, n_knockouts=3, greedy=2, seed=SEED)

    def mean(nodes):
        return float(slow.kept_values([nodes])[0].mean())

    nodes, everything = circuit.nodes, all_nodes(model.config)
    full, nothing, alone = mean(everything), mean([]), mean(nodes)
    width = (full - nothing) / 100
    assert found.recovered.at()[0] == pytest.approx((alone - nothing) / width)
    assert found.destroyed.at()[0] == pytest.approx((full - mean(leave_out(everything, nodes))) / width)
    assert found.items == tuple(map(str, nodes))
    for node, drop in zip(nodes, found.drops.mean.tolist(), strict=True):
        assert drop == pytest.approx((alone - mean(leave_out(nodes, [node]))) / width, abs=1e-8)
    score = math.exp(-alone) if metric == "kl" else alone / full
    assert found.score.at()[0] == pytest.approx(100 * score)
    named = {str(node): node for node in nodes}
    assert len(found.completeness.knockouts) == 5
    for i, names in enumerate(found.completeness.knockouts):
        part = [named[name] for name in names]
        of_circuit, of_model = mean(leave_out(nodes, part)), mean(leave_out(everything, part))
        assert found.completeness.circuit.at(i)[0] == pytest.approx((of_circuit - nothing) / width)
        assert found.completeness.model.at(i)[0] == pytest.approx((of_model - nothing) / width)
        assert float(found.completeness.incomplete[i]) == pytest.approx(abs((of_circuit - of_model) / width), abs=1e-8)
    assert found.values.shape == (4, task.n)
    assert torch.allclose(found.values.mean(1), found.metric.mean)
    assert json.loads(json.dumps(found.to_dict()))["recovered"][0] == pytest.approx(found.recovered.at()[0])


def test_the_whole_model_is_a_perfect_circuit(case):
    model, task, _ = case
    everything = Circuit.of_nodes(all_nodes(model.config))
    found = evaluate_circuit(Ablation(model, task, precision="fp64"), everything, n_knockouts=4)
    assert found.recovered.at() == pytest.approx((100, 100, 100))
    assert found.destroyed.at() == pytest.approx((100, 100, 100))
    assert found.score.at() == pytest.approx((100, 100, 100))
    assert found.completeness.incomplete.tolist() == pytest.approx([0] * 4, abs=1e-9)


def test_drops_are_those_of_the_score_on_another_scale(case):
    model, task, circuit = case
    ablation = Ablation(model, task, precision="fp64")
    found = evaluate_circuit(ablation, circuit, n_knockouts=0)
    scale = ablation.full / float(found.metric.mean[0] - found.metric.mean[3])
    points = {name: found.drops.at(i)[0] / scale for i, name in enumerate(found.items)}
    drops = node_drops(ablation, circuit)
    assert points == pytest.approx({name: drop for name, (drop, *_) in drops.items()}, abs=1e-8)
    weights = resampled_means(torch.eye(task.n).double())  # what each prompt counts in each resample
    values = ablation.kept_values([circuit.nodes, *(set(circuit.nodes) - {node} for node in circuit.nodes)])
    for (_, low, high), without in zip(drops.values(), values[1:], strict=True):
        drawn = 100 * (values[0] - without) @ weights / (ablation.clean @ weights)
        assert [low, high] == pytest.approx(drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist())
    assert set(found.minimal()) <= {name for name, drop in points.items() if drop > 0}


def test_edges_can_be_left_out_as_nodes_can():
    """An additive circuit of edges: each is worth its weight, and one outside it stands in for one inside."""
    weights = {("input", "m0"): 3.0, ("m0", "logits"): 1.0, ("input", "logits"): 0.0}
    stand_in = ("m0", "m1")

    def evaluate(kept):
        rows = []
        for edges in kept:
            value = sum(weights[edge] for edge in edges if edge in weights)
            if stand_in in edges and ("m0", "logits") not in edges:
                value += 1
            rows.append([value] * 3)
        return torch.tensor(rows, dtype=torch.float64)

    circuit, everything = list(weights), [*weights, stand_in]
    scale = Scale.of(evaluate, everything)
    assert drops(evaluate, circuit, scale).mean.tolist() == [75, 25, 0]
    found = completeness(evaluate, everything, circuit, [[("input", "m0")], [("m0", "logits")]], scale)
    assert found.incomplete.tolist() == [0, 25]
    assert found.knockouts[1] == ("m0 -> logits",)
    assert found.worst == 1
    assert greedy_parts(evaluate, everything, circuit, 1) == [[("m0", "logits")]]


def test_random_parts_are_of_the_circuit_and_never_empty():
    parts = random_parts("abc", 200, seed=1)
    assert {"".join(part) for part in parts} == {"a", "b", "c", "ab", "ac", "bc", "abc"}


def test_random_circuits_are_scored_as_one_by_one(case):
    model, task, circuit = case
    ablation = Ablation(model, task, precision="fp64")
    nothing = 100 * float(ablation.kept_values([[]]).mean()) / ablation.full
    for match in ("size", "layers"):
        found = random_baseline(ablation, circuit, 70, match=match, seed=SEED)
        rng = random.Random(SEED)
        drawn = [random_nodes(ablation.nodes, circuit, rng, match) for _ in range(70)]
        scores = torch.tensor([ablation.score_of(nodes) for nodes in drawn], dtype=torch.float64)
        torch.testing.assert_close(found.scores, scores)
        torch.testing.assert_close(found.random, 100 * (scores - nothing) / (100 - nothing))
        alone = 100 * (ablation.score_of(set(circuit.nodes)) - nothing) / (100 - nothing)
        assert found.recovered == pytest.approx(alone)
        assert found.p == (1 + sum(value >= found.recovered for value in found.random.tolist())) / 71
        assert found.least <= found.middle[0] <= found.mean <= found.most
    assert found.n_distinct <= 70
    assert json.loads(json.dumps(found.to_dict()))["max"] == pytest.approx(found.most)


def test_a_circuit_drawn_twice_is_evaluated_once(case):
    model, task, _ = case
    layer = Circuit([(0, 0)], [])
    seen = []
    found = random_baseline(Ablation(model, task), layer, 300, match="layers", progress=lambda *done: seen.append(done))
    assert found.n_distinct == 4
    assert len(found.random) == 300
    assert len(found.random.unique()) == 4
    assert seen == [(4, 4)]
    with pytest.raises(PatchError, match="match 'colour' is not known; expected one of size, layers, nodes"):
        random_baseline(Ablation(model, task), layer, 1, match="colour")
    with pytest.raises(PatchError, match="0 random circuits; expected at least 1"):
        random_baseline(Ablation(model, task), layer, 0)


def test_unions_and_intersections_are_scored_beside_their_circuits(case):
    model, task, circuit = case
    other = random_circuit(model.config, SEED + 9)
    both = {"a": circuit, "b": other, "shared": intersection([circuit, other]), "either": union([circuit, other])}
    found = circuits_scored(Ablation(model, task, precision="fp64"), both)
    for name, each in both.items():
        alone = evaluate_circuit(reference_ablation(model, task), each, n_knockouts=0) if each.nodes else None
        if alone is not None:
            assert found[name] == pytest.approx(alone.recovered.at())


def test_cells_are_called_by_their_q_values(case):
    model, task, _ = case
    scores = sweep(model, task, "heads", precision="fp64")
    q_values = cell_q_values(scores)
    assert torch.equal(q_values, benjamini_hochberg(sign_flip_p(scores.effects)))
    rows = table_with_q(scores)
    assert [row["q"] for row in rows] == q_values.tolist()
    assert [row["effect"] for row in rows] == [row["effect"] for row in scores.table()]
    assert all(row["q"] is None for row in table_with_q(replace(scores, settings={"metric": "kl"})))


def test_sites_are_counted_by_their_q_values_and_few_prompts_are_said():
    rows = [{"q": q} for q in (0.01, 0.05, 0.2)]
    assert called(rows, 32) == "2 of 3 sites have an effect, at a false discovery rate of 5% (q)"
    assert "With 3 prompts no q-value can reach 0.05; at least 6 prompts are needed" in called(rows, 3)
    assert "takes at least 25 sites at once" in called([{"q": 1.0}] * 160, 8)


def test_nothing_to_evaluate_is_an_error(case):
    model, task, _ = case
    with pytest.raises(PatchError, match="a circuit without nodes or edges"):
        evaluate_circuit(Ablation(model, task), Circuit([], []))
    with pytest.raises(PatchError, match="'a9.h0' does not exist"):
        evaluate_circuit(Ablation(model, task), Circuit([(9, 0)], []))
    with pytest.raises(PatchError, match="give the same metric, 2"):
        Scale(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))
