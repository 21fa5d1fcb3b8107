"""What distinguishes one GPT-2/Llama model from another, as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from subcircuit.engine.errors import ConfigError

Norm = Literal["layernorm", "rmsnorm"]
Positions = Literal["learned", "rope"]
Activation = Literal["gelu_new", "gelu", "silu", "relu"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the model was trained on.

    `linear` divides every frequency by `factor`. `llama3` (Meta's Llama 3.1) divides those with a wavelength above
    `original_n_ctx / low_freq_factor`, keeps those below `original_n_ctx / high_freq_factor`, and blends in between.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_n_ctx: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ConfigError(f"rope_scaling kind {self.kind!r} is not supported; expected 'linear' or 'llama3'")
        if self.factor <= 0:
            raise ConfigError(f"rope_scaling factor must be positive, got {self.factor}")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"rope_scaling high_freq_factor ({self.high_freq_factor}) must exceed "
                f"low_freq_factor ({self.low_freq_factor})"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Shape and variant of a model. GPT-2 and Llama are settings of this class, not classes of their own.

    Sizes are in elements. `n_kv_heads` below `n_heads` is grouped-query attention: query head h reads KV head
    `h // group_size`. `n_ctx` is the longest prompt the
    model takes, in tokens.

    Raises ConfigError when sizes contradict each other or a variant does not exist.
    """

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    n_kv_heads: int | None = None
    norm: Norm = "layernorm"
    norm_eps: float = 1e-5
    positions: Positions = "learned"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    activation: Activation = "gelu_new"
    gated_mlp: bool = False
    qkv_bias: bool = False
    attn_out_bias: bool = False
    mlp_bias: bool = False
    tied_unembed: bool = False
    family: str = "gpt2"
    name: str = ""

    def __post_init__(self) -> None:
        for field in ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "d_vocab", "n_ctx"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if self.kv_heads < 1 or self.n_heads % self.kv_heads:
            raise ConfigError(f"n_kv_heads ({self.n_kv_heads}) must divide n_heads ({self.n_heads})")
        for field, allowed in (
            ("norm", ("layernorm", "rmsnorm")),
            ("positions", ("learned", "rope")),
            ("activation", ("gelu_new", "gelu", "silu", "relu")),
        ):
            if getattr(self, field) not in allowed:
                raise ConfigError(f"{field} {getattr(self, field)!r} is not supported; expected one of {allowed}")
        if not self.norm_eps >= 0:
            raise ConfigError(f"norm_eps must not be negative, got {self.norm_eps}")
        if not self.rope_theta > 0:
            raise ConfigError(f"rope_theta must be positive, got {self.rope_theta}")
        if self.positions == "rope" and self.d_head % 2:
            raise ConfigError(f"rotary positions need an even d_head, got {self.d_head}")

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads, as a plain int."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def group_size(self) -> int:
        """Query heads per KV head: 1 for multi-head attention."""
        return self.n_heads // self.kv_heads

    @property
    def n_params(self) -> int:
        """Number of parameters, a tied unembedding counted once."""
        d, kv, q = self.d_model, self.kv_heads * self.d_head, self.n_heads * self.d_head
        norm = d * (2 if self.norm == "layernorm" else 1)
        attn = d * (2 * q + 2 * kv) + self.qkv_bias * (q + 2 * kv) + self.attn_out_bias * d
        n_in = 2 if self.gated_mlp else 1
        mlp = (n_in + 1) * d * self.d_mlp + self.mlp_bias * (n_in * self.d_mlp + d)
        embeddings = self.d_vocab * d * (1 if self.tied_unembed else 2)
        embeddings += self.n_ctx * d if self.positions == "learned" else 0
        return self.n_layers * (2 * norm + attn + mlp) + norm + embeddings
