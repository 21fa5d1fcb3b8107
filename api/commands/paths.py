"""subcircuit paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import subcircuit as sc
from subcircuit.analysis.plural import counted
from subcircuit.console import interval_of, new_table, out, progress_bars, write_text
from subcircuit.options import (
    DeviceOption,
    DtypeOption,
    Executor,
    ExecutorOption,
    FilterOption,
    JsonOption,
    MembersOption,
    ModelOption,
    NOption,
    Precision,
    PrecisionOption,
    QuietOption,
    SeedOption,
    SourceOption,
    TaskOption,
    TemplateOption,
    check_suffix,
    names_in,
)

if TYPE_CHECKING:
    from subcircuit.engine.patching.path_delta import Freeze


def paths(
    model: ModelOption,
    task: TaskOption,
    to: Annotated[
        str, typer.Option("--to", help="Receivers, joined by commas: logits, m9, a7.q11, a7.h11 for its q, k and v.")
    ] = "logits",
    senders: Annotated[
        str, typer.Option("--from", help="Senders, joined by commas: a4.h4, m3, input; else all there are below.")
    ] = "",
    freeze: Annotated[
        str, typer.Option(help="Held fixed on the way: heads, heads+mlps (the direct edge alone) or none.")
    ] = "heads",
    n: NOption = 32,
    seed: SeedOption = 0,
    template: TemplateOption = "all",
    members: MembersOption = None,
    only_answered: FilterOption = False,
    source: SourceOption = "corrupted",
    precision: PrecisionOption = Precision.fp32,
    executor: ExecutorOption = Executor.torch,
    top: Annotated[int, typer.Option(min=1, help="Rows to print.")] = 20,
    file: Annotated[Path | None, typer.Option("--out", "-o", help="Write every row to this CSV file.")] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Patch paths. What each sender's corrupted value does through one receiver alone."""
    from subcircuit.analysis.records import csv_text
    from subcircuit.engine.threads import suitable_threads

    check_suffix(file, ".csv")
    loaded = sc.load(model, dtype=dtype, device=device)
    edges = sc.paths_between(loaded.config, names_in(senders), names_in(to))
    prompts = sc.task(task, loaded, n=n, seed=seed, template=template, members=members, filter=only_answered)
    frozen: Freeze = freeze  # type: ignore[assignment]
    with progress_bars(quiet) as progress, suitable_threads(loaded):
        found = sc.trace_paths(
            loaded,
            prompts,
            edges,
            freeze=frozen,
            source=source,
            executor=executor.value,
            precision=precision.value,
            progress=lambda done, total: progress("paths", done, total),
        )
    rows = found.table()
    if file is not None:
        write_text(file, csv_text(rows), silent=quiet or as_json)
    if as_json:
        print(json.dumps({"settings": found.settings, "paths": rows}))
    else:
        _print(found, rows, top)


def _print(found: sc.EdgeEffects, rows: list[dict[str, Any]], top: int) -> None:
    out.print(f"{counted(len(rows), 'path')}, mean logit difference {float(found.clean_metric.mean()):.3f}")
    table = new_table("from", "to", "effect", "95 %", "share", "q")
    for row in sorted(rows, key=lambda row: -abs(row["effect"]))[:top]:
        numbers = f"{row['effect']:+.3f}", interval_of(row), f"{row['share']:+.1%}", f"{row['q']:.2g}"
        table.add_row(row["sender"], row["receiver"], *numbers)
    out.print(table)
