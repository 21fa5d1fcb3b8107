"""query_delta: `attention_delta` of the last query alone, which needs no keys and values of the other positions.

    q · δk_t = (W_Kᵀ q) · δn_t        Σ_t p_t δv_t = W_V Σ_t p_t δn_t

with q the row's query, p its pattern and δn the change of the normed residual stream. What is multiplied with a weight
is one vector per head, in place of one per KV head and position. Keys that rotary embedding turns are projected all the
same: W_Kᵀ q would be another vector at each position.
"""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.kernels.rotary import Rotation, rotate_last

RATE = 2
"""How many times faster than a head's the large products are."""


def is_query_delta_cheaper(n_new: int, n_heads: int, n_kv: int, d_head: int, d_model: int) -> bool:
    """Whether this is faster than projecting `n_new` positions, and holds no more."""
    n_projected = n_new * n_kv * d_head
    return RATE * n_heads * (d_head + n_new) <= n_projected and n_heads * d_model <= 2 * n_projected


def query_delta(
    clean_q: Float[Tensor, "prompt one head d_head"],
    clean_k: Float[Tensor, "prompt pos kv_head d_head"],
    clean_v: Float[Tensor, "prompt pos kv_head d_head"],
    clean_z: Float[Tensor, "prompt one head d_head"],
    delta_q: Float[Tensor, "set prompt one head d_head"],
    delta_k: Float[Tensor, "#set prompt new_pos kv_head d_head"] | None,
    delta_normed: Float[Tensor, "#set prompt new_pos d_model"],
    w_k: Float[Tensor, "kv_head_d_head d_model"],
    w_v: Float[Tensor, "kv_head_d_head d_model"],
    out_dtype: torch.dtype,
    *,
    rotation: Rotation | None = None,
) -> Float[Tensor, "set prompt one head d_head"]:
    """Change of z at the last position, cast to `out_dtype`; all else in the clean side's dtype.

    `w_k` and `w_v` are the linear weights. The clean q and k are after rotary embedding, δq and δk before it; δk is
    given with one, and comes of δn otherwise.
    """
    n_kv, n_new = clean_k.shape[2], delta_normed.shape[2]
    turned_q, turned_k = (rotate_last(delta, rotation) for delta in (delta_q, delta_k))
    q = (clean_q + cast(Tensor, turned_q))[:, :, 0].unflatten(2, (n_kv, -1))
    normed = delta_normed.to(q.dtype)
    w_k, w_v = (weight.unflatten(0, (n_kv, -1)) for weight in (w_k, w_v))
    scores = torch.einsum("spkgc,ptkc->spkgt", q, clean_k)
    if turned_k is None:
        scores[..., -n_new:] += torch.einsum("spkgd,sptd->spkgt", torch.einsum("spkgc,kcd->spkgd", q, w_k), normed)
    else:
        scores[..., -n_new:] += torch.einsum("spkgc,sptkc->spkgt", q, turned_k.to(q.dtype))
    pattern = scores.mul_(q.shape[-1] ** -0.5).softmax(-1)
    mixed = torch.einsum("spkgt,sptd->spkgd", pattern[..., -n_new:], normed)
    z = torch.einsum("spkgt,ptkc->spkgc", pattern, clean_v) + torch.einsum("spkgd,kcd->spkgc", mixed, w_v)
    return (z.flatten(2, 3)[:, :, None] - clean_z).to(out_dtype)
