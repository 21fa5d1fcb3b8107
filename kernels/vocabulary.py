"""vocabulary: what a row predicts, from δ of its normed final residual stream, without its logits in memory.

    KL = KL(clean ‖ row) = log Σ_v p_v e^(x_v),   x_v = δn · (W_U[v] − Σ_u p_u W_U[u])
    top token = argmax_v (log p_v + δn · W_U[v])

p are the clean run's probabilities, x the row's change of the logits less its mean under p. That mean changes no
prediction, and without it Σ p x = 0, so that

    KL = log(1 + Σ_v p_v φ(x_v)),   φ(x) = e^x − 1 − x ≥ 0

adds up positive numbers only: the KL of a tiny δ, which is of its square's size, keeps its digits, where −Σ p δ and the
change of the log-sum-exp would cancel. The sum is kept as e^m s, where m is 0 until an exponent exceeds 60, and then
its excess, so that a KL of any size is finite.

The vocabulary is read in tiles, and [row, d_vocab] never exists; torch finds both on one way through it, since the mean
that is taken off for the KL changes no row's largest. In Triton one program takes a block of rows and a part of the
vocabulary; the parts are merged at the end.

Moved per row, with operands of b bytes: 4 · d_vocab bytes of log p (which the cache has where rows share a prompt) and
b · d_model · d_vocab / BLOCK_M of W_U; 2 · d_model · d_vocab operations, and about 40 · d_vocab elementwise ones.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from subcircuit.kernels.backend import Backend, float32_dot, interpreted, tl, triton

SMALL = 0.5
"""Below this size of x, φ is summed as its Taylor series: e^x − 1 − x has lost its digits there."""

HEADROOM = 60.0
"""Exponents up to this need no shift m: float32 holds the sum of 10¹² terms of e^60."""

TILE_ELEMENTS = 2**18
"""Rows times tokens that torch takes at once: what lies between its passes stays in a core's cache."""


def kl_readout(
    delta_normed: Float[Tensor, "set prompt d_model"],
    clean_log_p: Float[Tensor, "prompt d_vocab"],
    mean_unembed: Float[Tensor, "prompt d_model"],
    unembed: Float[Tensor, "d_vocab d_model"],
    *,
    backend: Backend = "torch",
) -> Float[Tensor, "set prompt"]:
    """KL(clean ‖ row) in nats. `mean_unembed` is Σ_v p_v W_U[v] of each prompt.

    The product is in the dtype of `unembed`, sums in float32, or in float64 where the clean side is.
    """
    delta = delta_normed.to(unembed.dtype)
    mean_delta = _mean_delta(delta, mean_unembed)
    if _is_fused(backend, clean_log_p):
        return _log_of_sum(*_launch(delta, mean_delta, clean_log_p, unembed, top=False))
    return _log_of_sum(*_sum_torch(delta, mean_delta, clean_log_p, unembed)[:2])


def top_readout(
    delta_normed: Float[Tensor, "set prompt d_model"],
    clean_log_p: Float[Tensor, "prompt d_vocab"],
    unembed: Float[Tensor, "d_vocab d_model"],
    *,
    backend: Backend = "torch",
) -> Int[Tensor, "set prompt"]:
    """The token that a row holds likeliest, the first of several. Precision as in `kl_readout`."""
    delta = delta_normed.to(unembed.dtype)
    if _is_fused(backend, clean_log_p):
        return _top_of_parts(*_launch(delta, None, clean_log_p, unembed, top=True))
    return _top_of_parts(*_top_torch(delta, clean_log_p, unembed))


def kl_and_top_readout(
    delta_normed: Float[Tensor, "set prompt d_model"], *of_clean: Tensor, backend: Backend = "torch"
) -> tuple[Float[Tensor, "set prompt"], Int[Tensor, "set prompt"]]:
    """What `kl_readout` gives, with the arguments that it takes, and `top_readout`; torch reads the vocabulary once for
    both."""
    clean_log_p, mean_unembed, unembed = of_clean
    if _is_fused(backend, clean_log_p):
        kl = kl_readout(delta_normed, *of_clean, backend=backend)
        return kl, top_readout(delta_normed, clean_log_p, unembed, backend=backend)
    delta = delta_normed.to(unembed.dtype)
    shift, total, value, token = _sum_torch(delta, _mean_delta(delta, mean_unembed), clean_log_p, unembed)
    return _log_of_sum(shift, total), _top_of_parts(value, token)


