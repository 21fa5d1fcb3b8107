"""subcircuit sweep."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import subcircuit as sc
from subcircuit.analysis.plural import counted
from subcircuit.console import interval_of, new_table, out, progress_bars, say_written, write_text
from subcircuit.options import (
    BudgetOption,
    DeviceOption,
    DtypeOption,
    Executor,
    ExecutorOption,
    FilterOption,
    JsonOption,
    MembersOption,
    Metric,
    MetricOption,
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
    bytes_of,
    positions_of,
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
    members: MembersOption = None,
    only_answered: FilterOption = False,
    source: SourceOption = "corrupted",
    metric: MetricOption = Metric.logit_difference,
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
    budget: BudgetOption = None,
    check: Annotated[int, typer.Option(min=0, help="Rows to run once more in float64; 0 for none.")] = 4,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would cost.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Sites to print, the largest effects first.")] = 10,
    target: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write every site to a .csv file, or the whole sweep to a run directory."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is there.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run that is there.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Patch every component in turn and measure its effect. On the logit difference, or on another metric."""
    from subcircuit.analysis.baselines import table_with_q
    from subcircuit.analysis.durable import durable_sweep
    from subcircuit.analysis.records import csv_text
    from subcircuit.engine.threads import suitable_threads

    if metric is not Metric.logit_difference and (method is not SweepMethod.exact or screen is not None):
        raise typer.BadParameter("--metric needs the exact method: gradients are of the logit difference")
    csv_file = target if target is not None and target.suffix == ".csv" else None
    folder = target if csv_file is None else None
    if folder is None and (resume or overwrite):
        raise typer.BadParameter("--resume and --overwrite are for a run directory; expected --out with a folder")
    if folder is not None and (method is not SweepMethod.exact or screen is not None):
        raise typer.BadParameter(
            f"{folder}: a run directory holds an exact sweep of all sites; expected --out NAME.csv"
        )
    loaded = sc.load(model, dtype=dtype, device=device)
    prompts = sc.task(task, loaded, n=n, seed=seed, template=template, members=members, filter=only_answered)
    options: dict[str, Any] = {
        "source": source,
        "positions": positions_of(positions),
        "precision": precision.value,
        "budget_bytes": bytes_of(budget),
    }
    if dry_run:
        with suitable_threads(loaded):
            plan = sc.plan(loaded, prompts, components, executor=executor.value, metric=metric.value, **options)
        if as_json:
            print(json.dumps(plan.as_dict()))
        else:
            _print_plan(plan)
        return
    screening = None
    with progress_bars(quiet) as progress, suitable_threads(loaded):
        options["progress"] = lambda done, total: progress("sweep", done, total)
        if screen is not None:
            ranked_by = "atp" if method is SweepMethod.exact else method.value
            options |= {"method": ranked_by, "steps": steps, "executor": executor.value}
            screening = sc.screen(loaded, prompts, components, k=screen, **options)
            scores, top = screening.scores, screening.k
        elif method is SweepMethod.exact:
            options |= {"executor": executor.value, "metric": metric.value, "check": check}
            if folder is None:
                scores = sc.sweep(loaded, prompts, components, **options)
            else:
                options |= {
                    "resume": resume,
                    "overwrite": overwrite,
                    "command": shlex.join(["subcircuit", *sys.argv[1:]]),
                }
                scores = durable_sweep(loaded, prompts, folder, components, **options)
        else:
            options |= {"method": method.value, "steps": steps}
            scores = sc.gradient_scores(loaded, prompts, components, **options)
    rows = scores.table() if screening is not None else table_with_q(scores, seed=seed)
    silent = quiet or as_json
    if csv_file is not None:
        write_text(csv_file, csv_text(rows), silent)
    elif folder is not None:
        say_written(folder, silent)
    if as_json:
        found = {} if screening is None else {"screening": screening.summary()}
        print(json.dumps({"settings": scores.settings, **found, "sites": rows}))
    else:
        _print_scores(scores, screening, rows, top)
    _report_check(scores)


def _print_scores(scores: sc.Scores, screening: sc.Screening | None, rows: list[dict[str, Any]], top: int) -> None:
    from subcircuit.analysis.baselines import called

    clean, name = float(scores.clean_metric.mean()), scores.metric.replace("_", " ")
    sizes = f"{counted(len(rows), 'site')} × {counted(scores.effects.shape[1], 'prompt')}"
    out.print(f"{sizes}, clean {name} {clean:.3f}")
    if screening is not None:
        spent = f"{1 - screening.saved:.0%} of the rows of {screening.n_sites} sites"
        out.print(
            f"the {screening.k} largest effects, certain after {spent}; "
            f"rank agreement of {scores.settings['screened_by']}: {screening.rank_agreement:.2f}"
        )
    elif scores.settings["method"] != "exact patching":
        out.print(f"effects to first order: {scores.settings['method']}")
    with_q = screening is None
    table = new_table("site", "effect", "95 %", "share", *(["q"] if with_q else []))
    for row in sorted(rows, key=lambda row: -abs(row["effect"]))[:top]:
        share = "–" if row["share"] is None else f"{row['share']:+.1%}"
        q = ["–" if row["q"] is None else f"{row['q']:.2g}"] if with_q else []
        table.add_row(row["site"], f"{row['effect']:+.3f}", interval_of(row), share, *q)
    out.print(table)
    if with_q and scores.metric != "kl":
        out.print(called(rows, scores.effects.shape[1]))
    if scores.settings.get("n_halvings"):
        out.print(f"Memory ran out: chunks were halved {scores.settings['n_halvings']} times")
    if "check" in scores.settings:
        from subcircuit.analysis.check import Check

        out.print(f"Check: {Check(**scores.settings['check'])}")


def _report_check(scores: sc.Scores) -> None:
    """Ends with status 1 where the check failed, after the results were written."""
    check = scores.settings.get("check")
    if check is not None and not check["passed"]:
        from subcircuit.analysis.check import Check

        print(f"error: the sweep's check failed: {Check(**check)}", file=sys.stderr)
        raise SystemExit(1)


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
    if plan.readout_flops:
        out.print(f"Reading the {plan.metric.replace('_', ' ')}: {_flops(plan.readout_flops)}")
    out.print(f"Clean runs: {_flops(plan.clean_flops)}; all: {share:.1%} of a full forward pass per row")
    parts = {"copies of weights": plan.copied_bytes, "clean": plan.clean_bytes, "rows": plan.chunk_bytes}
    listed = ", ".join(f"{name} {n_bytes / 1e6:,.1f} MB" for name, n_bytes in parts.items())
    peak, budget = (n_bytes / 1e6 for n_bytes in (plan.peak_bytes, plan.budget_bytes))
    out.print(f"Memory beside the weights: {peak:,.1f} MB of {budget:,.0f} MB ({listed})")
    if plan.seconds is not None:
        out.print(f"Time on this machine, {plan.executor} {plan.precision}: about {plan.seconds:.1f} s")


def _flops(n: int) -> str:
    return f"{n / 1e9:,.2f} GFLOP"
