"""subcircuit lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import subcircuit as sc
from subcircuit.analysis.plural import counted
from subcircuit.console import interval_of, new_table, out, write_text
from subcircuit.options import (
    TASKS,
    DeviceOption,
    DtypeOption,
    FilterOption,
    JsonOption,
    ModelOption,
    NOption,
    QuietOption,
    SeedOption,
    TemplateOption,
    check_suffix,
    names_in,
)


def lengths(
    model: ModelOption,
    tasks: Annotated[
        str, typer.Option("--tasks", "--task", "-t", help=f"Sequences, joined by commas: {TASKS}.")
    ] = "numerals,number_words,months",
    longest: Annotated[int, typer.Option(min=1, help="Members that a prompt shows, or as many as fit.")] = 10,
    n: NOption = 32,
    seed: SeedOption = 0,
    template: TemplateOption = "all",
    only_answered: FilterOption = False,
    figure: Annotated[Path | None, typer.Option("--out", "-o", help="Draw the curves in this SVG file.")] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say how sure a model is of the next member. By how many members of the sequence it is shown."""
    from subcircuit.analysis.lengths import by_length
    from subcircuit.engine.threads import suitable_threads

    check_suffix(figure, ".svg")
    names = dict.fromkeys(names_in(tasks))
    if not names:
        raise typer.BadParameter("no task; expected --tasks with one or more")
    loaded = sc.load(model, dtype=dtype, device=device)
    with suitable_threads(loaded):
        found = [
            by_length(loaded, name, longest, n=n, seed=seed, template=template, filter=only_answered) for name in names
        ]
    rows = [row for each in found for row in each.table()]
    left_out = {each.task.name: each.too_long for each in found if each.too_long}
    if figure is not None:
        from subcircuit.analysis.lens_figures import lengths_figure

        title = f"{model}: the next member, by members shown"
        write_text(figure, lengths_figure(rows, title), silent=quiet or as_json)
    if as_json:
        print(json.dumps({"model": model, "rows": rows, "no_more": left_out}))
    else:
        _print(rows, n)
        for reason in left_out.values():
            out.print(f"\nNo more of {reason}")


def _print(rows: list[dict[str, Any]], n: int) -> None:
    out.print(f"{counted(n, 'prompt')}, each read after its first member, its second, …\n")
    table = new_table("task", "members shown", "p(answer)", "95 %", "top-1", "95 %")
    for row in rows:
        answer = f"{row['answer']:.3f}", interval_of(row, "answer_", ".3f")
        top = f"{row['top1']:.0%}", interval_of(row, "top1_", ".0%")
        table.add_row(row["task"] if row["members"] == 1 else "", str(row["members"]), *answer, *top)
    out.print(table)
