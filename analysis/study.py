"""The whole study of a model: tasks, sweeps, circuits, what they share, and a report, in a run directory."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

from subcircuit.analysis.circuit import Circuit, intersection, union
from subcircuit.analysis.compare import cross_task_scores, jaccard_matrix
from subcircuit.analysis.discover import Direction, discover
from subcircuit.analysis.faithfulness import Ablation, node_drops, random_circuits
from subcircuit.analysis.metrics import is_top
from subcircuit.analysis.report import write_report
from subcircuit.analysis.store import RunDirectory
from subcircuit.analysis.sweep import Scores, sweep
from subcircuit.analysis.tasks import Task
from subcircuit.analysis.tasks import task as build_task
from subcircuit.engine.errors import StoreError, TaskError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Site
from subcircuit.engine.patching.session import Executor, Precision
from subcircuit.weights.names import load

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, units done, units in all)."""

N_EXAMPLES = 4


@dataclass(frozen=True)
class StudySettings:
    """What a study depends on; a run is resumed only with the same ones."""

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    n: int = 32
    seed: int = 0
    template: str = "all"
    filter: bool = False
    source: str = "corrupted"
    threshold: float = 20.0
    first: Direction = "backward"
    max_sweeps: int | None = None
    precision: Precision = "fp32"
    executor: Executor = "torch"
    dtype: str = "float32"
    n_random: int = 20


