"""Readouts of the vocabulary, on every backend, against the whole logits in float64."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from subcircuit.kernels import vocabulary
from subcircuit.kernels.backend import triton_runs_on
from subcircuit.kernels.vocabulary import kl_and_top_readout, kl_readout, top_readout

SEED = random.randrange(10**6)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    not triton_runs_on(DEVICE), reason="Triton is not installed, or has neither a GPU nor its interpreter"
)
BACKENDS = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
DTYPES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest relative error of a KL by the dtype of the product's operands."""
SHAPES = [(4, 3, 19, 131), (1, 1, 7, 1), (1, 2, 1, 2500), (7, 5, 40, 1030), (2, 1, 33, 64)]
"""Sets, prompts, d_model and d_vocab: one row, one token, a vocabulary of several parts, none a multiple of a block."""
SIZES = [0.02, 1.0, 30.0]
FEW = [(torch.float32, size, shape) for size, shape in zip([1.0, 30.0, 0.02, 1.0, 30.0], SHAPES, strict=True)]
FEW += [(dtype, 1.0, SHAPES[0]) for dtype in DTYPES]
"""For the interpreter, which is slow."""
CASES = [("torch", *case) for case in itertools.product(DTYPES, SIZES, SHAPES)]
CASES += [pytest.param("triton", *case, marks=needs_triton) for case in FEW]


def draw(shape: tuple[int, int, int, int], size: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """δn, clean logits and W_U in float64, where δ moves a logit by about `size`."""
    print(f"seed {seed}")
    n_sets, n_prompts, d_model, d_vocab = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)

    unembed = normal(d_vocab, d_model) + normal(d_model)  # a common part moves all logits and no prediction
    return size / d_model**0.5 * normal(n_sets, n_prompts, d_model), 3 * normal(n_prompts, d_vocab), unembed


def inputs(delta: Tensor, logits: Tensor, unembed: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What the readouts take: the operands in `dtype`, the clean side of at least float32."""
    clean = torch.promote_types(dtype, torch.float32)
    p = logits.softmax(-1)
    return delta.to(dtype), p.log().to(clean), (p @ unembed).to(clean), unembed.to(dtype)


def exact_kl(delta: Tensor, logits: Tensor, unembed: Tensor) -> Tensor:
    """−Σ p δlogit + change of the log-sum-exp. Of a tiny δ, float64 keeps about eight digits of it."""
    change = delta @ unembed.T
    log_sum = (logits + change).logsumexp(-1) - logits.logsumexp(-1)
    return log_sum - (logits.softmax(-1) * change).sum(-1)


@pytest.mark.parametrize(("backend", "dtype", "size", "shape"), CASES, ids=str)
def test_kl_equals_its_definition(backend, dtype, size, shape):
    delta, logits, unembed = draw(shape, size, SEED)
    values = kl_readout(*inputs(delta, logits, unembed, dtype), backend=backend)
    # How operands round is not the kernel's question: it is measured by what they hold. Their mean is the clean run's.
    held, held_unembed = delta.to(dtype).double(), unembed.to(dtype).double()
    expected = exact_kl(held, logits, held_unembed)
    rounding = DTYPES[dtype] * (held.abs() @ held_unembed.abs().T).norm()  # of what the KL lacks: its square counts
    assert values.dtype == torch.promote_types(dtype, torch.float32)
    assert (values >= 0).all()
    error = (values.double() - expected).norm()
    assert error <= DTYPES[dtype] * expected.norm() + rounding**2 + 1e-14, error / expected.norm()


@BACKENDS
def test_the_kl_of_a_tiny_change_keeps_its_digits(backend):
    delta, logits, unembed = draw((3, 2, 16, 90), 1e-4, SEED)
    values = kl_readout(*inputs(delta, logits, unembed, torch.float32), backend=backend)
    change = delta @ unembed.T
    p = logits.softmax(-1)
    mean = (p * change).sum(-1, keepdim=True)
    expected = (p * (change - mean) ** 2).sum(-1) / 2  # to first order in δ, and δ is 1e-4
    torch.testing.assert_close(values.double(), expected, rtol=1e-3, atol=0)


@BACKENDS
def test_a_change_of_any_size_has_a_finite_kl(backend):
    delta, logits, unembed = draw((2, 3, 16, 90), 1000, SEED)
    values = kl_readout(*inputs(delta, logits, unembed, torch.float32), backend=backend)
    expected = exact_kl(delta, logits, unembed)
    assert (expected > 90).all()  # e^90 is no float32
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("backend", "dtype", "size", "shape"), CASES, ids=str)
def test_the_top_token_has_the_largest_logit(backend, dtype, size, shape):
    delta, logits, unembed = draw(shape, size, SEED)
    delta, log_p, _, unembed = inputs(delta, logits, unembed, dtype)
    tokens = top_readout(delta, log_p, unembed, backend=backend)
    changed = log_p.double() + delta.double() @ unembed.double().T
    chosen = changed.gather(-1, tokens[..., None])[..., 0]
    assert tokens.dtype == torch.int64
    # A bfloat16 product of torch rounds its result: a token as good as the best within that is the best.
    slack = {torch.bfloat16: 2**-6, torch.float16: 2**-9}.get(dtype, 1e-5)
    assert (changed.amax(-1) - chosen <= slack * changed.abs().amax()).all()


@pytest.mark.parametrize(("backend", "dtype", "size", "shape"), CASES, ids=str)
def test_both_together_are_what_each_is_alone(backend, dtype, size, shape):
    values = inputs(*draw(shape, size, SEED), dtype)
    delta, log_p, _, unembed = values
    kl, top = kl_and_top_readout(*values, backend=backend)
    assert torch.equal(kl, kl_readout(*values, backend=backend))
    alone = top_readout(delta, log_p, unembed, backend=backend)
    # The mean change of the logits is taken off before, so that near ties may be rounded to another token.
    changed = log_p.double() + delta.double() @ unembed.double().T
    chosen, best = (changed.gather(-1, tokens[..., None]) for tokens in (top, alone))
    assert ((best - chosen).abs() <= (1e-5 if dtype.itemsize > 2 else 2**-6) * changed.abs().amax()).all()


@BACKENDS
def test_of_equal_logits_the_first_is_the_top_token(backend):
    log_p = torch.full((1, 2300), -20.0, device=DEVICE)
    log_p[0, [70, 71, 2200]] = -2
    delta, unembed = torch.zeros(1, 1, 4, device=DEVICE), torch.ones(2300, 4, device=DEVICE)
    assert top_readout(delta, log_p, unembed, backend=backend).item() == 70


@BACKENDS
def test_no_difference_has_no_kl_and_leaves_the_top_token(backend):
    delta, logits, unembed = draw((2, 3, 9, 77), 0.0, SEED)
    values = inputs(delta, logits, unembed, torch.float32)
    assert not kl_readout(*values, backend=backend).any()
    assert torch.equal(top_readout(values[0], values[1], values[3], backend=backend), logits.argmax(-1).expand(2, -1))


def test_torch_never_holds_the_logits_of_all_rows(monkeypatch):
    widths = []
    original = vocabulary.F.linear
    monkeypatch.setattr(vocabulary.F, "linear", lambda x, w: widths.append(len(w)) or original(x, w))
    delta, logits, unembed = draw((512, 4, 8, 1000), 1.0, SEED)
    kl_readout(*inputs(delta, logits, unembed, torch.float32))
    assert sum(widths) == 1000
    assert max(widths) == 128
