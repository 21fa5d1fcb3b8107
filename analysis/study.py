"""The whole study of a model: tasks, sweeps, circuits, what they share, and a report, in a run directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from subcircuit.analysis.ablation import check_threshold
from subcircuit.analysis.common import aligned
from subcircuit.analysis.model_study import ModelStudy, Progress
from subcircuit.analysis.pruning import Direction
from subcircuit.analysis.records import (
    circuits_of,
    config_of,
    now,
    peak_memory_bytes,
    slugs_of,
    slugs_of_tasks,
    timed,
    versions,
)
from subcircuit.analysis.report import write_report
from subcircuit.analysis.stages import STAGES, TASK_STAGES
from subcircuit.analysis.store import RunDirectory
from subcircuit.analysis.tasks import check_known, file_fingerprint, is_file_name
from subcircuit.engine.errors import PatchError, StoreError, TaskError
from subcircuit.engine.patching.options import Executor, Precision


@dataclass(frozen=True)
class StudySettings:
    """What a study depends on; a run is resumed only with the same ones.

    `n_random` is how many random circuits are scored per task; None is 1,000 for a small model (200 of edges) and
    10 for another. `n_edge_prompts` is how many prompts edges are patched on. `n_sensitivity_prompts` is on how many a
    circuit is measured under every convention; None is all for a small model and 3 for another. `stages` are what is
    done (`analysis.stages.STAGES`); what needs a circuit is left out where none is asked for or there. A run may be
    resumed with others.
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
        ModelStudy(directory, settings, name, slug, progress)
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
    if "compare" in settings.stages and len(settings.models) > 1:
        models = directory.run["models"]
        found = [(each["name"], config_of(each["config"]), circuits_of(directory, each["slug"])) for each in models]
        directory.write_json("results/depths.json", {"pairs": aligned(found)})
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
    check_threshold(settings.threshold, "points of score that the circuit may lose")
    for stage in settings.stages:
        if stage not in STAGES:
            raise PatchError(f"stage {stage!r} is not known; expected some of {', '.join(STAGES)}")
    for name in ("n", "max_sweeps", "n_random", "n_edge_prompts", "n_sensitivity_prompts"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise PatchError(f"{name} is {value}; expected at least 1")


def _is_finished(directory: RunDirectory, slug: str, stages: Sequence[str]) -> bool:
    """Whether every file that a model's part of the study ends with is there, and none says that a stage was left out
    which could be asked now."""
    about = {model["slug"]: model for model in directory.run["models"]}.get(slug, {})
    if "tasks" not in about:
        return False
    of_task = {
        "sweep": "scores/{}.{}.safetensors",
        "prune": "circuits/{}.{}.json",
        "random": "results/{}.{}.random.json",
        **{stage: f"results/{{}}.{{}}.{stage}.json" for stage in TASK_STAGES},
    }
    names = ["results/{}.{}.json", *(of_task[stage] for stage in stages if stage in of_task)]
    of_model = [f"results/{slug}.{stage}.json" for stage in ("compare", "transfer") if stage in stages]
    files = [*of_model, *(name.format(slug, task) for name in names for task in about["tasks"])]
    if not all(map(directory.has, files)):
        return False
    circuits = circuits_of(directory, slug)
    possible = {
        f"results/{slug}.{task}.{stage}.json": bool(circuit.nodes)
        for task, circuit in circuits.items()
        for stage in TASK_STAGES
    }
    possible[f"results/{slug}.transfer.json"] = any(circuit.heads for circuit in circuits.values())
    return not any(possible.get(file) and directory.read_json(file).get("left_out") for file in files)
