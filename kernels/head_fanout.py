"""head_fanout: patches of single heads of one layer, each as a change of the residual stream.

    δ[s] = (z_source[h_s] − z_clean[h_s]) W_O[h_s]

Each set s has one head, so it costs one head's share of the output projection and not the whole of it. In Triton a
grouped product: one program takes a tile of a set's tokens and of d_model, with that set's head gathered from both
sides.

Moved per row token: 4 · d_model bytes written, d_head read from the cache; 2 · d_head · d_model operations.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subcircuit.kernels.backend import Backend, float32_dot, interpreted, tl, triton, with_columns


def head_fanout(
    source_delta: Float[Tensor, "#prompt pos head d_head"],
    heads: Int[Tensor, "set"],
    w_o: Float[Tensor, "d_model head_d_head"],
    out_dtype: torch.dtype,
    *,
    backend: Backend = "torch",
) -> Float[Tensor, "set #prompt pos d_model"]:
    """Residual change of every (set, prompt). `w_o` is the linear weight and gives the precision of the product."""
    if backend == "triton" and w_o.dtype != torch.float64:
        return _launch(source_delta, heads, w_o, out_dtype)
    n_prompts, n_pos, _, d_head = source_delta.shape
    chosen = source_delta.to(w_o.dtype).permute(2, 0, 1, 3)[heads].flatten(1, 2)
    per_head = w_o.unflatten(1, (-1, d_head)).transpose(0, 1)[heads]
    return torch.bmm(chosen, per_head.transpose(1, 2)).to(out_dtype).view(len(heads), n_prompts, n_pos, -1)


CONFIGS = [
    triton.Config({"BLOCK_M": 16, "BLOCK_N": 64}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_M": 32, "BLOCK_N": 64}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=8, num_stages=2),
]
CHUNK = 32
"""Columns of a head that are multiplied at once."""


@triton.autotune(configs=CONFIGS[:1] if interpreted() else CONFIGS, key=["n_tokens", "d_model", "D_HEAD"])
@triton.jit
def head_fanout_kernel(
    source, heads, weight, out, source_prompt, source_pos, source_head, weight_row,
    n_tokens, n_pos, d_model, D_HEAD: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of one set's tokens and of d_model."""
    row_set = tl.program_id(1).to(tl.int64)
    head = tl.load(heads + row_set).to(tl.int64)
    n_tiles = tl.cdiv(d_model, BLOCK_N)
    token = tl.program_id(0) // n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    token_there, column_there = token < n_tokens, column < d_model
    rows = source + token // n_pos * source_prompt + token % n_pos * source_pos + head * source_head
    columns = weight + column.to(tl.int64) * weight_row + head * D_HEAD
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, D_HEAD, CHUNK):
        k = first + tl.arange(0, CHUNK)
        k_there = k < D_HEAD
        left = tl.load(rows[:, None] + k[None, :], mask=token_there[:, None] & k_there[None, :], other=0.0)
        right = tl.load(columns[None, :] + k[:, None], mask=column_there[None, :] & k_there[:, None], other=0.0)
        left = left.to(weight.dtype.element_ty)
        if INTERPRETED:  # whose product of bfloat16 multiplies their bits
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, acc=total, input_precision=PRECISION)
    at = out + (row_set * n_tokens + token)[:, None] * d_model + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=token_there[:, None] & column_there[None, :])


def _launch(source_delta: Tensor, heads: Tensor, w_o: Tensor, out_dtype: torch.dtype) -> Tensor:
    source_delta, w_o = (with_columns(x) for x in (source_delta, w_o))
    n_prompts, n_pos, _, d_head = source_delta.shape
    n_tokens, d_model = n_prompts * n_pos, w_o.shape[0]
    out = torch.empty(len(heads), n_prompts, n_pos, d_model, dtype=out_dtype, device=w_o.device)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(n_tokens, meta["BLOCK_M"]) * triton.cdiv(d_model, meta["BLOCK_N"]), len(heads)

    head_fanout_kernel[grid](
        source_delta, heads, w_o, out,
        *source_delta.stride()[:3], w_o.stride(0), n_tokens, n_pos, d_model,
        D_HEAD=d_head, CHUNK=CHUNK, PRECISION=float32_dot(), INTERPRETED=interpreted(),
    )  # fmt: skip
    return out
