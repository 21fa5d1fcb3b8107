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
A100 80GB SXM: 312 TFLOP/s bfloat16, 19.5 float32, 2,039 GB/s (NVIDIA A100 data sheet). H100 SXM: 989.4 TFLOP/s
bfloat16 dense, 67 float32, 3.35 TB/s (NVIDIA H100 data sheet, whose 1,979 is with sparsity). MI300X: 1,307.4 TFLOP/s
bfloat16 dense, 163.4 float32, 5.3 TB/s (AMD Instinct MI300X data sheet). A product at float32's accuracy is six
bfloat16 products on NVIDIA (`bf16x6`) and a float32 one on AMD."""


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


EFFICIENCY = 0.6
"""Share of the bound that a prediction assumes: an assumption about large GEMMs and streaming kernels, not measured."""

N_POS = 23

SYMBOLIC = {
    "norm_delta": ("(8 + 2b) d_model", "12 d_model"),
    "attention_delta": ("2b d_head (n_heads + n_kv_heads)", "4 n_heads d_head n_keys + 6 n_heads n_keys"),
    "head_fanout": ("4 d_model", "2 d_head d_model"),
    "activation_delta": ("2b d_mlp; gated 3b d_mlp", "20 d_mlp"),
    "readout (per row)": ("4 d_model", "14 d_model"),
    "vocabulary (per row)": ("4 d_vocab (1 + d_model / BLOCK_M)", "2 d_model d_vocab + 40 d_vocab"),
}


def kernel_costs(model: Model) -> dict[str, Cost]:
    """Per row token, or per row for what reads one position."""
    costs = norm_delta(model), attention_delta(model, N_POS), head_fanout(model), activation_delta(model)
    return dict(zip(SYMBOLIC, (*costs, readout(model), vocabulary(model)), strict=True))


def page(with_aot: bool = True) -> Iterator[str]:
    """docs/kernels.md, line by line."""
    yield "# Kernels: what they move, what they compute, what bounds them"
    yield ""
    yield "<!-- Made by `python -m subcircuit.kernels.roofline`. -->"
    yield ""
    yield INTRODUCTION
    yield "## Bytes and operations"
    yield ""
    yield COUNTING
    yield from _table(["kernel", "bytes", "operations"], [[name, *text] for name, text in SYMBOLIC.items()])
    for model in (GPT2_SMALL, LLAMA2_7B):
        yield from _kernel_table(model)
    yield "## Peak figures"
    yield ""
    yield SOURCES
    yield ""
    yield "## Sweeps: predicted, not measured"
    yield ""
    yield PREDICTING
    for model, n_prompts in ((GPT2_SMALL, 1536), (LLAMA2_7B, 32)):
        yield from _sweep_section(model, n_prompts)
    if with_aot:
        yield from _compiled_section()


INTRODUCTION = """\
Between the GEMMs of the delta form (docs/method.md) stand six kernels. Each has a plain-torch version of the same
signature, and is tested against float64 under Triton's interpreter. No figure on this page was measured on a GPU: bytes
and operations are counted (the count of products is tested against torch's own), registers and shared memory are the
compilers', and times follow from peak figures.
"""

COUNTING = f"""\
Per row token, with operands of b bytes ({OPERAND_BYTES} in the figures). What is read once per prompt is taken to be
found in the cache and not counted; W_U, which no cache holds, is counted once per block of BLOCK_M rows. Operations of
norms, activations and softmax are elementwise ones, about.
"""

PREDICTING = f"""\
Every head is patched in turn, at all T = {N_POS} positions, on every prompt; all positions may differ; products are in
bfloat16. A row patched in layer l costs `head_fanout` and the MLP of layer l at T tokens, then all of each layer above.
In the last layer one position is read: there keys and values are computed at T tokens, and queries, attention, the
output projection and the MLP at one. A step's time is the largest of bytes / bandwidth and operations / peak of each
unit. The bound is their sum, as if no two steps overlapped and a launch cost nothing. The prediction assumes
{EFFICIENCY:.0%} of the bound's speed, which is a guess. The clean and the corrupted run of each prompt are left out,
and the weights' own bytes.
"""


def _table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"
    yield ""


def _kernel_table(model: Model) -> Iterator[str]:
    yield f"{model.name}, {N_POS} keys, and the least time of a million tokens (of a thousand rows), in milliseconds:"
    yield ""
    rows = []
    for name, cost in kernel_costs(model).items():
        n = 1e3 if "row" in name else 1e6
        times = [f"{cost.times(n).seconds(chip) * 1e3:.2f} ({cost.bound(chip)})" for chip in CHIPS]
        rows.append([name, f"{cost.bytes:,.0f}", f"{cost.operations:,.0f}", *times])
    yield from _table(["kernel", "bytes", "operations", *(chip.name for chip in CHIPS)], rows)


def _sweep_section(model: Model, n_prompts: int) -> Iterator[str]:
    n_heads = model.n_layers * model.n_heads  # of all layers
    costs = sweep_costs(model, n_prompts, N_POS)
    yield f"### {model.name}: {n_heads:,} heads × {n_prompts:,} prompts × {N_POS} tokens"
    yield ""
    rows = []
    for name, cost in costs.items():
        times = [f"{cost.seconds(chip):.3f} ({cost.bound(chip)})" for chip in CHIPS]
        rows.append([name, f"{cost.operations / 1e12:,.2f}", f"{cost.bytes / 1e9:,.1f}", *times])
    bounds = [sum(cost.seconds(chip) for cost in costs.values()) for chip in CHIPS]
    whole = _sum(list(costs.values()))
    totals = f"{whole.operations / 1e12:,.2f}", f"{whole.bytes / 1e9:,.1f}"
    rows.append(["**bound**", *totals, *(f"{bound:.2f}" for bound in bounds)])
    rows.append(["**predicted, not measured**", "", "", *(f"**{bound / EFFICIENCY:.2f}**" for bound in bounds)])
    yield from _table(["step", "10¹² operations", "GB", *(f"{chip.name}, s" for chip in CHIPS)], rows)
    products = costs["product"]
    forward = 2 * model.n_layers * (2 * model.d_model * (model.d_q + model.d_kv) + _mlp_weights(model)) * N_POS
    n_rows = n_heads * n_prompts
    yield (
        f"The products: {n_rows:,} rows × {products.operations / n_rows / 1e9:,.3f} · 10⁹ operations, where a full "
        f"forward has {forward / 1e9:,.3f} · 10⁹. On an H100 that is {products.bfloat16 / 1e12:,.1f} · 10¹² / "
        f"({CHIPS[1].bfloat16 / 1e12:,.1f} · 10¹² per second) = {products.bfloat16 / CHIPS[1].bfloat16:.3f} s."
    )
    yield ""
    kl = vocabulary(model).times(n_rows)
    added = ", ".join(f"{kl.seconds(chip):.2f} s on {chip.name}" for chip in CHIPS)
    yield (
        f"The metrics `kl`, `log_probability` and `accuracy` add {kl.operations / 1e12:,.2f} · 10¹² operations, and to "
        f"the bound {added}."
    )
    yield ""


def _mlp_weights(model: Model) -> int:
    return (model.n_pre + 1) * model.d_model * model.d_mlp


def _compiled_section() -> Iterator[str]:
    from subcircuit.kernels import aot

    yield "## Registers, spills, shared memory, occupancy"
    yield ""
    yield (
        "Of all configurations that may be launched, compiled ahead of time for GPUs that are not there, the smallest "
        "and the largest figure; `python -m subcircuit.kernels.aot` prints each one. Occupancy is the share of a "
        "multiprocessor's warps that registers and shared memory let run at once."
    )
    yield ""
    rows = []
    for target in aot.CHIPS:
        groups: dict[tuple[str, str], list[aot.Compiled]] = {}
        for case in aot.cases(target, quick=False):
            kernel, *_, last = case.name.split(", ")
            operands = last if last in ("bf16", "fp32") else "fp32"
            groups.setdefault((kernel, operands), []).append(aot.compile_case(case, target))
        for names, compiled in groups.items():
            spilled = str(max(one.spilled for one in compiled))
            registers, shared = (
                _range([getattr(one, field) for one in compiled]) for field in ("registers", "shared_bytes")
            )
            occupancy = _range([round(100 * one.occupancy) for one in compiled])
            rows.append([target, *names, str(len(compiled)), registers, spilled, shared, occupancy])
    head = [
        "chip",
        "kernel",
        "operands",
        "configurations",
        "registers",
        "bytes spilled",
        "shared bytes",
        "occupancy, %",
    ]
    yield from _table(head, rows)


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m subcircuit.kernels.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--no-aot", action="store_true", help="without the table that takes Triton's compilers minutes")
    options = parser.parse_args(arguments)
    print("\n".join(page(with_aot=not options.no_aot)).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