def _is_fused(backend: Backend, clean_log_p: Tensor) -> bool:
    return backend == "triton" and clean_log_p.dtype != torch.float64


def _mean_delta(
    delta: Float[Tensor, "set prompt d_model"], mean_unembed: Float[Tensor, "prompt d_model"]
) -> Float[Tensor, "set prompt"]:
    return torch.einsum("spd,pd->sp", delta.to(mean_unembed.dtype), mean_unembed)


def _top_of_parts(
    values: Float[Tensor, "part set prompt"], tokens: Int[Tensor, "part set prompt"]
) -> Int[Tensor, "set prompt"]:
    return tokens.gather(0, values.argmax(0, keepdim=True))[0]


def _log_of_sum(shift: Float[Tensor, "part *row"], total: Float[Tensor, "part *row"]) -> Float[Tensor, "*row"]:
    """log(1 + Σ e^shift · total) over parts of the vocabulary."""
    m = shift.amax(0)
    whole = (total * (shift - m).exp()).sum(0)
    return torch.where(m > 0, m + (whole + (-m).exp()).log(), whole.log1p())


def _tiles(n_rows: int, d_vocab: int) -> list[slice]:
    width = max(64, TILE_ELEMENTS // n_rows)
    return [slice(start, start + width) for start in range(0, d_vocab, width)]


def _sum_torch(
    delta: Tensor, mean_delta: Tensor, clean_log_p: Tensor, unembed: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Σ p φ(x) over each tile of the vocabulary, as e^shift · total, its largest log p + x, and that token; each
    [part, set, prompt]."""
    parts = []
    for tile in _tiles(mean_delta.numel(), len(unembed)):
        log_p = clean_log_p[:, tile]
        x = F.linear(delta, unembed[tile]).to(log_p.dtype).sub_(mean_delta[..., None])
        exponent = log_p + x
        value, token = exponent.max(-1)
        shift = (value[..., None] - HEADROOM).clamp_(min=0)
        p = (log_p - shift).exp_()
        far = exponent.sub_(shift).exp_().sub_(p).sub_(p * x)
        near = p.mul_(_phi(x))
        total = torch.where(x.abs() < SMALL, near, far).sum(-1)
        parts.append((shift[..., 0], total, value, token + tile.start))
    shifts, totals, values, tokens = map(torch.stack, zip(*parts, strict=True))
    return shifts, totals, values, tokens


def _phi(x: Tensor) -> Tensor:
    """e^x − 1 − x of |x| < SMALL, as its Taylor series to the last term that x's dtype can tell."""
    last = 16 if x.dtype == torch.float64 else 8
    series = torch.full_like(x, 1 / math.factorial(last))
    for power in range(last - 1, 1, -1):
        series.mul_(x).add_(1 / math.factorial(power))
    return series.mul_(x).mul_(x)


def _top_torch(
    delta: Tensor, clean_log_p: Tensor, unembed: Tensor
) -> tuple[Float[Tensor, "part set prompt"], Int[Tensor, "part set prompt"]]:
    """The largest log p + δlogit of each tile of the vocabulary, and its token."""
    parts = []
    for tile in _tiles(delta[..., 0].numel(), len(unembed)):
        log_p = clean_log_p[:, tile]
        value, token = F.linear(delta, unembed[tile]).to(log_p.dtype).add_(log_p).max(-1)
        parts.append((value, token + tile.start))
    values, tokens = zip(*parts, strict=True)
    return torch.stack(values), torch.stack(tokens)


TILES = 16
"""Tiles of the vocabulary per program."""

CONFIGS = [
    triton.Config({"BLOCK_M": 16, "BLOCK_N": 64}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=8, num_stages=2),
]
CHUNK = 32
"""Columns of δ that are multiplied at once."""


@triton.jit
def phi(x):
    """e^x − 1 − x of |x| < 1/2, as its Taylor series to x⁸."""
    series = 1 / 5040 + x * (1 / 40320)
    series = 1 / 120 + x * (1 / 720 + x * series)
    return x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * series)))


