"""Weights by hand: from parts that are said in features to the matrices of a GPT-2 or a Llama.

Norms. The stream holds one feature, ONE, that is `base` times as large as the others, and the norms' weight is
base / √d_model: x ↦ x · base / ‖x‖ is the identity up to a relative error of ‖the others‖² / 2 base², one part in a
thousand or two. All features lie across the vector of ones, so LayerNorm has nothing to centre and equals RMSNorm.

Positions. With learned ones the stream holds a feature per position, and a score is any table of (query position, key
position). Rotary: a query (a, b) and a key (1, 0) in a pair that turns by f per position score a cos fΔ − b sin fΔ at
distance Δ; with N_FAST pairs any score over up to MAX_POS distances is the solution of a linear system. Matches, which
must not turn, use pairs from FIRST_SLOW on, whose angle over a whole prompt stays under 0.02.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.analysis.truth.blueprint import ONE, POSITION, Conjunctions, Feature, Head
from subcircuit.engine.config import ModelConfig, RopeScaling
from subcircuit.engine.rope import rope_frequencies

Family = Literal["gpt2", "llama"]
HeadWeights = tuple[
    Float[Tensor, "d_model d_head"],
    Float[Tensor, "d_model d_head"],
    Float[Tensor, "d_model d_head"],
    Float[Tensor, "d_head d_model"],
]
"""W_Q, W_K, W_V and W_O of one head."""

D_MLP = 64
BASE = 100.0
"""Size of the constant feature, in units of the larger of what the circuit and what distractors write."""
STEEP = 24.0
"""Pre-activation of a neuron per unit of the features it reads: a conjunction fires at +12 and is silent at −12."""

RATIO, FASTEST = 0.68, 3.0
"""Of one rotary frequency to the next, and the first of them, in radians per position."""
N_FAST, FIRST_SLOW, MAX_POS = 8, 20, 12


class Space:
    """The residual stream as orthonormal features by family, turned at random: no feature is an axis of its own.

    `base` is the size of the constant feature, in units of the others.
    """

    def __init__(self, sizes: Mapping[str, int], base: float, generator: torch.Generator) -> None:
        self.base = base
        self.d_model = 1 + sum(sizes.values())
        directions = torch.randn(self.d_model, self.d_model, dtype=torch.float64, generator=generator)
        directions[:, 0] = 1
        basis = torch.linalg.qr(directions).Q[:, 1:]
        families = basis.split(list(sizes.values()), dim=1)
        self._families: dict[str, Tensor] = dict(zip(sizes, families, strict=True))

    def __getitem__(self, family: str) -> Float[Tensor, "d_model feature"]:
        """The directions of a family, along which its features are written."""
        return self._families[family]

    def __contains__(self, family: str) -> bool:
        return family in self._families

    def read(self, family: str) -> Float[Tensor, "d_model feature"]:
        """What reads a family's features in units of 1: its directions, ONE scaled back."""
        return self[family] / self.base if family == ONE else self[family]

    def vector(self, feature: Feature) -> Float[Tensor, "d_model"]:
        return self[feature[0]][:, feature[1]]


def config_for(
    family: Family, name: str, space: Space, *, n_layers: int, n_heads: int, n_match: int, d_vocab: int, n_pos: int
) -> ModelConfig:
    """Sizes and variant of a model whose heads match up to `n_match` features each.

    GPT-2: LayerNorm, learned positions, GELU. Llama: RMSNorm, rotary positions, two heads per KV head, gated SiLU.
    """
    config = partial(
        ModelConfig,
        n_layers=n_layers,
        n_heads=n_heads,
        d_model=space.d_model,
        d_mlp=D_MLP,
        d_vocab=d_vocab,
        n_ctx=n_pos,
        name=name,
    )
    if family == "gpt2":
        return config(d_head=n_match + n_pos, qkv_bias=True, attn_out_bias=True, mlp_bias=True)
    half = FIRST_SLOW + math.ceil(n_match / 2)
    return config(
        d_head=2 * half,
        n_kv_heads=n_heads // 2,
        norm="rmsnorm",
        positions="rope",
        rope_theta=RATIO**-half,
        rope_scaling=RopeScaling("linear", factor=1 / FASTEST),
        activation="silu",
        gated_mlp=True,
        family="llama",
    )


