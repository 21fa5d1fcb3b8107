"""subcircuit sweep."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer

import subcircuit as sc
from subcircuit.console import new_table, out, progress_bars, write_csv
from subcircuit.options import (
    BudgetOption,
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
    bytes_of,
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
    budget: BudgetOption = None,
    check: Annotated[int, typer.Option(min=0, help="Rows to run once more in float64; 0 for none.")] = 4,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would cost.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Sites to print, the largest effects first.")] = 10,
    csv_file: Annotated[Path | None, typer.Option("--out", "-o", help="Write every site to this CSV file.")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Patch every component in turn and measure its effect on the logit difference, or on another metric."""
    from subcircuit.analysis.baselines import cell_q_values
    from subcircuit.analysis.study import suitable_threads

    where, budget_bytes = _positions(positions), bytes_of(budget)
    loaded = sc.load(model, dtype=dtype, device=device)
    prompts = sc.task(task, loaded, n=n, seed=seed, template=template, filter=only_answered)
    if dry_run:
        with suitable_threads(loaded):
            plan = sc.plan(
                loaded,
                prompts,
                components,
                source=source,
                positions=where,
                executor=executor.value,
                precision=precision.value,
                budget_bytes=budget_bytes,
            )
        if as_json:
            print(json.dumps(plan.as_dict()))
        else:
            _print_plan(plan)
        return
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
            budget_bytes=budget_bytes,
            check=check,
            progress=lambda done, total: progress("sweep", done, total),
        )
    q_values = cell_q_values(scores, seed=seed).tolist()
    rows = [row | {"q": None if math.isnan(q) else q} for row, q in zip(scores.table(), q_values, strict=True)]
    if csv_file is not None:
        write_csv(csv_file, rows)
    if as_json:
        print(json.dumps({"settings": scores.settings, "sites": rows}))
        _report_check(scores)
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
    if scores.settings["n_halvings"]:
        out.print(f"Memory ran out: chunks were halved {scores.settings['n_halvings']} times")
    if check:
        from subcircuit.analysis.check import Check

        out.print(f"Check: {Check(**scores.settings['check'])}")
    _report_check(scores)


def _report_check(scores: sc.Scores) -> None:
    """Ends with status 1 where the check failed, after the results were written."""
    check = scores.settings.get("check")
    if check is not None and not check["passed"]:
        from subcircuit.analysis.check import Check

        print(f"error: the sweep's check failed: {Check(**check)}", file=sys.stderr)
        raise typer.Exit(1)


def _print_plan(plan: sc.Plan) -> None:
    out.print(
        f"{plan.n_sites} sites × {plan.n_prompts} prompts of {plan.n_pos} tokens = {plan.n_rows:,} rows, "
        f"in {plan.n_chunks} chunks ({plan.n_prompt_chunks} of prompts)"
    )
    table = new_table("layer", "sites", "products", "attention")
    for layer, flops in enumerate(zip(plan.sites_by_layer, plan.product_flops, plan.attention_flops, strict=True)):
        sites, *by_kind = flops
        table.add_row(str(layer), str(sites), *(_flops(n) for n in by_kind))
    table.add_row("all", str(plan.n_sites), _flops(sum(plan.product_flops)), _flops(sum(plan.attention_flops)))
    out.print(table)
    share = (plan.row_flops + plan.clean_flops) / plan.full_flops
    out.print(f"Clean runs: {_flops(plan.clean_flops)}; all: {share:.1%} of a full forward pass per row")
    parts = {"copies of weights": plan.copied_bytes, "clean": plan.clean_bytes, "rows": plan.chunk_bytes}
    listed = ", ".join(f"{name} {n_bytes / 1e6:,.1f} MB" for name, n_bytes in parts.items())
    out.print(
        f"Memory beside the weights: {plan.peak_bytes / 1e6:,.1f} MB of {plan.budget_bytes / 1e6:,.0f} ({listed})"
    )
    if plan.seconds is not None:
        out.print(f"Time on this machine, {plan.executor} {plan.precision}: about {plan.seconds:.1f} s")


def _flops(n: int) -> str:
    return f"{n / 1e9:,.2f} GFLOP"


def _positions(text: str | None) -> str | list[int] | None:
    if text is None or text == "each":
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"positions {text!r}: expected integers joined by commas, or 'each'") from None
