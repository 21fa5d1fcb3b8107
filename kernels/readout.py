"""readout: the effect of a row, without logits.

    effect = (norm_f(x + δ) − norm_f(x)) · (W_U[answer] − W_U[wrong])

Moved per row, with x and the direction found in the cache: 4 · d_model bytes. Bound by memory.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.kernels.backend import Backend, block_size, tl, triton, with_columns
from subcircuit.kernels.norm_delta import change_of_norm, norm_delta_reference


def readout(
    clean: Float[Tensor, "prompt d_model"],
    clean_normed: Float[Tensor, "prompt d_model"],
    delta: Float[Tensor, "set prompt d_model"],
    weight: Float[Tensor, "d_model"],
    bias: Float[Tensor, "d_model"] | None,
    eps: float,
    direction: Float[Tensor, "prompt d_model"],
    *,
    backend: Backend = "torch",
) -> Float[Tensor, "set prompt"]:
    """Change of the logit difference that `direction` reads from the normed final residual stream."""
    if backend == "triton" and delta.dtype != torch.float64:
        return _launch(clean, delta, weight, bias is not None, eps, direction)
    _, normed = norm_delta_reference(clean, clean_normed, delta, weight, bias, eps, delta.dtype)
    return (normed * direction).sum(-1)


@triton.jit
def readout_kernel(
    clean, delta, weight, direction, out, clean_prompt, delta_set, delta_prompt, direction_prompt, n_prompts, d, eps,
    LAYER_NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    prompt, row_set = row % n_prompts, row // n_prompts
    i = tl.arange(0, BLOCK)
    there = i < d
    x = tl.load(clean + prompt * clean_prompt + i, mask=there, other=0.0).to(tl.float32)
    change = tl.load(delta + row_set * delta_set + prompt * delta_prompt + i, mask=there, other=0.0).to(tl.float32)
    w = tl.load(weight + i, mask=there, other=0.0).to(tl.float32)
    normed = change_of_norm(x, change, w, there, d, eps, LAYER_NORM)
    read = tl.load(direction + prompt * direction_prompt + i, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row, tl.sum(normed * read))


def _launch(
    clean: Tensor, delta: Tensor, weight: Tensor, layer_norm: bool, eps: float, direction: Tensor
) -> Float[Tensor, "set prompt"]:
    clean, delta, direction = (with_columns(x) for x in (clean, delta, direction))
    n_sets, n_prompts, d = delta.shape
    out = torch.empty(n_sets, n_prompts, dtype=torch.float32, device=delta.device)
    block, n_warps = block_size(d)
    readout_kernel[(n_sets * n_prompts,)](
        clean, delta, weight, direction, out,
        clean.stride(0), *delta.stride()[:2], direction.stride(0), n_prompts, d, eps,
        LAYER_NORM=layer_norm, BLOCK=block, num_warps=n_warps,
    )  # fmt: skip
    return out