def study(
    settings: StudySettings,
    out: str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> RunDirectory:
    """Find the circuit of every task in every model, compare them, and write everything to a run directory.

    Each stage's result is written whole when it is done; with `resume` it is not computed again. A task that a model
    does not do (it does not prefer the answers) is left out with a note in run.json.

    Raises TaskError when a task cannot be built for a model, or a model does none of the tasks; StoreError when the
    folder is taken.
    """
    if not settings.models or not settings.tasks:
        raise TaskError("a study needs at least one model and one task")
    run = {
        "command": command,
        "settings": {name: _plain(value) for name, value in vars(settings).items()},
        "tasks": list(settings.tasks),
        "seed": settings.seed,
        "versions": _versions(),
        "models": [],
        "timings": {},
        "notes": [],
    }
    directory = RunDirectory.create(out, run, resume=resume, overwrite=overwrite)
    for name in settings.models:
        _ModelStudy(directory, settings, name, progress or (lambda stage, done, total: None)).run()
    with _timed(directory, "report"):
        write_report(directory)
    return directory


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _versions() -> dict[str, str]:
    return {
        "subcircuit": metadata.version("subcircuit"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
    }


@contextmanager
def _timed(directory: RunDirectory, stage: str) -> Iterator[None]:
    """Adds the seconds that a stage took to run.json."""
    start = time.perf_counter()
    yield
    timings = directory.run["timings"]
    timings[stage] = round(timings.get(stage, 0.0) + time.perf_counter() - start, 2)
    directory.update_run(timings=timings)


@dataclass
class _ModelStudy:
    """One model's part of a study."""

    directory: RunDirectory
    settings: StudySettings
    name: str
    progress: Progress
    tasks: dict[str, Task] = field(default_factory=dict)
    ablations: dict[str, Ablation] = field(default_factory=dict)
    circuits: dict[str, Circuit] = field(default_factory=dict)

    def run(self) -> None:
        self.slug = re.sub(r"[^A-Za-z0-9_-]+", "-", self.name).strip("-")
        with _timed(self.directory, f"{self.slug}: load"):
            self.progress(f"{self.name}: loading", 0, 1)
            self.model = load(self.name, dtype=self.settings.dtype)
            self._describe()
        with _timed(self.directory, f"{self.slug}: tasks"):
            for task_name in self.settings.tasks:
                self.tasks[task_name] = self._task(task_name)
        for task_name, task in self.tasks.items():
            self._study_task(task_name, task)
        if not self.circuits:
            raise TaskError(f"model {self.name} does none of the tasks {', '.join(self.settings.tasks)}")
        with _timed(self.directory, f"{self.slug}: compare"):
            self._compare()

    def _describe(self) -> None:
        config = self.model.config
        description = {
            "name": self.name,
            "slug": self.slug,
            "description": f"{config.family}, {config.n_layers} × {config.n_heads} heads, d_model {config.d_model}",
            "n_layers": config.n_layers,
            "n_heads": config.n_heads,
            "n_kv_heads": config.kv_heads,
            "n_params": config.n_params,
            "fingerprint": fingerprint(self.model),
        }
        others = [model for model in self.directory.run["models"] if model["slug"] != self.slug]
        same = [model for model in self.directory.run["models"] if model["slug"] == self.slug]
        if same and same[0]["fingerprint"] != description["fingerprint"]:
            raise StoreError(f"{self.directory.path} was run with other weights of {self.name}; it cannot be resumed")
        self.directory.update_run(models=[*others, description])

    def _task(self, name: str) -> Task:
        settings = self.settings
        return build_task(
            name,
            self.model,
            n=settings.n,
            seed=settings.seed,
            template=settings.template,
            filter=settings.filter,
        )

    def _study_task(self, name: str, task: Task) -> None:
        try:
            self.ablations[name] = Ablation(
                self.model, task, executor=self.settings.executor, precision=self.settings.precision
            )
        except TaskError as error:
            note = f"{self.name}: {error}"
            self.directory.update_run(notes=sorted({*self.directory.run["notes"], note}))
            return
        scores = self._sweep(name, task)
        self.circuits[name] = self._discover(name, task)
        self._results(name, task, scores)

    def _step(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(f"{self.name}: {what}", done, total)

    def _sweep(self, name: str, task: Task) -> Scores:
        file, settings = f"scores/{self.slug}.{name}.safetensors", self.settings
        if not self.directory.has(file):
            with _timed(self.directory, f"{self.slug}: sweep"):
                scores = sweep(
                    self.model,
                    task,
                    "heads+mlps",
                    source=settings.source,
                    executor=settings.executor,
                    precision=settings.precision,
                    progress=self._step(f"{name}, sweep of heads and MLPs (rows)"),
                )
            self.directory.write_tensors(
                file,
                {"effects": scores.effects, "clean_metric": scores.clean_metric},
                {"sites": json.dumps([str(site) for site in scores.sites]), "settings": json.dumps(scores.settings)},
            )
            self._append_csv(name, scores)
        return self._read_scores(file)

    def _read_scores(self, file: str) -> Scores:
        tensors, about = self.directory.read_tensors(file)
        sites = tuple(Site.of(site) for site in json.loads(about["sites"]))
        return Scores(
            sites, tensors["effects"], tensors["clean_metric"], self.model.config, json.loads(about["settings"])
        )

    def _append_csv(self, name: str, scores: Scores) -> None:
        text = io.StringIO()
        rows = [{"model": self.name, "task": name, **row} for row in scores.table()]
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        before = (self.directory.path / "scores.csv").read_text() if self.directory.has("scores.csv") else ""
        if not before:
            writer.writeheader()
        writer.writerows(rows)
        self.directory.write_text("scores.csv", before + text.getvalue())

    def _discover(self, name: str, task: Task) -> Circuit:
        file, settings = f"circuits/{self.slug}.{name}.json", self.settings
        if not self.directory.has(file):
            with _timed(self.directory, f"{self.slug}: discover"):
                circuit = discover(
                    self.model,
                    task,
                    threshold=settings.threshold,
                    first=settings.first,
                    max_sweeps=settings.max_sweeps,
                    ablation=self.ablations[name],
                    progress=self._step(f"{name}, pruning (candidates of this sweep)"),
                )
            self.directory.write_json(file, circuit.to_dict())
        return Circuit.from_dict(self.directory.read_json(file))

    def _results(self, name: str, task: Task, scores: Scores) -> None:
        file = f"results/{self.slug}.{name}.json"
        if self.directory.has(file):
            return
        ablation, circuit = self.ablations[name], self.circuits[name]
        with _timed(self.directory, f"{self.slug}: drops and random circuits"):
            drops = node_drops(ablation, circuit)
            baseline = random_circuits(
                ablation,
                circuit,
                self.settings.n_random,
                seed=self.settings.seed,
                progress=self._step(f"{name}, random circuits"),
            )
        examples, accuracy = self._examples(task)
        self.directory.write_json(
            file,
            {
                "examples": examples,
                "accuracy": accuracy,
                "full_logit_difference": ablation.full,
                "n_prompts": len(task.clean),
                "n_pos": task.clean.shape[1],
                "template": task.template,
                "heads": scores.heads().tolist(),
                "mlps": scores.mlps().tolist(),
                "clean_mean": float(scores.clean_metric.mean()),
                "drops": drops,
                "random_scores": baseline,
            },
        )

    def _examples(self, task: Task) -> tuple[list[dict[str, Any]], float]:
        with torch.no_grad():
            logits = self.model(task.clean)[:, -1]
        correct, tops = is_top(logits, task.answer), logits.argmax(-1)
        tokenizer = self.model.tokenizer

        def text(token: torch.Tensor) -> str:
            return tokenizer.decode([int(token)]) if tokenizer is not None else str(int(token))

        examples = [
            {
                "prompt": task.prompts[i],
                "corrupted": task.corrupted_prompts[i],
                "answer": text(task.answer[i]),
                "wrong": text(task.wrong[i]),
                "model_top": text(tops[i]),
                "correct": bool(correct[i]),
            }
            for i in range(min(N_EXAMPLES, len(task.prompts)))
        ]
        return examples, float(correct.float().mean())

    def _compare(self) -> None:
        file = f"results/{self.slug}.compare.json"
        if self.directory.has(file):
            return
        names = list(self.circuits)
        circuits = list(self.circuits.values())
        shared, either = intersection(circuits), union(circuits)
        table = cross_task_scores(
            [self.ablations[name] for name in names],
            [*circuits, shared, either],
            self._step("circuits on the other tasks"),
        )
        self.directory.write_json(
            file,
            {
                "tasks": names,
                "jaccard_heads": jaccard_matrix(circuits, "heads").tolist(),
                "jaccard_nodes": jaccard_matrix(circuits).tolist(),
                "cross_task": table.tolist(),
                "cross_task_columns": [*names, "shared", "union"],
                "shared": {"heads": shared.heads, "mlps": shared.mlps},
                "union": {"heads": either.heads, "mlps": either.mlps},
            },
        )


def fingerprint(model: HookedTransformer) -> str:
    """A short hash of a model's configuration and of a sample of its weights, to tell one checkpoint from another."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, value in model.state_dict().items():
        sample = value.flatten()[:: max(1, value.numel() // 1024)].float().cpu().contiguous()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def circuits_of(directory: RunDirectory, slug: str) -> dict[str, Circuit]:
    """The circuits that a run found for a model, by task."""
    tasks: Sequence[str] = directory.run["tasks"]
    files = {task: f"circuits/{slug}.{task}.json" for task in tasks}
    return {task: Circuit.from_dict(directory.read_json(file)) for task, file in files.items() if directory.has(file)}
