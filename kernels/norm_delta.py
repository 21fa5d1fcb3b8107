"""norm_delta: what a change of the residual stream changes in the normed residual stream.

    δ  ← δ + product
    δn = norm(x + δ) − norm(x)

x and norm(x) are shared by all rows of a prompt; δ has a row axis in front. The product is what a block's last GEMM
adds to the residual stream: adding it here saves reading and writing δ once more.

The C and Triton kernels subtract no two nearly equal numbers. With c = x − mean(x) and e = δ − mean(δ) (for RMSNorm the
means are left out), s² = mean(c²) + eps, and t² the same of c + e:

    δn = w (c (1/t − 1/s) + e / t),   1/t − 1/s = −(t² − s²) / (s t (s + t)),   t² − s² = mean(e (2 c + e))

Moved per row token, with products of b bytes and x found in the cache: (8 + 2 b) · d_model bytes; 12 · d_model
operations. Bound by memory everywhere.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from subcircuit.kernels import native
from subcircuit.kernels.backend import Backend, block_size, tl, triton, with_columns


def norm_delta(
    clean: Float[Tensor, "prompt pos d_model"],
    clean_normed: Float[Tensor, "prompt pos d_model"],
    delta: Float[Tensor, "#set prompt pos d_model"],
    weight: Float[Tensor, "d_model"],
    bias: Float[Tensor, "d_model"] | None,
    eps: float,
    out_dtype: torch.dtype,
    *,
    product: Float[Tensor, "#set prompt pos d_model"] | None = None,
    backend: Backend = "torch",
) -> tuple[Float[Tensor, "set prompt pos d_model"], Float[Tensor, "set prompt pos d_model"]]:
    """δ + product, and LayerNorm's (with bias) or RMSNorm's (bias None) change under it, cast to `out_dtype`.

    The sum is in δ's dtype. In float64 the reference does the work, whichever backend is asked for.
    """
    if backend == "native" and native.runs_on(clean, delta, weight, product_dtype=out_dtype):
        return native.norm_delta(clean, delta, product, weight, bias is not None, eps, out_dtype)
    if backend == "triton" and torch.float64 not in (clean.dtype, delta.dtype):
        return _launch(clean, delta, product, weight, bias is not None, eps, out_dtype)
    return norm_delta_reference(clean, clean_normed, delta, weight, bias, eps, out_dtype, product=product)


def norm_delta_reference(
    clean: Float[Tensor, "prompt pos d_model"],
    clean_normed: Float[Tensor, "prompt pos d_model"],
    delta: Float[Tensor, "#set prompt pos d_model"],
    weight: Float[Tensor, "d_model"],
    bias: Float[Tensor, "d_model"] | None,
    eps: float,
    out_dtype: torch.dtype,
    *,
    product: Float[Tensor, "#set prompt pos d_model"] | None = None,
) -> tuple[Float[Tensor, "set prompt pos d_model"], Float[Tensor, "set prompt pos d_model"]]:
    """`norm_delta` in plain torch."""
    if product is not None:
        delta = (delta + product).to(delta.dtype)
    row = clean + delta
    if bias is None:
        inverse_scale = row.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        row.mul_(inverse_scale).mul_(weight)
    else:
        row = F.layer_norm(row, weight.shape, weight, bias, eps)
    return delta, torch.sub(row, clean_normed, out=torch.empty_like(row, dtype=out_dtype))


@triton.jit
def change_of_norm(x, delta, weight, there, d, eps, LAYER_NORM: tl.constexpr):
    """δn of one token, all operands in float32 and 0 where nothing is there."""
    if LAYER_NORM:
        x = tl.where(there, x - tl.sum(x) / d, 0.0)
        delta = tl.where(there, delta - tl.sum(delta) / d, 0.0)
    change = tl.sum(delta * (2.0 * x + delta)) / d
    before = tl.sum(x * x) / d + eps
    after = tl.maximum(before + change, eps)
    s, t = tl.sqrt(before), tl.sqrt(after)
    return weight * (delta / t - x * (change / (s * t * (s + t))))


@triton.jit
def norm_delta_kernel(
    clean, delta, product, weight, total, out,
    clean_prompt, clean_pos, delta_set, delta_prompt, delta_pos, product_set, product_prompt, product_pos,
    n_prompts, n_pos, d, eps, LAYER_NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row token; `product` may be None."""
    token = tl.program_id(0).to(tl.int64)
    pos, prompt, row_set = token % n_pos, token // n_pos % n_prompts, token // n_pos // n_prompts
    i = tl.arange(0, BLOCK)
    there = i < d
    x = tl.load(clean + prompt * clean_prompt + pos * clean_pos + i, mask=there, other=0.0).to(tl.float32)
    at = delta + row_set * delta_set + prompt * delta_prompt + pos * delta_pos + i
    change = tl.load(at, mask=there, other=0.0).to(tl.float32)
    if product is not None:
        at = product + row_set * product_set + prompt * product_prompt + pos * product_pos + i
        change += tl.load(at, mask=there, other=0.0).to(tl.float32)
        tl.store(total + token * d + i, change.to(total.dtype.element_ty), mask=there)
    w = tl.load(weight + i, mask=there, other=0.0).to(tl.float32)
    normed = change_of_norm(x, change, w, there, d, eps, LAYER_NORM)
    tl.store(out + token * d + i, normed.to(out.dtype.element_ty), mask=there)


def _launch(
    clean: Tensor,
    delta: Tensor,
    product: Tensor | None,
    weight: Tensor,
    layer_norm: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    clean, delta, product = (with_columns(x) for x in (clean, delta, product))
    n_sets = delta.shape[0] if product is None else max(delta.shape[0], product.shape[0])
    shape = (n_sets, *clean.shape)
    n_prompts, n_pos, d = clean.shape
    total = delta if product is None else delta.new_empty(shape)
    out = torch.empty(shape, dtype=out_dtype, device=clean.device)
    product_strides = (0, 0, 0) if product is None else product.expand(shape).stride()[:3]
    block, n_warps = block_size(d)
    norm_delta_kernel[(n_sets * n_prompts * n_pos,)](
        clean, delta, product, weight, total, out,
        *clean.stride()[:2], *delta.expand(shape).stride()[:3], *product_strides,
        n_prompts, n_pos, d, eps, LAYER_NORM=layer_norm, BLOCK=block, num_warps=n_warps,
    )  # fmt: skip
    return total, out
