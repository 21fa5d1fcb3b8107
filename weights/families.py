"""One table per family and file format: which stored tensor becomes which parameter, and how it lies in the file.

A row names modules; each stands for its `.weight` and, where the model has one, its `.bias`. `{l}` is the layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from subcircuit.engine.config import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How one stored tensor holds one or several parameters.

    `stored_shape(parameter shapes)` is the shape it must have in the file; `unpack` takes it apart, without a copy
    where the parameters are views of it.
    """

    stored_shape: Callable[[list[Shape]], Shape]
    unpack: Callable[[Tensor, ModelConfig], tuple[Tensor, ...]]


def _stacked(shapes: list[Shape]) -> Shape:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _qkv_rows(stored: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
    d_q, d_kv = config.n_heads * config.d_head, config.kv_heads * config.d_head
    q_k_v: tuple[Tensor, ...] = stored.split((d_q, d_kv, d_kv))
    return q_k_v


def _rotate_half_rows(stored: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
    """Rows of each head from interleaved rotary pairs (2i, 2i + 1) to rotate-half pairs (i, i + d_head/2)."""
    per_head = stored.unflatten(0, (-1, config.d_head // 2, 2))
    return (per_head.transpose(1, 2).reshape(stored.shape),)


AS_STORED = Layout(lambda shapes: shapes[0], lambda stored, _: (stored,))

# GPT-2's Conv1D holds weights as [in, out]; ours are [out, in]. (`.t()` leaves a bias as it is.)
TRANSPOSED = Layout(lambda shapes: shapes[0][::-1], lambda stored, _: (stored.t(),))

# GPT-2's c_attn: q, k and v side by side in one Conv1D. Transposed they lie above each other: three views.
TRANSPOSED_QKV = Layout(lambda shapes: _stacked(shapes)[::-1], lambda stored, config: _qkv_rows(stored.t(), config))

# The same after llama.cpp's conversion, which transposes it.
STACKED_QKV = Layout(_stacked, _qkv_rows)

# q and k of Meta's, llama2.c's and llama.cpp's Llama files rotate neighbouring rows.
INTERLEAVED_ROPE = Layout(lambda shapes: shapes[0], _rotate_half_rows)


@dataclass(frozen=True)
class Row:
    """A stored module and the modules of ours that it holds."""

    stored: str
    ours: tuple[str, ...] | str
    layout: Layout = AS_STORED

    def our_modules(self, layer: int) -> list[str]:
        names = (self.ours,) if isinstance(self.ours, str) else self.ours
        return [name.format(l=layer) for name in names]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that the file must hold: its shape there, and the parameters made of it."""

    stored_shape: Shape
    parameters: list[str]
    layout: Layout


@dataclass(frozen=True)
class NameTable:
    """How one family's tensors are named in one file format.

    `prefix` may or may not stand before a name. `harmless` are patterns of tensors that hold no parameter: masks and
    frequencies that older software saved along.
    """

    rows: tuple[Row, ...]
    prefix: str = ""
    harmless: tuple[str, ...] = ()

    @cached_property
    def _harmless(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(name).replace(r"\{l\}", r"\d+") for name in self.harmless) or r"(?!)")

    @cached_property
    def _layer(self) -> re.Pattern[str]:
        stems = {row.stored.partition("{l}")[0] for row in self.rows if "{l}" in row.stored}
        return re.compile(f"(?:{'|'.join(re.escape(stem) for stem in sorted(stems))})([0-9]{{1,9}})\\.")

    def is_harmless(self, name: str) -> bool:
        return self._harmless.fullmatch(name) is not None

    def count_layers(self, names: Iterable[str]) -> int:
        """Layers 0 … n - 1 of which at least one tensor is there."""
        layers = {int(match[1]) for match in map(self._layer.match, names) if match}
        return next(layer for layer in range(len(layers) + 1) if layer not in layers)

    def plan(self, shapes: Mapping[str, Shape], n_layers: int) -> dict[str, PlannedTensor]:
        """Every tensor that a file must hold, by stored name, for parameters of the given shapes."""
        plan: dict[str, PlannedTensor] = {}
        for row in self.rows:
            for layer in range(n_layers if "{l}" in row.stored else 1):
                for kind in ("weight", "bias"):
                    parameters = [f"{module}.{kind}" for module in row.our_modules(layer)]
                    if all(name in shapes for name in parameters):
                        stored_shape = row.layout.stored_shape([shapes[name] for name in parameters])
                        name = f"{row.stored.format(l=layer)}.{kind}"
                        plan[name] = PlannedTensor(stored_shape, parameters, row.layout)
        return plan


_Q, _K, _V = "blocks.{l}.attn.w_q", "blocks.{l}.attn.w_k", "blocks.{l}.attn.w_v"

GPT2_HUGGINGFACE = NameTable(
    prefix="transformer.",
    rows=(
        Row("wte", "embed"),
        Row("wpe", "pos_embed"),
        Row("h.{l}.ln_1", "blocks.{l}.ln1"),
        Row("h.{l}.attn.c_attn", (_Q, _K, _V), TRANSPOSED_QKV),
        Row("h.{l}.attn.c_proj", "blocks.{l}.attn.w_o", TRANSPOSED),
        Row("h.{l}.ln_2", "blocks.{l}.ln2"),
        Row("h.{l}.mlp.c_fc", "blocks.{l}.mlp.w_in", TRANSPOSED),
        Row("h.{l}.mlp.c_proj", "blocks.{l}.mlp.w_out", TRANSPOSED),
        Row("ln_f", "ln_final"),
        Row("lm_head", "unembed"),
    ),
    harmless=("h.{l}.attn.bias", "h.{l}.attn.masked_bias"),
)

# Llama, Mistral and Qwen2 differ in which biases they have, which the configuration says.
LLAMA_HUGGINGFACE = NameTable(
    prefix="model.",
    rows=(
        Row("embed_tokens", "embed"),
        Row("layers.{l}.input_layernorm", "blocks.{l}.ln1"),
        Row("layers.{l}.self_attn.q_proj", _Q),
        Row("layers.{l}.self_attn.k_proj", _K),
        Row("layers.{l}.self_attn.v_proj", _V),
        Row("layers.{l}.self_attn.o_proj", "blocks.{l}.attn.w_o"),
        Row("layers.{l}.post_attention_layernorm", "blocks.{l}.ln2"),
        Row("layers.{l}.mlp.gate_proj", "blocks.{l}.mlp.w_gate"),
        Row("layers.{l}.mlp.up_proj", "blocks.{l}.mlp.w_in"),
        Row("layers.{l}.mlp.down_proj", "blocks.{l}.mlp.w_out"),
        Row("norm", "ln_final"),
        Row("lm_head", "unembed"),
    ),
    harmless=("layers.{l}.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"),
)

GPT2_GGUF = NameTable(
    rows=(
        Row("token_embd", "embed"),
        Row("position_embd", "pos_embed"),
        Row("blk.{l}.attn_norm", "blocks.{l}.ln1"),
        Row("blk.{l}.attn_qkv", (_Q, _K, _V), STACKED_QKV),
        Row("blk.{l}.attn_output", "blocks.{l}.attn.w_o"),
        Row("blk.{l}.ffn_norm", "blocks.{l}.ln2"),
        Row("blk.{l}.ffn_up", "blocks.{l}.mlp.w_in"),
        Row("blk.{l}.ffn_down", "blocks.{l}.mlp.w_out"),
        Row("output_norm", "ln_final"),
        Row("output", "unembed"),
    ),
)


def _llama_gguf(rope: Layout) -> NameTable:
    return NameTable(
        rows=(
            Row("token_embd", "embed"),
            Row("blk.{l}.attn_norm", "blocks.{l}.ln1"),
            Row("blk.{l}.attn_q", _Q, rope),
            Row("blk.{l}.attn_k", _K, rope),
            Row("blk.{l}.attn_v", _V),
            Row("blk.{l}.attn_output", "blocks.{l}.attn.w_o"),
            Row("blk.{l}.ffn_norm", "blocks.{l}.ln2"),
            Row("blk.{l}.ffn_gate", "blocks.{l}.mlp.w_gate"),
            Row("blk.{l}.ffn_up", "blocks.{l}.mlp.w_in"),
            Row("blk.{l}.ffn_down", "blocks.{l}.mlp.w_out"),
            Row("output_norm", "ln_final"),
            Row("output", "unembed"),
        ),
        # The configuration reads the scaling of the frequencies from rope_freqs.
        harmless=("rope_freqs.weight", "blk.{l}.attn_rot_embd.weight"),
    )


# llama.cpp permutes the rows of q and k for its `llama` architecture (Mistral's too), not for `qwen2`.
LLAMA_GGUF = _llama_gguf(INTERLEAVED_ROPE)
QWEN2_GGUF = _llama_gguf(AS_STORED)

# llama2.c's file has no names; these are Meta's.
LLAMA2C = NameTable(
    rows=(
        Row("tok_embeddings", "embed"),
        Row("layers.{l}.attention_norm", "blocks.{l}.ln1"),
        Row("layers.{l}.attention.wq", _Q, INTERLEAVED_ROPE),
        Row("layers.{l}.attention.wk", _K, INTERLEAVED_ROPE),
        Row("layers.{l}.attention.wv", _V),
        Row("layers.{l}.attention.wo", "blocks.{l}.attn.w_o"),
        Row("layers.{l}.ffn_norm", "blocks.{l}.ln2"),
        Row("layers.{l}.feed_forward.w1", "blocks.{l}.mlp.w_gate"),
        Row("layers.{l}.feed_forward.w2", "blocks.{l}.mlp.w_out"),
        Row("layers.{l}.feed_forward.w3", "blocks.{l}.mlp.w_in"),
        Row("norm", "ln_final"),
        Row("output", "unembed"),
    ),
)
