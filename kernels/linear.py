"""linear: δ times a linear weight.

On x86 processors oneDNN multiplies faster than what `F.linear` calls, the more so with weights laid out for it. For
2,112 rows of GPT-2 Small's shapes, on two Zen 4 cores: in float32 211 to 220 GFLOP/s, against 188 to 204 of MKL; in
bfloat16 434 to 453 from laid-out weights, against 395 to 436. Laying out float32 weights as well gains 3 % more, but
takes a copy of them that is paid for only after several sweeps.
"""

from __future__ import annotations

import platform
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LARGE = 2**23
"""Multiplications from which on oneDNN's overhead does not matter."""


def linear(
    delta: Float[Tensor, "*rows d_in"], weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, "d_out"] | None = None
) -> Float[Tensor, "*rows d_out"]:
    """δ Wᵀ (+ bias) in the dtype of the weight, which may be one that was `laid_out`. Without gradients."""
    rows = delta.to(weight.dtype).reshape(-1, weight.shape[1])  # of a slice, F.linear would copy the weight instead
    out: Tensor
    is_large = rows.numel() * len(weight) >= LARGE
    if weight.is_mkldnn or (weight.dtype == torch.float32 and is_large and _is_for_onednn(weight)):
        out = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    else:
        out = F.linear(rows, weight, bias)
    return out.view(*delta.shape[:-1], -1)


def _is_for_onednn(weight: Float[Tensor, "d_out d_in"]) -> bool:
    """Whether oneDNN is there for a weight, and the faster choice: with a transposed one it is slower by orders."""
    return weight.device.type == "cpu" and weight.is_contiguous() and weight.dtype in _onednn_dtypes()


@cache
def _onednn_dtypes() -> frozenset[torch.dtype]:
    """torch.compile uses the same operations for models that are frozen; torch has no public name for them."""
    is_x86 = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
    operations = "_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported"
    if not is_x86 or not all(hasattr(torch.ops.mkldnn, name) for name in operations):
        return frozenset()
    bfloat16 = [torch.bfloat16] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []
    return frozenset([torch.float32, *bfloat16])


def laid_out(weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
    """A copy of a weight for `linear` alone, where oneDNN is there for it, else the weight: it cannot be sliced or
    read."""
    weight = weight.detach().contiguous()
    if not _is_for_onednn(weight):
        return weight
    copy: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return copy
