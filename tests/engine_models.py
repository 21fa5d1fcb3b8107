"""Small random models and a toy tokenizer for the tests of the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from subcircuit.engine.config import ModelConfig, RopeScaling
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.tokenizer import Tokenizer

GPT2 = ModelConfig(
    n_layers=3,
    d_model=24,
    n_heads=3,
    d_head=8,
    d_mlp=32,
    d_vocab=40,
    n_ctx=32,
    qkv_bias=True,
    attn_out_bias=True,
    mlp_bias=True,
    tied_unembed=True,
)
LLAMA = ModelConfig(
    n_layers=3,
    d_model=24,
    n_heads=4,
    d_head=6,
    d_mlp=32,
    d_vocab=40,
    n_ctx=32,
    n_kv_heads=2,
    norm="rmsnorm",
    positions="rope",
    rope_scaling=RopeScaling("llama3", factor=4.0, original_n_ctx=16),
    activation="silu",
    gated_mlp=True,
    family="llama",
)
CONFIGS = {"gpt2": GPT2, "llama-gqa": LLAMA}


def random_model(
    config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64, tokenizer: Tokenizer | None = None
) -> HookedTransformer:
    """Weights large enough that every component matters; those of the norms lie around 1."""
    print(f"model seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in HookedTransformer.parameter_shapes(config).items():
        tensors[name] = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3
        if ".ln" in f".{name}" and name.endswith("weight"):
            tensors[name] += 1
    return HookedTransformer(config, {name: value.to(dtype) for name, value in tensors.items()}, tokenizer)


def random_tokens(config: ModelConfig, n_batch: int = 2, n_pos: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(0, config.d_vocab, (n_batch, n_pos), generator=torch.Generator().manual_seed(seed))


def recording(store: dict[str, Tensor]) -> Callable[[Tensor, str], None]:
    """A hook that keeps a copy of the value (or gradient) it is shown."""

    def record(value: Tensor, name: str) -> None:
        store[name] = value.detach().clone()

    return record


class ToyTokenizer:
    """One token per letter, `a` being 1; id 0 is the beginning of a sequence, 39 its end."""

    name = "toy"
    n_vocab = 40
    bos_id = 0
    eos_id = 39

    def __init__(self, adds_bos: bool = False) -> None:
        self.adds_bos = adds_bos

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        return [0] * (self.adds_bos if bos is None else bos) + [ord(letter) - ord("a") + 1 for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(ord("a") + token - 1) for token in ids)

    def token_bytes(self, token_id: int) -> bytes:
        return self.decode([token_id]).encode()
