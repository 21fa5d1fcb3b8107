"""One model's part of a study: its tasks, then stage after stage, each written whole before the next begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any

from subcircuit.analysis.baselines import called, random_baseline, suitable_n_random, table_with_q
from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.clean_run import clean_run
from subcircuit.analysis.common import crossed, in_common
from subcircuit.analysis.discover import discover, why_empty
from subcircuit.analysis.faithfulness import Ablation, node_drops
from subcircuit.analysis.heads import repeated_measures
from subcircuit.analysis.measures import Measure
from subcircuit.analysis.records import (
    csv_text,
    describe,
    read_scores,
    scores_of,
    slugs_of,
    slugs_of_tasks,
    timed,
    write_scores,
)
from subcircuit.analysis.sections import Section, Subject
from subcircuit.analysis.stages import TASK_STAGES, left_out, transfer_stage, why_not
from subcircuit.analysis.store import RunDirectory
from subcircuit.analysis.sweep import Scores, sweep
from subcircuit.analysis.tasks import Task
from subcircuit.analysis.tasks import task as build_task
from subcircuit.engine.errors import StoreError, TaskError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.threads import is_small, suitable_threads
from subcircuit.weights.names import load

if TYPE_CHECKING:
    from subcircuit.analysis.study import StudySettings

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, units done, units in all)."""

N_RANDOM = 10
"""Random circuits of a model that is not small, where no number is given."""


