"""Each delta kernel's torch form against its formula written out in float64."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from subcircuit.kernels.activation_delta import activation_delta
from subcircuit.kernels.head_fanout import head_fanout
from subcircuit.kernels.norm_delta import norm_delta
from subcircuit.kernels.readout import readout

SEED = random.randrange(10**6)
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture
def draw():
    print(f"seed {SEED}")
    generator = torch.Generator().manual_seed(SEED)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def close(value, expected, dtype):
    assert value.dtype == dtype
    error = (value.double() - expected).norm() / expected.norm()
    assert error < DTYPES[dtype], error


def working(dtype, *tensors):
    """Clean values and differences are float32 where the products' operands are bfloat16."""
    return [tensor.to(torch.float32 if dtype == torch.bfloat16 else dtype) for tensor in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", [(3, 2, 5, 16), (1, 1, 1, 7), (2, 3, 4, 33)])
def test_norm_delta(draw, dtype, centred, shape):
    clean, delta, weight, bias = draw(*shape[1:]), draw(*shape), draw(shape[-1]), draw(shape[-1])

    def norm(x):
        if centred:
            return F.layer_norm(x, weight.shape, weight, bias, 1e-5)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    x, normed, d, w, b = working(dtype, clean, norm(clean), delta, weight, bias)
    _, out = norm_delta(x, normed, d, w, b if centred else None, 1e-5, dtype)
    close(out, norm(clean + delta) - norm(clean), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gelu_new", "gelu", "silu", "relu"])
@pytest.mark.parametrize("gated", [True, False])
def test_activation_delta(draw, dtype, name, gated):
    act = {"gelu_new": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu, "silu": F.silu, "relu": F.relu}[name]
    pre, linear, delta_pre, delta_linear = draw(2, 3, 9), draw(2, 3, 9), draw(4, 2, 3, 9), draw(4, 2, 3, 9)
    clean_post = act(pre) * linear if gated else act(pre)
    row = act(pre + delta_pre) * (linear + delta_linear) if gated else act(pre + delta_pre)
    p, post, dp, lin, dl = working(dtype, pre, clean_post, delta_pre, linear, delta_linear)
    out = activation_delta(p, post, dp.clone(), name, dtype, lin if gated else None, dl.clone() if gated else None)
    close(out, row - clean_post, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_prompts", [1, 3])
def test_head_fanout(draw, dtype, n_prompts):
    source_delta, w_o, heads = draw(n_prompts, 5, 4, 8), draw(16, 32), torch.tensor([2, 0, 2])
    expected = torch.stack([source_delta[:, :, h] @ w_o[:, 8 * h : 8 * h + 8].T for h in heads.tolist()])
    close(head_fanout(working(dtype, source_delta)[0], heads, w_o.to(dtype), dtype), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_readout(draw, dtype):
    clean, delta, weight, bias, direction = draw(3, 16), draw(4, 3, 16), draw(16), draw(16), draw(3, 16)

    def read(x):
        return (F.layer_norm(x, (16,), weight, bias, 1e-5) * direction).sum(-1)

    normed = F.layer_norm(clean, (16,), weight, bias, 1e-5)
    out = readout(*working(dtype, clean, normed, delta, weight, bias), 1e-5, direction.to(dtype))
    close(out, read(clean + delta) - read(clean), dtype)
