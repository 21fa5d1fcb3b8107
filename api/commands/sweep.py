"""subcircuit sweep."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer

import subcircuit as sc
from subcircuit.console import new_table, out, progress_bars, write_csv
from subcircuit.options import (
    DeviceOption,
    DtypeOption,
    Executor,
    ExecutorOption,
    FilterOption,
    JsonOption,
    Metric,
    MetricOption,
    ModelOption,
    NOption,
    Precision,
    PrecisionOption,
    QuietOption,
    SeedOption,
    SourceOption,
    TaskOption,
    TemplateOption,
)

CALLED = 0.05


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
    metric: MetricOption = Metric.logit_difference,
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
    from subcircuit.analysis.baselines import cell_q_values
    from subcircuit.analysis.study import suitable_threads

    where = _positions(positions)
    loaded = sc.load(model, dtype=dtype, device=device)
    prompts = sc.task(task, loaded, n=n, seed=seed, template=template, filter=only_answered)
    with progress_bars(quiet) as progress, suitable_threads(loaded):
        scores = sc.sweep(
            loaded,
            prompts,
            components,
            source=source,
            positions=where,
            executor=executor.value,
            precision=precision.value,
            metric=metric.value,
            progress=lambda done, total: progress("sweep", done, total),
        )
    q_values = cell_q_values(scores, seed=seed).tolist()
    rows = [row | {"q": None if math.isnan(q) else q} for row, q in zip(scores.table(), q_values, strict=True)]
    if csv_file is not None:
        write_csv(csv_file, rows)
    if as_json:
        print(json.dumps({"settings": scores.settings, "sites": rows}))
        return
    clean = float(scores.clean_metric.mean())
    name = metric.value.replace("_", " ")
    out.print(f"{len(rows)} sites × {scores.effects.shape[1]} prompts, clean {name} {clean:.3f}")
    table = new_table("site", "effect", "± s.e.", "share", "q")
    for row in sorted(rows, key=lambda row: -abs(row["effect"]))[:top]:
        share = "–" if row["share"] is None else f"{row['share']:+.1%}"
        q = "–" if row["q"] is None else f"{row['q']:.2g}"
        numbers = f"{row['effect']:+.3f}", f"{row['standard_error']:.3f}", share, q
        table.add_row(row["site"], *numbers)
    out.print(table)
    if all(row["q"] is not None for row in rows):
        n_called = sum(row["q"] <= CALLED for row in rows)
        out.print(f"{n_called} of {len(rows)} sites have an effect, at a false discovery rate of {CALLED:.0%} (q)")
    if csv_file is not None:
        out.print(f"All sites: {csv_file}")


def _positions(text: str | None) -> str | list[int] | None:
    if text is None or text == "each":
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"positions {text!r}: expected integers joined by commas, or 'each'") from None
