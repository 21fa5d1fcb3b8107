"""What the kernels move and compute, and how fast a chip could do it at best: docs/kernels.md is made from this.

    python -m subcircuit.kernels.roofline [--no-aot] > docs/kernels.md

No GPU is needed. Times are predicted from peak figures, not measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from subcircuit.kernels.vocabulary import CONFIGS as VOCABULARY_CONFIGS

OPERAND_BYTES = 2
"""Of δ in the products: bfloat16."""

NORM_OPERATIONS, ACTIVATION_OPERATIONS, READOUT_OPERATIONS, VOCABULARY_OPERATIONS = 12, 20, 14, 40
"""Elementwise operations per element, about."""


@dataclass(frozen=True)
class Chip:
    """Peak figures of a GPU, dense, without sparsity."""

    name: str
    bfloat16: float
    """Matrix operations per second in bfloat16, FLOP/s."""
    float32: float
    """Operations per second outside the matrix units, FLOP/s."""
    float32_dot: float
    """Matrix operations per second at float32's accuracy as the kernels make them (`backend.float32_dot`), FLOP/s."""
    bandwidth: float
    """Bytes per second of the memory."""


CHIPS = [
    Chip("A100 SXM 80GB", 312e12, 19.5e12, 312e12 / 6, 2.039e12),
    Chip("H100 SXM", 989.4e12, 67e12, 989.4e12 / 6, 3.35e12),
    Chip("MI300X", 1307.4e12, 163.4e12, 163.4e12, 5.3e12),
]
SOURCES = """\
A100 80GB SXM: 312 TFLOP/s bfloat16, 19.5 float32, 2,039 GB/s (NVIDIA A100 data sheet). H100 SXM: 989.4 TFLOP/s bfloat16
dense, 67 float32, 3.35 TB/s (NVIDIA H100 data sheet; the data sheet's 1,979 is with sparsity). MI300X: 1,307.4 TFLOP/s
bfloat16 dense, 163.4 float32, 5.3 TB/s (AMD Instinct MI300X data sheet). A product at float32's accuracy is six bfloat16
products on NVIDIA (`bf16x6`) and a float32 one on AMD."""


@dataclass(frozen=True)
class Model:
    """The sizes of a model that its cost depends on."""

    name: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    gated: bool

    @property
    def n_pre(self) -> int:
        """Products that the MLP's activation takes."""
        return 2 if self.gated else 1

    @property
    def d_q(self) -> int:
        return self.n_heads * self.d_head

    @property
    def d_kv(self) -> int:
        return self.n_kv_heads * self.d_head


GPT2_SMALL = Model("GPT-2 Small", 12, 768, 12, 12, 64, 3072, 50257, gated=False)
LLAMA2_7B = Model("Llama-2-7B", 32, 4096, 32, 32, 128, 11008, 32000, gated=True)


@dataclass(frozen=True)
class Cost:
    """What a piece of work takes: operations by unit, and bytes to and from memory."""

    bfloat16: float = 0
    float32: float = 0
    float32_dot: float = 0
    bytes: float = 0

    @property
    def operations(self) -> float:
        return self.bfloat16 + self.float32 + self.float32_dot

    def times(self, n: float) -> Cost:
        return Cost(n * self.bfloat16, n * self.float32, n * self.float32_dot, n * self.bytes)

    def seconds(self, chip: Chip) -> float:
        """The least time on a chip: that of the unit that is busy longest."""
        return max(self._unit_seconds(chip).values())

    def bound(self, chip: Chip) -> str:
        """What the least time is that of."""
        units = self._unit_seconds(chip)
        return max(units, key=units.__getitem__)

    def _unit_seconds(self, chip: Chip) -> dict[str, float]:
        return {
            "memory": self.bytes / chip.bandwidth,
            "bfloat16 units": self.bfloat16 / chip.bfloat16,
            "float32 units": self.float32 / chip.float32,
            "float32-accurate products": self.float32_dot / chip.float32_dot,
        }


def norm_delta(model: Model) -> Cost:
    """Per row token: δ read and written in float32, a product read and δn written as operands."""
    return Cost(float32=NORM_OPERATIONS * model.d_model, bytes=(8 + 2 * OPERAND_BYTES) * model.d_model)


