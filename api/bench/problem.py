"""What is measured: the model's files, prompts drawn from a seed, the patches of a scenario and a sample of them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from subcircuit.bench.workers.harness import Patch
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import BenchError

SCENARIOS = {
    "heads": "every head, at all positions",
    "pairs": "every pair of a head and a position from the first that differs on",
    "last": "every head, at the last position only",
}


@dataclass(frozen=True)
class Settings:
    """Sizes of a benchmark and how it is timed.

    `length` and `first_difference` are in tokens; `sample` patches stand for all of them where one costs what another
    does; `runs` timed runs, of which medians are taken.
    """

    n_prompts: int = 16
    length: int = 16
    first_difference: int = 5
    sample: int = 6
    runs: int = 5
    threads: int = 2
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_prompts", "length", "sample", "runs", "threads"):
            if getattr(self, name) < 1:
                raise BenchError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.first_difference < self.length:
            raise BenchError(
                f"first_difference {self.first_difference} is not a position of prompts of {self.length} tokens"
            )


@dataclass(frozen=True)
class Problem:
    """A model in files, and clean and corrupted prompts with the two tokens that are compared."""

    model: Path
    config: ModelConfig
    settings: Settings
    clean: Int[Tensor, "prompt pos"]
    corrupted: Int[Tensor, "prompt pos"]
    answer: Int[Tensor, "prompt"]
    wrong: Int[Tensor, "prompt"]

    @classmethod
    def draw(cls, model: Path, config: ModelConfig, settings: Settings) -> Problem:
        """Random prompts; a corrupted one is another token at every position from the first difference on.

        Raises BenchError for prompts that are longer than the model's context.
        """
        if settings.length > config.n_ctx:
            raise BenchError(f"prompts of {settings.length} tokens are longer than the model's {config.n_ctx}")
        generator = torch.Generator().manual_seed(settings.seed)
        shape = settings.n_prompts, settings.length

        def other(tokens: Tensor) -> Tensor:
            step = torch.randint(1, config.d_vocab, tokens.shape, generator=generator)
            return (tokens + step) % config.d_vocab

        clean = torch.randint(config.d_vocab, shape, generator=generator)
        corrupted = clean.clone()
        corrupted[:, settings.first_difference :] = other(clean[:, settings.first_difference :])
        answer = torch.randint(config.d_vocab, shape[:1], generator=generator)
        return cls(model, config, settings, clean, corrupted, answer, other(answer))

    def patches(self, scenario: str) -> list[Patch]:
        """All patches of a scenario, by layer. Raises BenchError for one that does not exist."""
        if scenario not in SCENARIOS:
            raise BenchError(f"scenario {scenario!r} is not known; expected one of {', '.join(SCENARIOS)} or all")
        length, first = self.settings.length, self.settings.first_difference
        positions: dict[str, list[int | None]] = {
            "heads": [None],
            "pairs": list(range(first, length)),
            "last": [length - 1],
        }
        return [
            Patch(layer, head, position)
            for layer in range(self.config.n_layers)
            for head in range(self.config.n_heads)
            for position in positions[scenario]
        ]


def sample_of(patches: list[Patch], size: int) -> list[int]:
    """Indices of some patches, spread evenly over the layers and over the heads and positions within them."""
    size = min(size, len(patches))
    by_layer = defaultdict(list)
    for index, patch in enumerate(patches):
        by_layer[patch.layer].append(index)
    layers = sorted(by_layer)
    wanted = [round(i * (len(layers) - 1) / max(size - 1, 1)) for i in range(size)]
    indices = []
    for i, layer in enumerate(wanted):
        inside = by_layer[layers[layer]]
        indices.append(inside[(2 * i + 1) * len(inside) // (2 * size)])
    return sorted(set(indices))
