"""Edge scores against finite differences of forwards in which one receiver's input alone is moved, in float64."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from gradient_references import slope, source_values
from patching_cases import CONFIGS, random_model, random_task
from subcircuit.analysis.eap import connected, edge_scores
from subcircuit.engine.errors import PatchError
from subcircuit.engine.patching import Component
from subcircuit.engine.patching.graph import edges, receivers, senders

SEED = random.randrange(10**6)


def build(name):
    print(f"seed {SEED}")
    return random_model(CONFIGS[name], SEED).double(), random_task(SEED + 1, n_prompts=3)


@pytest.fixture(scope="module", params=list(CONFIGS))
def case(request):
    return build(request.param)


def sender_delta(model, task, sender, source):
    """What a sender's patch changes in the residual stream, from its own hook point and its own weights."""
    if sender == "input":
        name = "blocks.0.hook_resid_pre"
        return source_values(model, task, source, [name])[name] - model.run_with_cache(task.clean, [name])[1][name]
    component = Component.parse(sender)
    name = component.hook_name
    delta = source_values(model, task, source, [name])[name] - model.run_with_cache(task.clean, [name])[1][name]
    if component.kind == "mlp":
        return delta
    return delta[:, :, component.index] @ model.blocks[component.layer].attn.W_O[component.index]


def moving_input(model, receiver, delta):
    """A hook that adds a difference to the input of one receiver, before its norm, and to nobody else's."""
    if receiver == "logits":
        return f"blocks.{model.config.n_layers - 1}.hook_resid_post", lambda value, _: value + delta
    component = Component.parse(receiver)
    if component.kind == "mlp":
        return f"blocks.{component.layer}.hook_mlp_in", lambda value, _: value + delta

    def move(value, name):
        value = value.clone()
        value[:, :, component.index] += delta
        return value

    return f"blocks.{component.layer}.hook_{component.kind}_input", move


def edge_slope(model, task, edge, source, entry=None):
    sender, receiver = edge
    delta = sender_delta(model, task, sender, source)
    start = [] if entry is None else [("blocks.0.hook_resid_pre", lambda value, _: entry)]
    return slope(model, task, lambda epsilon: [*start, moving_input(model, receiver, epsilon * delta)])


def some_edges(config, n):
    """Edges drawn at random, with each kind of receiver and the ends of the model among them."""
    drawn = random.Random(SEED).sample(edges(config), n)
    ends = [("input", "a0.q1"), ("input", "logits"), ("a0.h3", "m0"), ("m1", "a2.k1"), ("a2.h1", "logits")]
    return [*ends, ("a1.h0", "a2.v0"), *drawn]


@pytest.mark.parametrize("source", ["corrupted", "mean", "zero"])
def test_an_edge_scores_what_moving_its_receivers_input_alone_does(case, source):
    model, task = case
    scores = edge_scores(model, task, source=source, precision="fp64", per_prompt=True)
    for edge in some_edges(model.config, 25):
        row, column = scores.senders.index(edge[0]), scores.receivers.index(edge[1])
        expected = edge_slope(model, task, edge, source)
        torch.testing.assert_close(scores.per_prompt[:, row, column], expected, rtol=1e-5, atol=1e-7)
        assert scores.of(edge) == pytest.approx(float(expected.mean()), rel=1e-5, abs=1e-7)


def test_integrated_gradients_are_the_mean_on_the_way_from_the_sources_prompts(case):
    model, task = case
    entry, n_steps = "blocks.0.hook_resid_pre", 3
    clean = model.run_with_cache(task.clean, [entry])[1][entry]
    start = source_values(model, task, "corrupted", [entry])[entry]
    ways = [start + (clean - start) * k / n_steps for k in range(1, n_steps + 1)]
    scores = edge_scores(model, task, "eap-ig", steps=n_steps, precision="fp64")
    for edge in some_edges(model.config, 6):
        slopes = [edge_slope(model, task, edge, "corrupted", entry=way) for way in ways]
        assert scores.of(edge) == pytest.approx(float(torch.stack(slopes).mean()), rel=1e-5, abs=1e-7)
    one = edge_scores(model, task, "eap-ig", steps=1, precision="fp64").effects
    torch.testing.assert_close(one, edge_scores(model, task, precision="fp64").effects, equal_nan=True)


def test_scores_cover_the_models_edges_and_no_others(case):
    model, task = case
    scores = edge_scores(model, task)
    assert (list(scores.senders), list(scores.receivers)) == (senders(model.config), receivers(model.config))
    found = {(scores.senders[i], scores.receivers[j]) for i, j in (~scores.effects.isnan()).nonzero().tolist()}
    assert found == set(edges(model.config))
    assert scores.n_edges == len(found)
    with pytest.raises(PatchError, match="'m2' -> 'a1.q0' does not exist"):
        scores.of(("m2", "a1.q0"))


def test_the_edges_out_of_a_sender_add_up_to_its_gradient_score(case):
    """An edge enters one receiver's input; all of them together move what the sender's own patch moves."""
    from subcircuit.analysis.gradients import gradient_scores

    model, task = case
    by_edge = edge_scores(model, task, precision="fp64").effects.nansum(1)
    names = ["r0", *senders(model.config)[1:]]
    by_node = gradient_scores(model, task, names, precision="fp64").mean
    torch.testing.assert_close(by_edge, by_node)


