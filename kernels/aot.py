"""Compiles every kernel for GPUs that are not there, and says what each configuration costs on them.

    python -m subcircuit.kernels.aot [--target sm_90] [--quick]

A line per kernel and configuration: registers and bytes spilled per thread, shared memory per block, and the share of
a multiprocessor's threads that these allow at once. Exit status 1 where something is spilled or the chip has less
shared memory. No GPU is needed, only Triton's own compilers.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subcircuit.kernels import activation_delta, attention_delta_triton, head_fanout, norm_delta, readout, vocabulary
from subcircuit.kernels.backend import TRITON_VERSION, block_size, float32_dot, interpreted, triton


@dataclass(frozen=True)
class Chip:
    """What limits the blocks of a multiprocessor (NVIDIA) or compute unit (AMD)."""

    warp: int
    """Threads per warp."""
    warps: int
    """Warps at once."""
    registers: int
    """32-bit registers of all its threads together."""
    register_step: int
    """Registers per thread are given out in multiples of this."""
    shared_bytes: int
    block_bytes: int
    """Shared memory that one block may have."""


CHIPS = {
    "sm_80": Chip(32, 64, 65536, 8, 164 * 1024, 163 * 1024),
    "sm_90": Chip(32, 64, 65536, 8, 228 * 1024, 227 * 1024),
    "gfx942": Chip(64, 32, 4 * 512 * 64, 8, 64 * 1024, 64 * 1024),
}
"""A100, H100 and MI300X. Sources: NVIDIA's tuning guides for Ampere and Hopper, AMD's CDNA 3 instruction set manual."""


@dataclass(frozen=True)
class Case:
    """A kernel with everything that its compilation depends on. Arguments not in `types` are integers."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    unaligned: frozenset[str]
    """Integers of which nothing is known; strides and sizes are otherwise taken for multiples of 16."""
    n_warps: int
    n_stages: int


@dataclass(frozen=True)
class Compiled:
    """What a case costs on a chip."""

    name: str
    registers: int
    spilled: int
    shared_bytes: int
    occupancy: float

    def fits(self, chip: Chip) -> bool:
        return self.spilled == 0 and self.shared_bytes <= chip.block_bytes


def cases(target: str, quick: bool) -> Iterator[Case]:
    """Every kernel and configuration that may be launched on a chip; of each kind the tightest ones if `quick`."""
    yield from _row_kernels(quick)
    yield from _fanout_cases(target, quick)
    yield from _vocabulary_cases(target, quick)
    yield from _attention_cases(target, quick)


def _row_kernels(quick: bool) -> Iterator[Case]:
    clean = dict.fromkeys(["clean", "weight", "delta", "total", "direction"], "*fp32") | {"eps": "fp32"}
    counts = frozenset({"n_prompts", "n_pos"})
    for dtype in ("bf16",) if quick else ("bf16", "fp32"):
        for width in (4096,) if quick else (768, 4096, 8192):
            block, n_warps = block_size(width)
            for layer_norm in (True, False):
                constants: dict[str, Any] = {"LAYER_NORM": layer_norm, "BLOCK": block}
                what = f"{'layer norm' if layer_norm else 'RMS norm'}, {width} wide"
                types = clean | {"product": f"*{dtype}", "out": f"*{dtype}"}
                kernel = norm_delta.norm_delta_kernel
                yield Case(f"norm_delta, {what}, {dtype}", kernel, types, constants, counts, n_warps, 3)
                if dtype == "bf16":
                    types = clean | {"out": "*fp32"}
                    kernel = readout.readout_kernel
                    yield Case(f"readout, {what}", kernel, types, constants, counts, n_warps, 3)
        for activation in ("gelu",) if quick else ("gelu_new", "gelu", "silu", "relu"):
            for gated in (True, False):
                types = dict.fromkeys(["clean_pre", "clean_linear", "clean_post"], "*fp32")
                types |= dict.fromkeys(["delta_pre", "delta_linear", "out"], f"*{dtype}")
                constants = {"ACTIVATION": activation, "BLOCK": activation_delta.BLOCK}
                if not gated:
                    constants |= dict.fromkeys(["clean_linear", "delta_linear"])
                name = f"activation_delta, {activation}{', gated' if gated else ''}, {dtype}"
                yield Case(name, activation_delta.activation_delta_kernel, types, constants, counts, 4, 3)


def _fanout_cases(target: str, quick: bool) -> Iterator[Case]:
    kernel, counts = head_fanout.head_fanout_kernel.fn, frozenset({"n_tokens", "n_pos"})
    for config in head_fanout.CONFIGS:
        for dtype in ("fp32",) if quick else ("fp32", "bf16"):
            types = {"source": "*fp32", "heads": "*i64", "weight": f"*{dtype}", "out": f"*{dtype}"}
            constants = {"D_HEAD": 64, "CHUNK": head_fanout.CHUNK, "PRECISION": float32_dot(_is_amd(target))}
            constants |= {"INTERPRETED": False, **config.kwargs}
            name = f"head_fanout, {_described(config)}, {dtype}"
            yield Case(name, kernel, types, constants, counts, config.num_warps, config.num_stages)


