"""Iterative pruning against a plain sequential loop of hooked forwards."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from patching_cases import CONFIGS, random_model, task_for
from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.discover import discover
from subcircuit.analysis.eap import edge_scores
from subcircuit.analysis.edge_ablation import edge_score
from subcircuit.analysis.faithfulness import Ablation, node_drops, score
from subcircuit.analysis.metrics import accuracy, kl_divergence, log_probability
from subcircuit.analysis.tasks import task as build_task
from subcircuit.engine.errors import PatchError, TaskError
from subcircuit.engine.patching import Component
from subcircuit.engine.patching.edges import edge_effects
from subcircuit.weights.names import load

SEED = random.randrange(10**6)


def sequential_pruning(model, task, threshold, first="backward", max_sweeps=None, both_sides=False):
    """The paper's rule as plainly as it can be said: one hooked forward per candidate."""
    config = model.config
    names = [f"blocks.{layer}.{name}" for layer in range(config.n_layers) for name in ("attn.hook_z", "hook_mlp_out")]
    cache = model.run_with_cache(task.corrupted, names)[1]
    means = {name: cache[name].mean(0, keepdim=True) for name in names}
    rows = torch.arange(len(task.clean))

    def metric(removed):
        def hook(value, name):
            layer = int(name.split(".")[1])
            value = value.clone()
            if name.endswith("mlp_out"):
                return means[name].expand_as(value) if (layer, "mlp") in removed else value
            for head in range(config.n_heads):
                if (layer, head) in removed:
                    value[:, :, head] = means[name][:, :, head]
            return value

        logits = model.run_with_hooks(task.clean, [(name, hook) for name in names])[:, -1]
        return float((logits[rows, task.answer] - logits[rows, task.wrong]).mean())

    full, removed, trace, direction, sweep = metric(set()), set(), [], first, 0
    while max_sweeps is None or sweep < max_sweeps:
        sweep += 1
        layers = range(config.n_layers)
        order = []
        for layer in reversed(layers) if direction == "backward" else layers:
            heads = [(layer, head) for head in range(config.n_heads)]
            order += [(layer, "mlp"), *heads] if direction == "backward" else [*heads, (layer, "mlp")]
        changed = False
        for node in order:
            if node in removed:
                continue
            without = 100 * metric(removed | {node}) / full
            gone = 100 - without < threshold and (not both_sides or without - 100 < threshold)
            name = f"m{node[0]}" if node[1] == "mlp" else f"a{node[0]}.h{node[1]}"
            trace.append((sweep, direction, name, without, gone))
            if gone:
                removed.add(node)
                changed = True
        if not changed:
            break
        direction = "forward" if direction == "backward" else "backward"
    return removed, 100 * metric(removed) / full, trace


@pytest.fixture(params=CONFIGS)
def case(request):
    print(f"seed {SEED}")
    model = random_model(CONFIGS[request.param], SEED)
    return model, task_for(model, SEED + 1)


@pytest.mark.parametrize("first", ["backward", "forward"])
@pytest.mark.parametrize("at_once", [1, 3, None])
def test_pruning_takes_the_decisions_of_the_sequential_rule(case, first, at_once):
    model, task = case
    circuit = discover(model, task, threshold=30, first=first, precision="fp64", candidates_per_batch=at_once)
    removed, final_score, trace = sequential_pruning(model.double(), task, 30, first)
    assert [(step.sweep, step.direction, step.node, step.removed) for step in circuit.trace] == [
        (sweep, direction, node, gone) for sweep, direction, node, _, gone in trace
    ]
    torch.testing.assert_close(
        torch.tensor([step.score_without for step in circuit.trace]), torch.tensor([step[3] for step in trace])
    )
    assert removed
    assert circuit.nodes
    assert not removed & ({*circuit.heads} | {(layer, "mlp") for layer in circuit.mlps})
    assert len(removed) + len(circuit) == model.config.n_layers * (model.config.n_heads + 1)
    assert circuit.score == pytest.approx(final_score)
    assert score(model, task, circuit, precision="fp64") == pytest.approx(final_score)


