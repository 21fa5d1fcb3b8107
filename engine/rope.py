"""Rotary position embedding (Su et al., arXiv 2104.09864), with the rotate-half pairing of Llama's checkpoints."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subcircuit.engine.config import ModelConfig, RopeScaling
from subcircuit.kernels.rotary import rotate as rotate


def rope_frequencies(config: ModelConfig) -> Float[Tensor, "half"]:
    """Angle per position of each of the d_head/2 pairs, with the model's scaling applied.

    In float32 whatever the model's dtype, as in the checkpoints' own code: the rounding is part of the trained model,
    and at hundreds of positions it is what a logit's fifth digit depends on.
    """
    exponents = torch.arange(0, config.d_head, 2, dtype=torch.float32) / config.d_head
    frequencies = 1.0 / config.rope_theta**exponents
    return frequencies if config.rope_scaling is None else _scale(frequencies, config.rope_scaling)


def _scale(frequencies: Float[Tensor, "half"], scaling: RopeScaling) -> Float[Tensor, "half"]:
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_n_ctx * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rope_tables(
    frequencies: Float[Tensor, "half"], positions: Int[Tensor, "*batch pos"], dtype: torch.dtype
) -> tuple[Float[Tensor, "*batch pos 1 half"], Float[Tensor, "*batch pos 1 half"]]:
    """cos and sin of every (position, pair), ready to broadcast over heads.

    Angles are formed in float32, as Hugging Face does, unless the model runs in float64.
    """
    angle_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    angles = positions.to(angle_dtype)[..., None] * frequencies.to(device=positions.device, dtype=angle_dtype)
    angles = angles.unsqueeze(-2)
    return angles.cos().to(dtype), angles.sin().to(dtype)
