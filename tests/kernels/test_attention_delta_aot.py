"""attention_delta compiled for GPUs that are not there: no spilled registers, and the chip's shared memory suffices.

As a script, with a target's name: compiles the kernel for it in all configurations and prints a line of JSON for each;
with a width of a head as well, one configuration. The tests run it in a process of its own, as theirs may have
Triton's interpreter in place of its compiler.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from subcircuit.kernels.backend import TRITON_VERSION

SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
HEADS = [(64, True), (128, True), (256, True), (64, False)]
"""Widths of a head, and whether with rotary embedding."""


def compile_case(target: str, d_head: int, rotary: bool, rows: int, config, delta_dtype: str) -> dict[str, object]:
    """Registers spilled and shared memory of one configuration, with every input there is."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from subcircuit.kernels import attention_delta_triton as kernel

    function, half = kernel.attention_delta_kernel.fn, kernel.block_half(d_head)
    amd = target.startswith("gfx")
    constants = {"D_HEAD": d_head, "GROUP": 3, "BLOCK_H": half, "CHUNK": kernel.chunk(half), "BLOCK_M": rows}
    constants |= {
        "PRECISION": "ieee" if amd else "bf16x6",
        **config.kwargs,
        **({} if rotary else dict.fromkeys(["cos", "sin"])),
    }
    pointers = dict.fromkeys(["clean_q", "clean_k", "clean_v", "clean_z", "cos", "sin", "source"], "*fp32")
    pointers |= dict.fromkeys(["delta_q", "delta_k", "delta_v", "out"], f"*{delta_dtype}") | {
        "mask": "*i1",
        "first": "*i64",
    }
    types = pointers | {"scale_log2": "fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in function.arg_names}
    unaligned = {"n_sets", "n_q", "n_new", "n_k", "n_kv", "mask_set", "mask_pos", "mask_head"}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind[0] == "*" or (kind == "i32" and name not in unaligned)
    }
    compiled = triton.compile(
        ASTSource(function, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    if amd:
        spilled = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"])[1])
    else:
        spilled = stack_bytes(compiled.asm["cubin"])
    case = f"{d_head} wide, {'' if rotary else 'not '}rotary, {rows} rows, {config}, {delta_dtype}"
    return {"case": case, "spilled": spilled, "shared_bytes": compiled.metadata.shared}


def stack_bytes(cubin: bytes) -> int:
    """Bytes per thread outside of its registers."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", listing)[1])


def main(target: str, width: int | None = None) -> None:
    from subcircuit.kernels import attention_delta_triton as kernel

    for d_head, rotary in HEADS if width is None else [(width, True)]:
        half = kernel.block_half(d_head)
        for rows in sorted({kernel.block_rows(n, half) for n in (1, 4096)})[0 if width is None else -1 :]:
            configs = [c for c in kernel.CONFIGS if kernel.fits(c, rows, half, recent=target != "sm_80")]
            for config in configs if width is None else configs[-1:]:
                for delta_dtype in ("bf16", "fp32") if width is None else ("bf16",):
                    print(json.dumps(compile_case(target, d_head, rotary, rows, config, delta_dtype)), flush=True)


@pytest.mark.skipif(TRITON_VERSION is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("target", "width"),
    [("sm_80", 128), ("sm_90", 64), ("sm_90", 256), ("gfx942", 128)],
)
def test_compiles_without_spills_into_the_shared_memory(target, width):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, target, str(width)]
    script = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert script.returncode == 0, script.stderr
    case = json.loads(script.stdout)
    assert case["spilled"] == 0
    assert case["shared_bytes"] <= SHARED_BYTES[target]


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
