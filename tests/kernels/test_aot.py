"""Every kernel compiled for GPUs that are not there: nothing spilled, and the chip's shared memory suffices.

In a process of its own, as the tests may have Triton's interpreter in place of its compiler.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from subcircuit.kernels.aot import CHIPS, Compiled, occupancy
from subcircuit.kernels.backend import TRITON_VERSION


@pytest.mark.skipif(TRITON_VERSION is None, reason="Triton is not installed")
@pytest.mark.parametrize("target", CHIPS)
def test_the_tightest_configurations_fit(target):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "subcircuit.kernels.aot", "--quick", "--target", target]
    script = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert script.returncode == 0, script.stdout + script.stderr
    for kernel in ("norm_delta", "readout", "activation_delta", "head_fanout", "vocabulary", "attention_delta"):
        assert kernel in script.stdout


def test_a_spill_or_too_much_shared_memory_does_not_fit():
    chip = CHIPS["sm_80"]
    assert Compiled("", 255, 0, chip.block_bytes, 0.1).fits(chip)
    assert not Compiled("", 255, 4, 0, 0.1).fits(chip)
    assert not Compiled("", 32, 0, chip.block_bytes + 1, 0.1).fits(chip)


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "n_warps", "share"),
    [(32, 0, 4, 1.0), (64, 0, 4, 0.5), (255, 0, 8, 0.125), (32, 82 * 1024, 4, 0.125)],
)
def test_occupancy_is_limited_by_what_runs_out_first(registers, shared_bytes, n_warps, share):
    assert occupancy(CHIPS["sm_80"], registers, shared_bytes, n_warps) == share
