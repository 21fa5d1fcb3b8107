"""What callers of patching choose (executor, precision, memory), and checks of the prompts that they give."""

from __future__ import annotations

import copy
from typing import Literal, cast, get_args

import torch

from subcircuit.engine.errors import PatchError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.sources import AlignedPrompts
from subcircuit.kernels.backend import triton_runs_on

DeltaExecutor = Literal["torch", "triton"]
Executor = Literal["torch", "triton", "reference"]
Precision = Literal["fp64", "fp32", "bf16"]

EXECUTORS: tuple[Executor, ...] = ("torch", "triton", "reference")
CPU_BUDGET_BYTES = 2 * 2**30

_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def dtype_of(precision: str) -> torch.dtype:
    """A precision as torch knows it. Raises PatchError for one that does not exist."""
    if precision not in _DTYPES:
        raise PatchError(f"precision {precision!r} is not known; expected one of {', '.join(_DTYPES)}")
    return _DTYPES[precision]


def delta_executor(executor: str) -> DeltaExecutor:
    """An executor that is not `reference`. Raises PatchError for one that does not exist."""
    if executor not in get_args(DeltaExecutor):
        raise PatchError(f"executor {executor!r} is not known; expected one of {', '.join(EXECUTORS)}")
    return cast(DeltaExecutor, executor)


def check_delta_executor(executor: str, device: torch.device) -> None:
    """Raises PatchError for an executor that has no delta form, or cannot run on the device."""
    if executor not in get_args(DeltaExecutor):
        raise PatchError(f"executor {executor!r} is not known; expected one of {', '.join(get_args(DeltaExecutor))}")
    if executor == "triton" and not triton_runs_on(device):
        raise PatchError(
            f"executor 'triton' needs Triton and a GPU, and the model is on {device}; executor 'torch' runs "
            "everywhere (TRITON_INTERPRET=1 in the environment runs Triton's kernels on a CPU, slowly)"
        )


def default_budget(device: torch.device) -> int:
    """Bytes that a session may take beside the weights: 2 GiB on a CPU, four fifths of what is free on a GPU."""
    return int(0.8 * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else CPU_BUDGET_BYTES


def in_dtype(model: HookedTransformer, dtype: torch.dtype) -> HookedTransformer:
    """The model itself, or a copy of it in another dtype."""
    return model if model.dtype == dtype else copy.deepcopy(model).to(dtype)


def check_prompts(model: HookedTransformer, prompts: AlignedPrompts) -> None:
    """Raises PatchError when clean and corrupted prompts are not aligned token by token."""
    clean, corrupted = prompts.clean, prompts.corrupted
    if clean.ndim != 2 or 0 in clean.shape:
        raise PatchError(f"clean prompts have shape {tuple(clean.shape)}; patching needs aligned prompts [prompt, pos]")
    if corrupted is not None and corrupted.shape != clean.shape:
        raise PatchError(
            f"corrupted prompts have shape {tuple(corrupted.shape)}, clean ones {tuple(clean.shape)}; "
            "they must be aligned"
        )
    if clean.shape[1] > model.config.n_ctx:
        raise PatchError(
            f"prompts of {clean.shape[1]} tokens are longer than the model's context of {model.config.n_ctx}"
        )
