"""Random sparse dictionaries, and what they compute written out a second time."""

from __future__ import annotations

import torch
from torch import Tensor

from subcircuit.engine.config import ModelConfig
from subcircuit.engine.dictionary import SparseDictionary

ACTIVATIONS = ("relu", "jumprelu", "topk")
PLACES = {
    "r": "blocks.1.hook_resid_pre",
    "a": "blocks.1.attn.hook_z",
    "mid": "blocks.1.hook_resid_mid",
    "m": "blocks.1.hook_mlp_out",
}
"""By what their features' names begin with, in the order in which they are computed."""


def random_dictionary(
    hook_name: str, config: ModelConfig, seed: int, activation: str = "relu", subtract: bool = True, d_sae: int = 40
) -> SparseDictionary:
    """About half of the features fire at each position, of `topk` seven."""
    generator = torch.Generator().manual_seed(seed)
    d_in = config.n_heads * config.d_head if hook_name.endswith("hook_z") else config.d_model
    draws = [torch.randn(shape, generator=generator) * 0.3 for shape in ((d_in, d_sae), (d_sae, d_in), d_sae, d_in)]
    threshold = torch.rand(d_sae, generator=generator) * 0.5 if activation == "jumprelu" else None
    k = 7 if activation == "topk" else None
    return SparseDictionary(hook_name, *draws, activation, k, threshold, subtract)


def plain_encode(dictionary: SparseDictionary, x: Tensor) -> Tensor:
    """Activations of vectors one at a time, by the definitions."""
    rows = x.reshape(-1, dictionary.d_in).double()
    weights, bias = dictionary.W_enc.double(), dictionary.b_enc.double()
    acts = torch.zeros(len(rows), dictionary.d_sae, dtype=torch.float64)
    for i, row in enumerate(rows):
        centred = row - dictionary.b_dec.double() if dictionary.subtract_b_dec else row
        pre = (centred @ weights + bias).tolist()
        kept = sorted(range(dictionary.d_sae), key=lambda f: -pre[f])[: dictionary.k]
        for f in kept:
            above = 0.0 if dictionary.threshold is None else max(0.0, float(dictionary.threshold[f]))
            acts[i, f] = pre[f] if pre[f] > above else 0.0
    return acts.reshape(*x.shape[:2], dictionary.d_sae)
