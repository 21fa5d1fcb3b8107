"""Learned gates on edges: what they do to a forward pass, and the circuits they lead to."""

from __future__ import annotations

import random

import pytest
import torch

import subcircuit as sc
from patching_cases import CONFIGS, random_model, relative_error, task_for
from subcircuit.analysis.discover import discover
from subcircuit.analysis.eap import connected
from subcircuit.analysis.edge_ablation import EdgeAblation, edge_score
from subcircuit.analysis.edge_masks import circuit_of_edge_masks, gated_edges, learn_edge_masks
from subcircuit.analysis.gates import Masks, near_enough, smallest_prefix
from subcircuit.analysis.truth import truth, truth_report
from subcircuit.engine.errors import PatchError
from subcircuit.engine.patching import Patch, Site
from subcircuit.engine.patching.edge_delta import sender
from subcircuit.engine.patching.edges import edge_effects
from subcircuit.engine.patching.graph import EdgeIndex, edges
from subcircuit.engine.patching.sources import Sources

SEED = random.randrange(10**6)


@pytest.fixture(params=CONFIGS)
def case(request):
    print(f"seed {SEED}")
    model = random_model(CONFIGS[request.param], SEED).double()
    return model, task_for(model, SEED + 1)


def metric_with(model, task, closed, source):
    """Each prompt's logit difference when receivers read `closed` of the senders from the source."""
    index, chunk = EdgeIndex(model.config), torch.arange(task.n)
    sources = Sources(model, task, [tuple(Patch(Site(sender(name))) for name in index.senders)], source, task.n)
    logits = model.run_with_hooks(task.clean, gated_edges(model, index, closed, sources, chunk))[:, -1]
    return (logits.gather(1, task.answer[:, None]) - logits.gather(1, task.wrong[:, None]))[:, 0]


def closed_matrix(model, values):
    index = EdgeIndex(model.config)
    closed = torch.zeros(len(index.receivers), len(index.senders), dtype=torch.float64)
    closed[index.places(edges(model.config))] = values
    return closed


@pytest.mark.parametrize("source", ["corrupted", "mean", "zero"])
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_closed_gates_are_removed_edges_and_open_ones_nothing(case, source, share):
    model, task = case
    every = edges(model.config)
    gone = torch.rand(len(every), generator=torch.Generator().manual_seed(SEED)) < share
    removed = [edge for edge, closed in zip(every, gone.tolist(), strict=True) if closed]
    reference = edge_effects(model, task, [removed], source=source, executor="reference", precision="fp64")
    found = metric_with(model, task, closed_matrix(model, gone.double()), source)
    assert relative_error(found - reference.clean_metric, reference.effects[0]) < 1e-9


def test_half_a_gate_is_half_of_the_way_to_the_source(case):
    """Into the logits, what a receiver reads can be mixed by hand."""
    model, task = case
    closed = closed_matrix(model, 0.0)
    closed[-1] = torch.rand(closed.shape[1], generator=torch.Generator().manual_seed(SEED))
    resid = model(task.clean, stop_at_layer=model.config.n_layers)[:, -1]
    for share, name in zip(closed[-1], EdgeIndex(model.config).senders, strict=True):
        part = sender(name)
        clean, corrupted = (
            model.run_with_cache(tokens, [part.hook_name])[1][part.hook_name][:, -1]
            for tokens in (task.clean, task.corrupted)
        )
        change = corrupted - clean
        change = change[:, part.index] @ model.W_O[part.layer, part.index] if part.kind == "z" else change
        resid = resid + share * change
    logits = model.unembed_normed(resid)
    expected = (logits.gather(1, task.answer[:, None]) - logits.gather(1, task.wrong[:, None]))[:, 0]
    torch.testing.assert_close(metric_with(model, task, closed, "corrupted"), expected, rtol=1e-9, atol=1e-9)