@pytest.mark.parametrize("first", ["backward", "forward"])
def test_costs_are_what_each_node_changed_when_it_was_last_evaluated(case, first):
    model, task = case
    circuit = discover(model, task, threshold=30, first=first, precision="fp64")
    ablation, costs = Ablation(model, task, precision="fp64"), {}
    removed = []
    for step in circuit.trace:
        node = Component.parse(step.node)
        before, after = ablation.scores([removed, [*removed, node]])
        costs[step.node] = before - after
        removed += [node] * step.removed
    assert len({step.sweep for step in circuit.trace}) > 1
    assert circuit.costs() == pytest.approx(costs)
    assert costs.keys() == {str(node) for node in ablation.nodes}
    assert Circuit.of_nodes(["m0"]).costs() == {}


def test_pruning_on_both_sides_keeps_what_would_raise_the_score_too_far(case):
    model, task = case
    circuit = discover(model, task, threshold=30, both_sides=True, precision="fp64")
    removed, final_score, trace = sequential_pruning(model.double(), task, 30, both_sides=True)
    assert [(step.node, step.removed) for step in circuit.trace] == [(node, gone) for _, _, node, _, gone in trace]
    assert circuit.score == pytest.approx(final_score)
    assert abs(circuit.score - 100) < 30
    assert len(removed) + len(circuit) == model.config.n_layers * (model.config.n_heads + 1)
    assert circuit.settings["both_sides"]


def test_no_option_is_silently_ignored(case):
    model, task = case
    ablation = Ablation(model, task, source="zero")
    assert discover(model, task, ablation=ablation, max_sweeps=1).settings["source"] == "zero"
    for given in ({"source": "mean"}, {"precision": "fp64", "budget_bytes": 2**30}):
        with pytest.raises(PatchError, match=f"{', '.join(given)}: an ablation brings its own"):
            discover(model, task, ablation=ablation, **given)
    with pytest.raises(PatchError, match="steps 3 mean nothing to 'eap'"):
        discover(model, task, "eap", n_edges=4, steps=3)
    for method, option in (("eap", "metric"), ("eap-ig", "first"), ("acdc", "first"), ("masks", "n_edges")):
        with pytest.raises(PatchError, match=f"method '{method}' has no option '{option}'"):
            discover(model, task, method, **{option: "any"})


def test_pruning_by_the_kl_is_that_of_full_forwards(case):
    model, task = case
    ablation = Ablation(model, task, metric="kl", precision="fp64")
    threshold = (100 - ablation.score_of(set())) / 4
    options = {"metric": "kl", "threshold": threshold, "precision": "fp64"}
    circuit = discover(model, task, **options)
    slow = discover(model, task, executor="reference", candidates_per_batch=1, **options)
    assert [(step.node, step.removed) for step in circuit.trace] == [(step.node, step.removed) for step in slow.trace]
    assert {step.removed for step in circuit.trace} == {True, False}
    assert circuit.score == pytest.approx(slow.score)
    assert circuit.score == pytest.approx(ablation.score_of(set(circuit.nodes)))
    assert circuit.settings["metric"] == "kl"


@pytest.mark.parametrize("name", ["numerals", "number_words", "months"])
def test_the_bundled_model_is_pruned_as_the_sequential_rule_does(name):
    model = load("tiny-gpt2")
    task = build_task(name, model, n=16, seed=0)
    circuit = discover(model, task)
    removed, final_score, trace = sequential_pruning(model, task, 20)
    assert [(step.node, step.removed) for step in circuit.trace] == [(node, gone) for _, _, node, _, gone in trace]
    assert not removed & ({*circuit.heads} | {(layer, "mlp") for layer in circuit.mlps})
    assert len(removed) + len(circuit) == 4 * 9
    assert circuit.score == pytest.approx(final_score, abs=1e-2)


def test_the_reference_executor_finds_the_same_circuit(case):
    model, task = case
    fast = discover(model, task, threshold=30, max_sweeps=1)
    slow = discover(model, task, threshold=30, max_sweeps=1, executor="reference", precision="fp64")
    assert (fast.heads, fast.mlps) == (slow.heads, slow.mlps)


