"""readout: the effect of a row, without logits.

effect = (norm_f(x + δ) − norm_f(x)) · (W_U[answer] − W_U[wrong])
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from subcircuit.kernels.norm_delta import norm_delta


def readout(
    clean: Float[Tensor, "prompt d_model"],
    clean_normed: Float[Tensor, "prompt d_model"],
    delta: Float[Tensor, "set prompt d_model"],
    weight: Float[Tensor, "d_model"],
    bias: Float[Tensor, "d_model"] | None,
    eps: float,
    direction: Float[Tensor, "prompt d_model"],
) -> Float[Tensor, "set prompt"]:
    """Change of the logit difference that `direction` reads from the normed final residual stream."""
    _, normed = norm_delta(clean, clean_normed, delta, weight, bias, eps, delta.dtype)
    return (normed * direction).sum(-1)