def head_weights(head: Head, config: ModelConfig, space: Space, sharpness: float) -> HeadWeights:
    """The matrices of a head that attends and moves as it is said to; its scores are times `sharpness`."""
    w_q, w_k = torch.zeros(2, space.d_model, config.d_head, dtype=torch.float64)
    free = _match_dims(config)
    for match in head.matches:
        query, key = space.read(match.query), space.read(match.key)
        dims, free = free[: key.shape[1]], free[key.shape[1] :]
        w_q[:, dims] = match.strength * query.expand(-1, len(dims))
        w_k[:, dims] = key
    if head.offset is not None:
        positional = _rotary_offset if config.positions == "rope" else _learned_offset
        positional(head.offset, config, space, w_q, w_k)
    source = torch.cat([space.read(family) for family, _, _ in head.moves], dim=1)
    target = torch.cat([space[family] * weight for _, family, weight in head.moves], dim=1)
    pad = (0, config.d_head - source.shape[1])
    w_v, w_o = torch.nn.functional.pad(source, pad), torch.nn.functional.pad(target, pad).T
    return w_q * sharpness * math.sqrt(config.d_head), w_k, w_v, w_o


def _match_dims(config: ModelConfig) -> list[int]:
    """Dimensions of queries and keys that do not turn with position."""
    if config.positions == "learned":
        return list(range(config.n_ctx, config.d_head))
    half = config.d_head // 2
    return [*range(FIRST_SLOW, half), *range(half + FIRST_SLOW, 2 * half)]


def _learned_offset(
    offset: Callable[[int], float], config: ModelConfig, space: Space, w_q: Tensor, w_k: Tensor
) -> None:
    """Score of (query position, key position) from a table: the query brings its row, the key picks from it."""
    n = config.n_ctx
    table = torch.tensor([[offset(i - j) if j <= i else 0.0 for j in range(n)] for i in range(n)], dtype=torch.float64)
    w_q[:, :n] = space[POSITION] @ table
    w_k[:, :n] = space[POSITION]


def _rotary_offset(offset: Callable[[int], float], config: ModelConfig, space: Space, w_q: Tensor, w_k: Tensor) -> None:
    """Score of a distance as a sum of waves of the fast pairs, with the smallest coefficients that give it."""
    half = config.d_head // 2
    distances = torch.arange(config.n_ctx, dtype=torch.float64)
    angles = distances[:, None] * rope_frequencies(config)[:N_FAST].double()
    waves = torch.cat((angles.cos(), -angles.sin()), dim=1)
    scores = torch.tensor([offset(distance) for distance in range(config.n_ctx)], dtype=torch.float64)
    cosines, sines = (torch.linalg.pinv(waves) @ scores).chunk(2)
    one = space.read(ONE)
    w_q[:, :N_FAST], w_q[:, half : half + N_FAST] = one * cosines, one * sines
    w_k[:, :N_FAST] = one


def conjunction_weights(mlp: Conjunctions, config: ModelConfig, space: Space) -> dict[str, Tensor]:
    """The matrices of an MLP whose neurons fire where both features they read are there; gated ones count them in the
    gate. The rest of its neurons stay silent."""
    read, write = torch.zeros(2, config.d_mlp, space.d_model, dtype=torch.float64)
    threshold = 1.5 * space.read(ONE)[:, 0]
    for i, (first, second, target) in enumerate(mlp.neurons):
        read[i] = STEEP * (space.vector(first) + space.vector(second) - threshold)
        write[i] = space.vector(target) / (STEEP / 2)
    if not config.gated_mlp:
        return {"w_in.weight": read, "w_out.weight": write.T}
    always = space.read(ONE).T.expand(config.d_mlp, -1)
    return {"w_gate.weight": read, "w_in.weight": always, "w_out.weight": write.T}