@triton.autotune(configs=CONFIGS[:1] if interpreted() else CONFIGS, key=["d_model", "d_vocab", "TOP"])
@triton.jit(do_not_specialize=["n_rows", "n_prompts"])
def vocabulary_kernel(
    delta, mean_delta, log_p, unembed, value, second, log_p_prompt, unembed_row, n_rows, n_prompts, d_model, d_vocab,
    SMALL: tl.constexpr, HEADROOM: tl.constexpr, TILES: tl.constexpr, CHUNK: tl.constexpr, TOP: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of rows and a part of the vocabulary: the sum and its shift, or the largest logit and its token if TOP.
    Blocks of rows that run together read the same part of W_U."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_there = row < n_rows
    prompt = (row % n_prompts).to(tl.int64)
    rows = delta + row.to(tl.int64) * d_model
    if TOP:
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        token = tl.zeros((BLOCK_M,), tl.int32)
    else:
        shift = tl.zeros((BLOCK_M,), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        mean = tl.load(mean_delta + row, mask=row_there, other=0.0)
    first_tile = tl.program_id(1) * TILES
    for tile in range(first_tile, tl.minimum(first_tile + TILES, tl.cdiv(d_vocab, BLOCK_N))):
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        column_there = column < d_vocab
        columns = unembed + column.to(tl.int64) * unembed_row
        x = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(0, d_model, CHUNK):
            k = first + tl.arange(0, CHUNK)
            k_there = k < d_model
            left = tl.load(rows[:, None] + k[None, :], mask=row_there[:, None] & k_there[None, :], other=0.0)
            right = tl.load(columns[None, :] + k[:, None], mask=column_there[None, :] & k_there[:, None], other=0.0)
            if INTERPRETED:  # whose product of bfloat16 multiplies their bits
                left, right = left.to(tl.float32), right.to(tl.float32)
            x = tl.dot(left, right, acc=x, input_precision=PRECISION)
        there = row_there[:, None] & column_there[None, :]
        clean = tl.load(log_p + prompt[:, None] * log_p_prompt + column[None, :], mask=there, other=float("-inf"))
        if TOP:
            best, at = tl.max(clean + x, 1, return_indices=True)
            token = tl.where(best > largest, tile * BLOCK_N + at, token)
            largest = tl.maximum(largest, best)
        else:
            x -= mean[:, None]
            new_shift = tl.maximum(shift, tl.max(clean + x, 1) - HEADROOM)
            p = tl.exp(clean - new_shift[:, None])
            far = tl.exp(clean + x - new_shift[:, None]) - p - p * x
            terms = tl.where(tl.abs(x) < SMALL, p * phi(x), far)
            total = total * tl.exp(shift - new_shift) + tl.sum(terms, 1)
            shift = new_shift
    at = tl.program_id(1).to(tl.int64) * n_rows + row
    if TOP:
        tl.store(value + at, largest, mask=row_there)
        tl.store(second + at, token, mask=row_there)
    else:
        tl.store(value + at, shift, mask=row_there)
        tl.store(second + at, total, mask=row_there)


def _launch(
    delta: Tensor, mean_delta: Tensor | None, clean_log_p: Tensor, unembed: Tensor, top: bool
) -> tuple[Float[Tensor, "part set prompt"], Tensor]:
    """What `_top_torch` or `_sum_torch` gives, by the kernel."""
    n_sets, n_prompts, d_model = delta.shape
    n_rows, d_vocab = n_sets * n_prompts, len(unembed)
    delta, clean_log_p, unembed = delta.contiguous(), clean_log_p.contiguous(), unembed.contiguous()
    n_parts = triton.cdiv(d_vocab, TILES * min(config.kwargs["BLOCK_N"] for config in CONFIGS))
    shape = (n_parts, n_sets, n_prompts)
    value = torch.full(shape, float("-inf") if top else 0.0, dtype=torch.float32, device=delta.device)
    second = torch.zeros(shape, dtype=torch.int64 if top else torch.float32, device=delta.device)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(n_rows, meta["BLOCK_M"]), triton.cdiv(d_vocab, TILES * meta["BLOCK_N"])

    vocabulary_kernel[grid](
        delta, None if mean_delta is None else mean_delta.contiguous(), clean_log_p, unembed, value, second,
        clean_log_p.stride(0), unembed.stride(0), n_rows, n_prompts, d_model, d_vocab,
        SMALL=SMALL, HEADROOM=HEADROOM, TILES=TILES, CHUNK=CHUNK, TOP=top,
        PRECISION=float32_dot(), INTERPRETED=interpreted(),
    )  # fmt: skip
    return value, second
