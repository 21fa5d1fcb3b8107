"""The whole study of a model: tasks, sweeps, circuits, what they share, and a report, in a run directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, get_args

import torch

from subcircuit.analysis.baselines import called, random_baseline, suitable_n_random, table_with_q
from subcircuit.analysis.circuit import Circuit, intersection, union
from subcircuit.analysis.compare import cross_task_scores, jaccard_matrix
from subcircuit.analysis.discover import discover, why_empty
from subcircuit.analysis.faithfulness import Ablation, node_drops
from subcircuit.analysis.heads import repeated_measures
from subcircuit.analysis.measures import Measure
from subcircuit.analysis.metrics import final_logits, is_top, logit_difference
from subcircuit.analysis.overlap import Kind, overlap_matrix
from subcircuit.analysis.pruning import Direction
from subcircuit.analysis.records import (
    csv_text,
    describe,
    now,
    peak_memory_bytes,
    read_scores,
    slugs_of,
    slugs_of_tasks,
    timed,
    versions,
    write_scores,
)
from subcircuit.analysis.report import write_report
from subcircuit.analysis.sections import Section, Subject
from subcircuit.analysis.stages import STAGES, TASK_STAGES, left_out, transfer_stage, why_not
from subcircuit.analysis.statistics import bootstrap_mean
from subcircuit.analysis.store import RunDirectory
from subcircuit.analysis.sweep import Scores, sweep
from subcircuit.analysis.tasks import Task, check_known, file_fingerprint, is_file_name
from subcircuit.analysis.tasks import task as build_task
from subcircuit.engine.errors import PatchError, StoreError, TaskError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.options import Executor, Precision
from subcircuit.engine.threads import is_small, suitable_threads
from subcircuit.weights.names import load

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, units done, units in all)."""

N_EXAMPLES = 4
N_RANDOM = 10
"""Random circuits of a model that is not small, where no number is given."""
N_TOP = 3
"""Tokens that an example shows of what the model expects."""