def test_scores_and_drops_are_consistent(case):
    model, task = case
    circuit = Circuit(heads=[(0, 1), (1, 2), (2, 3)], mlps=[0, 2])
    circuit = replace(circuit, score=score(model, task, circuit, precision="fp64"))
    ablation = Ablation(model, task, precision="fp64")
    everything = Circuit(
        heads=[(layer, head) for layer in range(3) for head in range(4)],
        mlps=[0, 1, 2],
    )
    assert ablation.score_of(set(everything.nodes)) == pytest.approx(100)
    drops = node_drops(ablation, circuit)
    assert list(drops) == [str(node) for node in circuit.nodes]
    for node in circuit.nodes:
        without = ablation.score_of(set(circuit.nodes) - {node})
        drop, low, high = drops[str(node)]
        assert drop == pytest.approx(circuit.score - without)
        assert low <= drop <= high


@pytest.mark.parametrize("executor", ["torch", "reference"])
def test_scores_of_other_metrics_are_what_is_left_of_the_full_model(case, executor):
    model, task = case
    double = model.double()
    full = double(task.clean)[:, -1]
    top = full.argmax(-1)
    task = replace(task, answer=torch.where(torch.arange(task.n) % 2 == 0, top, task.answer))
    circuit = Circuit(heads=[(0, 1), (0, 2), (1, 2), (2, 3)], mlps=[0, 2])

    def zero(value, name):
        value = value.clone()
        kept = [head for layer, head in circuit.heads if f"blocks.{layer}." in name]
        value[:, :, [head for head in range(4) if head not in kept]] = 0
        return value

    hooks = [(f"blocks.{layer}.attn.hook_z", zero) for layer in range(3)]
    hooks.append(("blocks.1.hook_mlp_out", lambda value, name: torch.zeros_like(value)))
    ablated = double.run_with_hooks(task.clean, hooks)[:, -1]
    log_odds = log_probability(ablated, task.answer) - log_probability(full, task.answer)
    expected = {
        "log_probability": 100 * float(log_odds.mean().exp()),
        "kl": 100 * float((-kl_divergence(ablated, full).mean()).exp()),
        "accuracy": 100 * accuracy(ablated, task.answer) / accuracy(full, task.answer),
    }
    for metric, left in expected.items():
        options = {"source": "zero", "executor": executor, "precision": "fp64", "metric": metric}
        assert score(model, task, circuit, **options) == pytest.approx(left, rel=1e-6)
        assert Ablation(model, task, **options).scores([()])[0] == pytest.approx(100)
    with pytest.raises(TaskError, match=r"mean accuracy 0.000"):
        Ablation(model, replace(task, answer=full.argmin(-1)), metric="accuracy", executor=executor)


def test_what_cannot_be_pruned_is_refused(case):
    model, task = case
    with pytest.raises(PatchError, match="method 'magic' is not known"):
        discover(model, task, method="magic")
    with pytest.raises(PatchError, match="threshold 0"):
        discover(model, task, threshold=0)
    with pytest.raises(TaskError, match="does not prefer the answers"):
        discover(model, replace(task, answer=task.wrong, wrong=task.answer))
    with pytest.raises(PatchError, match="'a7.h0' does not exist"):
        score(model, task, Circuit(heads=[(7, 0)], mlps=[]))


def test_the_strongest_edges_are_scored_and_verified(case):
    model, task = case
    options = {"n_edges": 12, "source": "mean", "precision": "fp64"}
    estimated = discover(model, task, "eap-ig", **options)
    found = discover(model, task, "eap-ig", verify=True, **options)
    assert found.edges == estimated.edges
    assert found.score == pytest.approx(edge_score(model, task, found, source="mean", precision="fp64"))
    exact = edge_effects(model, task, found.edges, source="mean", executor="reference", precision="fp64")
    full = float(exact.clean_metric.mean())
    for edge, effect in zip(found.edges, exact.effects.mean(1).tolist(), strict=True):
        assert found.edge_scores[edge] == pytest.approx(-100 * effect / full, abs=1e-9)
    scores = edge_scores(model, task, "eap-ig", source="mean", precision="fp64")
    assert estimated.edge_scores == pytest.approx({edge: -100 * scores.of(edge) / full for edge in found.edges})
    assert -1 <= found.settings["verified"]["rank_correlation"] <= 1
    assert 0 <= found.settings["verified"]["same_sign"] <= 1
