"""Edges of circuits against plain loops of hooked forwards in float64."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from patching_cases import CONFIGS, random_model, relative_error, task_for
from subcircuit.analysis.acdc import acdc
from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.discover import discover
from subcircuit.analysis.edge_ablation import EdgeAblation, edge_score
from subcircuit.analysis.edges import edges_between, prune_edges
from subcircuit.analysis.faithfulness import score
from subcircuit.analysis.paths import paths_between, trace_paths, verify_edges
from subcircuit.engine.errors import PatchError, TaskError
from subcircuit.engine.patching.edges import EdgeSet, edge_effects, path_effects
from subcircuit.engine.patching.graph import INPUT, LOGITS, edges, receivers
from subcircuit.engine.patching.sites import as_patch_set

SEED = random.randrange(10**6)
EXACT = {"executor": "reference", "precision": "fp64"}


@pytest.fixture(params=CONFIGS)
def case(request):
    print(f"seed {SEED}")
    config = replace(CONFIGS[request.param], n_layers=2)
    model = random_model(config, SEED).double()
    return model, task_for(model, SEED + 1)


def sequential_acdc(model, task, threshold, source, metric="logit_difference"):
    """The rule as plainly as it can be said: one hooked forward per edge, none of them left out."""
    options = {"source": source, "metric": metric, **EXACT}
    clean = edge_effects(model, task, [()], **options).clean_metric.mean()

    def score_without(removed):
        effect = edge_effects(model, task, [removed], **options).effects.mean()
        shares = {"kl": (-effect).exp(), "log_probability": effect.exp(), "logit_difference": (effect + clean) / clean}
        return 100 * float(shares[metric])

    removed, kept, now, trace = [], {}, 100.0, {}
    for edge in reversed(edges(model.config)):
        without = score_without([*removed, edge])
        trace[f"{edge[0]}->{edge[1]}"] = without
        if now - without < threshold:
            removed.append(edge)
            now = without
        else:
            kept[edge] = now - without
    return kept, now, trace


@pytest.mark.parametrize(
    ("source", "threshold", "at_once"), [("mean", 3.0, 1), ("corrupted", 0.5, 7), ("zero", 10.0, 16)]
)
def test_acdc_decides_as_the_sequential_rule_does(case, source, threshold, at_once):
    model, task = case
    kept, final_score, trace = sequential_acdc(model, task, threshold, source)
    circuit = discover(
        model, task, "acdc", threshold=threshold, source=source, precision="fp64", candidates_per_batch=at_once
    )
    assert set(circuit.edges) == set(kept)
    assert 0 < len(kept) < len(edges(model.config))
    assert circuit.score == pytest.approx(final_score)
    assert circuit.edge_scores == pytest.approx(kept, abs=1e-6)
    assert {step.node: step.score_without for step in circuit.trace} == pytest.approx(
        {step.node: trace[step.node] for step in circuit.trace}, abs=1e-6
    )
    assert edge_score(model, task, circuit, source=source, precision="fp64") == pytest.approx(final_score)
    assert {str(node) for node in circuit.nodes} == {sender for sender, _ in kept} - {INPUT}


def test_acdc_by_the_kl_decides_as_the_sequential_rule_does(case):
    model, task = case
    nothing_left = EdgeAblation(model, task, metric="kl", precision="fp64").score_of([])
    # So little per edge that all of them together cannot go.
    threshold = (100 - nothing_left) / len(edges(model.config))
    kept, final_score, _ = sequential_acdc(model, task, threshold, "mean", "kl")
    circuit = discover(model, task, "acdc", metric="kl", threshold=threshold, precision="fp64")
    assert set(circuit.edges) == set(kept)
    assert 0 < len(kept) < len(edges(model.config))
    assert circuit.score == pytest.approx(final_score)
    assert circuit.settings["metric"] == "kl"


def test_the_executors_find_the_same_edges(case):
    model, task = case
    fast = acdc(model, task, threshold=3.0, precision="fp64")
    slow = acdc(model, task, threshold=3.0, candidates_per_batch=1, **EXACT)
    assert fast.edges == slow.edges


def outside(circuit, config):
    nodes = [f"a{layer}.h{head}" for layer in range(config.n_layers) for head in range(config.n_heads)]
    nodes += [f"m{layer}" for layer in range(config.n_layers)]
    return [node for node in nodes if node not in {str(node) for node in circuit.nodes}]


def ablated(circuit, config, source):
    return tuple(replace(patch, source=source) for patch in as_patch_set(tuple(outside(circuit, config))))


def sequential_edge_pruning(model, task, circuit, threshold, source, freeze, same_layer, from_input):
    """Every edge by itself, with hooks: the corrupted values are those of runs with the circuit's ablation active."""
    config = model.config
    gone = outside(circuit, config)
    names = [f"blocks.{layer}.{name}" for layer in range(config.n_layers) for name in ("attn.hook_z", "hook_mlp_out")]
    cache = model.run_with_cache(task.corrupted, names)[1]
    instead = {name: cache[name].mean(0, keepdim=True) if source == "mean" else 0 * cache[name] for name in names}

    def ablate(value, name):
        value, layer = value.clone(), name.split(".")[1]
        if name.endswith("mlp_out"):
            return instead[name].expand_as(value) if f"m{layer}" in gone else value
        for head in range(config.n_heads):
            if f"a{layer}.h{head}" in gone:
                value[:, :, head] = instead[name][:, :, head]
        return value

    with model.hooks([(name, ablate) for name in names]):
        corrupted = model.run_with_cache(task.corrupted, [*names, "blocks.0.hook_resid_pre"])[1]
    base = ablated(circuit, config, source)
    kept = {}
    for receiver in receivers(config):
        for sender in [*([INPUT] if from_input else []), *map(str, circuit.nodes)]:
            if not belongs(sender, receiver, circuit, config, same_layer):
                continue
            options = {"source": corrupted, "freeze": freeze, "base": base, **EXACT}
            result = path_effects(model, task, [(sender, receiver)], **options)
            share = float((result.effects.mean() + result.clean_metric.mean()) / result.clean_metric.mean())
            if share < threshold:
                kept[sender, receiver] = share
    return kept


