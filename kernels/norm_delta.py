"""norm_delta: what a change of the residual stream changes in the normed residual stream.

    δn = norm(x + δ) − norm(x)

x and norm(x) are shared by all rows of a prompt; δ has a row axis in front.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def norm_delta(
    clean: Float[Tensor, "prompt pos d_model"],
    clean_normed: Float[Tensor, "prompt pos d_model"],
    delta: Float[Tensor, "set prompt pos d_model"],
    weight: Float[Tensor, "d_model"],
    bias: Float[Tensor, "d_model"] | None,
    eps: float,
    out_dtype: torch.dtype,
) -> Float[Tensor, "set prompt pos d_model"]:
    """LayerNorm's (with bias) or RMSNorm's (bias None) change under δ, cast to `out_dtype`."""
    row = clean + delta
    if bias is None:
        inverse_scale = row.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        row.mul_(inverse_scale).mul_(weight)
    else:
        row = F.layer_norm(row, weight.shape, weight, bias, eps)
    return torch.sub(row, clean_normed, out=torch.empty_like(row, dtype=out_dtype))