def _vocabulary_cases(target: str, quick: bool) -> Iterator[Case]:
    kernel, counts = vocabulary.vocabulary_kernel.fn, frozenset({"n_rows", "n_prompts", "d_vocab"})
    for config in vocabulary.CONFIGS:
        for dtype in ("fp32",) if quick else ("fp32", "bf16"):
            for top in (False, True):
                types = {"delta": f"*{dtype}", "unembed": f"*{dtype}", "log_p": "*fp32", "mean_delta": "*fp32"}
                types |= {"value": "*fp32", "second": "*i64" if top else "*fp32"}
                constants: dict[str, Any] = {"SMALL": vocabulary.SMALL, "HEADROOM": vocabulary.HEADROOM, "TOP": top}
                constants |= {"TILES": vocabulary.TILES, "CHUNK": vocabulary.CHUNK}
                constants |= {"PRECISION": float32_dot(_is_amd(target)), "INTERPRETED": False, **config.kwargs}
                if top:
                    constants["mean_delta"] = None
                name = f"vocabulary, {'top token' if top else 'KL'}, {_described(config)}, {dtype}"
                yield Case(name, kernel, types, constants, counts, config.num_warps, config.num_stages)


def _attention_cases(target: str, quick: bool) -> Iterator[Case]:
    module = attention_delta_triton
    clean = dict.fromkeys(["clean_q", "clean_k", "clean_v", "clean_z", "cos", "sin", "source"], "*fp32")
    clean |= {"mask": "*i1", "first": "*i64", "scale_log2": "fp32"}
    counts = frozenset({"n_sets", "n_q", "n_new", "n_k", "n_kv", "mask_set", "mask_pos", "mask_head"})
    quick_width = {"sm_80": 128, "sm_90": 64}.get(target, 128)
    for d_head, rotary in [(quick_width, True)] if quick else [(64, True), (128, True), (256, True), (64, False)]:
        half = module.block_half(d_head)
        for rows in sorted({module.block_rows(n, half) for n in (1, 4096)})[-1 if quick else 0 :]:
            configs = [c for c in module.CONFIGS if module.fits(c, rows, half, recent=target != "sm_80")]
            for config in configs[-1:] if quick else configs:
                for dtype in ("bf16",) if quick else ("bf16", "fp32"):
                    types = clean | dict.fromkeys(["delta_q", "delta_k", "delta_v", "out"], f"*{dtype}")
                    constants: dict[str, Any] = {
                        "D_HEAD": d_head,
                        "GROUP": 3,
                        "BLOCK_H": half,
                        "CHUNK": module.chunk(half),
                    }
                    constants |= {"BLOCK_M": rows, "PRECISION": float32_dot(_is_amd(target)), **config.kwargs}
                    if not rotary:
                        constants |= dict.fromkeys(["cos", "sin"])
                    what = f"{d_head} wide{', rotary' if rotary else ''}, {rows} rows, {_described(config)}, {dtype}"
                    kernel = module.attention_delta_kernel.fn
                    yield Case(
                        f"attention_delta, {what}",
                        kernel,
                        types,
                        constants,
                        counts,
                        config.num_warps,
                        config.num_stages,
                    )


def _is_amd(target: str) -> bool:
    return target.startswith("gfx")


def _described(config: Any) -> str:
    blocks = " × ".join(str(size) for size in config.kwargs.values())
    return f"block {blocks}, {config.num_warps} warps"


def compile_case(case: Case, target: str) -> Compiled:
    """Compile one case for a chip named as in `CHIPS`."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd, chip = _is_amd(target), CHIPS[target]
    types = case.types | dict.fromkeys(case.constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in case.kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind[0] == "*" or (kind == "i32" and name not in case.unaligned)
    }
    compiled = triton.compile(
        ASTSource(case.kernel, signature, constexprs=case.constants, attrs=aligned),
        target=GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32),
        options={"num_warps": case.n_warps, "num_stages": case.n_stages},
    )
    registers, spilled = _amd_usage(compiled.asm["amdgcn"]) if amd else _nvidia_usage(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    return Compiled(case.name, registers, spilled, shared, occupancy(chip, registers, shared, case.n_warps))


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers (with accumulation registers) and spilled ones."""

    def count(name: str) -> int:
        return max(int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", assembly))

    return count("vgpr_count"), count("vgpr_spill_count")


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes per thread outside of them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def occupancy(chip: Chip, registers: int, shared_bytes: int, n_warps: int) -> float:
    """Share of a multiprocessor's warps that run at once, as registers and shared memory allow."""
    per_thread = -(-max(registers, 1) // chip.register_step) * chip.register_step
    by_registers = chip.registers // (per_thread * chip.warp * n_warps)
    by_shared = chip.shared_bytes // shared_bytes if shared_bytes else chip.warps
    return min(by_registers * n_warps, by_shared * n_warps, chip.warps) / chip.warps


def main(arguments: list[str] | None = None) -> int:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m subcircuit.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=list(CHIPS), help="all of them if left out")
    parser.add_argument("--quick", action="store_true", help="only the tightest configurations")
    options = parser.parse_args(arguments)
    if TRITON_VERSION is None or interpreted():
        parser.error("Triton is not installed" if TRITON_VERSION is None else "TRITON_INTERPRET must not be set")
    console, failed = Console(width=130), 0
    for target in options.target or CHIPS:
        table = Table(title=f"{target}, Triton {TRITON_VERSION}", title_justify="left")
        for column in ("kernel", "registers", "spilled", "shared bytes", "occupancy"):
            table.add_column(column, justify="left" if column == "kernel" else "right")
        for case in cases(target, options.quick):
            used = compile_case(case, target)
            fits = used.fits(CHIPS[target])
            failed += not fits
            row = used.registers, used.spilled, f"{used.shared_bytes:,}", f"{used.occupancy:.0%}"
            table.add_row(used.name, *map(str, row), style=None if fits else "bold red")
        console.print(table)
    console.print(f"{failed} configurations spill or need more shared memory than there is" if failed else "all fit")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