def belongs(sender, receiver, circuit, config, same_layer):
    def layer(name):
        return {INPUT: -1, LOGITS: config.n_layers}.get(name) if name in (INPUT, LOGITS) else int(name[1])

    if receiver[0] == "a":
        head = int(receiver[4:])
        group = config.group_size
        readers = [head] if receiver[3] == "q" else range(head * group, (head + 1) * group)
        if not any((layer(receiver), reader) in circuit.heads for reader in readers):
            return False
    elif receiver != LOGITS and layer(receiver) not in circuit.mlps:
        return False
    beside = same_layer and receiver[0] == "m" and sender[0] == "a" and layer(sender) == layer(receiver)
    return layer(sender) < layer(receiver) or beside


@pytest.mark.parametrize(
    ("source", "freeze", "same_layer", "from_input"),
    [("mean", "heads", False, False), ("mean", "heads+mlps", True, True), ("zero", "none", False, True)],
)
def test_edges_are_pruned_as_one_by_one(case, source, freeze, same_layer, from_input):
    model, task = case
    circuit = Circuit(heads=[(0, 1), (0, 2), (1, 0), (1, 2), (1, 3)], mlps=[0, 1], task="random", method="prune")
    circuit = replace(circuit, score=score(model, task, circuit, source=source, precision="fp64"))
    options = {"source": source, "freeze": freeze, "same_layer": same_layer, "from_input": from_input}
    threshold = circuit.score / 100 - 0.01
    kept = sequential_edge_pruning(model, task, circuit, threshold, **options)
    found = prune_edges(model, task, circuit, threshold, precision="fp64", **options)
    assert set(found.edges) == set(kept)
    assert 0 < len(kept) < found.settings["edges"]["n_candidates"]
    assert found.edge_scores == pytest.approx({edge: circuit.score - 100 * share for edge, share in kept.items()})
    assert found.nodes == circuit.nodes
    assert found.score == circuit.score
    assert Circuit.from_json(found.to_json()) == found
    candidates = edges_between(circuit, model.config, from_input=from_input, same_layer=same_layer)
    base = EdgeSet(tuple(set(candidates) - set(kept)), ablated(circuit, model.config, source))
    without = edge_effects(model, task, [()], source=source, base=base, **EXACT)
    share = (without.effects.mean() + without.clean_metric.mean()) / without.clean_metric.mean()
    assert found.settings["edges"]["score"] == pytest.approx(100 * float(share), abs=1e-7)


def test_all_edges_of_a_circuit_of_nodes_score_like_its_nodes(case):
    model, task = case
    circuit = Circuit(heads=[(0, 1), (0, 2), (1, 0), (1, 3)], mlps=[0, 1])
    within = edges_between(circuit, model.config, from_input=True, same_layer=True)
    for source in ("mean", "corrupted"):
        alone = score(model, task, circuit, source=source, precision="fp64")
        whole = replace(circuit, edges=tuple(within))
        assert edge_score(model, task, whole, source=source, precision="fp64") == pytest.approx(alone)


def test_a_threshold_relative_to_the_circuit_scales_with_its_score(case):
    model, task = case
    everything = [(layer, head) for layer in range(2) for head in range(4)]
    circuits = [Circuit([head for head in everything if head != left_out], [0, 1]) for left_out in everything]
    shares = [score(model, task, circuit, precision="fp64") / 100 for circuit in circuits]
    share, circuit = max(zip(shares, circuits, strict=True), key=lambda pair: pair[0])
    assert share > 0
    absolute = prune_edges(model, task, circuit, 0.9 * share, precision="fp64")
    relative = prune_edges(model, task, circuit, 0.9, relative_to="circuit", precision="fp64")
    assert absolute.edges == relative.edges


