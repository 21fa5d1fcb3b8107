"""Where a kernel runs: plain torch, C on a CPU, or Triton. The one place that knows whether Triton is there, and in which version.

Triton reads TRITON_INTERPRET when a kernel is defined, so it has to be set before this package is imported; the
kernels then run, slowly, on the CPU.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

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
