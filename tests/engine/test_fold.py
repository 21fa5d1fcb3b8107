"""Folding norms and centring are explicit, change what they say, and leave the logits alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import ConfigError
from subcircuit.engine.fold import centre_residual, fold_norms
from subcircuit.engine.model import HookedTransformer

SIZES = {"n_layers": 2, "d_model": 16, "n_heads": 4, "d_head": 6, "d_mlp": 24, "d_vocab": 30, "n_ctx": 12}
GPT2 = ModelConfig(**SIZES, qkv_bias=True, attn_out_bias=True, mlp_bias=True, tied_unembed=True)
LLAMA = ModelConfig(
    **SIZES, n_kv_heads=2, norm="rmsnorm", positions="rope", activation="silu", gated_mlp=True, tied_unembed=True
)
CONFIGS = {
    "gpt2": GPT2,
    "gpt2-untied": replace(GPT2, tied_unembed=False),
    "layernorm-without-biases": replace(GPT2, qkv_bias=False, attn_out_bias=False, mlp_bias=False),
    "layernorm-gated": replace(GPT2, gated_mlp=True, mlp_bias=False),
    "llama": LLAMA,
    "llama-biased": replace(LLAMA, qkv_bias=True, attn_out_bias=True, mlp_bias=True, tied_unembed=False),
}
TOKENS = torch.randint(0, 30, (3, 9), generator=torch.Generator().manual_seed(1))


def random_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Weights large enough that every term matters, norms and biases too."""
    generator = torch.Generator().manual_seed(0)
    shapes = HookedTransformer.parameter_shapes(config).items()
    return {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> HookedTransformer:
    config = CONFIGS[request.param]
    return HookedTransformer(config, random_tensors(config))


def test_folding_norms_leaves_the_logits_alone(model: HookedTransformer) -> None:
    logits = model(TOKENS)
    assert (fold_norms(model)(TOKENS) - logits).abs().max() < 1e-5 * max(1.0, float(logits.abs().max()))


def test_folded_norms_have_unit_weights_and_only_the_final_bias(model: HookedTransformer) -> None:
    folded = fold_norms(model)
    for name, value in folded.state_dict().items():
        if "ln" in name:
            assert name == "ln_final.bias" or torch.equal(value, torch.full_like(value, float(name.endswith("weight"))))
    assert ("ln_final.bias" in folded.state_dict()) == (model.config.norm == "layernorm")


def test_folded_weights_read_the_normed_residual_stream(model: HookedTransformer) -> None:
    """hook_normalized is the value before weight and bias: the folded maps act on it as it is."""
    folded = fold_norms(model)
    _, cache = model.run_with_cache(TOKENS)
    block = folded.blocks[1]
    for norm, linear, out in (
        ("ln1", block.attn.w_k, cache["k", 1].flatten(2)),
        ("ln2", block.mlp.w_in, cache["pre_linear" if model.config.gated_mlp else "pre", 1]),
    ):
        torch.testing.assert_close(linear(cache["normalized", 1, norm]), out, rtol=1e-4, atol=1e-4)


def test_the_given_model_does_not_change(model: HookedTransformer) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config, logits = model.config, model(TOKENS)
    fold_norms(model)
    if config.norm == "layernorm":
        centre_residual(model)
    assert model.config == config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(TOKENS), logits)


def test_a_final_norm_that_cannot_be_folded_is_an_error() -> None:
    tensors = random_tensors(GPT2)
    tensors["ln_final.weight"][3] = 0
    with pytest.raises(ConfigError, match="its weight is 0 where its bias is not"):
        fold_norms(HookedTransformer(GPT2, tensors))
    tensors["ln_final.bias"][3] = 0
    model = HookedTransformer(GPT2, tensors)
    torch.testing.assert_close(fold_norms(model)(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind, config in CONFIGS.items() if config.norm == "layernorm"])
def test_centring_takes_the_mean_out_of_the_residual_stream_only(kind: str) -> None:
    model = HookedTransformer(CONFIGS[kind], random_tensors(CONFIGS[kind]))
    centred = centre_residual(model)
    logits, cache = centred.run_with_cache(TOKENS)
    torch.testing.assert_close(logits, model(TOKENS), rtol=1e-4, atol=1e-5)
    _, plain = model.run_with_cache(TOKENS)
    for name, value in cache.items():
        if "resid" in name or name.endswith("_out"):
            assert value.mean(-1).abs().max() < 1e-5
            assert plain[name].mean(-1).abs().max() > 1e-2
            torch.testing.assert_close(value, plain[name] - plain[name].mean(-1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_centring_a_model_that_reads_the_mean_is_an_error() -> None:
    with pytest.raises(ConfigError, match="rmsnorm cannot be centred"):
        centre_residual(HookedTransformer(LLAMA, random_tensors(LLAMA)))