def attention_delta(model: Model, n_keys: float) -> Cost:
    """Per query token that reads `n_keys` keys, all of which differ: δq, δk, δv read, δz written."""
    return Cost(
        float32_dot=4 * model.d_q * n_keys,
        float32=6 * model.n_heads * n_keys,
        bytes=OPERAND_BYTES * (2 * model.d_q + 2 * model.d_kv),
    )


def head_fanout(model: Model) -> Cost:
    """Per row token: one head's share of the output projection, in the clean run's float32."""
    return Cost(float32_dot=2 * model.d_head * model.d_model, bytes=4 * model.d_model)


def activation_delta(model: Model) -> Cost:
    """Per row token: pre-activations read, activations written, as operands."""
    moved = (model.n_pre + 1) * OPERAND_BYTES * model.d_mlp
    return Cost(float32=ACTIVATION_OPERATIONS * model.d_mlp, bytes=moved)


def readout(model: Model) -> Cost:
    """Per row: δ of the position that is read."""
    return Cost(float32=READOUT_OPERATIONS * model.d_model, bytes=4 * model.d_model)


def vocabulary(model: Model) -> Cost:
    """Per row, at float32's accuracy: W_U once per block of rows, log p of its own prompt."""
    rows = max(config.kwargs["BLOCK_M"] for config in VOCABULARY_CONFIGS)
    return Cost(
        float32_dot=2 * model.d_model * model.d_vocab,
        float32=VOCABULARY_OPERATIONS * model.d_vocab,
        bytes=4 * model.d_vocab * (1 + model.d_model / rows),
    )


def product(n_in: int, n_out: int) -> Cost:
    """Per row token: a GEMM of δ, the weight's own bytes left out (many rows share it)."""
    return Cost(bfloat16=2 * n_in * n_out, bytes=OPERAND_BYTES * (n_in + n_out))


Steps = list[tuple[str, float, Cost]]
"""What, how many times per row, and the cost of one."""


def attention_steps(model: Model, n_pos: int, n_read: int) -> Steps:
    """A layer's attention, of a row with `n_pos` positions of which the last `n_read` are read above."""
    return [
        ("norm_delta", n_pos, norm_delta(model)),
        ("product", n_read, product(model.d_model, model.d_q)),
        ("product", n_pos, product(model.d_model, 2 * model.d_kv)),
        ("attention_delta", n_read, attention_delta(model, n_pos)),
        ("product", n_read, product(model.d_q, model.d_model)),
    ]


def mlp_steps(model: Model, n_read: int) -> Steps:
    """A layer's MLP at `n_read` positions."""
    return [
        ("norm_delta", n_read, norm_delta(model)),
        ("product", n_read, product(model.d_model, model.n_pre * model.d_mlp)),
        ("activation_delta", n_read, activation_delta(model)),
        ("product", n_read, product(model.d_mlp, model.d_model)),
    ]


def row_steps(model: Model, layer: int, n_pos: int) -> Iterator[tuple[str, float, Cost]]:
    """One row whose patch replaces a head of a layer at all of `n_pos` positions, all of which may differ."""

    def n_read(at: int) -> int:
        return 1 if at == model.n_layers - 1 else n_pos

    yield "head_fanout", n_read(layer), head_fanout(model)
    yield from mlp_steps(model, n_read(layer))
    for above in range(layer + 1, model.n_layers):
        yield from attention_steps(model, n_pos, n_read(above))
        yield from mlp_steps(model, n_read(above))
    yield "readout", 1, readout(model)


def sweep_costs(model: Model, n_prompts: int, n_pos: int) -> dict[str, Cost]:
    """A sweep of every head, each at all positions, by kind of step. The clean run, once per prompt, is left out."""
    costs: dict[str, list[Cost]] = {}
    for layer in range(model.n_layers):
        for name, n, cost in row_steps(model, layer, n_pos):
            costs.setdefault(name, []).append(cost.times(n * model.n_heads * n_prompts))
    return {name: _sum(parts) for name, parts in costs.items()}


def _sum(costs: list[Cost]) -> Cost:
    return Cost(*(sum(getattr(cost, unit) for cost in costs) for unit in vars(Cost())))