@dataclass(frozen=True)
class StudySettings:
    """What a study depends on; a run is resumed only with the same ones.

    `n_random` is how many random circuits are scored per task; None is 1,000 for a small model (200 of edges) and
    10 for another.
    `n_edge_prompts` is how many prompts edges are patched on. `n_sensitivity_prompts` is on how many a circuit is
    measured under every convention; None is all for a small model and 3 for another. `stages` are what is asked of each
    circuit once it is found (`analysis.stages.STAGES`); a run may be resumed with others.
    """

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
    device: str = "cpu"
    n_random: int | None = None
    n_edge_prompts: int = 8
    n_sensitivity_prompts: int | None = None
    stages: tuple[str, ...] = STAGES


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

    Each stage's result is written whole when it is done; with `resume` it is not computed again. A task that does not
    fit a model's tokenizer, or that the model does not do (it does not prefer the answers), is left out with a note in
    run.json; so is what cannot be asked of a circuit without nodes, which is what pruning leaves of a task that needs
    none. Every model is loaded and its tasks are built before the first long stage, so that what is wrong with the
    last of several models is said at once.

    Raises TaskError for an unknown task, or when none is left for a model; WeightsError for an unknown model;
    PatchError for an option that is not known; StoreError when the folder is taken, or for both `resume` and
    `overwrite`, which would delete what should be resumed.
    """
    if resume and overwrite:
        raise StoreError("resume and overwrite contradict each other; expected one of them")
    settings = replace(
        settings, models=tuple(dict.fromkeys(settings.models)), tasks=tuple(dict.fromkeys(map(str, settings.tasks)))
    )
    if not settings.models or not settings.tasks:
        raise TaskError("a study needs at least one model and one task")
    for name in settings.tasks:
        if not is_file_name(name):
            check_known(name)
    _check_options(settings)
    run = {
        "command": command,
        "settings": _as_written(settings),
        "tasks": list(slugs_of_tasks(settings.tasks).values()),
        "seed": settings.seed,
        "versions": versions(),
        "started": now(),
        "models": [],
        "timings": {},
        "notes": [],
    }
    directory = RunDirectory.create(out, run, resume=resume, overwrite=overwrite)
    progress = progress or (lambda stage, done, total: None)
    studies = [
        _ModelStudy(directory, settings, name, slug, progress)
        for name, slug in zip(settings.models, slugs_of(settings.models), strict=True)
        if not _is_finished(directory, slug, settings.stages)
    ]
    # The first model last: it stays loaded for its study, and no other does, so that only one is in memory.
    for model_study in reversed(studies):
        model_study.prepare()
        if model_study is not studies[0]:
            model_study.loaded = None
    for model_study in studies:
        model_study.run()
    progress("report", 0, 1)
    with timed(directory, "report"):
        write_report(directory)
    progress("report", 1, 1)
    peak = max(directory.run.get("peak_memory_bytes", 0), peak_memory_bytes())
    directory.update_run(finished=now(), peak_memory_bytes=peak)
    return directory


def _as_written(settings: StudySettings) -> dict[str, Any]:
    """Settings for run.json, without the stages; with what task files hold, as they may change under one name."""
    written = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(settings).items()
        if name != "stages"
    }
    files = {name: file_fingerprint(name) for name in settings.tasks if is_file_name(name)}
    return written | ({"contents_of_files": files} if files else {})


def _check_options(settings: StudySettings) -> None:
    """Raises PatchError for what a later stage would refuse, when much is computed already."""
    choices = {
        "source": ("corrupted", "mean", "zero"),
        "first": get_args(Direction),
        "precision": get_args(Precision),
        "executor": get_args(Executor),
    }
    for name, known in choices.items():
        value = getattr(settings, name)
        if value not in known:
            raise PatchError(f"{name} {value!r} is not known; expected one of {', '.join(known)}")
    if not settings.threshold > 0:
        raise PatchError(f"threshold {settings.threshold} must be positive: points of score that the circuit may lose")
    for stage in settings.stages:
        if stage not in STAGES:
            raise PatchError(f"stage {stage!r} is not known; expected some of {', '.join(STAGES)}")
    if "edge-faithfulness" in settings.stages and "edges" not in settings.stages:
        raise PatchError("stage 'edge-faithfulness' judges what 'edges' finds; expected both or neither")
    for name in ("n", "max_sweeps", "n_random", "n_edge_prompts", "n_sensitivity_prompts"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise PatchError(f"{name} is {value}; expected at least 1")


def circuits_of(directory: RunDirectory, slug: str) -> dict[str, Circuit]:
    """The circuits that a run found for a model, by task."""
    files = _files_by_task(directory, f"circuits/{slug}.{{}}.json")
    return {task: Circuit.from_dict(directory.read_json(file)) for task, file in files.items()}


def scores_of(directory: RunDirectory, slug: str) -> dict[str, Scores]:
    """The sweeps that a run made for a model, by task."""
    files = _files_by_task(directory, f"scores/{slug}.{{}}.safetensors")
    return {task: read_scores(directory, file) for task, file in files.items()}


def _files_by_task(directory: RunDirectory, pattern: str) -> dict[str, str]:
    files = {task: pattern.format(task) for task in directory.run["tasks"]}
    return {task: file for task, file in files.items() if directory.has(file)}


def _is_finished(directory: RunDirectory, slug: str, stages: Sequence[str]) -> bool:
    """Whether every file that a model's part of the study ends with is there."""
    file = f"results/{slug}.compare.json"
    if not directory.has(file) or slug not in [model["slug"] for model in directory.run["models"]]:
        return False
    names = ["scores/{}.{}.safetensors", "circuits/{}.{}.json", "results/{}.{}.json"]
    names += [f"results/{{}}.{{}}.{stage}.json" for stage in stages if stage in TASK_STAGES]
    tasks = directory.read_json(file)["tasks"]
    if "transfer" in stages and not directory.has(f"results/{slug}.transfer.json"):
        return False
    return all(directory.has(name.format(slug, task)) for name in names for task in tasks)


