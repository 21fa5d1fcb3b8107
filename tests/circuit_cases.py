"""Random circuits of a random model, and the slow way to score them."""

from __future__ import annotations

import random
from typing import Any

from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.faithfulness import Ablation
from subcircuit.analysis.tasks import Task
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.model import HookedTransformer


def random_circuit(config: ModelConfig, seed: int) -> Circuit:
    """About half of the heads and of the MLPs, at least one of each."""
    rng = random.Random(seed)
    heads = [(layer, head) for layer in range(config.n_layers) for head in range(config.n_heads)]
    layers = range(config.n_layers)
    return Circuit(rng.sample(heads, len(heads) // 2), rng.sample(layers, max(1, config.n_layers // 2)))


def reference_ablation(model: HookedTransformer, task: Task, **options: Any) -> Ablation:
    """The slow way: a full forward with hooks for every set, in float64."""
    return Ablation(model, task, executor="reference", precision="fp64", **options)
