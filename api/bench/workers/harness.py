"""What every contestant's process runs: `python harness.py WORKER JOB_DIRECTORY`.

The process may live in an environment that has neither subcircuit nor the other contestants, so this file and the
workers beside it import torch, safetensors and their own library only, and everything passes through files:

    job.json             model (a directory in Hugging Face's form), patches [[layer, head, position or null], …],
                         runs, threads, device, the contestant's own options; library [distribution, major or null]
    job.safetensors      clean, corrupted [prompt, pos]; answer, wrong [prompt]
    result.json          version, seconds, peak memory; or why there is none
    result.safetensors   effects [patch, prompt]

A worker is a module with a function `prepare(job)` that returns a `PatchByPatch` or a `WholeSweep`. The effect of a
patch on a prompt is logit(answer) − logit(wrong) at the last position, with the head's z (its output before the output
projection) replaced by the corrupted prompt's at one position or at all of them, less the same without a patch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol


class Patch(NamedTuple):
    """A head, patched at one position or (None) at all of them."""

    layer: int
    head: int
    position: int | None


@dataclass(frozen=True)
class Job:
    """What is to be measured. Token tensors are `[prompt, pos]` and `[prompt]`, on the job's device."""

    model: str
    patches: list[Patch]
    runs: int
    threads: int
    device: str
    clean: Any
    corrupted: Any
    answer: Any
    wrong: Any
    options: dict[str, Any] = field(default_factory=dict)

    def metric(self, logits: Any) -> Any:
        """logit(answer) − logit(wrong) `[prompt]` at the last position of logits `[prompt, pos, d_vocab]`."""
        last = logits[:, -1]
        return (last.gather(1, self.answer[:, None]) - last.gather(1, self.wrong[:, None]))[:, 0]

    def transformers_model(self, **settings: Any) -> Any:
        """The model as a `transformers` one in float32, on the job's device."""
        import torch
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32, **settings)
        return model.to(self.device).eval()

    @staticmethod
    def output_projections(model: Any) -> list[Any]:
        """Each layer's attention output projection in a `transformers` model, or in a wrapper that has its names.

        Its input is all heads' z side by side.
        """
        if model.config.model_type == "gpt2":
            return [block.attn.c_proj for block in model.transformer.h]
        return [block.self_attn.o_proj for block in model.model.layers]


class PatchByPatch(Protocol):
    """A contestant that runs the model once for every patch."""

    def start(self) -> Any:
        """Run the clean and the corrupted prompts, keep what the patches need; the clean metric `[prompt]`."""

    def patched(self, patch: Patch) -> Any:
        """The metric `[prompt]` with one patch."""


class WholeSweep(Protocol):
    """A contestant that is given all patches at once."""

    def sweep(self) -> Any:
        """Effects `[patch, prompt]`, everything that they need included."""

    def calibrate(self) -> None:
        """Measure what the machine can do at this moment; called before every timed sweep."""

    def notes(self) -> dict[str, Any]:
        """What else goes into the result."""


def main() -> None:
    worker_file, directory = Path(sys.argv[1]), Path(sys.argv[2])
    # Python puts this file's folder first, where the workers lie; no library must be looked for there.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent.resolve()]
    values = json.loads((directory / "job.json").read_text(encoding="utf-8"))
    try:
        version = installed_version(*values.pop("library"))
        worker = load_worker(worker_file)
        job = read_job(directory, values)
        engine = worker.prepare(job)
    except (ImportError, NotImplementedError) as error:
        write_result(directory, {"status": "skipped", "reason": str(error)})
        return
    effects, measured = time_whole(engine, job) if hasattr(engine, "sweep") else time_each(engine, job)
    from safetensors.torch import save_file

    save_file({"effects": effects.double().cpu().contiguous()}, directory / "result.safetensors")
    write_result(directory, {"status": "ok", "version": version, **versions(), **measured})


def load_worker(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def installed_version(distribution: str, major: int | None) -> str:
    """Version of the contestant's library. Raises ImportError when it is absent or of another major version."""
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{distribution} is not installed in {sys.prefix}") from None
    if major is not None and version.split(".")[0] != str(major):
        raise ImportError(f"{distribution} {major} is needed, and {sys.prefix} has {version}")
    return version


def read_job(directory: Path, values: dict[str, Any]) -> Job:
    import torch
    from safetensors.torch import load_file

    values["patches"] = [Patch(*patch) for patch in values["patches"]]
    torch.set_num_threads(values["threads"])
    torch.set_grad_enabled(False)
    tokens: dict[str, Any] = load_file(directory / "job.safetensors", device=values["device"])
    return Job(**values, **tokens)


def time_each(engine: PatchByPatch, job: Job) -> tuple[Any, dict[str, Any]]:
    """Effects, and the seconds of the start and of each patch in every run; a first round, not timed, warms up."""
    import torch

    clean = engine.start()
    effects = torch.stack([engine.patched(patch) - clean for patch in job.patches])
    starts, patches = [], []
    for _ in range(job.runs):
        starts.append(seconds(engine.start, job.device))
        patches.append([seconds(lambda patch=patch: engine.patched(patch), job.device) for patch in job.patches])  # type: ignore[misc]
    return effects, {"start_s": starts, "patch_s": patches, **peak_memory(job.device)}


def time_whole(engine: WholeSweep, job: Job) -> tuple[Any, dict[str, Any]]:
    """Effects, and the seconds of the whole sweep in every run; a first sweep, not timed, warms up."""
    effects = engine.sweep()
    memory = peak_memory(job.device)
    sweeps = []
    for _ in range(job.runs):
        engine.calibrate()
        sweeps.append(seconds(engine.sweep, job.device))
    return effects, {"sweep_s": sweeps, **memory, **engine.notes()}


def seconds(run: Callable[[], Any], device: str) -> float:
    """Wall time of one call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def peak_memory(device: str) -> dict[str, int]:
    """Most bytes that this process has had resident, and on a GPU the most that torch had allocated there."""
    peaks = {"peak_bytes": peak_resident_bytes()}
    if device.startswith("cuda"):
        import torch

        peaks["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    return peaks


def peak_resident_bytes() -> int:
    """Linux' VmHWM is this program's own; ru_maxrss would start from what the parent had."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def versions() -> dict[str, str]:
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__}


def write_result(directory: Path, values: dict[str, Any]) -> None:
    (directory / "result.json").write_text(json.dumps(values), encoding="utf-8")


if __name__ == "__main__":
    main()
