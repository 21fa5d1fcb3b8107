"""activation_delta: what a change of the MLP's pre-activations changes in its activations.

δpost = act(u + δu) − act(u)                        plain
δpost = act(g + δg) · (u + δu) − act(g) · u         gated

Moved per row token, with products of b bytes and the clean side found in the cache: 2 b · d_mlp bytes, 3 b · d_mlp
where gated; about 20 operations per element. Bound by memory on a GPU.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from subcircuit.kernels import native
from subcircuit.kernels.backend import Backend, tl, triton, with_columns

Activation = Literal["gelu_new", "gelu", "silu", "relu"]

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "silu": lambda x: F.silu(x, inplace=True),
    "relu": lambda x: F.relu(x, inplace=True),
}


def activation_delta(
    clean_pre: Float[Tensor, "prompt pos d_mlp"],
    clean_post: Float[Tensor, "prompt pos d_mlp"],
    delta_pre: Float[Tensor, "set prompt pos d_mlp"],
    activation: Activation,
    out_dtype: torch.dtype,
    clean_pre_linear: Float[Tensor, "prompt pos d_mlp"] | None = None,
    delta_pre_linear: Float[Tensor, "set prompt pos d_mlp"] | None = None,
    *,
    backend: Backend = "torch",
) -> Float[Tensor, "set prompt pos d_mlp"]:
    """Change of the MLP's post-activations, cast to `out_dtype`. The linear parts are those of a gated MLP."""
    if backend == "native" and native.runs_on(clean_pre, clean_post, clean_pre_linear, product_dtype=out_dtype):
        out = native.activation_delta(
            clean_pre, clean_post, delta_pre, activation, out_dtype, clean_pre_linear, delta_pre_linear
        )
        if out is not None:
            return out
    if backend == "triton" and torch.float64 not in (clean_pre.dtype, out_dtype):
        return _launch(clean_pre, clean_post, delta_pre, activation, out_dtype, clean_pre_linear, delta_pre_linear)
    return activation_delta_reference(
        clean_pre, clean_post, delta_pre, activation, out_dtype, clean_pre_linear, delta_pre_linear
    )


def activation_delta_reference(
    clean_pre: Float[Tensor, "prompt pos d_mlp"],
    clean_post: Float[Tensor, "prompt pos d_mlp"],
    delta_pre: Float[Tensor, "set prompt pos d_mlp"],
    activation: Activation,
    out_dtype: torch.dtype,
    clean_pre_linear: Float[Tensor, "prompt pos d_mlp"] | None = None,
    delta_pre_linear: Float[Tensor, "set prompt pos d_mlp"] | None = None,
) -> Float[Tensor, "set prompt pos d_mlp"]:
    """`activation_delta` in plain torch."""
    post = _FUNCTIONS[activation](clean_pre + delta_pre)
    if clean_pre_linear is not None and delta_pre_linear is not None:
        post.mul_(clean_pre_linear + delta_pre_linear)
    return torch.sub(post, clean_post, out=torch.empty_like(post, dtype=out_dtype))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """An activation in float32. The tanh form of GELU is x / (1 + exp(−2 y)), which overflows nowhere."""
    if ACTIVATION == "relu":
        return tl.maximum(x, 0.0)
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == "gelu_new":
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x * tl.sigmoid(x)


@triton.jit
def activation_delta_kernel(
    clean_pre, clean_linear, clean_post, delta_pre, delta_linear, out,
    pre_prompt, pre_pos, linear_prompt, linear_pos, post_prompt, post_pos,
    delta_set, delta_prompt, delta_pos, dlinear_set, dlinear_prompt, dlinear_pos,
    n_prompts, n_pos, d_mlp, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one row token; the linear parts may be None."""
    token = tl.program_id(0).to(tl.int64)
    pos, prompt, row_set = token % n_pos, token // n_pos % n_prompts, token // n_pos // n_prompts
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = i < d_mlp
    x = tl.load(clean_pre + prompt * pre_prompt + pos * pre_pos + i, mask=there, other=0.0).to(tl.float32)
    at = delta_pre + row_set * delta_set + prompt * delta_prompt + pos * delta_pos + i
    row = activate(x + tl.load(at, mask=there, other=0.0).to(tl.float32), ACTIVATION)
    if clean_linear is not None:
        y = tl.load(clean_linear + prompt * linear_prompt + pos * linear_pos + i, mask=there, other=0.0).to(tl.float32)
        at = delta_linear + row_set * dlinear_set + prompt * dlinear_prompt + pos * dlinear_pos + i
        row *= y + tl.load(at, mask=there, other=0.0).to(tl.float32)
    post = tl.load(clean_post + prompt * post_prompt + pos * post_pos + i, mask=there, other=0.0).to(tl.float32)
    tl.store(out + token * d_mlp + i, (row - post).to(out.dtype.element_ty), mask=there)


BLOCK = 1024


def _launch(
    clean_pre: Tensor,
    clean_post: Tensor,
    delta_pre: Tensor,
    activation: Activation,
    out_dtype: torch.dtype,
    clean_linear: Tensor | None,
    delta_linear: Tensor | None,
) -> Tensor:
    n_sets, n_prompts, n_pos, d_mlp = delta_pre.shape
    clean = [with_columns(x) for x in (clean_pre, clean_linear, clean_post)]
    deltas = [with_columns(x) for x in (delta_pre, delta_linear)]
    out = torch.empty(delta_pre.shape, dtype=out_dtype, device=delta_pre.device)
    activation_delta_kernel[(n_sets * n_prompts * n_pos, triton.cdiv(d_mlp, BLOCK))](
        *clean, *deltas, out,
        *(stride for x in clean for stride in ((0, 0) if x is None else x.stride()[:2])),
        *(stride for x in deltas for stride in ((0, 0, 0) if x is None else x.stride()[:3])),
        n_prompts, n_pos, d_mlp, ACTIVATION=activation, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return out
