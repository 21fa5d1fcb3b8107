"""activation_delta: what a change of the MLP's pre-activations changes in its activations.

δpost = act(u + δu) − act(u)                        plain
δpost = act(g + δg) · (u + δu) − act(g) · u         gated
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from subcircuit.kernels import native
from subcircuit.kernels.backend import Backend

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
