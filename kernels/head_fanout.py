"""head_fanout: patches of single heads of one layer, each as a change of the residual stream.

    δ[s] = (z_source[h_s] − z_clean[h_s]) W_O[h_s]

Each set s has one head, so it costs one head's share of the output projection and not the whole of it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def head_fanout(
    source_delta: Float[Tensor, "#prompt pos head d_head"],
    heads: Int[Tensor, "set"],
    w_o: Float[Tensor, "d_model head_d_head"],
    out_dtype: torch.dtype,
) -> Float[Tensor, "set prompt pos d_model"]:
    """Residual change of every (set, prompt). `w_o` is the linear weight and gives the precision of the product."""
    n_prompts, n_pos, _, d_head = source_delta.shape
    chosen = source_delta.to(w_o.dtype).permute(2, 0, 1, 3)[heads].flatten(1, 2)
    per_head = w_o.unflatten(1, (-1, d_head)).transpose(0, 1)[heads]
    return torch.bmm(chosen, per_head.transpose(1, 2)).to(out_dtype).view(len(heads), n_prompts, n_pos, -1)