def test_scores_of_edges_run_from_nothing_to_everything(case):
    model, task = case
    ablation = EdgeAblation(model, task, source="corrupted", precision="fp64")
    everything = edges(model.config)
    assert ablation.score_of(everything) == pytest.approx(100)
    logits, rows = model(task.corrupted)[:, -1], torch.arange(len(task.clean))
    nothing = 100 * float((logits[rows, task.answer] - logits[rows, task.wrong]).mean()) / ablation.full
    assert ablation.score_of([]) == pytest.approx(nothing)


def test_verified_edges_are_exact(case):
    model, task = case
    chosen = random.Random(SEED).sample(edges(model.config), 12)
    reference = edge_effects(model, task, chosen, **EXACT)
    verified = verify_edges(model, task, chosen, precision="fp64")
    assert relative_error(verified.effects, reference.effects) < 1e-10
    edge, value = verified.top(1)[0]
    assert value == pytest.approx(float(reference.effects.mean(1)[chosen.index(edge)]))
    assert abs(value) == pytest.approx(float(reference.effects.mean(1).abs().max()))


@pytest.mark.parametrize("metric", ["log_probability", "kl"])
def test_a_circuit_of_edges_is_scored_by_any_metric(case, metric):
    model, task = case
    circuit = Circuit([(0, 1)], [1], edges=((INPUT, "a0.v1"), ("a0.h1", "m1"), ("m1", "logits")))
    exact = EdgeAblation(model, task, executor="reference", precision="fp64", metric=metric)
    found = edge_score(model, task, circuit, precision="fp64", metric=metric)
    assert found == pytest.approx(exact.score_of(circuit.edges))


def test_what_cannot_be_done_is_named(case):
    model, task = case
    circuit = Circuit(heads=[(0, 1)], mlps=[])
    with pytest.raises(PatchError, match="the circuit has no edges to score"):
        edge_score(model, task, circuit)
    with pytest.raises(PatchError, match="threshold 0 must be positive"):
        acdc(model, task, threshold=0)
    with pytest.raises(PatchError, match="relative_to 'half' is not known"):
        prune_edges(model, task, circuit, relative_to="half")
    with pytest.raises(PatchError, match="freeze 'mlps' is not known"):
        prune_edges(model, task, circuit, freeze="mlps")
    with pytest.raises(PatchError, match="needs corrupted prompts"):
        prune_edges(model, replace(task, corrupted=None), circuit)
    with pytest.raises(PatchError, match=r"'a7\.h0' does not exist"):
        edges_between(Circuit([(7, 0)], []), model.config)
    with pytest.raises(PatchError, match="edge 'm1' -> 'm0' does not exist"):
        EdgeAblation(model, task).score_of([("m1", "m0")])
    with pytest.raises(TaskError, match="does not prefer the answers"):
        EdgeAblation(model, replace(task, answer=task.wrong, wrong=task.answer))


@pytest.mark.parametrize("freeze", ["heads", "heads+mlps", "none"])
def test_paths_to_a_receiver_are_traced_from_every_sender(case, freeze):
    model, task = case
    chosen = paths_between(model.config, [], ["a1.h2", "logits"])
    assert {receiver for _, receiver in chosen} == {"a1.q2", "logits", *readers_of_key(model.config)}
    assert len({sender for sender, receiver in chosen if receiver == LOGITS}) == 1 + 2 * (model.config.n_heads + 1)
    exact = path_effects(model, task, chosen, freeze=freeze, **EXACT)
    found = trace_paths(model, task, chosen, freeze=freeze, precision="fp64")
    assert relative_error(found.effects, exact.effects) < 1e-10
    rows = found.table()
    assert [(row["sender"], row["receiver"]) for row in rows] == chosen
    for row, effects in zip(rows, exact.effects, strict=True):
        assert row["effect"] == pytest.approx(float(effects.mean()), abs=1e-9)
        assert row["low"] <= row["effect"] <= row["high"]
    assert paths_between(model.config, ["m0", "input"], ["m1"]) == [("input", "m1"), ("m0", "m1")]
    with pytest.raises(PatchError, match="edge 'm1' -> 'a1.q0' does not exist"):
        paths_between(model.config, ["m1"], ["a0.q1", "a1.q0"])
    with pytest.raises(PatchError, match="'a9.h0' does not exist"):
        paths_between(model.config, [], ["a9.h0"])


def readers_of_key(config):
    group = 2 // config.group_size
    return {f"a1.k{group}", f"a1.v{group}"}
