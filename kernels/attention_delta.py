"""attention_delta: what a change of queries, keys and values changes in the heads' outputs.

    δz = attn(q + δq, k + δk, v + δv) − z

Keys before the first position that can differ are the prompt's own and carry no δ. Grouped-query attention is computed
per KV head, with the queries of its group side by side; keys are never repeated per query head.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from subcircuit.kernels import attention_delta_triton, native
from subcircuit.kernels.backend import Backend
from subcircuit.kernels.rotary import Rotation, rotate_last

HeadPatch = tuple[Bool[Tensor, "#set #q_pos head"], Float[Tensor, "#prompt q_pos head d_head"]]
"""Which (set, position, head) have their δz replaced, and by what: source − clean."""


def attention_delta(
    clean_q: Float[Tensor, "prompt q_pos head d_head"],
    clean_k: Float[Tensor, "prompt k_pos kv_head d_head"],
    clean_v: Float[Tensor, "prompt k_pos kv_head d_head"],
    clean_z: Float[Tensor, "prompt q_pos head d_head"],
    delta_q: Float[Tensor, "#set prompt q_pos head d_head"] | None,
    delta_k: Float[Tensor, "#set prompt new_pos kv_head d_head"] | None,
    delta_v: Float[Tensor, "#set prompt new_pos kv_head d_head"] | None,
    out_dtype: torch.dtype,
    *,
    rotation: Rotation | None = None,
    patch: HeadPatch | None = None,
    first: Int[Tensor, "prompt"] | None = None,
    backend: Backend = "torch",
) -> Float[Tensor, "#set prompt q_pos head d_head"]:
    """Change of z at the last `q_pos` positions; δk and δv cover the last `new_pos` ones. None stands for no change.

    The clean q and k are after rotary embedding. With `rotation`, tables over all k_pos positions, δq and δk are given
    before it and turned here. `patch` puts its own δ in place of δz where its mask is true. `first` counts each
    prompt's leading positions of the new_pos axis (of q_pos where δk and δv are both None) that cannot differ: whatever
    δq, δk and δv hold there counts as 0, and δz is 0 for queries there, unless patched.

    The result has one set where every δ and the patch's mask have one, and then stands for all of them.
    Sums, scores and softmax in float32, in float64 where the clean side is; the result is cast to `out_dtype`.
    """
    if backend == "native" and first is None and native.runs_on(clean_q, clean_k, product_dtype=out_dtype):
        clean, deltas = (clean_q, clean_k, clean_v, clean_z), (delta_q, delta_k, delta_v)
        return native.attention_delta(clean, deltas, out_dtype, rotation, patch)
    if backend == "triton" and torch.float64 not in (clean_q.dtype, out_dtype):
        n_sets = max(1 if x is None else x.shape[0] for x in (delta_q, delta_k, delta_v))
        fused = None if patch is None or patch[0].shape[0] > n_sets else patch
        inputs = clean_q, clean_k, clean_v, clean_z, delta_q, delta_k, delta_v
        out = attention_delta_triton.launch(*inputs, out_dtype, rotation, fused, first)
        return out if patch is None or fused is not None else replace_heads(out, patch)
    n_new = next((x.shape[2] for x in (delta_k, delta_v) if x is not None), clean_q.shape[1])
    if first is not None:
        delta_q, delta_k, delta_v = (
            None if x is None else x.masked_fill(_before(first, n_new, x.shape[2]), 0)
            for x in (delta_q, delta_k, delta_v)
        )
    delta_q, delta_k = rotate_last(delta_q, rotation), rotate_last(delta_k, rotation)
    out = _change_of_z(clean_q, clean_k, clean_v, clean_z, delta_q, delta_k, delta_v, out_dtype)
    if first is not None:
        out.masked_fill_(_before(first, n_new, out.shape[2]), 0)
    return out if patch is None else replace_heads(out, patch)


def replace_heads(
    delta_z: Float[Tensor, "#set prompt q_pos head d_head"], patch: HeadPatch
) -> Float[Tensor, "set prompt q_pos head d_head"]:
    """δz with the patch's δ where its mask is true."""
    mask, source_delta = patch
    return torch.where(mask[:, None, :, :, None], source_delta.to(delta_z.dtype), delta_z)


