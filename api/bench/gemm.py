"""How close a sweep comes to the machine's matrix products: its FLOPs by dtype, and a plain product's rate."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from subcircuit.kernels.linear import laid_out, linear

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)
ONEDNN_PRODUCT = "mkldnn::_linear_pointwise"
PLAIN_SIZE = 2048
"""A plain large product is that of two square matrices of this size."""


class _ProductCounter(TorchDispatchMode):
    """Counts the FLOPs of every matrix product that torch runs, by the dtype of its operands."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket in PRODUCTS:
            count = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
            self.flops[dtype_name(args[-1].dtype)] += count
        elif func.overloadpacket._qualified_op_name == ONEDNN_PRODUCT:
            self.flops[dtype_name(out.dtype)] += 2 * out.numel() * args[0].shape[-1]
        return out


def matrix_product_flops(run: Callable[[], object]) -> dict[str, int]:
    """FLOPs of the matrix products of one call, by dtype, a multiplication and an addition as two.

    Counted is what reaches torch as mm, addmm, bmm or baddbmm, or oneDNN. The products inside fused attention and
    inside kernels of our own are not.
    """
    with _ProductCounter() as counter:
        run()
    return dict(counter.flops)


def gemm_rate(dtype_name: str, device: str = "cpu") -> float:
    """FLOPs per second of one plain large product of a dtype, the best of three, with a laid-out weight where that is
    faster."""
    dtype = getattr(torch, dtype_name)
    rows, weight = (torch.randn(PLAIN_SIZE, PLAIN_SIZE, device=device).to(dtype) for _ in range(2))
    weight = laid_out(weight)
    return 2 * PLAIN_SIZE**3 / min(_seconds(rows, weight) for _ in range(3))


def gemm_share(flops: Mapping[str, float], rates: Mapping[str, float], seconds: float) -> float:
    """The part of a wall time that the matrix products alone would take at the plain rate of their dtypes."""
    return sum(count / rates[dtype] for dtype, count in flops.items()) / seconds


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _seconds(rows: Tensor, weight: Tensor) -> float:
    start = time.perf_counter()
    product = linear(rows, weight)
    if product.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
