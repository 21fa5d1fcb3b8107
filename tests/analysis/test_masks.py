"""Learned gates: what they do to a forward pass, and the circuits they lead to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import subcircuit as sc
from patching_cases import CONFIGS, random_model, random_task, task_for
from subcircuit.analysis.faithfulness import Ablation
from subcircuit.analysis.gates import open_probability, sampled
from subcircuit.analysis.masks import gated, learn_masks, mask_circuit
from subcircuit.analysis.nodes import all_nodes
from subcircuit.analysis.tasks import Task
from subcircuit.engine.errors import PatchError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Patch, Site, patch_effects
from subcircuit.engine.patching.sources import Sources


def logits_with_gates(model: HookedTransformer, task: Task, gates: Tensor, source: str) -> Tensor:
    nodes = all_nodes(model.config)
    sources = Sources(model, task, [tuple(Patch(Site(node)) for node in nodes)], source, task.n)
    hooks = gated(nodes, gates, sources, torch.arange(task.n))
    return model.run_with_hooks(task.clean, hooks)[:, -1]


@pytest.mark.parametrize("source", ["corrupted", "mean", "zero"])
@pytest.mark.parametrize("name", CONFIGS)
def test_closed_gates_are_ablations_and_open_ones_nothing(name, source):
    model, task = random_model(CONFIGS[name], seed=3).double(), random_task(4)
    nodes = all_nodes(model.config)
    closed = torch.rand(len(nodes), generator=torch.Generator().manual_seed(5)) < 0.4
    logits = logits_with_gates(model, task, (~closed).double(), source)
    found = logits.gather(1, task.answer[:, None]) - logits.gather(1, task.wrong[:, None])
    patches = tuple(Patch(Site(node)) for node, gone in zip(nodes, closed.tolist(), strict=True) if gone)
    ablated = patch_effects(model, task, [patches], source=source, executor="reference", precision="fp64")
    torch.testing.assert_close(found[:, 0], ablated.effects[0] + ablated.clean_metric, rtol=1e-9, atol=1e-9)


def test_gates_are_zero_or_one_as_often_as_the_formula_says():
    log_alpha = torch.tensor([-3.0, -0.5, 1.0, 4.0]).repeat_interleave(20_000)
    gates = sampled(log_alpha, torch.Generator().manual_seed(0)).view(4, -1)
    assert gates.min() == 0
    assert gates.max() == 1
    expected = open_probability(log_alpha).view(4, -1)[:, 0]
    torch.testing.assert_close((gates > 0).float().mean(1), expected, atol=0.01, rtol=0)


def test_a_seed_decides_the_gates():
    model, task = random_model(CONFIGS["gpt2"], seed=3), random_task(4)
    nodes = all_nodes(model.config)
    one, same, other = (learn_masks(model, task, nodes, steps=4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.log_alpha, same.log_alpha)
    assert not torch.equal(one.log_alpha, other.log_alpha)


def test_the_circuit_of_tiny_gpt2_keeps_the_score_with_few_nodes():
    model = sc.load("tiny-gpt2")
    task = sc.task("months", model, n=16, seed=0)
    circuit = mask_circuit(model, task, steps=60, loss="logit_difference")
    assert len(circuit) < len(all_nodes(model.config)) * 0.6
    assert circuit.score is not None
    assert circuit.score >= 80
    assert abs(Ablation(model, task).score_of(set(circuit.nodes)) - circuit.score) < 1e-3


def test_scores_of_masks_follow_the_executor_and_the_precision():
    model = random_model(CONFIGS["gpt2"], seed=3)
    task = task_for(model, 4)
    nodes = all_nodes(model.config)
    options = {"precision": "fp64", "source": "zero", "metric": "kl"}
    fast, slow = (
        mask_circuit(model, task, steps=3, executor=executor, **options) for executor in ("torch", "reference")
    )
    assert (fast.settings["executor"], slow.settings["executor"]) == ("torch", "reference")
    assert fast.settings["precision"] == slow.settings["precision"] == "fp64"
    assert fast.nodes == slow.nodes
    assert fast.score == pytest.approx(slow.score, rel=1e-9)
    assert set(fast.nodes) <= set(nodes)
    for option in ({"executor": "abacus"}, {"precision": "fp8"}):
        with pytest.raises(PatchError, match=f"{next(iter(option))} '.*' is not known"):
            mask_circuit(model, task, progress=lambda *done: pytest.fail("learned before it said so"), **option)


@pytest.mark.parametrize("option", [{"loss": "l2"}, {"steps": 0}, {"prompts_per_step": 0}, {"learning_rate": -1.0}])
def test_bad_options_are_named(option):
    model, task = random_model(CONFIGS["gpt2"], seed=3), random_task(4)
    with pytest.raises(PatchError, match=next(iter(option))):
        learn_masks(model, task, all_nodes(model.config), **option)
