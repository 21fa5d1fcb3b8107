"""attention_delta in Triton: flash attention of q + δq, k + δk, v + δv, formed on the fly, minus the clean z.

    δz = softmax((q + δq)(k + δk)ᵀ / √d_head + causal) (v + δv) − z

One program takes one row (set, prompt), one KV head and a block of the queries of its group, packed position by
position, and streams blocks of keys past them with an online softmax (Dao, arXiv 2307.08691, algorithm 1). The clean
side is gathered by prompt and never copied per row; where a key or query cannot differ, δ is not loaded. Keys in the
causal future of the whole block are not visited.

Columns are held as two halves, the way rotary embedding pairs them, so that δq and δk are turned as they are loaded. A
head wider than 128 columns is scored in slices of both halves, with the queries formed again for each block of keys:
its queries do not fit in registers.

δz is the small difference of two large values, so the products need float32 accuracy (see `float32_dot`). Each block's
share of z is summed outside of the tensor cores, whose adder truncates: emulated over 1,024 keys, leaving the sum to
them makes the error of δz 7 times that of float32, and this way half of it.

Moved per row and KV head: b · d_head · (2 n_new + 2 group n_q) bytes for δ of b bytes; per prompt, if its rows' blocks
find the clean side in the cache, 4 · d_head · (2 n_k + 2 group n_q). Operations: 4 · group · n_q · n_k · d_head, half
of it where n_q = n_k.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from subcircuit.kernels.backend import float32_dot, interpreted, tl, triton, with_columns
from subcircuit.kernels.rotary import Rotation

RESIDENT = 64
"""Widest half of a head whose queries stay in registers."""


def block_rows(n_rows: int, block_half: int) -> int:
    """Queries per program: few where there are few, or where a head is wide; else a tensor-core tile per warp."""
    return 16 if n_rows <= 32 or block_half > RESIDENT else 64


def block_half(d_head: int) -> int:
    """Columns that a program holds of each half of a head."""
    return max(16, 1 << ((d_head - 1) // 2).bit_length())


def chunk(half: int) -> int:
    """Columns of each half that are scored at once."""
    return half if half <= RESIDENT else 16


CONFIGS = [
    triton.Config({"BLOCK_N": 16}, num_warps=8, num_stages=2),
    triton.Config({"BLOCK_N": 16}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_N": 32}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_N": 32}, num_warps=8, num_stages=1),
]


def fits(config: Any, rows: int, half: int, recent: bool) -> bool:
    """Whether a configuration's blocks stay in registers, by the compilers' count for sm_80, sm_90 and gfx942.

    `recent` stands for sm_90 or gfx942, whose products of 64 rows leave more registers free. A head whose width is no
    power of two, or one of 128 without rotary embedding, may spill up to 16 bytes in float32.
    """
    wide, tall = half > RESIDENT, rows > 16
    match config.kwargs["BLOCK_N"], config.num_warps:
        case 16, 8:
            return True
        case 16, 4:
            return not (tall and half == RESIDENT)
        case 32, 4:
            return half <= RESIDENT // 2 and (recent or not tall)
        case _:
            return wide


def fitting(configs: list[Any], named_args: dict[str, Any], **constants: Any) -> list[Any]:
    """The configurations to try for one launch."""
    recent = torch.cuda.get_device_capability() >= (9, 0)
    return [c for c in configs if fits(c, constants["BLOCK_M"], constants["BLOCK_H"], recent)]


@triton.jit
def _halves(pointers, there, column, D_HEAD: tl.constexpr, WIDTH: tl.constexpr):
    """Columns [column, column + WIDTH) of both halves of the rows that are there, in float32; 0 elsewhere."""
    HALF: tl.constexpr = (D_HEAD + 1) // 2
    d = column + tl.arange(0, WIDTH)[None, :]
    low_mask = there[:, None]
    high_mask = there[:, None]
    if D_HEAD % (2 * WIDTH) != 0:
        low_mask = low_mask & (d < HALF)
        high_mask = high_mask & (d < D_HEAD - HALF)
    at = pointers[:, None] + d
    low = tl.load(at, mask=low_mask, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=high_mask, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def _moved(
    clean, clean_start, clean_rows, delta, delta_start, delta_rows, cos, sin, positions, there, differs, column,
    D_HEAD: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Clean rows plus δ, the latter turned by its positions' angles where there are tables."""
    low, high = _halves(clean + clean_start + clean_rows, there, column, D_HEAD, WIDTH)
    if delta is not None:
        delta_low, delta_high = _halves(delta + delta_start + delta_rows, differs, column, D_HEAD, WIDTH)
        if cos is None:
            low += delta_low
            high += delta_high
        else:
            pair = column + tl.arange(0, WIDTH)[None, :]
            mask = differs[:, None]
            if D_HEAD % (2 * WIDTH) != 0:
                mask = mask & (pair < D_HEAD // 2)
            at = positions[:, None] * (D_HEAD // 2) + pair
            c = tl.load(cos + at, mask=mask, other=0.0).to(tl.float32)
            s = tl.load(sin + at, mask=mask, other=0.0).to(tl.float32)
            low += delta_low * c - delta_high * s
            high += delta_high * c + delta_low * s
    return low, high


@triton.autotune(
    configs=CONFIGS[:1] if interpreted() else CONFIGS,
    key=["D_HEAD", "GROUP", "BLOCK_M"],
    prune_configs_by={"early_config_prune": fitting},
)
@triton.jit(do_not_specialize=["n_sets", "n_q", "n_new", "n_k", "mask_set", "mask_pos"])
def attention_delta_kernel(
    clean_q, clean_k, clean_v, clean_z, delta_q, delta_k, delta_v, cos, sin, mask, source, first, out,
    q_prompt, q_pos, q_head, k_prompt, k_pos, k_head, v_prompt, v_pos, v_head, z_prompt, z_pos, z_head,
    dq_set, dq_prompt, dq_pos, dq_head, dk_set, dk_prompt, dk_pos, dk_head, dv_set, dv_prompt, dv_pos, dv_head,
    mask_set, mask_pos, mask_head, source_prompt, source_pos, source_head, out_set, out_prompt,
    n_sets, n_q, n_new, n_k, n_kv, scale_log2,
    D_HEAD: tl.constexpr, GROUP: tl.constexpr, BLOCK_H: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of BLOCK_M (position, head of the group) of one row; `first`, `mask`, `cos` and any δ may be None."""
    HALF: tl.constexpr = (D_HEAD + 1) // 2
    n_blocks = tl.cdiv(n_q * GROUP, BLOCK_M)
    program = tl.program_id(0)
    # The last queries see the most keys: start them first.
    block = n_blocks - 1 - program % n_blocks
    program //= n_blocks
    row_set = (program % n_sets).to(tl.int64)
    kv_head = program // n_sets % n_kv
    prompt = (program // n_sets // n_kv).to(tl.int64)

    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    i = m // GROUP
    head = kv_head * GROUP + m % GROUP
    there = i < n_q
    position = n_k - n_q + i
    first_new = n_k - n_new
    if first is not None:
        first_new += tl.load(first + prompt).to(tl.int32)
    differs = there & (position >= first_new)
    last = n_k - n_q + tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, n_q - 1)
    end = tl.where(last < first_new, 0, last + 1)

    q_start, dq_start = prompt * q_prompt, row_set * dq_set + prompt * dq_prompt
    q_rows, dq_rows = i * q_pos + head * q_head, i * dq_pos + head * dq_head
    k_start, dk_start = prompt * k_prompt + kv_head * k_head, row_set * dk_set + prompt * dk_prompt + kv_head * dk_head
    v_start, dv_start = prompt * v_prompt + kv_head * v_head, row_set * dv_set + prompt * dv_prompt + kv_head * dv_head
    if CHUNK == BLOCK_H:
        q_low, q_high = _moved(
            clean_q, q_start, q_rows, delta_q, dq_start, dq_rows, cos, sin, position, there, differs, 0, D_HEAD, BLOCK_H
        )
    z_low = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    z_high = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for key in range(0, end, BLOCK_N):
        n = key + tl.arange(0, BLOCK_N)
        key_there = n < n_k
        key_differs = key_there & (n >= first_new)
        n_in_new = n - (n_k - n_new)
        if CHUNK == BLOCK_H:
            k_low, k_high = _moved(
                clean_k, k_start, n * k_pos, delta_k, dk_start, n_in_new * dk_pos, cos, sin, n, key_there, key_differs,
                0, D_HEAD, BLOCK_H,
            )  # fmt: skip
            scores = tl.dot(q_low, tl.trans(k_low), input_precision=PRECISION)
            scores = tl.dot(q_high, tl.trans(k_high), acc=scores, input_precision=PRECISION)
        else:
            scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for column in range(0, HALF, CHUNK):
                k_low, k_high = _moved(
                    clean_k, k_start, n * k_pos, delta_k, dk_start, n_in_new * dk_pos, cos, sin, n, key_there,
                    key_differs, column, D_HEAD, CHUNK,
                )  # fmt: skip
                q_low, q_high = _moved(
                    clean_q, q_start, q_rows, delta_q, dq_start, dq_rows, cos, sin, position, there, differs, column,
                    D_HEAD, CHUNK,
                )  # fmt: skip
                scores = tl.dot(q_low, tl.trans(k_low), acc=scores, input_precision=PRECISION)
                scores = tl.dot(q_high, tl.trans(k_high), acc=scores, input_precision=PRECISION)
        scores = tl.where(n[None, :] <= position[:, None], scores * scale_log2, float("-inf"))
        # Key 0 is visible to every query, so `largest` is finite after the first block.
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        largest = new_largest
        total = total * shrink + tl.sum(weights, 1)
        v_low, v_high = _moved(
            clean_v, v_start, n * v_pos, delta_v, dv_start, n_in_new * dv_pos, None, None, n, key_there, key_differs,
            0, D_HEAD, BLOCK_H,
        )  # fmt: skip
        # An fma and not a sum or an accumulator of the product: those may be given to the tensor cores' adder.
        shrink = tl.broadcast_to(shrink[:, None], (BLOCK_M, BLOCK_H))
        z_low = tl.fma(z_low, shrink, tl.dot(weights, v_low, input_precision=PRECISION))
        z_high = tl.fma(z_high, shrink, tl.dot(weights, v_high, input_precision=PRECISION))

    total = tl.maximum(total, 1.0)[:, None]  # 0 where no key was visited, else at least the largest key's own 1
    clean_low, clean_high = _halves(clean_z + prompt * z_prompt + i * z_pos + head * z_head, there, 0, D_HEAD, BLOCK_H)
    delta_low = tl.where(differs[:, None], z_low / total - clean_low, 0.0)
    delta_high = tl.where(differs[:, None], z_high / total - clean_high, 0.0)
    if mask is not None:
        patched = tl.load(mask + row_set * mask_set + i * mask_pos + head * mask_head, mask=there, other=0) != 0
        source_rows = source + prompt * source_prompt + i * source_pos + head * source_head
        source_low, source_high = _halves(source_rows, patched, 0, D_HEAD, BLOCK_H)
        delta_low = tl.where(patched[:, None], source_low, delta_low)
        delta_high = tl.where(patched[:, None], source_high, delta_high)
    d = tl.arange(0, BLOCK_H)[None, :]
    out_rows = out + row_set * out_set + prompt * out_prompt + (i * n_kv * GROUP + head) * D_HEAD
    at = out_rows[:, None] + d
    tl.store(at, delta_low.to(out.dtype.element_ty), mask=there[:, None] & (d < HALF))
    tl.store(at + HALF, delta_high.to(out.dtype.element_ty), mask=there[:, None] & (d < D_HEAD - HALF))


def launch(
    clean_q: Float[Tensor, "prompt q_pos head d_head"],
    clean_k: Float[Tensor, "prompt k_pos kv_head d_head"],
    clean_v: Float[Tensor, "prompt k_pos kv_head d_head"],
    clean_z: Float[Tensor, "prompt q_pos head d_head"],
    delta_q: Float[Tensor, "#set prompt q_pos head d_head"] | None,
    delta_k: Float[Tensor, "#set prompt new_pos kv_head d_head"] | None,
    delta_v: Float[Tensor, "#set prompt new_pos kv_head d_head"] | None,
    out_dtype: torch.dtype,
    rotation: Rotation | None,
    patch: tuple[Bool[Tensor, "#set #q_pos head"], Float[Tensor, "#prompt q_pos head d_head"]] | None,
    first: Int[Tensor, "prompt"] | None,
) -> Float[Tensor, "#set prompt q_pos head d_head"]:
    """`attention_delta` by the kernel, for operands of up to float32 and a patch of no more sets than δ has."""
    n_prompts, n_q, n_heads, d_head = clean_q.shape
    n_k, n_kv = clean_k.shape[1:3]
    deltas = [with_columns(delta) for delta in (delta_q, delta_k, delta_v)]
    n_sets = max(delta.shape[0] for delta in deltas if delta is not None)
    n_new = next((delta.shape[2] for delta in deltas[1:] if delta is not None), n_q)
    clean = [with_columns(x) for x in (clean_q, clean_k, clean_v, clean_z)]
    cos, sin = (None, None) if rotation is None else (table.contiguous() for table in rotation)
    mask = source = None
    patch_strides: tuple[int, ...] = (0,) * 6
    if patch is not None:
        mask, source = patch[0].expand(n_sets, n_q, n_heads), with_columns(patch[1])
        patch_strides = *mask.stride(), *source.expand(clean_q.shape).stride()[:3]
    out = clean_q.new_empty(n_sets, n_prompts, n_q, n_heads, d_head, dtype=out_dtype)
    group, half = n_heads // n_kv, block_half(d_head)
    rows = block_rows(n_q * group, half)
    n_programs = -(-n_q * group // rows) * n_sets * n_kv * n_prompts
    attention_delta_kernel[(n_programs,)](
        *clean, *deltas, cos, sin, mask, source, None if first is None else first.contiguous(), out,
        *(stride for x in clean for stride in x.stride()[:3]),
        *(stride for x in deltas for stride in _row_strides(x, n_sets)),
        *patch_strides, *out.stride()[:2],
        n_sets, n_q, n_new, n_k, n_kv, d_head**-0.5 * math.log2(math.e),
        D_HEAD=d_head, GROUP=group, BLOCK_H=half, CHUNK=chunk(half), BLOCK_M=rows,
        PRECISION=float32_dot(),
    )  # fmt: skip
    return out


def _row_strides(delta: Tensor | None, n_sets: int) -> tuple[int, ...]:
    """Strides over set (0 where one stands for all), prompt, position and head."""
    return (0, 0, 0, 0) if delta is None else delta.expand(n_sets, *delta.shape[1:]).stride()[:4]
