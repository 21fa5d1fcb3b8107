"""Small random models and data sets for the tests of patching and discovery."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subcircuit.analysis.tasks import Task, task_from_tokens
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.model import HookedTransformer

CONFIGS = {
    "gpt2": ModelConfig(
        n_layers=3,
        d_model=32,
        n_heads=4,
        d_head=8,
        d_mlp=64,
        d_vocab=50,
        n_ctx=32,
        qkv_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
        tied_unembed=True,
    ),
    "llama-gqa": ModelConfig(
        n_layers=3,
        d_model=32,
        n_heads=4,
        d_head=8,
        d_mlp=48,
        d_vocab=50,
        n_ctx=32,
        n_kv_heads=2,
        norm="rmsnorm",
        positions="rope",
        activation="silu",
        gated_mlp=True,
    ),
}


@dataclass(frozen=True)
class RandomPrompts:
    clean: Tensor
    corrupted: Tensor | None
    answer: Tensor
    wrong: Tensor
    name: str = "random"


def random_model(config: ModelConfig, seed: int) -> HookedTransformer:
    """Weights large enough that every component matters and no activation is linear."""
    generator = torch.Generator().manual_seed(seed)
    shapes = HookedTransformer.parameter_shapes(config)
    tensors = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    return HookedTransformer(config, tensors)


def random_prompts(seed: int, n_prompts: int = 5, n_pos: int = 9, d_vocab: int = 50) -> RandomPrompts:
    """Corrupted prompts differ from position 3 on at the earliest, at a different one in each prompt."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(0, d_vocab, (n_prompts, n_pos), generator=generator)
    corrupted = clean.clone()
    for row in range(n_prompts):
        at = 3 + row % 3
        corrupted[row, at : at + 3] = (clean[row, at : at + 3] + 7) % d_vocab
    answer = torch.randint(0, d_vocab, (n_prompts,), generator=generator)
    return RandomPrompts(clean, corrupted, answer, (answer + 11) % d_vocab)


def random_task(seed: int, n_prompts: int = 5) -> Task:
    """`random_prompts` as a task."""
    prompts = random_prompts(seed, n_prompts)
    return task_from_tokens(
        clean=prompts.clean, corrupted=prompts.corrupted, answer=prompts.answer, wrong=prompts.wrong
    )


def random_sequence_task(seed: int, n_prompts: int = 11, d_vocab: int = 50) -> Task:
    """Random tokens, of which those at 2, 4 and 6 are called members of a sequence."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(0, d_vocab, (n_prompts, 9), generator=generator)
    answer = torch.randint(0, d_vocab, (n_prompts,), generator=generator)
    positions = {"members": (2, 4, 6), "last": (8,)}
    return Task("random", clean, None, answer, (answer + 7) % d_vocab, positions=positions)


def task_for(model: HookedTransformer, seed: int, n_prompts: int = 6) -> Task:
    """A task that only the components can do.

    The prompts end in one token, and each has as wrong answer the answer of the one before: what all prompts have in
    common favours neither, so that nothing is left of the logit difference when everything is ablated.
    """
    prompts = random_prompts(seed, n_prompts)
    assert prompts.corrupted is not None
    clean, corrupted = prompts.clean.clone(), prompts.corrupted.clone()
    clean[:, -1] = corrupted[:, -1] = 1
    logits = model(clean)[:, -1]
    lead = logits - logits.mean(0)
    taken: list[int] = []
    for row in lead:
        taken.append(next(int(token) for token in row.argsort(descending=True) if int(token) not in taken))
    answer = torch.tensor(taken)
    return task_from_tokens(clean=clean, corrupted=corrupted, answer=answer, wrong=answer.roll(1))


def relative_error(values: Tensor, reference: Tensor) -> float:
    """‖Δ‖ / ‖reference‖ in float64."""
    return float((values.double() - reference.double()).norm() / reference.double().norm())
