"""ModelConfig refuses what contradicts itself, and the model refuses tensors that do not fit it."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from engine_models import CONFIGS, GPT2, LLAMA, random_model, random_tokens
from subcircuit.engine.config import ModelConfig, RopeScaling
from subcircuit.engine.errors import ConfigError, SubcircuitError
from subcircuit.engine.model import HookedTransformer


def test_kv_heads_default_to_query_heads():
    assert (GPT2.n_kv_heads, GPT2.kv_heads, GPT2.group_size) == (3, 3, 1)
    assert (LLAMA.n_kv_heads, LLAMA.kv_heads, LLAMA.group_size) == (2, 2, 2)


def test_a_config_does_not_change():
    with pytest.raises(FrozenInstanceError):
        GPT2.n_layers = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
        ({"d_vocab": -1}, "d_vocab must be at least 1"),
        ({"n_kv_heads": 3}, r"n_kv_heads \(3\) must divide n_heads \(4\)"),
        ({"n_kv_heads": 0}, r"n_kv_heads \(0\) must divide"),
        ({"norm": "batchnorm"}, "norm 'batchnorm' is not supported; expected one of"),
        ({"positions": "alibi"}, "positions 'alibi' is not supported"),
        ({"activation": "mish"}, "activation 'mish' is not supported"),
        ({"d_head": 7}, "rotary positions need an even d_head, got 7"),
        ({"rope_theta": 0.0}, "rope_theta must be positive, got 0.0"),
        ({"norm_eps": -1e-5}, "norm_eps must not be negative"),
    ],
)
def test_a_config_that_contradicts_itself_is_one_clear_line(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        replace(LLAMA, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "yarn", "factor": 2.0}, "rope_scaling kind 'yarn' is not supported"),
        ({"kind": "linear", "factor": 0.0}, "factor must be positive"),
        ({"kind": "llama3", "factor": 8.0, "low_freq_factor": 4.0}, "must exceed"),
    ],
)
def test_a_rope_scaling_that_cannot_be_is_one_clear_line(arguments, message):
    with pytest.raises(ConfigError, match=message):
        RopeScaling(**arguments)


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_n_params_counts_the_parameters(config, untied):
    config = replace(config, tied_unembed=not untied)
    model = random_model(config)
    assert config.n_params == sum(parameter.numel() for parameter in model.parameters())


def test_every_flag_of_a_bias_adds_its_parameters():
    plain = ModelConfig(n_layers=1, d_model=4, n_heads=2, d_head=2, d_mlp=8, d_vocab=5, n_ctx=6)
    for flag, names in {
        "qkv_bias": {"attn.w_q.bias", "attn.w_k.bias", "attn.w_v.bias"},
        "attn_out_bias": {"attn.w_o.bias"},
        "mlp_bias": {"mlp.w_in.bias", "mlp.w_out.bias"},
    }.items():
        biased = replace(plain, **{flag: True})
        new = set(HookedTransformer.parameter_shapes(biased)) - set(HookedTransformer.parameter_shapes(plain))
        assert new == {f"blocks.0.{name}" for name in names}


class TestTensors:
    def tensors(self):
        return {name: torch.zeros(shape) for name, shape in HookedTransformer.parameter_shapes(GPT2).items()}

    def test_a_missing_tensor_is_named(self):
        tensors = self.tensors()
        del tensors["blocks.1.attn.w_q.weight"]
        with pytest.raises(ConfigError, match=r"'blocks\.1\.attn\.w_q\.weight' is missing; expected shape \(24, 24\)"):
            HookedTransformer(GPT2, tensors)

    def test_a_wrong_shape_is_named_with_the_right_one(self):
        with pytest.raises(ConfigError, match=r"'embed\.weight' has shape \(3, 3\); expected \(40, 24\)"):
            HookedTransformer(GPT2, self.tensors() | {"embed.weight": torch.zeros(3, 3)})

    def test_a_tensor_too_many_is_named(self):
        with pytest.raises(ConfigError, match=r"'unembed\.weight' is not a parameter"):
            HookedTransformer(GPT2, self.tensors() | {"unembed.weight": torch.zeros(40, 24)})

    def test_tensors_of_several_dtypes_are_refused(self):
        with pytest.raises(ConfigError, match=r"'ln_final\.bias' is torch\.float16; expected one floating-point dtype"):
            HookedTransformer(GPT2, self.tensors() | {"ln_final.bias": torch.zeros(24, dtype=torch.float16)})

    def test_integer_tensors_are_refused(self):
        integers = {name: tensor.long() for name, tensor in self.tensors().items()}
        with pytest.raises(ConfigError, match=r"is torch\.int64; expected one floating-point dtype"):
            HookedTransformer(GPT2, integers)

    def test_tensors_are_used_without_a_copy(self):
        tensors = self.tensors()
        parameters = dict(HookedTransformer(GPT2, tensors).named_parameters())
        assert all(parameters[name].data_ptr() == tensor.data_ptr() for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_precision_gives_logits_near_those_of_float64(config, dtype):
    model, tokens = random_model(config, seed=2), random_tokens(config)
    reference = model(tokens)
    logits = random_model(config, seed=2, dtype=dtype)(tokens)
    assert logits.dtype == dtype
    error = (logits.double() - reference).norm() / reference.norm()
    assert error < (1e-12 if dtype == torch.float64 else 0.05)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_training_step_lowers_the_loss(config):
    model, tokens = random_model(config, seed=3), random_tokens(config, n_batch=4)

    def loss():
        return torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    before = loss()
    assert not before.requires_grad
    model.requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained(model))
    optimizer.step()
    assert loss() < before


def trained(model):
    """Parameters that a loss depends on: a bias of the keys moves all scores of a query alike, so it never does."""
    return [parameter for name, parameter in model.named_parameters() if not name.endswith("w_k.bias")]


@pytest.mark.parametrize("stop", [-4, 4])
def test_stopping_at_a_layer_that_does_not_exist_is_an_error(stop):
    with pytest.raises(SubcircuitError, match=f"stop_at_layer {stop} is out of range for a model of 3 layers"):
        random_model(GPT2)(random_tokens(GPT2), stop_at_layer=stop)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_stacked_weights_hold_every_head_of_every_layer(config):
    model = random_model(config)
    assert model.W_Q.shape == (3, config.n_heads, 24, config.d_head)
    assert model.W_K.shape == model.W_V.shape == (3, config.kv_heads, 24, config.d_head)
    assert model.W_O.shape == (3, config.n_heads, config.d_head, 24)
    x = torch.randn(24, dtype=torch.float64)
    attn, head, d_head = model.blocks[2].attn, config.n_heads - 1, config.d_head
    rows = slice(head * d_head, (head + 1) * d_head)
    torch.testing.assert_close(x @ model.W_Q[2, head], attn.w_q.weight[rows] @ x)
    z = torch.randn(d_head, dtype=torch.float64)
    torch.testing.assert_close(z @ model.W_O[2, head], attn.w_o.weight[:, rows] @ z)
