"""Where a kernel runs: plain torch, C on a CPU, or Triton. The one place that knows Triton and its version.

Triton reads TRITON_INTERPRET when a kernel is defined, so it has to be set before this package is imported; the
kernels then run, slowly, on the CPU.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

__all__ = [
    "TRITON_VERSION",
    "Backend",
    "block_size",
    "float32_dot",
    "interpreted",
    "tl",
    "triton",
    "triton_runs_on",
    "with_columns",
]

Backend = Literal["torch", "native", "triton"]
"""Plain torch; the C kernels of `native` where they apply, else torch; Triton."""

try:
    import triton
    import triton.language as tl

    TRITON_VERSION: str | None = triton.__version__
except ImportError:  # macOS and Windows
    TRITON_VERSION = None

    class _Missing:
        """Stands for `triton` and `tl`, so that modules with kernels can be imported; nothing of it can run."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self

    triton = _Missing()
    tl = _Missing()


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter."""
    return TRITON_VERSION is not None and bool(triton.knobs.runtime.interpret)


def triton_runs_on(device: torch.device | str) -> bool:
    """Whether Triton kernels can be launched on tensors of this device."""
    return TRITON_VERSION is not None and (torch.device(device).type == "cuda" or interpreted())


def with_columns(x: Any) -> Any:
    """x as kernels read it, None if it is None: any strides, but what a row holds side by side."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def block_size(n: int) -> tuple[int, int]:
    """Block and warps of a kernel that takes n columns at once: 8 columns per thread, 16 of the widest."""
    block = max(32, 1 << (n - 1).bit_length())
    return block, min(16, max(1, block // 256))


def float32_dot(amd: bool = torch.version.hip is not None) -> str:
    """The `input_precision` with which `tl.dot` of float32 operands has float32's accuracy, on AMD or on NVIDIA.

    On AMD, and in the interpreter, float32 itself. NVIDIA's tensor cores have no float32, and without them a product
    spills its registers: there each operand is split into three bfloat16 (24 bits of mantissa) and six products of
    the parts are summed. Three products of two TF32 parts (`tf32x3`) lose two bits.
    """
    if interpreted() or amd:
        return "ieee"
    from triton.backends.nvidia.compiler import CUDAOptions

    return "bf16x6" if "bf16x6" in CUDAOptions().allowed_dot_input_precisions else "ieee"
