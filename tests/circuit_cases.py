"""Tasks that a random model does, and random circuits of it."""

from __future__ import annotations

import random
from typing import Any

import torch

from patching_cases import random_prompts
from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.faithfulness import Ablation
from subcircuit.analysis.tasks import Task, task_from_tokens
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.model import HookedTransformer


def answered_task(model: HookedTransformer, seed: int, n_prompts: int = 6) -> Task:
    """Prompts that end in one token, each with an answer that the model prefers for it more than for the others.

    Its wrong answer is the answer of the prompt before, so that nothing is left of the logit difference, on average,
    when the prompts are made alike.
    """
    prompts = random_prompts(seed, n_prompts=n_prompts)
    assert prompts.corrupted is not None
    clean, corrupted = prompts.clean.clone(), prompts.corrupted.clone()
    clean[:, -1] = corrupted[:, -1] = 1
    logits = model(clean)[:, -1]
    taken: list[int] = []
    for row in logits - logits.mean(0):
        taken.append(next(int(token) for token in row.argsort(descending=True) if int(token) not in taken))
    answer = torch.tensor(taken)
    return task_from_tokens(clean=clean, corrupted=corrupted, answer=answer, wrong=answer.roll(1))


def random_circuit(config: ModelConfig, seed: int) -> Circuit:
    """About half of the heads and of the MLPs, at least one of each."""
    rng = random.Random(seed)
    heads = [(layer, head) for layer in range(config.n_layers) for head in range(config.n_heads)]
    layers = range(config.n_layers)
    return Circuit(rng.sample(heads, len(heads) // 2), rng.sample(layers, max(1, config.n_layers // 2)))


def reference_ablation(model: HookedTransformer, task: Task, **options: Any) -> Ablation:
    """The slow way: a full forward with hooks for every set, in float64."""
    return Ablation(model, task, executor="reference", precision="fp64", **options)