def _before(first: Int[Tensor, "prompt"], n_new: int, n_last: int) -> Bool[Tensor, "prompt last_pos 1 1"]:
    """Which of the last `n_last` of `n_new` positions stand before each prompt's first one that can differ."""
    positions = torch.arange(n_new - n_last, n_new, device=first.device)
    return (positions < first[:, None])[..., None, None]


def _change_of_z(
    clean_q: Tensor,
    clean_k: Tensor,
    clean_v: Tensor,
    clean_z: Tensor,
    delta_q: Tensor | None,
    delta_k: Tensor | None,
    delta_v: Tensor | None,
    out_dtype: torch.dtype,
) -> Float[Tensor, "#set prompt q_pos head d_head"]:
    """δz with nothing to turn, leave out or patch: two batched products over (set, prompt, KV head)."""
    dtype = torch.promote_types(clean_q.dtype, torch.float32)
    clean_q, clean_k, clean_v = (x.to(dtype) for x in (clean_q, clean_k, clean_v))
    n_prompts, n_q, n_heads, d_head = clean_q.shape
    n_k, n_kv = clean_k.shape[1:3]
    group = n_heads // n_kv
    n_sets = max(1 if x is None else x.shape[0] for x in (delta_q, delta_k, delta_v))
    n_batch = n_sets * n_prompts * n_kv

    q = clean_q.new_empty(n_sets, n_prompts, n_kv, group, n_q, d_head)
    _sum_into(q.permute(0, 1, 4, 2, 3, 5), clean_q.unflatten(2, (n_kv, group)), _grouped(delta_q, n_kv))
    k = _with_delta(clean_k, delta_k, n_sets)
    v = _with_delta(clean_v, delta_v, n_sets)

    scores = torch.baddbmm(
        _causal_bias(n_q, n_k, clean_q).repeat(group, 1).expand(n_batch, -1, -1),
        q.reshape(n_batch, group * n_q, d_head),
        k.reshape(n_batch, n_k, d_head).transpose(1, 2),
        alpha=d_head**-0.5,
    )
    z = torch.bmm(scores.softmax(-1), v.reshape(n_batch, n_k, d_head))
    z = z.view(n_sets, n_prompts, n_kv, group, n_q, d_head).permute(0, 1, 4, 2, 3, 5)
    out = clean_z.new_empty((n_sets, *clean_z.shape), dtype=out_dtype)
    torch.sub(z, clean_z.unflatten(2, (n_kv, group)), out=out.unflatten(3, (n_kv, group)))
    return out


def _grouped(delta: Tensor | None, n_kv: int) -> Tensor | None:
    return None if delta is None else delta.unflatten(3, (n_kv, -1))


def _sum_into(out: Tensor, clean: Tensor, delta: Tensor | None) -> None:
    if delta is None:
        out.copy_(clean)
    else:
        torch.add(clean, delta.expand(out.shape), out=out)


def _with_delta(clean: Tensor, delta: Tensor | None, n_sets: int) -> Float[Tensor, "set prompt kv_head k_pos d_head"]:
    """Keys or values of every row: the clean ones, plus δ at the last positions."""
    n_prompts, n_k, n_kv, d_head = clean.shape
    n_shared = n_k if delta is None else n_k - delta.shape[2]
    out = clean.new_empty(n_sets, n_prompts, n_kv, n_k, d_head)
    by_position = out.transpose(2, 3)
    by_position[:, :, :n_shared] = clean[:, :n_shared]
    if delta is not None:
        _sum_into(by_position[:, :, n_shared:], clean[:, n_shared:], delta)
    return out


def _causal_bias(n_q: int, n_k: int, like: Tensor) -> Float[Tensor, "q_pos k_pos"]:
    """0 where query i of the last n_q positions may read a key, −∞ where it may not."""
    return torch.full((n_q, n_k), float("-inf"), dtype=like.dtype, device=like.device).triu(n_k - n_q + 1)
