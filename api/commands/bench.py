"""subcircuit bench."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import subcircuit as sc
from subcircuit.commands.truth import truth as truth_command
from subcircuit.console import err, new_table, out, progress_bars, say_written, write_text
from subcircuit.options import DeviceOption, JsonOption, QuietOption, SeedOption

if TYPE_CHECKING:
    from rich.table import Table

    from subcircuit.bench import Measurement, Report, ScenarioResult


LEGEND = """×: how many times as fast as that row subcircuit is. ≈: estimated from a sample of patches (--sample).
error: of the effects, against full forwards in float64. GEMM share: matrix products at a plain product's rate."""


class Scenario(StrEnum):
    heads = "heads"
    pairs = "pairs"
    last = "last"
    all = "all"


def bench(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A model; if left out, GPT-2 Small with random weights.")
    ] = None,
    scenario: Annotated[
        Scenario, typer.Option(help="All heads at all positions; every head and position; at the last position.")
    ] = Scenario.heads,
    contestants: Annotated[
        list[str] | None, typer.Option("--peer", help="Only these (several times); subcircuit is ours. Default: all.")
    ] = None,
    python: Annotated[
        list[str] | None, typer.Option("--peer-python", help="NAME=PATH of the Python that has this peer.")
    ] = None,
    environments: Annotated[
        Path, typer.Option("--peers-dir", help="Where NAME/bin/python is looked for (`make peers`).")
    ] = Path(".venv-peers"),
    layers: Annotated[int, typer.Option(min=1, help="Of the random model.")] = 12,
    d_model: Annotated[int, typer.Option(min=1, help="Of the random model.")] = 768,
    heads: Annotated[int, typer.Option(min=1, help="Of the random model, per layer.")] = 12,
    vocab: Annotated[int, typer.Option(min=2, help="Of the random model, in tokens.")] = 50257,
    prompts: Annotated[int, typer.Option(min=1, help="Pairs of prompts.")] = 16,
    length: Annotated[int, typer.Option(min=1, help="Of the prompts, in tokens.")] = 16,
    first_difference: Annotated[int, typer.Option(min=0, help="First position that differs in a pair.")] = 5,
    sample: Annotated[int, typer.Option(min=1, help="Patches that peers run, and that are compared.")] = 6,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs, of which the median is taken.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Of every contestant.")] = 2,
    grid: Annotated[bool, typer.Option("--grid", help="Also how time grows with prompts, tokens and layers.")] = False,
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    truth: Annotated[
        bool, typer.Option("--truth", help="Not speed: how well methods recover known circuits, as `truth` prints it.")
    ] = False,
    directory: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write bench.json, bench.md and bench.svg to this directory.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Time the same sweep by this and by other libraries. Speed, memory, error."""
    if truth:
        truth_command(n=prompts, seed=seed, as_json=as_json, quiet=quiet)
        return
    from subcircuit.bench import SCENARIOS, Settings, run_benchmark
    from subcircuit.bench.contestants import chosen, interpreters
    from subcircuit.bench.model_files import gpt2_config

    rows = chosen(contestants or [])
    pythons = interpreters(python or [], environments)
    settings = Settings(prompts, length, first_difference, sample, runs, threads, device, seed)
    source = gpt2_config(layers, d_model, heads, vocab) if model is None else sc.load(model)
    scenarios = list(SCENARIOS) if scenario == Scenario.all else [scenario.value]
    with progress_bars(quiet) as progress:
        report = run_benchmark(source, settings, rows, pythons, scenarios, grid=grid, progress=progress)
    if directory is not None:
        _write(report, directory)
        say_written(directory, silent=quiet or as_json)
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        _print(report)
    for row in report.wrong_rows:
        err.print(f"error: {row.title} {row.status}: {row.reason}", soft_wrap=True)
    if report.wrong_rows:
        raise typer.Exit(1)


def _write(report: Report, directory: Path) -> None:
    from subcircuit.analysis.figures import bars_figure

    write_text(directory / "bench.json", json.dumps(report.to_dict(), indent=1), silent=True)
    write_text(directory / "bench.md", _markdown(report), silent=True)
    for result in report.scenarios:
        timed = {row.title: row.patches_per_s for row in result.rows if row.patches_per_s is not None}
        n_own = sum(row.name.startswith("subcircuit") for row in result.rows if row.patches_per_s is not None)
        figure = bars_figure(timed, _title(result), "patches per second", n_own)
        name = "bench.svg" if len(report.scenarios) == 1 else f"bench-{result.scenario}.svg"
        write_text(directory / name, figure, silent=True)


def _print(report: Report) -> None:
    for result in report.scenarios:
        out.print(f"\n{_title(result)}; {result.settings.threads} threads, {report.config.name}")
        out.print(_table(result))
        for row in result.rows:
            if row.reason:
                out.print(f"{row.title} {row.status}: {row.reason}")
    out.print(f"\n{LEGEND}")
    if report.grid:
        out.print("\nSeconds for all heads at other sizes:")
        out.print(_grid_table(report))


def _title(result: ScenarioResult) -> str:
    from subcircuit.bench import SCENARIOS

    s = result.settings
    what = f"{SCENARIOS[result.scenario]}: {result.n_patches:,} patches × {s.n_prompts} prompts of {s.length} tokens"
    return what[0].upper() + what[1:]


def _precision(row: Measurement) -> str:
    return row.title.removeprefix("subcircuit").strip(", ")


def _cells(result: ScenarioResult) -> list[list[str]]:
    """The table of a scenario: its heading, then a row for everybody who has a time."""
    own = [row for row in result.rows if row.name.startswith("subcircuit") and row.seconds is not None]
    cells = [["", "seconds", "patches/s", *(f"{_precision(row)} ×" for row in own), "peak GB", "error", "GEMM share"]]
    for row in result.rows:
        if row.seconds is None:
            continue
        cells.append(
            [
                f"{row.title} ({row.version})",
                f"{'≈ ' if row.estimated else ''}{row.seconds:,.3g}",
                f"{row.patches_per_s:,.3g}",
                *(f"{result.times_faster(ours.name, row):.2f}" for ours in own),
                f"{(row.peak_bytes or 0) / 1e9:.2f}",
                f"{row.effect_error:.1e}",
                "" if row.gemm_share is None else f"{row.gemm_share:.0%}",
            ]
        )
    return cells


def _table(result: ScenarioResult) -> Table:
    heading, *rows = _cells(result)
    table = new_table(*heading)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    return table


def _markdown(report: Report) -> str:
    """The tables as a page may hold them."""
    lines = []
    for result in report.scenarios:
        heading, *rows = _cells(result)
        ruler = ["---", *["---:"] * (len(heading) - 1)]
        lines += [f"{_title(result)}:", "", *(f"| {' | '.join(cells)} |" for cells in (heading, ruler, *rows)), ""]
    return "\n".join(lines)


def _grid_table(report: Report) -> Table:
    titles = [row.title for row in report.grid[0].rows]
    table = new_table("prompts", "tokens", "layers", *titles)
    for result in report.grid:
        seconds = ["" if row.seconds is None else f"{row.seconds:.3g}" for row in result.rows]
        sizes = result.settings.n_prompts, result.settings.length, result.n_layers
        table.add_row(*map(str, sizes), *seconds)
    return table
