"""The command line: each command takes its options, calls the analysis, and prints what came out."""

from __future__ import annotations

import json
import shlex
import sys
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
    from subcircuit.analysis.circuit import Circuit
    from subcircuit.analysis.store import RunDirectory

app = typer.Typer(
    name="subcircuit",
    help="Which heads and MLPs of a GPT-2 or Llama do a task: exact activation patching, circuits, what they share.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)


# typer may bring a click of its own; what it raises for bad options derives from that one's ClickException.
BadUsage: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


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


ModelOption = Annotated[str, typer.Option("--model", "-m", help="A short name, a directory, a .gguf file or a hub id.")]
TaskOption = Annotated[str, typer.Option("--task", "-t", help="A task; see `subcircuit models` for models that do it.")]
NOption = Annotated[int, typer.Option("--n", min=1, help="Prompts per task.")]
SeedOption = Annotated[int, typer.Option(help="Of the prompts, and of everything drawn at random.")]
TemplateOption = Annotated[str, typer.Option(help="done, lost, born, bare, several joined by +, or all that fit.")]
FilterOption = Annotated[bool, typer.Option("--filter", help="Only prompts that the model answers, as in the paper.")]
SourceOption = Annotated[str, typer.Option(help="What a patch puts in place: corrupted, mean or zero.")]
PrecisionOption = Annotated[Precision, typer.Option(help="Of the products of differences.")]
ExecutorOption = Annotated[Executor, typer.Option(help="torch: differences only; reference: full forwards.")]
DtypeOption = Annotated[str, typer.Option(help="Of the model's weights.")]
JsonOption = Annotated[bool, typer.Option("--json", help="The result as JSON on standard output.")]
ThresholdOption = Annotated[float, typer.Option(help="Points of score that the circuit may lose.")]
FirstOption = Annotated[Direction, typer.Option(help="Direction of the first pruning sweep.")]
MaxSweepsOption = Annotated[int | None, typer.Option(min=1, help="At most so many pruning sweeps.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"subcircuit {sc.__version__}")
        raise typer.Exit


@app.command()
def study(
    model: Annotated[list[str], typer.Option("--model", "-m", help="A model; may be given several times.")],
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="The run directory to write.")],
    tasks: Annotated[str, typer.Option(help="Tasks, joined by commas.")] = "numerals,number_words,months",
    n: NOption = 32,
    seed: SeedOption = 0,
    template: TemplateOption = "all",
    only_answered: FilterOption = False,
    source: SourceOption = "corrupted",
    threshold: ThresholdOption = 20.0,
    first: FirstOption = Direction.backward,
    max_sweeps: MaxSweepsOption = None,
    precision: PrecisionOption = Precision.fp32,
    executor: ExecutorOption = Executor.torch,
    dtype: DtypeOption = "float32",
    n_random: Annotated[int, typer.Option("--random", min=1, help="Random circuits of equal size per task.")] = 20,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is there.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Find the circuits of several tasks in one or more models, compare them, and write a report."""
    settings = sc.StudySettings(
        models=tuple(model),
        tasks=tuple(_split(tasks)),
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
        n_random=n_random,
    )
    command = shlex.join(["subcircuit", *sys.argv[1:]])
    with _stages() as progress:
        run = sc.study(settings, str(out_dir), resume=resume, overwrite=overwrite, command=command, progress=progress)
    if as_json:
        print(json.dumps({"out": str(run.path), **_study_values(run)}))
    else:
        _print_study(run)


@app.command()
def sweep(
    model: ModelOption,
    task: TaskOption,
    components: Annotated[str, typer.Option(help="heads, mlps, keys, values, …, joined by +, or a5.h1.")] = "heads",
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
    top: Annotated[int, typer.Option(min=1, help="Sites to print, the largest effects first.")] = 10,
    csv_file: Annotated[Path | None, typer.Option("--out", "-o", help="Write every site to this CSV file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Patch every component in turn and measure its effect on the logit difference."""
    loaded = sc.load(model, dtype=dtype)
    prompts = sc.task(task, loaded, n=n, seed=seed, template=template, filter=only_answered)
    with _stages() as progress:
        scores = sc.sweep(
            loaded,
            prompts,
            components,
            source=source,
            positions=_positions(positions),
            executor=executor.value,
            precision=precision.value,
            progress=lambda done, total: progress("sweep (rows)", done, total),
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
        table.add_row(row["site"], f"{row['effect']:+.3f}", f"{row['standard_error']:.3f}", f"{row['share']:+.1%}")
    out.print(table)


@app.command()
def discover(
    model: ModelOption,
    task: TaskOption,
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
    circuit_file: Annotated[Path | None, typer.Option("--out", "-o", help="Write the circuit to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Find the circuit of one task by iterative pruning."""
    loaded = sc.load(model, dtype=dtype)
    prompts = sc.task(task, loaded, n=n, seed=seed, template=template, filter=only_answered)
    with _stages() as progress:
        circuit = sc.discover(
            loaded,
            prompts,
            threshold=threshold,
            first=first.value,
            max_sweeps=max_sweeps,
            precision=precision.value,
            executor=executor.value,
            progress=lambda done, total: progress("pruning (candidates of this sweep)", done, total),
        )
    if circuit_file is not None:
        circuit.save(circuit_file)
    print(circuit.to_json() if as_json else str(circuit))


@app.command()
def generate(
    model: ModelOption,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="A prompt; may be given several times.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 20,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    seed: SeedOption = 0,
    bos: Annotated[bool | None, typer.Option("--bos/--no-bos", help="Override the tokenizer's own rule.")] = None,
    dtype: DtypeOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """Continue prompts."""
    loaded = sc.load(model, dtype=dtype, bos=bos)
    result = loaded.generate(prompt, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    texts = result.texts or []
    if as_json:
        print(
            json.dumps(
                [{"prompt": p, "text": t, "tokens": i} for p, t, i in zip(prompt, texts, result.tokens, strict=True)]
            )
        )
        return
    for start, text in zip(prompt, texts, strict=True):
        out.print(start, style="dim", end="", markup=False, highlight=False)
        out.print(text, markup=False, highlight=False)


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
    out.print("Tasks: " + ", ".join(sc.task_names()))


@app.command()
def info(model: Annotated[str, typer.Argument(help="A model.")], as_json: JsonOption = False) -> None:
    """A model's configuration and tokenizer."""
    loaded = sc.load(model)
    tokenizer = loaded.tokenizer
    values: dict[str, Any] = {**vars(loaded.config), "n_params": loaded.config.n_params}
    if tokenizer is not None:
        values |= {"tokenizer": tokenizer.name, "adds_bos": tokenizer.adds_bos, "bos_id": tokenizer.bos_id}
    if as_json:
        print(json.dumps(values, default=str))
        return
    table = _table("", "")
    for name, value in values.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
    out.print(table)


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write the report of a run directory anew."""
    from subcircuit.analysis.report import write_report
    from subcircuit.analysis.store import RunDirectory

    out.print(str(write_report(RunDirectory.open(directory))), markup=False, highlight=False, soft_wrap=True)


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _positions(text: str | None) -> str | list[int] | None:
    if text is None or text == "each":
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"positions {text!r}: expected integers joined by commas, or 'each'") from None


def _write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    import csv

    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, show_header=any(columns))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i and column in ("effect", "± s.e.", "share", "score") else "left")
    return table


@contextmanager
def _stages() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar per stage on standard error, with rate and time left; silent where that is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(f"{task.speed:,.0f}/s" if task.speed else "", style="dim")

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn()]
    with Progress(*columns, console=err, disable=not err.is_terminal) as bars:
        current: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in current:
                current[stage] = bars.add_task(stage, total=total)
            bars.update(current[stage], completed=done, total=total)

        yield update


def _study_values(run: RunDirectory) -> dict[str, Any]:
    from subcircuit.analysis.study import circuits_of

    values: dict[str, Any] = {"models": {}, "notes": run.run["notes"], "timings": run.run["timings"]}
    for model in run.run["models"]:
        circuits = circuits_of(run, model["slug"])
        compare = run.read_json(f"results/{model['slug']}.compare.json")
        found = {
            task: {"heads": circuit.heads, "mlps": circuit.mlps, "score": circuit.score}
            for task, circuit in circuits.items()
        }
        values["models"][model["name"]] = {"circuits": found, "shared": compare["shared"]}
    return values


def _print_study(run: RunDirectory) -> None:
    from subcircuit.analysis.study import circuits_of

    for model in run.run["models"]:
        out.print(f"\n{model['name']}: {model['description']}", style="bold", markup=False, highlight=False)
        table = _table("task", "accuracy", "heads", "MLPs", "score", "random circuits")
        for task, circuit in circuits_of(run, model["slug"]).items():
            table.add_row(task, *_summary(circuit, run.read_json(f"results/{model['slug']}.{task}.json")))
        out.print(table)
        shared = run.read_json(f"results/{model['slug']}.compare.json")["shared"]
        heads = " ".join(f"{layer}.{head}" for layer, head in shared["heads"]) or "none"
        mlps = " ".join(map(str, shared["mlps"])) or "none"
        out.print(f"shared by all: heads {heads}; MLPs {mlps}", markup=False, highlight=False)
    for note in run.run["notes"]:
        out.print(f"note: {note}", markup=False, highlight=False)
    seconds = sum(run.run["timings"].values())
    out.print(
        f"\n{seconds:.0f} s in all. Report: {run.path / 'report.html'}", markup=False, highlight=False, soft_wrap=True
    )


def _summary(circuit: Circuit, result: dict[str, Any]) -> list[str]:
    baseline = result["random_scores"]
    return [
        f"{result['accuracy']:.0%}",
        str(len(circuit.heads)),
        str(len(circuit.mlps)),
        f"{circuit.score:.1f}",
        f"mean {sum(baseline) / len(baseline):.1f}, best {max(baseline):.1f}",
    ]


def main() -> None:
    """Console entry point: bad input is one line on standard error and exit status 2, without a traceback."""
    try:
        app(standalone_mode=False)
    except SubcircuitError as error:
        _fail(str(error), 2)
    except BadUsage as error:
        _fail(" ".join(error.format_message().split()), 2)  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        hint = "; --resume goes on with what is finished" if "study" in sys.argv[1:2] else ""
        _fail(f"interrupted{hint}", 130)
    except OSError as error:
        _fail(str(error), 2)


def _fail(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)
