"""Known models do their task by the circuit that they were built with, and by nothing else."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from edge_oracle import metric_without
from subcircuit.analysis.faithfulness import Ablation
from subcircuit.analysis.metrics import accuracy, logit_difference
from subcircuit.analysis.sweep import sweep
from subcircuit.analysis.truth import FAMILIES, truth, truth_names
from subcircuit.analysis.truth.known import BLUEPRINTS
from subcircuit.engine.errors import TaskError
from subcircuit.engine.patching.graph import check_edge, edges

SEED = random.randrange(10**6)
MUCH, LITTLE = 0.2, 0.01
"""Shares of the clean logit difference: the least that a true part changes, the most that another one does."""


@pytest.fixture(scope="module", params=[(name, family) for name in truth_names() for family in FAMILIES], ids="-".join)
def known(request):
    print(f"seed {SEED}")
    return truth(*request.param, seed=SEED, n=12, dtype=torch.float64)


def test_the_model_does_its_task_and_the_corrupted_prompts_flip_it(known):
    task = known.task
    clean, corrupted = known.model(task.clean), known.model(task.corrupted)
    assert accuracy(clean, task.answer) == accuracy(corrupted, task.wrong) == 1
    assert logit_difference(clean, task.answer, task.wrong).min() > 5
    assert logit_difference(corrupted, task.answer, task.wrong).max() < -5


def test_prompts_that_it_was_not_made_with_are_answered_too(known):
    other = truth(known.name, known.family, seed=SEED + 1, n=100).task
    assert accuracy(known.model(other.clean), other.answer) == 1


@pytest.mark.parametrize("source", ["corrupted", "mean", "zero"])
def test_every_true_node_matters_and_no_other_does(known, source):
    scores = sweep(known.model, known.task, "heads+mlps", source=source, executor="reference")
    share = {str(site): abs(value) for site, value in zip(scores.sites, scores.share.tolist(), strict=True)}
    true = {str(node) for node in known.circuit.nodes}
    assert true == set(known.roles.values())
    assert min(share[node] for node in true) > MUCH
    assert max(value for node, value in share.items() if node not in true) < LITTLE
    assert true | {*known.distractors} | {*known.inert} == share.keys()


@pytest.mark.parametrize("source", ["corrupted", "mean", "zero"])
def test_the_true_nodes_alone_recover_the_task(known, source):
    ablation = Ablation(known.model, known.task, source=source, executor="reference")
    assert ablation.score_of(set(known.circuit.nodes)) == pytest.approx(100, abs=1)
    assert ablation.score_of(set()) < 25


def test_every_true_edge_matters_and_no_other_does(known):
    every, task = edges(known.model.config), known.task.subset(range(4))
    for edge in known.circuit.edges:
        check_edge(edge, known.model.config)
    full = metric_without(known.model, task, [()])
    lost = torch.cat(
        [
            full - metric_without(known.model, task, [[edge] for edge in every[first : first + 64]])
            for first in range(0, len(every), 64)
        ]
    )
    share = dict(zip(every, (lost / full).abs().tolist(), strict=True))
    assert min(share[edge] for edge in known.circuit.edges) > MUCH
    assert max(value for edge, value in share.items() if edge not in known.circuit.edges) < LITTLE


def test_the_true_edges_alone_recover_the_task(known):
    others = set(edges(known.model.config)) - set(known.circuit.edges)
    full, alone, none = metric_without(
        known.model, known.task, [(), others, others | set(known.circuit.edges)]
    ).tolist()
    assert alone == pytest.approx(full, rel=0.01)
    corrupted = logit_difference(known.model(known.task.corrupted), known.task.answer, known.task.wrong).mean()
    assert none == pytest.approx(float(corrupted))


def test_distractors_write_noise_of_the_size_asked_for_and_inert_nodes_write_nothing(known):
    config = known.model.config
    cache = known.model.run_with_cache(known.task.clean, ["blocks.*.attn.hook_result", "blocks.*.hook_mlp_out"])[1]
    written = {f"m{layer}": cache[f"blocks.{layer}.hook_mlp_out"] for layer in range(config.n_layers)}
    for layer in range(config.n_layers):
        result = cache[f"blocks.{layer}.attn.hook_result"]
        written |= {f"a{layer}.h{head}": result[:, :, head] for head in range(config.n_heads)}
    assert known.distractors
    assert known.inert
    for node in known.distractors:
        assert written[node].pow(2).sum(-1).mean().sqrt() == pytest.approx(1.0, rel=1e-3)
        assert written[node].std(0).max() > 0.05  # another value in each prompt
    for node in known.inert:
        assert not written[node].any()


def test_heads_attend_as_their_roles_say():
    for family in FAMILIES:
        known = truth("induction", family, seed=SEED, dtype=torch.float64)
        head = known.circuit.nodes[0]
        pattern = known.model.run_with_cache(known.task.clean, [f"blocks.{head.layer}.attn.hook_pattern"])[1]
        attention = pattern[f"blocks.{head.layer}.attn.hook_pattern"][:, head.index]
        assert attention.diagonal(-1, 1, 2).min() > 0.99


def test_a_seed_says_everything_and_another_one_makes_another_model():
    one, again, other = (truth("inhibition", "llama", seed=seed) for seed in (SEED, SEED, SEED + 1))
    assert torch.equal(one.model.W_Q, again.model.W_Q)
    assert one.task.fingerprint() == again.task.fingerprint()
    assert one.circuit == again.circuit
    assert one.task.fingerprint() != other.task.fingerprint()
    assert one.model.W_Q.shape == other.model.W_Q.shape
    assert not torch.equal(one.model.W_Q, other.model.W_Q)


def test_sizes_and_noise_are_as_asked_for():
    known = truth("successor", "llama", n_layers=3, n_heads=6, n_distractors=4, noise=3.0, seed=SEED)
    config = known.model.config
    assert (config.n_layers, config.n_heads, config.kv_heads) == (3, 6, 3)
    assert len(known.distractors) == 4
    assert len(known.distractors) + len(known.inert) + len(known.circuit) == 3 * 7
    assert accuracy(known.model(known.task.clean), known.task.answer) == 1


@pytest.mark.parametrize("name", truth_names())
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_that_look_less_sharply_still_do_the_task_by_the_same_circuit(name, family):
    print(f"seed {SEED}")
    sharp, soft = (truth(name, family, seed=SEED, sharpness=sharpness) for sharpness in (12, 5))
    task = soft.task
    assert soft.circuit.edges == sharp.circuit.edges
    assert accuracy(soft.model(task.clean), task.answer) == 1
    less, full = (logit_difference(each.model(task.clean), task.answer, task.wrong).mean() for each in (soft, sharp))
    assert 0.5 * full < less < 0.99 * full
    scores = sweep(soft.model, task, "heads+mlps")
    share = {str(site): abs(value) for site, value in zip(scores.sites, scores.share.tolist(), strict=True)}
    true = set(soft.roles.values())
    assert min(share[node] for node in true) > MUCH
    assert max(value for node, value in share.items() if node not in true) < LITTLE


def test_a_blueprint_names_positions_that_are_there():
    for name in truth_names():
        blueprint, task = BLUEPRINTS[name], truth(name).task
        assert task.positions == blueprint.positions
        assert task.positions["last"] == (task.pos - 1,)
        with pytest.raises(
            TaskError, match=rf"'{name}': end at .{task.pos},.; expected positions in 0..{task.pos - 1}"
        ):
            replace(blueprint, positions={"end": (task.pos,)})
    successor, inhibition = truth("successor", seed=SEED).task, truth("inhibition", seed=SEED).task
    shown = successor.clean[:, list(successor.positions["members"])]
    assert bool(((shown.diff(dim=1) - 1) % 10 == 0).all())
    first, again = inhibition.clean[:, [1, 3]], inhibition.clean[:, list(inhibition.positions["S2"])]
    repeated = first[first != inhibition.answer[:, None]]
    assert bool((again == repeated[:, None]).any(1).all())


def test_what_cannot_be_built_is_refused():
    with pytest.raises(TaskError, match="'magic' does not exist; expected one of induction, successor, inhibition"):
        truth("magic")
    with pytest.raises(TaskError, match="family 'mamba' is not known"):
        truth("induction", "mamba")
    with pytest.raises(TaskError, match="needs 4 layers, got 3"):
        truth("inhibition", n_layers=3)
    with pytest.raises(TaskError, match="99 distractors do not fit: 18 of 20 places are free"):
        truth("induction", n_distractors=99)
    with pytest.raises(TaskError, match="even number of heads"):
        truth("induction", n_heads=3)
    with pytest.raises(TaskError, match="noise=1.0, sharpness=0.0"):
        truth("induction", sharpness=0.0)
    with pytest.raises(TaskError, match="needs 2 key-value heads in a layer, got 1"):
        truth("inhibition", "llama", n_heads=2)
    blueprint = BLUEPRINTS["induction"]
    with pytest.raises(TaskError, match="no such edge 'input' -> 'induction'"):
        replace(blueprint, edges=(("input", "induction"),))
    with pytest.raises(TaskError, match="family 'previous' is not one of"):
        replace(blueprint, sizes={name: size for name, size in blueprint.sizes.items() if name != "previous"})
