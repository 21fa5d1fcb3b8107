"""The command line: each command takes its options, calls the analysis, and prints what came out."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import subcircuit as sc
from subcircuit.engine.errors import SubcircuitError

if TYPE_CHECKING:
    from subcircuit.analysis.store import RunDirectory

app = typer.Typer(
    name="subcircuit",
    help="Which heads and MLPs of a GPT-2 or Llama do a task: exact activation patching, circuits, what they share.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Where no terminal says how wide it is, tables are as wide as they need to be.
out = Console(width=None if sys.stdout.isatty() else 160, soft_wrap=True, markup=False, highlight=False)
err = Console(stderr=True, markup=False, highlight=False)


# typer may bring a click of its own; what it raises for bad options derives from that one's ClickException.
BadUsage: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


INTERRUPTED = 130


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp64 = "fp64"


class Executor(StrEnum):
    torch = "torch"
    reference = "reference"


class Direction(StrEnum):
    backward = "backward"
    forward = "forward"


TASKS = "numerals, number_words, months, weekdays or letters"

ModelOption = Annotated[str, typer.Option("--model", "-m", help="A short name, a directory, a .gguf file or a hub id.")]
TaskOption = Annotated[str, typer.Option("--task", "--tasks", "-t", help=f"{TASKS}.")]
NOption = Annotated[int, typer.Option("--n", "-n", min=1, help="Prompts per task.")]
SeedOption = Annotated[int, typer.Option(help="Of the prompts, and of everything drawn at random.")]
TemplateOption = Annotated[str, typer.Option(help="done, lost, born, bare, several joined by +, or all that fit.")]
FilterOption = Annotated[bool, typer.Option("--filter", help="Only prompts that the model answers, as in the paper.")]
SourceOption = Annotated[str, typer.Option(help="What a patch puts in place: corrupted, mean or zero.")]
PrecisionOption = Annotated[Precision, typer.Option(help="Of the products of differences.")]
ExecutorOption = Annotated[Executor, typer.Option(help="torch: differences only; reference: full forwards.")]
DtypeOption = Annotated[str, typer.Option(help="Of the model's weights: float32, bfloat16, float16 or float64.")]
DeviceOption = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, …")]
JsonOption = Annotated[bool, typer.Option("--json", help="The result as JSON on standard output.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")]
ThresholdOption = Annotated[float, typer.Option(help="Points of score that the circuit may lose.")]
FirstOption = Annotated[Direction, typer.Option(help="Direction of the first pruning sweep.")]
MaxSweepsOption = Annotated[int | None, typer.Option(min=1, help="At most so many pruning sweeps.")]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", "-V", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"subcircuit {sc.__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def study(
    model: Annotated[list[str], typer.Option("--model", "-m", help="A model; may be given several times.")],
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="The run directory to write.")],
    tasks: Annotated[
        str, typer.Option("--tasks", "--task", "-t", help=f"Joined by commas: {TASKS}.")
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
        int | None, typer.Option("--random", min=1, help="Random circuits per task; 50 for a small model, else 10.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is there.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run that is there.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find the circuits of several tasks in one or more models, compare them, and write a report."""
    settings = sc.StudySettings(
        models=tuple(model),
        tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
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
    )
    command = shlex.join(["subcircuit", *sys.argv[1:]])
    with _progress(quiet) as progress:
        run = sc.study(settings, str(out_dir), resume=resume, overwrite=overwrite, command=command, progress=progress)
    if as_json:
        print(json.dumps({"out": str(run.path), "report": str(run.path / "report.html"), **_study_values(run)}))
    else:
        _print_study(run)