def test_single_precision_and_chunks_of_one_prompt_change_nothing(case):
    model, task = case
    precise = edge_scores(model, task, "eap-ig", precision="fp64", per_prompt=True)
    single = edge_scores(model.float(), task, "eap-ig", budget_bytes=1, per_prompt=True)
    model.double()
    for name in ("effects", "per_prompt", "clean_metric"):
        torch.testing.assert_close(
            getattr(single, name).double(), getattr(precise, name), rtol=1e-3, atol=1e-4, equal_nan=True
        )


def is_connected(chosen, config):
    """Whether each edge lies on a path from input to logits: by following every path, one edge at a time."""

    def heads_of(receiver):
        if receiver == "logits" or receiver.startswith("m"):
            return [receiver]
        component = Component.parse(receiver)
        size = 1 if component.kind == "q" else config.group_size
        return [f"a{component.layer}.h{component.index * size + i}" for i in range(size)]

    def leads_to_logits(node):
        return node == "logits" or any(
            sender == node and any(map(leads_to_logits, heads_of(receiver))) for sender, receiver in chosen
        )

    def comes_from_input(node):
        return node == "input" or any(
            node in heads_of(receiver) and comes_from_input(sender) for sender, receiver in chosen
        )

    return {edge for edge in chosen if comes_from_input(edge[0]) and any(map(leads_to_logits, heads_of(edge[1])))}


@pytest.mark.parametrize("selection", ["top", "greedy"])
@pytest.mark.parametrize("n_edges", [3, 8, 15])
def test_a_circuit_has_the_strongest_edges_that_lie_on_a_path(case, selection, n_edges):
    model, task = case
    scores = edge_scores(model, task)
    circuit = scores.circuit(n_edges, selection=selection)
    assert set(circuit.edges) == is_connected(circuit.edges, model.config)
    assert {str(node) for node in circuit.nodes} == {sender for sender, _ in circuit.edges} - {"input"}
    assert (circuit.method, circuit.settings["n_edges"]) == ("eap", n_edges)
    if selection == "top":
        strongest = [edge for edge, _ in scores.top(n_edges)]
        assert set(circuit.edges) == is_connected(strongest, model.config)


def test_greedy_search_takes_the_strongest_edge_into_what_it_has_reached():
    model, task = build("gpt2")
    scores = edge_scores(model, task)
    chosen, reached = [], {"logits"}
    for _ in range(12):
        open_edges = [
            edge
            for edge in edges(model.config)
            if edge not in chosen and edge[1].replace("q", "h").replace("k", "h").replace("v", "h") in reached
        ]
        chosen.append(max(open_edges, key=lambda edge: abs(scores.of(edge))))
        reached.add(chosen[-1][0])
    assert set(scores.circuit(12, selection="greedy").edges) == is_connected(chosen, model.config)


def test_all_edges_or_a_threshold_of_zero_are_the_whole_model(case):
    model, task = case
    scores = edge_scores(model, task)
    for circuit in (
        scores.circuit(scores.n_edges),
        scores.circuit(threshold=0.0),
        scores.circuit(scores.n_edges, selection="greedy"),
    ):
        assert set(circuit.edges) == set(edges(model.config))
        assert len(circuit) == len(senders(model.config)) - 1
    largest = scores.top(5)
    assert [abs(score) for _, score in largest] == sorted((abs(score) for _, score in largest), reverse=True)
    assert scores.circuit(threshold=2 * abs(largest[0][1])).edges == ()


def test_an_edge_into_a_shared_key_enters_every_head_of_its_group():
    config = CONFIGS["llama-gqa"]
    kept = connected([("input", "a1.k1"), ("a1.h2", "logits"), ("a1.h1", "logits")], config)
    assert kept == [("input", "a1.k1"), ("a1.h2", "logits")]
    assert connected([("input", "a1.k1"), ("m0", "logits")], config) == []
    for edge in (("m2", "a1.q0"), ("input", "a9.q0"), ("input", "r1")):
        with pytest.raises(PatchError, match=edge[1]):
            connected([edge], config)


def test_bad_options_are_named(case):
    model, task = case
    with pytest.raises(PatchError, match="method 'atp' is not known; expected one of eap, eap-ig"):
        edge_scores(model, task, "atp")
    with pytest.raises(PatchError, match="steps 0"):
        edge_scores(model, task, "eap-ig", steps=0)
    with pytest.raises(PatchError, match="needs corrupted prompts"):
        edge_scores(model, replace(task, corrupted=None))
    scores = edge_scores(model, task)
    for options in ({}, {"n_edges": 3, "threshold": 0.1}, {"n_edges": 3, "selection": "best"}):
        with pytest.raises(PatchError, match="expected one of the first two, and one of top, greedy"):
            scores.circuit(**options)
    with pytest.raises(PatchError, match="n_edges 0 is out of range"):
        scores.circuit(0)
