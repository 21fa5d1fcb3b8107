"""subcircuit study, subcircuit report."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import subcircuit as sc
from subcircuit.analysis.plural import counted
from subcircuit.console import interval, new_table, out, progress_bars, say_written
from subcircuit.options import (
    TASKS,
    DeviceOption,
    Direction,
    DtypeOption,
    Executor,
    ExecutorOption,
    FilterOption,
    FirstOption,
    JsonOption,
    MaxSweepsOption,
    NOption,
    Precision,
    PrecisionOption,
    QuietOption,
    SeedOption,
    TemplateOption,
    ThresholdOption,
    names_in,
)

if TYPE_CHECKING:
    from rich.table import Table

    from subcircuit.analysis.store import RunDirectory


def study(
    model: Annotated[list[str], typer.Option("--model", "-m", help="A model; may be given several times.")],
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="The run directory to write.")],
    tasks: Annotated[
        str, typer.Option("--tasks", "--task", "-t", help=f"{TASKS}, or .csv or .json files; joined by commas.")
    ] = "numerals,number_words,months",
    n: NOption = 32,
    seed: SeedOption = 0,
    template: TemplateOption = "all",
    only_answered: FilterOption = False,
    source: Annotated[str, typer.Option(help="What the sweeps put in place: corrupted, mean or zero.")] = "corrupted",
    threshold: ThresholdOption = 20.0,
    first: FirstOption = Direction.backward,
    max_sweeps: MaxSweepsOption = None,
    precision: PrecisionOption = Precision.fp32,
    executor: ExecutorOption = Executor.torch,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    n_random: Annotated[
        int | None, typer.Option("--random", min=1, help="Random circuits per task; 1000 for a small model, else 10.")
    ] = None,
    n_edge_prompts: Annotated[
        int, typer.Option("--edge-prompts", min=1, help="Prompts that edges are patched on.")
    ] = 8,
    n_sensitivity_prompts: Annotated[
        int | None,
        typer.Option(
            "--sensitivity-prompts",
            min=1,
            help="Prompts to measure on under every convention; all for a small model, else 3.",
        ),
    ] = None,
    stages: Annotated[
        str,
        typer.Option(
            help="Joined by commas: sweep, prune, random, faithfulness, sensitivity, edges, edge-faithfulness, roles, "
            "lens, compare, transfer; or all."
        ),
    ] = "all",
    skip: Annotated[str, typer.Option(help="Stages to leave out, joined by commas.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is there.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run that is there.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find and compare the circuits of several tasks. In one or more models, with a report of it all."""
    settings = sc.StudySettings(
        models=tuple(model),
        tasks=tuple(names_in(tasks)),
        n=n,
        seed=seed,
        template=template,
        filter=only_answered,
        source=source,
        threshold=threshold,
        first=first.value,
        max_sweeps=max_sweeps,
        precision=precision.value,
        executor=executor.value,
        dtype=dtype,
        device=device,
        n_random=n_random,
        n_edge_prompts=n_edge_prompts,
        n_sensitivity_prompts=n_sensitivity_prompts,
        stages=_stages(stages, skip),
    )
    command = shlex.join(["subcircuit", *sys.argv[1:]])
    with progress_bars(quiet) as progress:
        run = sc.study(settings, str(out_dir), resume=resume, overwrite=overwrite, command=command, progress=progress)
    say_written(run.path / "report.html", silent=quiet or as_json)
    if as_json:
        print(json.dumps({"out": str(run.path), "report": str(run.path / "report.html"), **_study_values(run)}))
    else:
        _print_study(run)


def _stages(text: str, skip: str) -> tuple[str, ...]:
    """Those asked for, less those to leave out. Refuses to leave out what is no stage."""
    from subcircuit.analysis.stages import STAGES

    asked = STAGES if text == "all" else names_in(text)
    left_out = names_in(skip)
    for name in left_out:
        if name not in STAGES:
            raise typer.BadParameter(f"--skip {name} is no stage; expected some of {', '.join(STAGES)}")
    return tuple(stage for stage in asked if stage not in left_out)


def report(directory: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write the report of a run directory anew."""
    from subcircuit.analysis.report import write_report
    from subcircuit.analysis.store import RunDirectory

    print(write_report(RunDirectory.open(directory)))


def _study_values(run: RunDirectory) -> dict[str, Any]:
    from subcircuit.analysis.records import circuits_of

    values: dict[str, Any] = {"models": {}, "notes": run.run["notes"], "timings": run.run["timings"]}
    for model in run.run["models"]:
        slug = model["slug"]
        circuits = {}
        for task, circuit in circuits_of(run, slug).items():
            result = run.read_json(f"results/{slug}.{task}.json")
            chance = run.json_if_there(f"results/{slug}.{task}.random.json")
            circuits[task] = {
                "heads": circuit.heads,
                "mlps": circuit.mlps,
                "n_edges": len(circuit.edges),
                "score": circuit.score,
                "accuracy": result["accuracy"],
                "intervals": result["intervals"] | {"score": chance.get("score_interval")},
                "random_scores": chance.get("random_scores", []),
            }
        compare = run.json_if_there(f"results/{slug}.compare.json")
        kept = ("shared", "cross_task", "cross_task_intervals", "cross_task_columns", "jaccard_heads")
        values["models"][model["name"]] = {
            "circuits": circuits,
            **{name: compare[name] for name in kept if name in compare},
        }
    return values


def _print_study(run: RunDirectory) -> None:
    for name, found in _study_values(run)["models"].items():
        out.print(f"\n{name}", style="bold")
        if found["circuits"]:
            out.print(_table_of_circuits(found["circuits"]))
        if len(found["circuits"]) > 1 and "shared" in found:
            heads = " ".join(f"{layer}.{head}" for layer, head in found["shared"]["heads"]) or "none"
            mlps = " ".join(map(str, found["shared"]["mlps"])) or "none"
            edges = f"; {counted(len(found['shared']['edges']), 'edge')}" if found["shared"]["edges"] else ""
            out.print(f"in every circuit: heads {heads}; MLPs {mlps}{edges}")
    for note in run.run["notes"]:
        out.print(f"note: {note}")
    out.print(f"\n{sum(run.run['timings'].values()):.0f} s in all")


def _table_of_circuits(circuits: dict[str, Any]) -> Table:
    from subcircuit.analysis.baselines import beside_random

    columns = ("task", "top-1", "95 %", "heads", "MLPs", "edges", "score", "95 %", "random, mean", "random, best", "p")
    table = new_table(*columns)
    for task, circuit in circuits.items():
        intervals, chance = circuit["intervals"], beside_random(circuit["score"], circuit["random_scores"])
        numbers = circuit["score"], chance["random_mean"], chance["random_best"]
        score, *random = ("–" if value is None else f"{value:.1f}" for value in numbers)
        p = "–" if chance["p"] is None else f"{chance['p']:.2g}"
        sizes = [str(n) for n in (len(circuit["heads"]), len(circuit["mlps"]), circuit["n_edges"] or "–")]
        top1 = f"{circuit['accuracy']:.0%}", interval(intervals["accuracy"], ".0%")
        table.add_row(task, *top1, *sizes, score, interval(intervals["score"], ".1f"), *random, p)
    return table
