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

Activation = Literal["gelu_new", "gelu", "silu", "relu"]

_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
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
) -> Float[Tensor, "set prompt pos d_mlp"]:
    """Change of the MLP's post-activations, cast to `out_dtype`. Overwrites `delta_pre` and `delta_pre_linear`."""
    post = _IN_PLACE[activation](delta_pre.add_(clean_pre))
    if clean_pre_linear is not None and delta_pre_linear is not None:
        post.mul_(delta_pre_linear.add_(clean_pre_linear))
    return torch.sub(post, clean_post, out=torch.empty_like(post, dtype=out_dtype))
