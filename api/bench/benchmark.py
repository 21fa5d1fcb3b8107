"""The benchmark as a whole: scenarios and a grid of sizes, for every contestant, as one value."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from subcircuit.bench.contestants import REFERENCE, Contestant
from subcircuit.bench.measurement import Measurement, measure, reference_effects
from subcircuit.bench.model_files import random_gpt2, save_huggingface
from subcircuit.bench.problem import SCENARIOS, Problem, Settings, sample_of
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.model import HookedTransformer

SCHEMA_VERSION = 1

Progress = Callable[[str, int, int], None]
"""Takes what is being measured, measurements done, measurements in all."""

ModelSource = ModelConfig | HookedTransformer
"""A GPT-2 configuration, of which a model is drawn at random, or a model."""


@dataclass(frozen=True)
class ScenarioResult:
    """All contestants on one scenario of one size."""

    scenario: str
    n_layers: int
    n_patches: int
    settings: Settings
    rows: tuple[Measurement, ...]

    def times_faster(self, own: str, other: Measurement) -> float | None:
        """How many times as fast as another row one of subcircuit's is; None where either has no time."""
        seconds = next((row.seconds for row in self.rows if row.name == own), None)
        return None if seconds is None or other.seconds is None else other.seconds / seconds

    def to_dict(self) -> dict[str, Any]:
        timed = [row for row in self.rows if row.seconds is not None]
        own = [row.name for row in timed if row.name.startswith("subcircuit")]
        return {
            "scenario": self.scenario,
            "description": SCENARIOS[self.scenario],
            "n_layers": self.n_layers,
            "n_patches": self.n_patches,
            **asdict(self.settings),
            "rows": [row.to_dict() for row in self.rows],
            "times_faster": {name: {row.name: self.times_faster(name, row) for row in timed} for name in own},
        }


@dataclass(frozen=True)
class Report:
    """Everything that was measured, and on what."""

    config: ModelConfig
    machine: Mapping[str, Any]
    scenarios: tuple[ScenarioResult, ...]
    grid: tuple[ScenarioResult, ...] = ()

    @property
    def wrong_rows(self) -> list[Measurement]:
        """Contestants that failed, or whose effects are not those of the float64 reference."""
        rows = [row for result in (*self.scenarios, *self.grid) for row in result.rows]
        return [row for row in rows if row.status in ("failed", "differs")]

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA_VERSION,
            "model": asdict(self.config),
            "machine": dict(self.machine),
            "scenarios": [result.to_dict() for result in self.scenarios],
            "grid": [result.to_dict() for result in self.grid],
        }


def run_benchmark(
    model: ModelSource,
    settings: Settings,
    contestants: Sequence[Contestant],
    pythons: Mapping[str, str],
    scenarios: Sequence[str] = ("heads",),
    *,
    grid: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Measure contestants on scenarios, each in a process of its own, started with its interpreter in `pythons`.

    With `grid` also on all heads at other numbers of prompts, tokens and, of a random model, layers.

    Raises BenchError for a scenario or a size that cannot be run.
    """
    plan = [(scenario, model, settings) for scenario in scenarios]
    plan += [("heads", *size) for size in grid_sizes(model, settings)] if grid else []
    machine = describe_machine()  # before our own load on it
    done = 0

    def count(what: str) -> None:
        nonlocal done
        if progress is not None:
            progress(what, done, len(plan) * (len(contestants) + 1))
        done += 1

    results = [measure_scenario(*part, contestants, pythons, count) for part in plan]
    return Report(_config(model), machine, tuple(results[: len(scenarios)]), tuple(results[len(scenarios) :]))


def measure_scenario(
    scenario: str,
    model: ModelSource,
    settings: Settings,
    contestants: Sequence[Contestant],
    pythons: Mapping[str, str],
    before: Callable[[str], None],
) -> ScenarioResult:
    """All contestants on one scenario; `before` is told who comes next."""
    with tempfile.TemporaryDirectory() as folder:
        config, directory = _config(model), Path(folder)
        problem = Problem.draw(directory, config, settings)
        patches = problem.patches(scenario)
        sample = sample_of(patches, settings.sample)
        save_huggingface(random_gpt2(model, settings.seed) if isinstance(model, ModelConfig) else model, directory)
        before(REFERENCE.title)
        exact = reference_effects(REFERENCE, sys.executable, problem, [patches[i] for i in sample])
        rows = []
        for contestant in contestants:
            before(contestant.title)
            rows.append(measure(contestant, pythons[contestant.name], problem, patches, sample, exact))
    return ScenarioResult(scenario, config.n_layers, len(patches), settings, tuple(rows))


def grid_sizes(model: ModelSource, settings: Settings) -> list[tuple[ModelSource, Settings]]:
    """Sizes around the given one, one thing varied at a time: prompts, tokens (the same part of them equal in both
    prompts) and a random model's layers, each a quarter, a half, once, twice and four times as many."""
    n_ctx = _config(model).n_ctx
    prompts = [(model, replace(settings, n_prompts=n)) for n in _around(settings.n_prompts)]
    lengths = [
        (model, replace(settings, length=n, first_difference=settings.first_difference * n // settings.length))
        for n in _around(settings.length)
        if n <= n_ctx
    ]
    sizes: list[tuple[ModelSource, Settings]] = [*prompts, *lengths]
    if isinstance(model, ModelConfig):
        sizes += [(replace(model, n_layers=n), settings) for n in _around(model.n_layers)]
    return sizes


def describe_machine() -> dict[str, Any]:
    """Where this runs and what else runs there: the load is the mean number of busy processes of the last minute."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": device,
        "load": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _config(model: ModelSource) -> ModelConfig:
    return model if isinstance(model, ModelConfig) else model.config


def _around(n: int) -> list[int]:
    return sorted({size for size in (n // 4, n // 2, n, 2 * n, 4 * n) if size >= 1})
