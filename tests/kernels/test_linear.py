"""δ times a linear weight, laid out for oneDNN and plain, against float64."""

from __future__ import annotations

import random

import pytest
import torch

from patching_cases import CONFIGS, random_model, random_prompts, relative_error
from subcircuit.engine.patching import DeltaSession
from subcircuit.engine.patching.memory import copied_bytes
from subcircuit.kernels.linear import can_lay_out, laid_out, linear

SEED = random.randrange(10**6)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (4, 1, 176), (3, 7, 40)])
@pytest.mark.parametrize("widths", [(64, 192), (33, 7), (1, 20)])
def test_products_of_slices_equal_those_in_float64(dtype, shape, widths):
    print(f"seed {SEED}")
    generator = torch.Generator().manual_seed(SEED)
    d_in, d_out = widths
    delta = torch.randn(*shape[:2], shape[2] + 2, d_in, generator=generator)[:, :, 2:]
    weight = torch.randn(2 * d_out, d_in, generator=generator).to(dtype)[d_out:]
    expected = delta.to(dtype).double() @ weight.double().T
    given = [weight, laid_out(weight)] if can_lay_out(CPU, dtype) else [weight]
    for each in given:
        found = linear(delta, each)
        assert (found.shape, found.dtype) == ((*shape, d_out), dtype)
        assert relative_error(found.double(), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("config", CONFIGS)
def test_weights_are_laid_out_where_a_copy_fits_half_the_budget(config):
    model = random_model(CONFIGS[config], SEED)
    n_bytes, lays_out = copied_bytes(model, torch.float32, torch.float32, 2**30)
    assert lays_out == can_lay_out(CPU, torch.float32)
    assert n_bytes == lays_out * sum(p.nbytes for name, p in model.named_parameters() if ".w_" in name and p.ndim == 2)
    assert copied_bytes(model, torch.float32, torch.float32, 2 * n_bytes - 1) == (0, False)
    cast_bytes, cast_lays_out = copied_bytes(model, torch.bfloat16, torch.float32, 1)
    assert (cast_bytes, cast_lays_out) == (n_bytes // 2 or cast_bytes, can_lay_out(CPU, torch.bfloat16))
    sites = ["a0.h1", "m1", "a2.h3"]
    by_budget = [DeltaSession(model, random_prompts(SEED), budget_bytes=b).effects(sites) for b in (1, 2**30)]
    assert relative_error(by_budget[0].effects, by_budget[1].effects) < 1e-4
