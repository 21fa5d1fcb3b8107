"""head_pre against its definition: the norm's change under what a head writes, times the weight."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from patching_cases import relative_error
from subcircuit.kernels.head_pre import head_directions, head_pre, is_head_pre_cheaper, norm_change
from subcircuit.kernels.linear import laid_out

SEED = random.randrange(10**6)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Of the smallest change, the reference in float64 has lost four digits."""


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("size", [1e-4, 1.0, 30.0])
def test_pre_activations_equal_those_of_the_normed_stream(dtype, centred, size):
    print(f"seed {SEED}")
    generator = torch.Generator().manual_seed(SEED)
    n_prompts, n_pos, n_heads, d_head, d_model, d_out, eps = 3, 4, 5, 6, 40, 72, 1e-5

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads, delta_z = torch.tensor([3, 0, 3, 1]), size * draw(n_prompts, n_pos, n_heads, d_head)
    clean, w_o, weight = 2 + draw(n_prompts, n_pos, d_model), draw(d_model, n_heads * d_head), draw(d_out, d_model)
    norm_weight, norm_bias, bias = draw(d_model), draw(d_model), draw(d_out)

    def norm(x):
        if centred:
            return F.layer_norm(x, (d_model,), norm_weight, norm_bias, eps)
        return F.rms_norm(x, (d_model,), norm_weight, eps)

    per_head = w_o.unflatten(1, (n_heads, d_head))
    delta = torch.einsum("ptsc,dsc->sptd", delta_z[:, :, heads], per_head[:, heads])
    expected = (norm(clean + delta) - norm(clean)) @ weight.T

    clean_dtype = torch.promote_types(dtype, torch.float32)
    constant = F.linear(norm_bias, weight, bias) if centred else bias
    rest = clean, delta, w_o, norm_weight, F.linear(norm(clean), weight, bias), constant, delta_z
    clean, delta, w_o, norm_weight, pre, constant, delta_z = (x.to(clean_dtype) for x in rest)
    change = norm_change(clean, delta, eps, centred)
    directions = head_directions(w_o, heads, d_head, norm_weight, centred)
    out = head_pre(delta_z, heads, directions, change, laid_out(weight.to(dtype)), pre, constant)
    assert (out.shape, out.dtype) == (expected.shape, dtype)
    assert relative_error(out, expected) < TOLERANCE[dtype]
    assert (
        relative_error(head_pre(delta_z, heads, directions, change, weight.to(dtype), pre, constant), expected) < 1e-2
    )


def test_it_is_cheaper_from_some_tokens_on():
    assert next(n for n in range(1, 999) if is_head_pre_cheaper(n, 64, 768)) == 154
    assert not is_head_pre_cheaper(10**6, 64, 64)  # a head as wide as the stream
