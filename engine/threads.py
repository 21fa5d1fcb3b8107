"""How many threads a model is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from subcircuit.engine.model import HookedTransformer

SMALL_MODEL = 10_000_000
"""Parameters up to which a model's tensors are too small to share between threads."""


def is_small(model: HookedTransformer) -> bool:
    return model.config.n_params <= SMALL_MODEL


@contextmanager
def suitable_threads(model: HookedTransformer) -> Iterator[None]:
    """One thread for a small model on a CPU: its products are so short that several threads mostly wait for each other.

    Two threads on two busy cores made tiny-gpt2's study ten times as long.
    """
    before = torch.get_num_threads()
    if model.device.type == "cpu" and is_small(model):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
