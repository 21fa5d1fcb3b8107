"""norm_delta: what a change of the residual stream changes in the normed residual stream.

    δ  ← δ + product
    δn = norm(x + δ) − norm(x)

x and norm(x) are shared by all rows of a prompt; δ has a row axis in front. The product is what a block's last GEMM
adds to the residual stream: adding it here saves reading and writing δ once more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from subcircuit.kernels import native
from subcircuit.kernels.backend import Backend


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
    """δ + product, and LayerNorm's (with bias) or RMSNorm's (bias None) change under it, cast to `out_dtype`."""
    if backend == "native" and native.runs_on(clean, delta, weight, product_dtype=out_dtype):
        return native.norm_delta(clean, delta, product, weight, bias is not None, eps, out_dtype)
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
        delta = delta + product
    row = clean + delta
    if bias is None:
        inverse_scale = row.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        row.mul_(inverse_scale).mul_(weight)
    else:
        row = F.layer_norm(row, weight.shape, weight, bias, eps)
    return delta, torch.sub(row, clean_normed, out=torch.empty_like(row, dtype=out_dtype))