@dataclass
class _ModelStudy:
    """One model's part of a study."""

    directory: RunDirectory
    settings: StudySettings
    name: str
    slug: str
    progress: Progress
    tasks: dict[str, Task] = field(default_factory=dict)
    clean: dict[str, dict[str, Any]] = field(default_factory=dict)
    circuits: dict[str, Circuit] = field(default_factory=dict)
    loaded: HookedTransformer | None = None

    @property
    def model(self) -> HookedTransformer:
        """The model, loaded when it is first needed."""
        if self.loaded is None:
            with self._stage("load"):
                self.loaded = load(self.name, dtype=self.settings.dtype, device=self.settings.device)
        return self.loaded

    def prepare(self) -> None:
        """Load the model and build its tasks."""
        self._describe()
        with suitable_threads(self.model), self._stage("tasks"):
            self._build_tasks()

    def run(self) -> None:
        """The long stages."""
        with suitable_threads(self.model):
            for task_name, task in self.tasks.items():
                self._study_task(task_name, task)
            self._compare()
            self._transfer()
        self.loaded = None

    @contextmanager
    def _stage(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Times a stage, and tells the progress of its begin and end and of what it reports in between."""
        label = f"{self.name}: {name}"
        self.progress(label, 0, 1)
        with timed(self.directory, f"{self.slug}: {name}"):
            units = [1, 1]

            def step(done: int, total: int) -> None:
                units[:] = done, total
                self.progress(label, done, total)

            yield step
        self.progress(label, units[1], units[1])

    def _describe(self) -> None:
        description = describe(self.model, self.name, self.slug)
        models = {model["slug"]: model for model in self.directory.run["models"]}
        before = models.get(self.slug)
        if before is not None and before["fingerprint"] != description["fingerprint"]:
            raise StoreError(f"{self.directory.path} was run with other weights of {self.name}; it cannot be resumed")
        models[self.slug] = description
        in_order = [models[slug] for slug in slugs_of(self.settings.models) if slug in models]
        self.directory.update_run(models=in_order)

    def _build_tasks(self) -> None:
        """Every task that fits the tokenizer and that the model does, before any long work: errors come early."""
        settings, reasons = self.settings, []
        for given, name in slugs_of_tasks(settings.tasks).items():
            try:
                task = build_task(
                    given,
                    self.model,
                    n=settings.n,
                    seed=settings.seed,
                    template=settings.template,
                    filter=settings.filter,
                )
                if settings.source == "corrupted" and task.corrupted is None:
                    raise TaskError(f"task {name!r} has no corrupted prompts; expected the source mean or zero")
                self.clean[name] = self._clean_run(task)
                self.tasks[name] = replace(task, name=name)
            except TaskError as error:
                reasons.append(f"{self.name}: {error}")
        if not self.tasks:
            raise TaskError(reasons[0])
        self._note(*reasons)

    def _clean_run(self, task: Task) -> dict[str, Any]:
        """What the unpatched model makes of a task. Raises TaskError when it does not prefer the answers."""
        rows = final_logits(self.model, task.clean)
        differences = logit_difference(rows, *task.answer_sets)
        full = float(differences.mean())
        if full <= 0:
            raise TaskError(
                f"task {task.name!r}: the model does not prefer the answers (mean logit difference {full:.3f})"
            )
        correct = is_top(rows, task.answer_sets[0])
        top = rows[:N_EXAMPLES].softmax(-1).topk(min(N_TOP, rows.shape[-1]))
        examples = [
            {
                "prompt": task.prompts[i],
                "corrupted": task.corrupted_prompts[i] if task.corrupted_prompts else None,
                "answer": self._text(int(task.answer[i])),
                "wrong": self._text(int(task.wrong[i])),
                "model_top": self._text(int(top.indices[i, 0])),
                "top": [[self._text(int(id)), float(p)] for id, p in zip(top.indices[i], top.values[i], strict=True)],
                "correct": bool(correct[i]),
            }
            for i in range(min(N_EXAMPLES, task.n))
        ]
        measured = {"accuracy": correct.double(), "full_logit_difference": differences.double()}
        found = {name: bootstrap_mean(values, seed=self.settings.seed) for name, values in measured.items()}
        intervals = {name: self._ends(*interval.at()) for name, interval in found.items()}
        return {"examples": examples, "accuracy": float(correct.float().mean()), "intervals": intervals}

    def _ends(self, _: float, low: float, high: float) -> list[float] | None:
        """Of an interval over prompts; None of a single prompt, which does not say how others differ."""
        return [low, high] if self.settings.n > 1 else None

    def _text(self, token: int) -> str:
        return self.model.tokenizer.decode([token]) if self.model.tokenizer is not None else str(token)

    def _study_task(self, name: str, task: Task) -> None:
        scores = self._sweep(name, task)
        files = f"circuits/{self.slug}.{name}.json", f"results/{self.slug}.{name}.json"
        if not all(map(self.directory.has, files)):
            # All its clean activations, so only for as long as they are needed.
            ablation = self._ablation(task)
            self._discover(files[0], name, task, ablation)
            circuit = Circuit.from_dict(self.directory.read_json(files[0]))
            self._results(files[1], name, task, scores, circuit, ablation)
        self.circuits[name] = Circuit.from_dict(self.directory.read_json(files[0]))
        self._ask_further(name, task, scores)

    def _ask_further(self, name: str, task: Task, scores: Scores) -> None:
        """The stages that come after a circuit is found."""
        settings = self.settings
        subject = Subject(
            self.model,
            task,
            scores,
            self.circuits[name],
            settings.seed,
            settings.precision,
            settings.executor,
            self._n_random(),
            self._n_random(of_edges=True),
            settings.n_edge_prompts,
            self._n_sensitivity_prompts,
            lambda: self._repeated,
        )
        if not subject.circuit.nodes:
            self._note(f"{self.name}: the circuit of task {name!r} is empty: {why_empty(subject.circuit)}")
        reasons: dict[str, list[str]] = {}
        for stage, ask in TASK_STAGES.items():
            if stage not in settings.stages:
                continue
            reason, file = why_not(stage, subject.circuit, task), f"{self.slug}.{name}.{stage}"
            if reason is not None:
                reasons.setdefault(reason, []).append(stage)
            if self.directory.has(f"results/{file}.json"):
                continue
            if reason is None:
                with self._stage(f"{name}, {stage}") as step:
                    section = ask(subject, step)
                    if section.circuit is not None:
                        subject = replace(subject, circuit=section.circuit)
                        self.circuits[name] = section.circuit
                        self.directory.write_json(f"circuits/{self.slug}.{name}.json", section.circuit.to_dict())
            else:
                section = left_out(stage, reason)
            self._write_section(file, section)
        for reason, stages in reasons.items():
            self._note(f"{self.name}: left out for task {name!r}: {', '.join(stages)}, since {reason}")

    def _note(self, *notes: str) -> None:
        """Add to what run.json says beside the results, once each."""
        self.directory.update_run(notes=list(dict.fromkeys([*self.directory.run["notes"], *notes])))

    @cached_property
    def _repeated(self) -> dict[str, Measure]:
        """What heads do on repeated tokens: of the model, so measured once for all tasks."""
        return repeated_measures(self.model, self.settings.seed)

    def _transfer(self) -> None:
        name = f"{self.slug}.transfer"
        if "transfer" not in self.settings.stages or self.directory.has(f"results/{name}.json"):
            return
        if self.model.tokenizer is None or not any(circuit.heads for circuit in self.circuits.values()):
            reason = "the model has no tokenizer" if self.model.tokenizer is None else "no circuit has heads"
            self._note(f"{self.name}: transfer is left out: {reason}")
            self._write_section(name, left_out("transfer", reason))
            return
        with self._stage("transfer") as step:
            section = transfer_stage(
                self.model,
                self.circuits,
                {name: given for given, name in slugs_of_tasks(self.settings.tasks).items()},
                self.settings.seed,
                lambda what, done, total: step(done, total),
            )
            self._write_section(name, section)

    def _write_section(self, name: str, section: Section) -> None:
        """Its figures first: where the values are, they are too."""
        for figure, svg in section.figures.items():
            self.directory.write_text(f"figures/{name}.{figure}.svg", svg)
        self.directory.write_json(f"results/{name}.json", section.to_dict())

    def _n_random(self, of_edges: bool = False) -> int:
        return self.settings.n_random or suitable_n_random(self.model, N_RANDOM, of_edges=of_edges)

    @property
    def _n_sensitivity_prompts(self) -> int:
        if self.settings.n_sensitivity_prompts is not None:
            return self.settings.n_sensitivity_prompts
        return self.settings.n if is_small(self.model) else 3

    def _ablation(self, task: Task) -> Ablation:
        return Ablation(self.model, task, executor=self.settings.executor, precision=self.settings.precision)

    def _sweep(self, name: str, task: Task) -> Scores:
        file, settings = f"scores/{self.slug}.{name}.safetensors", self.settings
        if not self.directory.has(file):
            with self._stage(f"{name}, sweep of heads and MLPs") as step:
                scores = sweep(
                    self.model,
                    task,
                    "heads+mlps",
                    source=settings.source,
                    executor=settings.executor,
                    precision=settings.precision,
                    progress=step,
                )
            about = {"task_seed": task.seed, "template": task.template, "task_fingerprint": task.fingerprint()}
            write_scores(self.directory, file, replace(scores, settings=scores.settings | about))
        self._write_csv()
        return read_scores(self.directory, file)

    def _write_csv(self) -> None:
        """All sweeps that are there as one table, made anew: its rows cannot be fewer or more than the sweeps'."""
        rows = [
            {"model": model["name"], "task": task, **row}
            for model in self.directory.run["models"]
            for task, scores in scores_of(self.directory, model["slug"]).items()
            for row in table_with_q(scores, seed=self.settings.seed)
        ]
        self.directory.write_text("scores.csv", csv_text(rows))

    def _discover(self, file: str, name: str, task: Task, ablation: Ablation) -> None:
        if self.directory.has(file):
            return
        settings = self.settings
        with self._stage(f"{name}, pruning") as step:
            circuit = discover(
                self.model,
                task,
                threshold=settings.threshold,
                first=settings.first,
                max_sweeps=settings.max_sweeps,
                ablation=ablation,
                progress=step,
            )
        about = {
            "n_prompts": task.n,
            "task_seed": task.seed,
            "template": task.template,
            "task_fingerprint": task.fingerprint(),
        }
        self.directory.write_json(file, replace(circuit, settings=circuit.settings | about).to_dict())

    def _results(self, file: str, name: str, task: Task, scores: Scores, circuit: Circuit, ablation: Ablation) -> None:
        with self._stage(f"{name}, drops and random circuits") as step:
            drops = node_drops(ablation, circuit, seed=self.settings.seed)
            score = ablation.score_intervals(ablation.kept_values([circuit.nodes])[0], seed=self.settings.seed)
            random_scores: list[float] = []
            if circuit.nodes:  # those without are all the same one
                baseline = random_baseline(ablation, circuit, self._n_random(), seed=self.settings.seed, progress=step)
                random_scores = baseline.scores.tolist()
        tested = table_with_q(scores, seed=self.settings.seed)
        self.directory.write_json(
            file,
            {
                **self.clean[name],
                "full_logit_difference": ablation.full,
                "n_prompts": task.n,
                "n_pos": task.pos,
                "template": task.template,
                "heads": scores.heads().tolist(),
                "mlps": scores.mlps().tolist(),
                "clean_mean": float(scores.clean_metric.mean()),
                "q": {row["site"]: row["q"] for row in tested},
                "called": called(tested, task.n),
                "drops": {node: drop for node, (drop, *_) in drops.items()},
                "drop_intervals": {node: self._ends(*drop) for node, drop in drops.items()},
                "intervals": self.clean[name]["intervals"] | {"score": self._ends(*score.at())},
                "random_scores": random_scores,
            },
        )

    def _overlaps(self, circuits: Sequence[Circuit], kind: Kind) -> list[list[dict[str, Any]]]:
        return [[each.to_dict() for each in row] for row in overlap_matrix(circuits, self.model.config, kind)]

    def _compare(self) -> None:
        file = f"results/{self.slug}.compare.json"
        names, circuits = list(self.circuits), list(self.circuits.values())
        shared, either = intersection(circuits), union(circuits)
        with self._stage("circuits on each other's tasks") as step:
            table = []
            for name in names:
                ablation, seed = self._ablation(self.tasks[name]), self.settings.seed
                table.append(cross_task_scores([ablation], [*circuits, shared, either], seed=seed))
                step(len(table), len(names))
        cross_task, low, high = (torch.cat(part) for part in zip(*table, strict=True))
        ends = [[self._ends(0, *pair) for pair in row] for row in torch.stack((low, high), -1).tolist()]
        self.directory.write_json(
            file,
            {
                "tasks": names,
                "jaccard_heads": jaccard_matrix(circuits, "heads").tolist(),
                "jaccard_nodes": jaccard_matrix(circuits).tolist(),
                "overlap_heads": self._overlaps(circuits, "heads"),
                "overlap_nodes": self._overlaps(circuits, "nodes"),
                "cross_task": cross_task.tolist(),
                "cross_task_intervals": ends,
                "cross_task_columns": [*names, "shared", "union"],
                "shared": {"heads": shared.heads, "mlps": shared.mlps},
                "union": {"heads": either.heads, "mlps": either.mlps},
            },
        )
