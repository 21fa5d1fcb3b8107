"""Names, shapes and values of every hook point are TransformerLens 3.9's; docs/hooks.md lists where they are not.

The stored values were made by make_transformer_lens_fixture.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from subcircuit.engine.config import ModelConfig, RopeScaling
from subcircuit.engine.model import HookedTransformer

FILE = Path(__file__).parent / "data" / "transformer_lens.safetensors"
SIZES = {"n_layers": 2, "d_model": 12, "n_heads": 4, "d_head": 4, "d_mlp": 20, "d_vocab": 17, "n_ctx": 16}
CONFIGS = {
    "gpt2": ModelConfig(**SIZES, qkv_bias=True, attn_out_bias=True, mlp_bias=True),
    "llama": ModelConfig(
        **SIZES,
        n_kv_heads=2,
        norm="rmsnorm",
        positions="rope",
        rope_scaling=RopeScaling("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_n_ctx=24),
        activation="silu",
        gated_mlp=True,
        family="llama",
    ),
}


def stored(prefix: str) -> dict[str, Tensor]:
    """The stored tensors under a prefix, by the rest of their names."""
    with safe_open(FILE, "pt") as file:
        return {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118


@pytest.fixture(params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(name: str) -> HookedTransformer:
    return HookedTransformer(CONFIGS[name], stored(f"{name}/weights/"))


def test_the_file_says_which_versions_made_it() -> None:
    with safe_open(FILE, "pt") as file:
        assert file.metadata()["transformer_lens"].startswith("3.9.")


def test_logits_are_the_same(name: str, model: HookedTransformer) -> None:
    (tokens,), (logits,) = stored(f"{name}/tokens").values(), stored(f"{name}/logits").values()
    torch.testing.assert_close(model(tokens), logits, rtol=1e-5, atol=1e-5)


def test_hook_names_are_the_same(name: str, model: HookedTransformer) -> None:
    # TransformerLens has hook_attn_in in a model with grouped queries, but refuses to use it.
    never = {f"blocks.{layer}.hook_attn_in" for layer in range(2)} if name == "llama" else set()
    assert set(model.hook_names()) - never == set(stored(f"{name}/hooks/"))


def test_every_hook_point_has_the_same_shape_and_value(name: str, model: HookedTransformer) -> None:
    (tokens,) = stored(f"{name}/tokens").values()
    # One at a time: asking for a split input leaves the norm of the other hook points as it is only then.
    for hook_name, expected in stored(f"{name}/hooks/").items():
        _, cache = model.run_with_cache(tokens, hook_name)
        assert cache[hook_name].shape == expected.shape, hook_name
        torch.testing.assert_close(cache[hook_name], expected, rtol=1e-5, atol=1e-5, msg=hook_name)


def test_hook_points_kept_together_have_the_values_they_have_alone(name: str, model: HookedTransformer) -> None:
    (tokens,) = stored(f"{name}/tokens").values()
    _, cache = model.run_with_cache(tokens, model.hook_names())
    assert set(cache) == set(model.hook_names())
    for hook_name, expected in stored(f"{name}/hooks/").items():
        torch.testing.assert_close(cache[hook_name], expected, rtol=1e-5, atol=1e-5, msg=hook_name)
