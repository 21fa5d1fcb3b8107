"""Turning of query and key pairs by their position's angle: the tensor half of rotary position embedding.

Su et al., arXiv 2104.09864, with the rotate-half pairing of Llama's checkpoints: element i goes with i + d_head/2.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Rotation = tuple[Float[Tensor, "pos 1 half"], Float[Tensor, "pos 1 half"]]
"""cos and sin of every (position, pair), over all positions of a prompt."""


def rotate(
    x: Float[Tensor, "*batch pos head d_head"],
    cos: Float[Tensor, "*batch pos 1 half"],
    sin: Float[Tensor, "*batch pos 1 half"],
) -> Float[Tensor, "*batch pos head d_head"]:
    """x with every pair (x[i], x[i + d_head/2]) turned by its position's angle. Linear in x, so it turns δ as well."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate_last(
    x: Float[Tensor, "*batch last_pos head d_head"] | None, rotation: Rotation | None
) -> Float[Tensor, "*batch last_pos head d_head"] | None:
    """x, which covers a prompt's last positions, turned by the tables of all positions. Without either, x as it is."""
    if x is None or rotation is None:
        return x
    cos, sin = rotation
    return rotate(x, cos[-x.shape[-3] :], sin[-x.shape[-3] :])
