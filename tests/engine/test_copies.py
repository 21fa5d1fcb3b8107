"""A model can be copied, moved, saved and taken apart without hooks, weights or callers' tensors getting mixed up."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from engine_models import CONFIGS, random_model, random_tokens
from subcircuit.engine.model import HookedTransformer


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> HookedTransformer:
    return random_model(CONFIGS[request.param], seed=51)


@pytest.fixture
def tokens(model: HookedTransformer) -> Tensor:
    return random_tokens(model.config)


def test_a_copy_has_weights_of_its_own_and_none_of_the_hooks(model: HookedTransformer, tokens: Tensor) -> None:
    plain = model(tokens)
    with model.hooks([("blocks.0.hook_mlp_out", lambda value, name: value * 0)]):
        other = copy.deepcopy(model)
        assert not torch.allclose(model(tokens), plain)
        torch.testing.assert_close(other(tokens), plain)
    with torch.no_grad():
        other.embed.weight.zero_()
    torch.testing.assert_close(model(tokens), plain)
    other.run_with_hooks(tokens, [("blocks.0.hook_mlp_out", lambda value, name: None)])


def test_a_model_moved_to_another_dtype_is_the_model_made_in_it(model: HookedTransformer, tokens: Tensor) -> None:
    made = random_model(model.config, seed=51, dtype=torch.float32)(tokens)
    moved = copy.deepcopy(model).to(torch.float32)
    assert moved.dtype == torch.float32
    assert torch.equal(moved(tokens), made)
    # Rotary frequencies are no parameter: they do not go through the lower precision.
    there_and_back = copy.deepcopy(model).to(torch.bfloat16).to(torch.float64)
    rounded = {name: value.to(torch.bfloat16).double() for name, value in model.state_dict().items()}
    assert torch.equal(there_and_back(tokens), HookedTransformer(model.config, rounded)(tokens))


def test_the_state_dict_is_what_the_model_was_made_of(model: HookedTransformer, tokens: Tensor) -> None:
    state = model.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == model.parameter_shapes(model.config)
    assert torch.equal(HookedTransformer(model.config, state)(tokens), model(tokens))


def test_parameters_passed_as_tensors_keep_their_gradient_flag(model: HookedTransformer) -> None:
    given = {name: nn.Parameter(value.clone()) for name, value in model.state_dict().items()}
    made = HookedTransformer(model.config, given)
    assert all(parameter.requires_grad for parameter in given.values())
    assert not any(parameter.requires_grad for parameter in made.parameters())


def test_a_predicate_names_the_hook_points_of_a_hook(model: HookedTransformer, tokens: Tensor) -> None:
    seen: list[str] = []
    model.run_with_hooks(
        tokens, [(lambda name: name.endswith("hook_resid_mid"), lambda value, name: seen.append(name))]
    )
    assert seen == [f"blocks.{layer}.hook_resid_mid" for layer in range(3)]


def test_a_tensor_that_a_hook_returns_stays_the_users_own(model: HookedTransformer, tokens: Tensor) -> None:
    name, mine = "blocks.1.hook_resid_pre", torch.zeros(2, 7, 24, dtype=torch.float64)
    gradients: list[Tensor] = []
    hooks = [(name, lambda value, at: mine)]
    logits = model.run_with_hooks(tokens, hooks, [(name, lambda gradient, at: gradients.append(gradient))])
    logits.square().sum().backward()
    assert len(gradients) == 1
    assert not mine.requires_grad
    assert mine.grad is None


def test_stacked_mlp_weights_compute_the_neurons_and_the_output(model: HookedTransformer, tokens: Tensor) -> None:
    _, cache = model.run_with_cache(tokens)
    mlp, normed = model.blocks[2].mlp, model.blocks[2].ln2(cache["resid_mid", 2])
    read = model.W_in if model.W_gate is None else model.W_gate
    assert (model.W_gate is not None) == model.config.gated_mlp
    first = mlp.w_in if mlp.w_gate is None else mlp.w_gate
    bias = 0 if first.bias is None else first.bias
    torch.testing.assert_close(normed @ read[2] + bias, cache["pre", 2])
    bias = 0 if mlp.w_out.bias is None else mlp.w_out.bias
    torch.testing.assert_close(cache["post", 2] @ model.W_out[2] + bias, cache["mlp_out", 2])
