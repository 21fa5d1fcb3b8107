"""subcircuit sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

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
    ModelOption,
    NOption,
    Precision,
    PrecisionOption,
    QuietOption,
    SeedOption,
    SourceOption,
    StepsOption,
    SweepMethod,
    TaskOption,
    TemplateOption,
)


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
    method: Annotated[
        SweepMethod, typer.Option(help="exact patching, or to first order: atp, ig (integrated gradients), atp*.")
    ] = SweepMethod.exact,
    steps: StepsOption = 5,
    screen: Annotated[
        int | None,
        typer.Option(min=1, metavar="K", help="Only the K largest effects: ranked by gradients, verified exactly."),
    ] = None,
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
    with progress_bars(quiet) as progress, suitable_threads(loaded):
        options: dict[str, Any] = {"source": source, "positions": where, "precision": precision.value}
        options["progress"] = lambda done, total: progress("sweep", done, total)
        exactly = method is SweepMethod.exact
        by_gradient: dict[str, Any] = {"method": "atp" if exactly else method.value, "steps": steps}
        screening = None
        if screen is not None:
            options |= {**by_gradient, "executor": executor.value}
            screening = sc.screen(loaded, prompts, components, k=screen, **options)
            scores, top = screening.scores, screening.k
        elif exactly:
            scores = sc.sweep(loaded, prompts, components, executor=executor.value, **options)
        else:
            scores = sc.gradient_scores(loaded, prompts, components, **by_gradient, **options)
    rows = scores.table()
    if csv_file is not None:
        write_csv(csv_file, rows)
    if as_json:
        found = {} if screening is None else {"screening": screening.summary()}
        print(json.dumps({"settings": scores.settings, **found, "sites": rows}))
        return
    clean = float(scores.clean_metric.mean())
    out.print(f"{len(rows)} sites × {scores.effects.shape[1]} prompts, clean logit difference {clean:.3f}")
    if screening is not None:
        out.print(
            f"the {screening.k} largest effects, certain after {screening.n_exact} of {screening.n_sites} sites; "
            f"rank agreement of {scores.settings['screened_by']}: {screening.rank_agreement:.2f}"
        )
    elif not exactly:
        out.print(f"effects to first order: {scores.settings['method']}")
    table = new_table("site", "effect", "± s.e.", "share")
    for row in sorted(rows, key=lambda row: -abs(row["effect"]))[:top]:
        numbers = f"{row['effect']:+.3f}", f"{row['standard_error']:.3f}", f"{row['share']:+.1%}"
        table.add_row(row["site"], *numbers)
    out.print(table)
    if csv_file is not None:
        out.print(f"All sites: {csv_file}")


def _positions(text: str | None) -> str | list[int] | None:
    if text is None or text == "each":
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"positions {text!r}: expected integers joined by commas, or 'each'") from None