@dataclass
class ModelStudy:
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
        # What an earlier run noted of this model is noted again where it is still so.
        notes = [note for note in self.directory.run["notes"] if not note.startswith(f"{self.name}: ")]
        self.directory.update_run(notes=notes)
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
        self._write_models(models)

    def _write_models(self, models: dict[str, dict[str, Any]]) -> None:
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
                self.clean[name] = clean_run(self.model, task, settings.seed)
                self.tasks[name] = replace(task, name=name)
            except TaskError as error:
                reasons.append(f"{self.name}: {error}")
        if not self.tasks:
            raise TaskError(reasons[0])
        self._note(*reasons)
        models = {model["slug"]: model for model in self.directory.run["models"]}
        self._write_models(models | {self.slug: models[self.slug] | {"tasks": list(self.tasks)}})

    def _asked(self, stage: str, file: str) -> bool:
        """Whether a stage is asked for and its file is not there yet."""
        return stage in self.settings.stages and not self.directory.has(file)

    def _study_task(self, name: str, task: Task) -> None:
        scores = self._sweep(name, task)
        self._write_results(name, task, scores)
        # It holds all clean activations of a task, so it is made when first needed, and only for these two.
        ablation = cache(partial(self._ablation, task))
        circuit = self._discover(name, task, ablation)
        if circuit is not None:
            self.circuits[name] = circuit
            self._against_chance(name, task, circuit, ablation)
        del ablation
        self._ask_further(name, task, scores, circuit)

    def _ask_further(self, name: str, task: Task, scores: Scores | None, circuit: Circuit | None) -> None:
        """The stages that come after a circuit is found."""
        settings = self.settings
        subject = Subject(
            model=self.model,
            task=task,
            scores=scores,
            circuit=Circuit([], []) if circuit is None else circuit,
            source=settings.source,
            seed=settings.seed,
            precision=settings.precision,
            executor=settings.executor,
            n_random=self._n_random(),
            n_random_edges=self._n_random(of_edges=True),
            n_edge_prompts=settings.n_edge_prompts,
            n_sensitivity_prompts=self._n_sensitivity_prompts,
            repeated=lambda: self._repeated,
        )
        if circuit is not None and not circuit.nodes:
            self._note(f"{self.name}: the circuit of task {name!r} is empty: {why_empty(circuit)}")
        reasons: dict[str, list[str]] = {}
        for stage, ask in TASK_STAGES.items():
            if stage not in settings.stages:
                continue
            file = f"{self.slug}.{name}.{stage}"
            reason = why_not(stage, None if circuit is None else subject.circuit, task)
            if reason is not None:
                reasons.setdefault(reason, []).append(stage)
            if self._is_done(file, reason):
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

    def _is_done(self, name: str, reason: str | None) -> bool:
        """Whether a section is there; one that was left out is not done when it could be asked now."""
        file = f"results/{name}.json"
        return self.directory.has(file) and (reason is not None or not self.directory.read_json(file)["left_out"])

    def _note(self, *notes: str) -> None:
        """Add to what run.json says beside the results, once each."""
        self.directory.update_run(notes=list(dict.fromkeys([*self.directory.run["notes"], *notes])))

    @cached_property
    def _repeated(self) -> dict[str, Measure]:
        """What heads do on repeated tokens: of the model, so measured once for all tasks."""
        return repeated_measures(self.model, self.settings.seed)

    def _transfer(self) -> None:
        name, reason = f"{self.slug}.transfer", None
        if "transfer" not in self.settings.stages:
            return
        if self.model.tokenizer is None or not any(circuit.heads for circuit in self.circuits.values()):
            reason = "the model has no tokenizer" if self.model.tokenizer is None else "no circuit has heads"
            self._note(f"{self.name}: transfer is left out: {reason}")
        if self._is_done(name, reason):
            return
        if reason is not None:
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

    def _sweep(self, name: str, task: Task) -> Scores | None:
        file, settings = f"scores/{self.slug}.{name}.safetensors", self.settings
        if self._asked("sweep", file):
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
            write_scores(self.directory, file, replace(scores, settings=scores.settings | _about(task)))
        if not self.directory.has(file):
            return None
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

    def _discover(self, name: str, task: Task, ablation: Callable[[], Ablation]) -> Circuit | None:
        """The task's circuit, found or read; None where none is there and none is asked for."""
        file, settings = f"circuits/{self.slug}.{name}.json", self.settings
        if self._asked("prune", file):
            with self._stage(f"{name}, pruning") as step:
                circuit = discover(
                    self.model,
                    task,
                    threshold=settings.threshold,
                    first=settings.first,
                    max_sweeps=settings.max_sweeps,
                    ablation=ablation(),
                    progress=step,
                )
            about = {"n_prompts": task.n, **_about(task)}
            self.directory.write_json(file, replace(circuit, settings=circuit.settings | about).to_dict())
        return Circuit.load(self.directory.path / file) if self.directory.has(file) else None

    def _write_results(self, name: str, task: Task, scores: Scores | None) -> None:
        """What is known of a task before its circuit: the clean run, and the sweep where there is one."""
        values = {**self.clean[name], "n_prompts": task.n, "n_pos": task.pos, "template": task.template}
        if scores is not None:
            tested = table_with_q(scores, seed=self.settings.seed)
            values |= {
                "heads": scores.heads().tolist(),
                "mlps": scores.mlps().tolist(),
                "clean_mean": float(scores.clean_metric.mean()),
                "q": {row["site"]: row["q"] for row in tested},
                "called": called(tested, task.n),
            }
        file = f"results/{self.slug}.{name}.json"
        if self.directory.json_if_there(file) != values:
            self.directory.write_json(file, values)

    def _against_chance(self, name: str, task: Task, circuit: Circuit, ablation: Callable[[], Ablation]) -> None:
        """What each node of the circuit is worth, and what random circuits score."""
        file, seed = f"results/{self.slug}.{name}.random.json", self.settings.seed
        if not self._asked("random", file):
            return
        with self._stage(f"{name}, drops and random circuits") as step:
            drops = node_drops(ablation(), circuit, seed=seed)
            score = ablation().score_intervals(ablation().kept_values([circuit.nodes])[0], seed=seed)
            random_scores: list[float] = []
            if circuit.nodes:  # those without are all the same one
                baseline = random_baseline(ablation(), circuit, self._n_random(), seed=seed, progress=step)
                random_scores = baseline.scores.tolist()
        several = task.n > 1  # a single prompt does not say how others differ
        values = {
            "drops": {node: drop for node, (drop, *_) in drops.items()},
            "drop_intervals": {node: list(ends) if several else None for node, (_, *ends) in drops.items()},
            "score_interval": list(score.at()[1:]) if several else None,
            "random_scores": random_scores,
        }
        self.directory.write_json(file, values)

    def _compare(self) -> None:
        """Always made anew: it is of the circuits as they are now, which a resumed run may have given edges."""
        if "compare" not in self.settings.stages or not self.circuits:
            return
        with self._stage("circuits on each other's tasks") as step:
            scores = crossed(self.circuits, lambda name: self._ablation(self.tasks[name]), self.settings.seed, step)
        values = in_common(self.circuits, self.model.config) | scores
        self.directory.write_json(f"results/{self.slug}.compare.json", values)


def _about(task: Task) -> dict[str, Any]:
    """What a file says of the prompts that it was made with."""
    return {"task_seed": task.seed, "template": task.template, "task_fingerprint": task.fingerprint()}
