"""head_pre: what patches of single heads change in the pre-activations of the MLP behind them.

A set s patches the head h_s alone, and δ = W_O[h_s] δz has no more directions than a head. With c = x − mean(x),
e = δ − mean(δ) (for RMSNorm the means are left out), s² = mean(c²) + eps, and t² the same of c + e:

    norm(x + δ) − norm(x) = w (c (1/t − 1/s) + e / t)
    δu = W (norm(x + δ) − norm(x)) = (s/t − 1) (u − b) + (W w (W_O[h_s] − mean)) δz / t

with u the clean pre-activations, and b what of them is no product with x. The large product has a row for each of a
head's directions, in place of one for each token.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subcircuit.kernels.linear import linear


def is_head_pre_cheaper(n_tokens: int, d_head: int, d_model: int) -> bool:
    """Whether this takes at most half of the operations, for so many tokens of each set."""
    return 2 * d_head * (d_model + n_tokens) <= n_tokens * d_model


def norm_change(
    clean: Float[Tensor, "prompt pos d_model"],
    delta: Float[Tensor, "set prompt pos d_model"],
    eps: float,
    centred: bool,
) -> tuple[Float[Tensor, "set prompt pos one"], Float[Tensor, "set prompt pos one"]]:
    """1/t and s/t − 1 of every row token; nothing nearly equal is subtracted."""
    c = clean - clean.mean(-1, keepdim=True) if centred else clean
    squares = c.square().mean(-1, keepdim=True) + eps
    change = (2 * c + delta).mul_(delta).mean(-1, keepdim=True)
    if centred:
        change -= delta.mean(-1, keepdim=True).square()
    t = (squares + change).clamp_min(eps).sqrt()
    return t.reciprocal(), -change / (t * (squares.sqrt() + t))


def head_directions(
    w_o: Float[Tensor, "d_model head_d_head"],
    heads: Int[Tensor, "set"],
    d_head: int,
    norm_weight: Float[Tensor, "d_model"],
    centred: bool,
) -> Float[Tensor, "set d_head d_model"]:
    """What each set's head writes, as the norm hands it on but for the scale 1/t."""
    written: Tensor = w_o.unflatten(1, (-1, d_head))[:, heads].permute(1, 2, 0)
    return norm_weight * (written - written.mean(-1, keepdim=True) if centred else written)


def head_pre(
    delta_z: Float[Tensor, "prompt pos head d_head"],
    heads: Int[Tensor, "set"],
    directions: Float[Tensor, "set d_head d_model"],
    change: tuple[Float[Tensor, "set prompt pos one"], Float[Tensor, "set prompt pos one"]],
    weight: Float[Tensor, "d_out d_model"],
    clean_pre: Float[Tensor, "prompt pos d_out"],
    constant: Float[Tensor, "d_out"] | None,
) -> Float[Tensor, "set prompt pos d_out"]:
    """δu of every (set, prompt), in the dtype of the linear weight; `change` is that of `norm_change`."""
    inverse, stretch = change
    scaled = (delta_z.permute(2, 0, 1, 3)[heads] * inverse).to(weight.dtype)
    out: Tensor = torch.bmm(scaled.flatten(1, 2), linear(directions, weight)).unflatten(1, delta_z.shape[:2])
    of_x = clean_pre if constant is None else clean_pre - constant
    return out.addcmul_(stretch.to(out.dtype), of_x.to(out.dtype))
