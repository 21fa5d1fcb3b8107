"""One contestant measured on one scenario: its process, and what follows from the numbers that it wrote."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from subcircuit.bench.contestants import HARNESS, Contestant
from subcircuit.bench.gemm import gemm_share
from subcircuit.bench.problem import Problem
from subcircuit.bench.workers.harness import Patch
from subcircuit.engine.errors import BenchError

Status = Literal["ok", "differs", "skipped", "failed"]


@dataclass(frozen=True)
class Measurement:
    """A contestant's row. Where it was skipped or failed, `reason` says why and the numbers are missing.

    `seconds` are of all patches: the median of the runs, or an estimate from `n_timed` of them. A patch counted by
    `patches_per_s` is one site of one prompt. Memory is of the whole process, loading included, in bytes. Errors are
    of the sample's effects against the float64 reference: ‖Δ‖ / ‖effects‖, and max |Δ| / max |effects|.
    """

    name: str
    title: str
    status: Status
    reason: str = ""
    version: str = ""
    torch: str = ""
    seconds: float | None = None
    estimated: bool = False
    n_timed: int = 0
    patches_per_s: float | None = None
    peak_bytes: int | None = None
    peak_device_bytes: int | None = None
    effect_error: float | None = None
    max_difference: float | None = None
    gemm_flops: Mapping[str, int] | None = None
    gemm_flops_per_s: Mapping[str, float] | None = None
    gemm_share: float | None = None
    n_precise_rows: int | None = None
    n_full_rows: int | None = None
    timings: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    contestant: Contestant,
    python: str,
    problem: Problem,
    patches: Sequence[Patch],
    sample: Sequence[int],
    exact: Float[Tensor, "sample prompt"],
) -> Measurement:
    """Run a contestant and compare its effects on the sampled patches with the exact ones.

    subcircuit sweeps all patches; a peer runs the sampled ones, from whose times that of all follows.
    """
    row = Measurement(contestant.name, contestant.title, "skipped")
    if contestant.needs_gpu and not problem.settings.device.startswith("cuda"):
        return replace(row, reason="needs a GPU (--device cuda)")
    wanted = list(patches) if contestant.own else [patches[i] for i in sample]
    result, effects = run_worker(contestant, python, problem, wanted, problem.settings.runs)
    if effects is None:
        return replace(row, status=result["status"], reason=result["reason"])
    measured = (effects[list(sample)] if contestant.own else effects) - exact
    largest = float(measured.abs().max() / exact.abs().max())
    agrees = largest <= contestant.tolerance
    seconds = median(result["sweep_s"]) if contestant.own else estimated_seconds(result, wanted, patches)
    return replace(
        row,
        status="ok" if agrees else "differs",
        reason="" if agrees else f"an effect is off by {largest:.1e} of the largest",
        version=result["version"],
        torch=result["torch"],
        seconds=seconds,
        estimated=not contestant.own,
        n_timed=len(wanted),
        patches_per_s=len(patches) * problem.settings.n_prompts / seconds,
        peak_bytes=result["peak_bytes"],
        peak_device_bytes=result.get("peak_device_bytes"),
        effect_error=float(measured.norm() / exact.norm()),
        max_difference=largest,
        timings={key: value for key, value in result.items() if key in ("sweep_s", "start_s", "patch_s")},
        **_gemm(result, seconds),
    )


def _gemm(result: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    if "gemm_flops" not in result:
        return {}
    flops, rates = result["gemm_flops"], result["gemm_flops_per_s"]
    rows = {key: result[key] for key in ("n_precise_rows", "n_full_rows")}
    return {"gemm_flops": flops, "gemm_flops_per_s": rates, "gemm_share": gemm_share(flops, rates, seconds), **rows}


def estimated_seconds(result: Mapping[str, Any], timed: Sequence[Patch], patches: Sequence[Patch]) -> float:
    """Time of all patches: the start, and for each what the sampled ones took in the median.

    Where a patch costs only the layers above it, its time is a straight line in its layer. The line fitted to the
    sample, taken at the mean layer of all patches, is their mean time; without a slope that is the sample's mean.
    """
    times: list[float] = [median(of_patch) for of_patch in zip(*result["patch_s"], strict=True)]
    layers = [patch.layer for patch in timed]
    mean_layer, mean_time = fmean(layers), fmean(times)
    spread = sum((layer - mean_layer) ** 2 for layer in layers)
    covariance = sum((layer - mean_layer) * (time - mean_time) for layer, time in zip(layers, times, strict=True))
    slope = covariance / spread if spread else 0.0
    each = mean_time + slope * (fmean(patch.layer for patch in patches) - mean_layer)
    start: float = median(result["start_s"])
    return start + len(patches) * each


def run_worker(
    contestant: Contestant, python: str, problem: Problem, patches: Sequence[Patch], runs: int
) -> tuple[dict[str, Any], Float[Tensor, "patch prompt"] | None]:
    """What a contestant's process wrote, and its effects; None where it was skipped or failed."""
    settings = problem.settings
    job = {
        "library": [contestant.distribution, contestant.major],
        "model": str(problem.model),
        "patches": patches,
        "runs": runs,
        "threads": settings.threads,
        "device": settings.device,
        "options": dict(contestant.options),
    }
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / "job.json").write_text(json.dumps(job), encoding="utf-8")
        tokens = {name: getattr(problem, name) for name in ("clean", "corrupted", "answer", "wrong")}
        save_file(tokens, directory / "job.safetensors")
        ended = subprocess.run(
            [python, str(HARNESS), str(contestant.worker_file), folder],
            env=environment(settings.threads),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        if ended.returncode:
            return {"status": "failed", "reason": _last_line(ended.stderr, ended.returncode)}, None
        result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
        if result["status"] != "ok":
            return result, None
        return result, load_file(directory / "result.safetensors")["effects"]


def environment(threads: int) -> dict[str, str]:
    """Every process has the same number of threads and asks no model hub."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {**os.environ, **dict.fromkeys(names, str(threads)), **offline}


def _last_line(stderr: str, status: int) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"ended with status {status}"


def reference_effects(
    contestant: Contestant, python: str, problem: Problem, patches: Sequence[Patch]
) -> Float[Tensor, "patch prompt"]:
    """Effects by full forwards in float64."""
    result, effects = run_worker(contestant, python, problem, patches, runs=0)
    if effects is None:
        raise BenchError(f"the float64 reference {result['status']}: {result['reason']}")
    return effects.to(torch.float64)