def test_gates_have_the_gradient_of_small_steps(case):
    model, task = case
    every = edges(model.config)
    values = torch.rand(len(every), dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
    values.requires_grad_()
    gradient = torch.autograd.grad(metric_with(model, task, closed_matrix(model, values), "mean").sum(), values)[0]
    direction = torch.randn(len(every), dtype=torch.float64, generator=torch.Generator().manual_seed(SEED + 1))
    with torch.no_grad():
        after, before = (
            metric_with(model, task, closed_matrix(model, values + step * direction), "mean").sum()
            for step in (1e-6, -1e-6)
        )
    assert float(gradient @ direction) == pytest.approx(float(after - before) / 2e-6, rel=1e-4, abs=1e-6)


def test_a_seed_decides_the_gates_and_parameters_get_no_gradient(case):
    model, task = case
    model.requires_grad_()
    one, same, other = (learn_edge_masks(model, task, steps=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.log_alpha, same.log_alpha)
    assert not torch.equal(one.log_alpha, other.log_alpha)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_circuit_is_the_connected_part_of_the_first_edges(case):
    model, task = case
    every = edges(model.config)
    log_alpha = torch.randn(len(every), generator=torch.Generator().manual_seed(SEED))
    masks = Masks(tuple(every), log_alpha, ())
    ablation = EdgeAblation(model, task, source="mean", precision="fp64")
    circuit = circuit_of_edge_masks(masks, ablation, threshold=30.0)
    ranking = sorted(every, key=lambda edge: -log_alpha[every.index(edge)])
    prefixes = [tuple(connected(ranking[:size], model.config)) for size in range(len(every) + 1)]
    assert circuit.edges in prefixes
    assert circuit.score >= 70
    assert edge_score(model, task, circuit, source="mean", precision="fp64") == pytest.approx(circuit.score)
    below = prefixes[prefixes.index(circuit.edges) - 1]
    assert ablation.score_of(below) < 70


def test_the_smallest_prefix_is_found_from_coarse_to_fine():
    rng = random.Random(SEED)
    for _ in range(200):
        n_items, at_once = rng.randint(1, 400), rng.randint(1, 20)
        answer, calls = rng.randint(0, n_items), []

        def scores_of(sizes, answer=answer, calls=calls):
            calls.append(list(sizes))
            return [float(size >= answer) for size in sizes]

        assert smallest_prefix(scores_of, n_items, at_once, lambda score: score > 0.5) == (answer, 1.0)
        assert all(len(sizes) <= max(2, at_once) for sizes in calls)
    every_size = [10.0, 95.0, 40.0, 130.0, 100.0]
    one_side, both = near_enough(20, False), near_enough(20, True)
    assert smallest_prefix(lambda sizes: [every_size[i] for i in sizes], 4, 5, one_side) == (1, 95.0)
    every_size[1] = 125.0
    assert smallest_prefix(lambda sizes: [every_size[i] for i in sizes], 4, 5, one_side) == (1, 125.0)
    assert smallest_prefix(lambda sizes: [every_size[i] for i in sizes], 4, 5, both) == (4, 100.0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_edges_of_a_known_model_are_learned(family):
    print(f"seed {SEED}")
    known = truth("induction", family, n=8, seed=SEED)
    circuit = discover(known.model, known.task, "edge-masks", steps=120, seed=SEED)
    assert truth_report(circuit, known)["edges"].recall == 1
    assert len(circuit.edges) < 20
    assert circuit.score == pytest.approx(100, abs=20)


def test_discover_takes_options_of_learning():
    model = sc.load("tiny-gpt2")
    task = sc.task("months", model, n=4, seed=0)
    circuit = sc.discover(model, task, "edge-masks", steps=2, loss="logit_difference", metric="kl", threshold=30)
    assert circuit.settings["loss"] == "logit_difference"
    assert circuit.settings["metric"] == "kl"
    assert circuit.method == "edge-masks"
    assert circuit.score >= 70
    with pytest.raises(PatchError, match="loss 'l2' is not known"):
        sc.discover(model, task, "edge-masks", loss="l2")
    with pytest.raises(PatchError, match="method 'prune' has no option 'loss'"):
        sc.discover(model, task, "prune", loss="kl")
