"""linear: δ times a linear weight.

The products of a sweep use the same weights again and again, so that on a CPU they are worth laying out once in the
blocks that oneDNN multiplies from. Measured on two Zen 4 cores for 2,112 rows of GPT-2 Small's shapes: float32 220 to
226 GFLOP/s, against 188 to 204 of `F.linear` (MKL); bfloat16 434 to 453 against 395 to 436.
"""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def linear(delta: Float[Tensor, "*rows d_in"], weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "*rows d_out"]:
    """δ Wᵀ in the dtype of the weight, which may be one that was `laid_out`."""
    rows = delta.to(weight.dtype).reshape(-1, weight.shape[1])  # of a slice, F.linear would copy the weight instead
    out: Tensor
    if weight.is_mkldnn:
        out = torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
    else:
        out = F.linear(rows, weight)
    return out.view(*delta.shape[:-1], -1)


def can_lay_out(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `laid_out` does anything for weights of this dtype.

    oneDNN's products of laid-out weights are what torch.compile uses for models that are frozen; torch has no public
    name for them. MKL and other processors' libraries are as fast as oneDNN elsewhere, as far as we know.
    """
    is_x86 = device.type == "cpu" and platform.machine() in ("x86_64", "AMD64")
    if not is_x86 or not torch.backends.mkldnn.is_available():
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def laid_out(weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
    """A copy of a linear weight for `linear` alone: it cannot be sliced or read. Needs `can_lay_out`."""
    copy: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    return copy
