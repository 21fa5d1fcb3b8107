"""δ times a linear weight, laid out for oneDNN and plain, against float64."""

from __future__ import annotations

import random

import pytest
import torch

from patching_cases import relative_error
from subcircuit.kernels.linear import laid_out, linear

SEED = random.randrange(10**6)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (4, 1, 176), (3, 7, 40)])
@pytest.mark.parametrize("widths", [(64, 192), (33, 7), (1, 20), (256, 700)])
def test_products_of_slices_equal_those_in_float64(dtype, shape, widths):
    print(f"seed {SEED}")
    generator = torch.Generator().manual_seed(SEED)
    d_in, d_out = widths
    delta = torch.randn(*shape[:2], shape[2] + 2, d_in, generator=generator)[:, :, 2:]
    weight = torch.randn(2 * d_out, d_in, generator=generator).to(dtype)[d_out:]
    expected = delta.to(dtype).double() @ weight.double().T
    transposed = weight.T.contiguous().T
    bias = torch.randn(d_out, generator=generator).to(dtype)
    for each in (weight, laid_out(weight), transposed, laid_out(transposed)):
        for found, by_hand in ((linear(delta, each), expected), (linear(delta, each, bias), expected + bias.double())):
            assert (found.shape, found.dtype) == ((*shape, d_out), dtype)
            assert relative_error(found.double(), by_hand) < TOLERANCE[dtype]
