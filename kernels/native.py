"""The C kernels of native.c, called through ctypes.

They do on a CPU what the Triton kernels do on a GPU: one pass over memory where torch needs several. Nothing depends on
them: without a compiler, or with SUBCIRCUIT_NATIVE=0 in the environment, the plain torch references do the work.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from subcircuit.kernels.native_build import library

_ACTIVATIONS = {"gelu_new": 0, "silu": 1, "relu": 2}
_DTYPES = (torch.float32, torch.bfloat16)

_Pointer, _Int, _Size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


class _Strides(ctypes.Structure):
    _fields_ = [("set", _Size), ("prompt", _Size), ("pos", _Size)]


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, _Pointer) for name in ("q", "k", "v", "z")),
        *((name, _Strides) for name in ("q_at", "k_at", "v_at", "z_at")),
        *((name, _Pointer) for name in ("dq", "dk", "dv")),
        *((name, _Strides) for name in ("dq_at", "dk_at", "dv_at")),
        *((name, _Pointer) for name in ("cos", "sin", "mask", "source")),
        *((name, _Strides) for name in ("mask_at", "source_at")),
        ("out", _Pointer),
        *((name, _Size) for name in ("n_sets", "n_prompts", "n_q", "n_k", "n_new", "n_heads", "n_kv", "d_head")),
    ]


def runs_on(*tensors: Tensor | None, product_dtype: torch.dtype) -> bool:
    """Whether the C kernels take these clean-side tensors and products of this dtype."""
    given = [tensor for tensor in tensors if tensor is not None]
    on_cpu = all(x.device.type == "cpu" and x.dtype == torch.float32 and x.stride(-1) == 1 for x in given)
    return on_cpu and product_dtype in _DTYPES and library() is not None


def _strides(x: Tensor | None, n_tail: int) -> _Strides:
    """Strides of [set, prompt, pos] before `n_tail` further axes; 0 along an axis that is missing or 1."""
    if x is None:
        return _Strides(0, 0, 0)
    lead = x.ndim - n_tail
    steps = [0 if x.shape[i] == 1 else x.stride(i) for i in range(lead)]
    return _Strides(*([0] * (3 - lead) + steps))


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _dense(x: Tensor | None, n_inner: int, dtype: torch.dtype) -> Tensor | None:
    """x in a dtype, its last `n_inner` axes without gaps."""
    if x is None:
        return None
    x = x.to(dtype)
    expected = 1
    for axis in range(1, n_inner + 1):
        if x.shape[-axis] > 1 and x.stride(-axis) != expected:
            return x.contiguous()
        expected *= x.shape[-axis]
    return x


def norm_delta(
    clean: Tensor,
    delta: Tensor,
    product: Tensor | None,
    weight: Tensor,
    layer_norm: bool,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """δ + product and δn, as in `kernels.norm_delta.norm_delta`."""
    kernels = library()
    assert kernels is not None
    product, delta = _dense(product, 1, dtype), delta if delta.stride(-1) == 1 else delta.contiguous()
    n_sets = max(delta.shape[0], 1 if product is None else product.shape[0])
    _, n_prompts, n_pos, d = delta.shape
    total = delta.new_empty(n_sets, n_prompts, n_pos, d)
    out = torch.empty_like(total, dtype=dtype)
    kernels.norm_delta(
        *(_Pointer(clean.data_ptr()), _strides(clean, 1)),
        *(_Pointer(delta.data_ptr()), _strides(delta, 1)),
        *(_Pointer(_address(product)), _strides(product, 1)),
        *(_Pointer(weight.contiguous().data_ptr()), _Pointer(total.data_ptr()), _Pointer(out.data_ptr())),
        *(_Size(n) for n in (n_sets, n_prompts, n_pos, d)),
        ctypes.c_float(eps),
        *(_Int(n) for n in (layer_norm, dtype == torch.bfloat16, torch.get_num_threads())),
    )
    return total, out


def activation_delta(
    clean_pre: Tensor,
    clean_post: Tensor,
    delta_pre: Tensor,
    activation: str,
    dtype: torch.dtype,
    clean_pre_linear: Tensor | None,
    delta_pre_linear: Tensor | None,
) -> Tensor | None:
    """As `kernels.activation_delta.activation_delta`; None for an activation or a layout that is not served."""
    kernels = library()
    assert kernels is not None
    n_sets, n_prompts, n_pos, d_mlp = delta_pre.shape
    step = delta_pre.stride(2)
    clean = [clean_pre, clean_post] if clean_pre_linear is None else [clean_pre, clean_post, clean_pre_linear]
    deltas = [delta_pre] if delta_pre_linear is None else [delta_pre, delta_pre_linear]
    even = all(
        x.dtype == dtype and x.stride() == (n_prompts * n_pos * step, n_pos * step, step, 1) for x in deltas
    ) and all(x.stride() == (clean_pre.stride(0), d_mlp, 1) for x in clean)
    if activation not in _ACTIVATIONS or not even:
        return None
    out = delta_pre.new_empty(delta_pre.shape)
    kernels.activation_delta(
        *(_Pointer(_address(x)) for x in (clean_pre, clean_pre_linear, clean_post)),
        _Size(clean_pre.stride(0)),
        *(_Pointer(_address(x)) for x in (delta_pre, delta_pre_linear)),
        _Size(step),
        _Pointer(out.data_ptr()),
        *(_Size(n) for n in (n_sets, n_prompts, n_pos, d_mlp)),
        *(_Int(n) for n in (_ACTIVATIONS[activation], dtype == torch.bfloat16, torch.get_num_threads())),
    )
    return out


def attention_delta(
    clean: tuple[Tensor, Tensor, Tensor, Tensor],
    deltas: tuple[Tensor | None, Tensor | None, Tensor | None],
    dtype: torch.dtype,
    rotation: tuple[Tensor, Tensor] | None,
    patch: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """As `kernels.attention_delta.attention_delta`; `clean` is (q, k, v, z), `deltas` are (δq, δk, δv)."""
    kernels = library()
    assert kernels is not None
    held = [_dense(x, 2, torch.float32) for x in clean] + [_dense(x, 2, dtype) for x in deltas]
    q, k = clean[0], clean[1]
    mask = source = None
    if patch is not None:
        mask, source = patch[0].contiguous(), _dense(patch[1], 2, torch.float32)
    tables = [None, None] if rotation is None else [table.contiguous() for table in rotation]
    n_sets = max(x.shape[0] for x in (*deltas, mask) if x is not None)
    n_new = max((x.shape[2] for x in deltas[1:] if x is not None), default=0)
    out = torch.empty(n_sets, *q.shape, dtype=dtype)
    mask_at = _strides(None if mask is None else mask[:, None], 1)
    task = _Attention(
        *(_address(x) for x in held[:4]),
        *(_strides(x, 2) for x in held[:4]),
        *(_address(x) for x in held[4:]),
        *(_strides(x, 2) for x in held[4:]),
        *(_address(x) for x in (*tables, mask, source)),
        *(mask_at, _strides(source, 2)),
        out.data_ptr(),
        *(n_sets, q.shape[0], q.shape[1], k.shape[1], n_new, q.shape[2], k.shape[2], q.shape[3]),
    )
    n_threads = torch.get_num_threads()
    scratch = torch.empty(n_threads * kernels.scratch_size(ctypes.byref(task)))
    kernels.attention_delta(
        ctypes.byref(task), _Pointer(scratch.data_ptr()), _Int(dtype == torch.bfloat16), _Int(n_threads)
    )
    return out