@app.command()
def sweep(
    model: ModelOption,
    task: TaskOption,
    components: Annotated[
        str, typer.Option("--components", "-c", help="heads, mlps, keys, values, …, joined by +, or a5.h1.")
    ] = "heads",
    positions: Annotated[
        str | None, typer.Option(help="Positions such as -1 or 4,6, or 'each'; all if left out.")
    ] = None,
    n: NOption = 32,
    seed: SeedOption = 0,
    template: TemplateOption = "all",
    only_answered: FilterOption = False,
    source: SourceOption = "corrupted",
    precision: PrecisionOption = Precision.fp32,
    executor: ExecutorOption = Executor.torch,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    top: Annotated[int, typer.Option(min=1, help="Sites to print, the largest effects first.")] = 10,
    csv_file: Annotated[Path | None, typer.Option("--out", "-o", help="Write every site to this CSV file.")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Patch every component in turn and measure its effect on the logit difference."""
    from subcircuit.analysis.study import suitable_threads

    where = _positions(positions)
    loaded = sc.load(model, dtype=dtype, device=device)
    prompts = sc.task(task, loaded, n=n, seed=seed, template=template, filter=only_answered)
    with _progress(quiet) as progress, suitable_threads(loaded):
        scores = sc.sweep(
            loaded,
            prompts,
            components,
            source=source,
            positions=where,
            executor=executor.value,
            precision=precision.value,
            progress=lambda done, total: progress("sweep", done, total),
        )
    rows = scores.table()
    if csv_file is not None:
        _write_csv(csv_file, rows)
    if as_json:
        print(json.dumps({"settings": scores.settings, "sites": rows}))
        return
    clean = float(scores.clean_metric.mean())
    out.print(f"{len(rows)} sites × {scores.effects.shape[1]} prompts, clean logit difference {clean:.3f}")
    table = _table("site", "effect", "± s.e.", "share")
    for row in sorted(rows, key=lambda row: -abs(row["effect"]))[:top]:
        numbers = f"{row['effect']:+.3f}", f"{row['standard_error']:.3f}", f"{row['share']:+.1%}"
        table.add_row(row["site"], *numbers)
    out.print(table)
    if csv_file is not None:
        out.print(f"All sites: {csv_file}")


@app.command()
def discover(
    model: ModelOption,
    task: TaskOption,
    method: Annotated[str, typer.Option(help="prune: the paper's iterative node pruning.")] = "prune",
    n: NOption = 32,
    seed: SeedOption = 0,
    template: TemplateOption = "all",
    only_answered: FilterOption = False,
    threshold: ThresholdOption = 20.0,
    first: FirstOption = Direction.backward,
    max_sweeps: MaxSweepsOption = None,
    precision: PrecisionOption = Precision.fp32,
    executor: ExecutorOption = Executor.torch,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    circuit_file: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the circuit to this file: JSON, or Graphviz for .dot.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find the circuit of one task by iterative pruning."""
    from subcircuit.analysis.store import write_whole
    from subcircuit.analysis.study import suitable_threads

    loaded = sc.load(model, dtype=dtype, device=device)
    prompts = sc.task(task, loaded, n=n, seed=seed, template=template, filter=only_answered)
    with _progress(quiet) as progress, suitable_threads(loaded):
        circuit = sc.discover(
            loaded,
            prompts,
            method,
            threshold=threshold,
            first=first.value,
            max_sweeps=max_sweeps,
            precision=precision.value,
            executor=executor.value,
            progress=lambda done, total: progress("pruning", done, total),
        )
    if circuit_file is not None:
        text = circuit.to_dot() if circuit_file.suffix == ".dot" else circuit.to_json() + "\n"
        write_whole(circuit_file, text.encode("utf-8"))
    print(circuit.to_json() if as_json else str(circuit))


@app.command()
def generate(
    model: ModelOption,
    texts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="Prompts to continue.")] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="The same as an option.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 20,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    bos: Annotated[bool | None, typer.Option("--bos/--no-bos", help="Override the tokenizer's own rule.")] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Continue prompts."""
    prompts = [*(texts or []), *(prompt or [])]
    if not prompts:
        raise typer.BadParameter("no prompt to continue; expected one or more")
    loaded = sc.load(model, dtype=dtype, device=device, bos=bos)
    result = loaded.generate(prompts, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    made = list(zip(prompts, result.texts or [], result.tokens, strict=True))
    if as_json:
        print(json.dumps([{"prompt": start, "text": text, "tokens": tokens} for start, text, tokens in made]))
        return
    for start, text, _ in made:
        out.print(start, style="dim", end="")
        out.print(text)


@app.command()
def models(as_json: JsonOption = False) -> None:
    """The models that have a short name, and where each is or how to get it."""
    known = sc.known_models()
    if as_json:
        print(json.dumps([{"name": m.name, "description": m.description, "where": m.where()} for m in known]))
        return
    table = _table("name", "model", "where")
    for model in known:
        table.add_row(model.name, model.description, model.where())
    out.print(table)
    out.print("\nAlso a directory in Hugging Face's form, a .gguf file, a llama2.c .bin file, or a hub id.")


@app.command()
def info(
    name: Annotated[str | None, typer.Argument(metavar="MODEL", help="A model.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="The same as an option.")] = None,
    as_json: JsonOption = False,
) -> None:
    """A model's configuration and tokenizer."""
    wanted = name or model
    if wanted is None:
        raise typer.BadParameter("no model; expected a name, a directory or a file")
    loaded = sc.load(wanted)
    tokenizer = loaded.tokenizer
    values: dict[str, Any] = {**vars(loaded.config), "n_params": loaded.config.n_params}
    values["n_hook_points"] = len(loaded.hook_names())
    if tokenizer is not None:
        values |= {"tokenizer": tokenizer.name, "adds_bos": tokenizer.adds_bos, "bos_id": tokenizer.bos_id}
    if as_json:
        print(json.dumps(values, default=vars))
        return
    table = _table("", "")
    for key, value in values.items():
        table.add_row(key, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
    out.print(table)


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write the report of a run directory anew."""
    from subcircuit.analysis.report import write_report
    from subcircuit.analysis.store import RunDirectory

    print(write_report(RunDirectory.open(directory)))


def _positions(text: str | None) -> str | list[int] | None:
    if text is None or text == "each":
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"positions {text!r}: expected integers joined by commas, or 'each'") from None


def _write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    import csv
    import io

    from subcircuit.analysis.store import write_whole

    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(file, text.getvalue().encode("utf-8"))


_NUMBERS = ("effect", "± s.e.", "share", "top-1", "heads", "MLPs", "score", "random, mean", "random, best")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, show_header=any(columns), padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in _NUMBERS else "left", no_wrap=column == "name")
    return table


Update = Callable[[str, int, int], None]
"""Takes what is being done, units done, units in all."""


@contextmanager
def _progress(quiet: bool) -> Iterator[Update]:
    """Progress on standard error: bars with rate and time left on a terminal, else a line per finished stage."""
    if quiet:
        yield lambda stage, done, total: None
    elif err.is_terminal:
        with _bars() as update:
            yield update
    else:
        lines = _Lines()
        yield lines.update
        lines.finish()


class _Lines:
    """A line for each stage when the next one begins."""

    def __init__(self) -> None:
        self.stage, self.start = "", time.perf_counter()

    def update(self, stage: str, done: int, total: int) -> None:
        if stage != self.stage:
            self.finish()
            self.stage, self.start = stage, time.perf_counter()

    def finish(self) -> None:
        if self.stage:
            print(f"{self.stage} ({time.perf_counter() - self.start:.1f} s)", file=sys.stderr, flush=True)


@contextmanager
def _bars() -> Iterator[Update]:
    """A bar per stage; pruning fills its bar once per sweep."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Task as Bar
    from rich.text import Text

    class RateAndTimeLeft(ProgressColumn):
        def render(self, task: Bar) -> Text:
            if task.finished or not task.speed:
                return Text("")
            left = f", {task.time_remaining:.0f} s left" if task.time_remaining is not None else ""
            rate = f"{task.speed:,.0f}" if task.speed >= 10 else f"{task.speed:.1f}"
            return Text(f"{rate} {_unit(task.description)}/s{left}", style="dim")

    columns = [TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn()]
    with Progress(*columns, TimeElapsedColumn(), RateAndTimeLeft(), console=err) as bars:
        current: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            bar = current.get(stage)
            if bar is None:
                bar = current[stage] = bars.add_task(stage, total=total)
            elif done < bars.tasks[bar].completed:
                bars.reset(bar, total=total)
            bars.update(bar, completed=done, total=total)

        yield update


def _unit(stage: str) -> str:
    """What a stage counts."""
    units = {"sweep": "rows", "pruning": "candidates", "random": "circuits"}
    return next((unit for word, unit in units.items() if word in stage), "")


def _study_values(run: RunDirectory) -> dict[str, Any]:
    from subcircuit.analysis.study import circuits_of

    values: dict[str, Any] = {"models": {}, "notes": run.run["notes"], "timings": run.run["timings"]}
    for model in run.run["models"]:
        slug = model["slug"]
        compare = run.read_json(f"results/{slug}.compare.json")
        circuits = {}
        for task, circuit in circuits_of(run, slug).items():
            result = run.read_json(f"results/{slug}.{task}.json")
            found = {"heads": circuit.heads, "mlps": circuit.mlps, "score": circuit.score}
            circuits[task] = found | {name: result[name] for name in ("accuracy", "random_scores")}
        shared = {name: compare[name] for name in ("shared", "cross_task", "cross_task_columns", "jaccard_heads")}
        values["models"][model["name"]] = {"circuits": circuits, **shared}
    return values


def _print_study(run: RunDirectory) -> None:
    for name, found in _study_values(run)["models"].items():
        out.print(f"\n{name}", style="bold")
        table = _table("task", "top-1", "heads", "MLPs", "score", "random, mean", "random, best")
        for task, circuit in found["circuits"].items():
            baseline = circuit["random_scores"]
            numbers = [circuit["score"], sum(baseline) / len(baseline), max(baseline)]
            sizes = len(circuit["heads"]), len(circuit["mlps"])
            table.add_row(task, f"{circuit['accuracy']:.0%}", *map(str, sizes), *(f"{value:.1f}" for value in numbers))
        out.print(table)
        if len(found["circuits"]) > 1:
            heads = " ".join(f"{layer}.{head}" for layer, head in found["shared"]["heads"]) or "none"
            mlps = " ".join(map(str, found["shared"]["mlps"])) or "none"
            out.print(f"in every circuit: heads {heads}; MLPs {mlps}")
    for note in run.run["notes"]:
        out.print(f"note: {note}")
    out.print(f"\n{sum(run.run['timings'].values()):.0f} s in all. Report: {run.path / 'report.html'}")


def main() -> None:
    """Console entry point: bad input is one line on standard error and exit status 2, without a traceback."""
    try:
        if app(prog_name="subcircuit", standalone_mode=False) == INTERRUPTED:
            raise KeyboardInterrupt  # typer has caught it and made a status of it
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has seen enough; nothing is left to say, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except SubcircuitError as error:
        _fail(str(error), 2)
    except BadUsage as error:
        _fail(" ".join(error.format_message().split()), 2)  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        _fail(f"interrupted{_how_to_resume(sys.argv[1:])}", INTERRUPTED)
    except OSError as error:
        _fail(str(error), 2)


def _how_to_resume(arguments: list[str]) -> str:
    if arguments[:1] != ["study"]:
        return ""
    again = [argument for argument in arguments if argument not in ("--overwrite", "--resume")]
    return f"; to go on: {shlex.join(['subcircuit', *again, '--resume'])}"


def _fail(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)
