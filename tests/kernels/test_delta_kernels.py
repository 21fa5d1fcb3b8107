"""Each delta kernel, on every backend, against its formula written out in float64."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from subcircuit.kernels import native
from subcircuit.kernels.activation_delta import activation_delta
from subcircuit.kernels.backend import triton_runs_on
from subcircuit.kernels.head_fanout import head_fanout
from subcircuit.kernels.native_build import library
from subcircuit.kernels.norm_delta import norm_delta
from subcircuit.kernels.readout import readout

SEED = random.randrange(10**6)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
BACKENDS = [
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(library() is None, reason="no C compiler")),
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(not triton_runs_on(DEVICE), reason="Triton has neither a GPU nor its interpreter"),
    ),
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def draw():
    print(f"seed {SEED}")
    generator = torch.Generator().manual_seed(SEED)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)


def close(value, expected, dtype, tolerance=None):
    assert value.dtype == dtype
    assert value.shape == expected.shape
    error = (value.double() - expected).norm() / expected.norm()
    assert error < (tolerance or DTYPES[dtype]), error


def working(dtype, *tensors):
    """Clean values and differences are float32 where the products' operands have less."""
    return [tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in tensors]


def norm_of(centred, weight, bias):
    def norm(x):
        if centred:
            return F.layer_norm(x, weight.shape, weight, bias, 1e-5)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    return norm


@every_backend
@every_dtype
@pytest.mark.parametrize("centred", [True, False], ids=["layernorm", "rmsnorm"])
@pytest.mark.parametrize("shape", [(3, 2, 5, 16), (1, 1, 1, 7), (2, 3, 4, 33), (1, 2, 3, 1025)])
@pytest.mark.parametrize("with_product", [True, False])
def test_norm_delta(draw, backend, dtype, centred, shape, with_product):
    n_pos = shape[2]
    clean, delta, weight, bias = (
        draw(shape[1], n_pos + 2, shape[3])[:, 2:],
        draw(*shape),
        draw(shape[-1]),
        draw(shape[-1]),
    )
    # A product may come with one set for all, and a δ with one set may meet a product of several.
    product = draw(3 if shape[0] == 1 else shape[0], *shape[1:]).to(dtype) if with_product else None
    norm = norm_of(centred, weight, bias)
    x, normed, d, w, b = working(dtype, clean, norm(clean), delta, weight, bias)
    total, out = norm_delta(x, normed, d, w, b if centred else None, 1e-5, dtype, product=product, backend=backend)
    moved = delta if product is None else delta + product.double()
    close(total, moved, x.dtype)
    close(out, norm(clean + moved) - norm(clean), dtype)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("centred", [True, False], ids=["layernorm", "rmsnorm"])
def test_norm_delta_of_a_tiny_difference_keeps_its_digits(draw, backend, centred):
    clean, delta, weight, bias = 30 * draw(2, 3, 64), 1e-5 * draw(4, 2, 3, 64), draw(64), draw(64)
    norm = norm_of(centred, weight, bias)
    x, normed, d, w, b = working(torch.float32, clean, norm(clean), delta, weight, bias)
    exact = norm(x.double() + d.double()) - norm(x.double())
    _, out = norm_delta(x, normed, d, w, b if centred else None, 1e-5, torch.float32, backend=backend)
    close(out, exact, torch.float32, 1e-5)


def test_norm_delta_reads_slices_of_wider_tensors(draw):
    clean, delta, weight = draw(2, 6, 16).float(), draw(3, 2, 9, 16).float(), draw(16).float()
    normed = norm_of(False, weight, None)(clean)
    for part in (slice(-1, None), slice(2, 5)):
        inputs = clean[:, part], normed[:, part], delta[:, :, part][:, :, : clean[:, part].shape[1]], weight, None, 1e-5
        expected = norm_delta(*inputs, torch.float32)[1]
        for backend in ("native", "triton") if triton_runs_on(DEVICE) else ("native",):
            torch.testing.assert_close(norm_delta(*inputs, torch.float32, backend=backend)[1], expected)


@every_backend
@every_dtype
@pytest.mark.parametrize("name", ["gelu_new", "gelu", "silu", "relu"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("d_mlp", [9, 1040])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # a sigmoid at −∞ is 0, as it should be
def test_activation_delta(draw, backend, dtype, name, gated, d_mlp):
    act = {"gelu_new": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu, "silu": F.silu, "relu": F.relu}[name]
    pre, linear = 2 * draw(2, 3, d_mlp), draw(2, 3, d_mlp)
    # Both halves of one product, as the executor has them; the last position is far from zero on either side.
    product = draw(4, 2, 3, 2 * d_mlp)
    product[:, :, -1] *= 30
    product = product.to(dtype)
    delta_pre, delta_linear = product.chunk(2, -1)
    clean_post = act(pre) * linear if gated else act(pre)
    row = act(pre + delta_pre.double())
    row = row * (linear + delta_linear.double()) if gated else row
    p, post, lin = working(dtype, pre, clean_post, linear)
    before = product.clone()
    linears = (lin, delta_linear) if gated else (None, None)
    out = activation_delta(p, post, delta_pre, name, dtype, *linears, backend=backend)
    close(out, row - clean_post, dtype)
    assert torch.equal(product, before), "the product is only read"


@every_backend
@every_dtype
@pytest.mark.parametrize("n_prompts", [1, 3])
@pytest.mark.parametrize("d_head", [8, 33, 64, 256])
def test_head_fanout(draw, backend, dtype, n_prompts, d_head):
    source_delta, w_o = draw(n_prompts, 6, 4, d_head)[:, 1:], draw(70, 4 * d_head)
    heads = torch.tensor([2, 0, 2], device=DEVICE)
    slices = [slice(d_head * h, d_head * (h + 1)) for h in heads.tolist()]
    expected = torch.stack([source_delta[:, :, part.start // d_head] @ w_o[:, part].T for part in slices])
    out = head_fanout(working(dtype, source_delta)[0], heads, w_o.to(dtype), dtype, backend=backend)
    close(out, expected, dtype)


@pytest.mark.parametrize("backend", [BACKENDS[0], BACKENDS[2]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("centred", [True, False], ids=["layernorm", "rmsnorm"])
def test_readout(draw, backend, dtype, centred):
    clean, delta, weight, bias, direction = draw(3, 19), draw(4, 3, 5, 19)[:, :, -1], draw(19), draw(19), draw(3, 19)
    norm = norm_of(centred, weight, bias)
    inputs = working(dtype, clean, norm(clean), delta, weight)
    out = readout(*inputs, bias.to(dtype) if centred else None, 1e-5, direction.to(dtype), backend=backend)
    close(out, ((norm(clean + delta) - norm(clean)) * direction).sum(-1), dtype)


def test_without_the_c_kernels_torch_does_the_work(draw, monkeypatch):
    clean, delta, weight = draw(2, 3, 16).float(), draw(4, 2, 3, 16).float(), draw(16).float()
    normed = norm_of(False, weight, None)(clean)
    monkeypatch.setattr(native, "library", lambda: None)
    inputs = clean, normed, delta, weight, None, 1e-5, torch.float32
    assert torch.equal(norm_delta(*inputs, backend="native")[1], norm_delta(*inputs)[1])
