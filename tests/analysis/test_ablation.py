"""Per-prompt values of ablations, by both executors, against a plain loop of forwards with hooks."""

from __future__ import annotations

import random

import pytest
import torch

from circuit_cases import random_circuit
from patching_cases import CONFIGS, random_model, task_for
from subcircuit.analysis import metrics
from subcircuit.analysis.baselines import random_baseline
from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.faithfulness import Ablation
from subcircuit.analysis.nodes import all_nodes
from subcircuit.engine.errors import PatchError

SEED = random.randrange(10**6)


@pytest.fixture(params=CONFIGS)
def case(request):
    print(f"seed {SEED}")
    model = random_model(CONFIGS[request.param], SEED).double()
    return model, task_for(model, SEED + 1)


def plain_logits(model, task, kept, source, positions):
    """The last logits of each prompt alone, nodes outside `kept` replaced one after another."""
    rows = []
    names = [
        f"blocks.{layer}.{name}" for layer in range(model.config.n_layers) for name in ("attn.hook_z", "hook_mlp_out")
    ]
    corrupted = model.run_with_cache(task.corrupted, names)[1]
    for prompt in range(task.n):

        def hook(value, name, prompt=prompt):
            layer, value = int(name.split(".")[1]), value.clone()
            there = corrupted[name]
            new = {"mean": there.mean(0), "corrupted": there[prompt], "zero": torch.zeros_like(there[prompt])}[source]
            for position in positions:
                for node in all_nodes(model.config):
                    if node in kept or node.layer != layer or (node.kind == "mlp") != name.endswith("mlp_out"):
                        continue
                    if node.kind == "mlp":
                        value[0, position] = new[position]
                    else:
                        value[0, position, node.index] = new[position, node.index]
            return value

        rows.append(model.run_with_hooks(task.clean[prompt : prompt + 1], [(name, hook) for name in names])[0, -1])
    return torch.stack(rows)


@pytest.mark.parametrize("source", ["mean", "corrupted", "zero"])
@pytest.mark.parametrize("positions", [None, (2, 5), (8,)])
def test_every_metric_is_that_of_a_plain_loop(case, source, positions):
    model, task = case
    circuits = [set(random_circuit(model.config, SEED + i).nodes) for i in range(2)]
    where = range(task.pos) if positions is None else positions
    clean = model(task.clean)[:, -1]
    by_metric = {
        "logit_difference": lambda logits: metrics.logit_difference(logits, task.answer, task.wrong),
        "log_probability": lambda logits: metrics.log_probability(logits, task.answer),
        "kl": lambda logits: metrics.kl_divergence(logits, clean),
        "accuracy": lambda logits: metrics.is_top(logits, task.answer).double(),
    }
    logits = [plain_logits(model, task, kept, source, where) for kept in circuits]
    for metric, measure in by_metric.items():
        if metric == "accuracy" and not measure(clean).any():
            continue  # the model answers no prompt, so that an ablation has nothing to score
        expected = torch.stack([measure(rows) for rows in logits]).double()
        for executor in ("torch", "reference"):
            options = {"source": source, "metric": metric, "positions": positions, "precision": "fp64"}
            ablation = Ablation(model, task, executor=executor, **options)
            torch.testing.assert_close(ablation.kept_values(circuits), expected, atol=1e-9, rtol=1e-6)
            torch.testing.assert_close(ablation.clean, measure(clean).double(), atol=1e-9, rtol=1e-6)


def test_kept_and_removed_nodes_are_two_ways_to_say_the_same(case):
    model, task = case
    ablation = Ablation(model, task, precision="fp64")
    circuits = [random_circuit(model.config, SEED + i) for i in range(3)]
    kept = ablation.kept_values([circuit.nodes for circuit in circuits])
    removed = ablation.values([ablation.complement(set(circuit.nodes)) for circuit in circuits])
    torch.testing.assert_close(kept, removed)
    scores = ablation.scores([ablation.complement(set(circuit.nodes)) for circuit in circuits])
    torch.testing.assert_close(100 * kept.mean(1) / ablation.clean.mean(), torch.tensor(scores, dtype=torch.float64))
    torch.testing.assert_close(ablation.kept_values([all_nodes(model.config)])[0], ablation.clean)
    assert ablation.kept_values([]).shape == (0, task.n)


def test_full_forwards_keep_to_the_budget_too(case, monkeypatch):
    model, task = case
    at_once = []
    run = type(model).run_with_hooks
    monkeypatch.setattr(
        type(model),
        "run_with_hooks",
        lambda self, tokens, *rest, **kw: at_once.append(len(tokens)) or run(self, tokens, *rest, **kw),
    )
    Ablation(model, task, executor="reference", precision="fp64", budget_bytes=1)
    assert set(at_once) == {1}


@pytest.mark.parametrize("match", ["size", "layers"])
def test_random_circuits_like_one_of_another_model_are_refused(case, match):
    model, task = case
    with pytest.raises(PatchError, match=r"'a9\.h0' does not exist"):
        random_baseline(Ablation(model, task), Circuit([(9, 0)], []), 3, match=match)
