"""subcircuit faithfulness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import subcircuit as sc
from subcircuit.circuits import load_circuits, warn_of_other_model
from subcircuit.console import new_table, out, progress_bars
from subcircuit.options import (
    CircuitOption,
    DeviceOption,
    DictionariesOption,
    DtypeOption,
    FilterOption,
    HooksOption,
    JsonOption,
    MembersOption,
    Metric,
    MetricOption,
    ModelOption,
    NOption,
    QuietOption,
    SeedOption,
    SourceOption,
    TaskOption,
    TemplateOption,
    with_dictionaries,
)

if TYPE_CHECKING:
    from subcircuit.analysis.baselines import Baseline
    from subcircuit.analysis.curves import Curve
    from subcircuit.analysis.evaluation import Evaluation


def faithfulness(
    model: ModelOption,
    task: TaskOption,
    circuit_file: CircuitOption = None,
    dictionaries: DictionariesOption = None,
    hooks: HooksOption = None,
    n: NOption = 32,
    seed: SeedOption = 0,
    template: TemplateOption = "all",
    members: MembersOption = None,
    only_answered: FilterOption = False,
    source: SourceOption = "mean",
    metric: MetricOption = Metric.logit_difference,
    n_random: Annotated[int, typer.Option("--random", min=0, help="Random circuits to compare with.")] = 100,
    match: Annotated[str, typer.Option(help="Random circuits alike in size or in layers.")] = "size",
    n_knockouts: Annotated[int, typer.Option("--knockouts", min=0, help="Random parts knocked out.")] = 20,
    greedy: Annotated[int, typer.Option(min=0, help="Parts of up to so many nodes, chosen to tell most.")] = 3,
    figure: Annotated[Path | None, typer.Option(help="Write the curve of recovered share to this SVG file.")] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Judge how faithful, complete and minimal a circuit is. Beside random circuits, with CPR and CMD."""
    from subcircuit.analysis.baselines import random_baseline
    from subcircuit.analysis.curves import ablation_curve, node_ranking
    from subcircuit.analysis.evaluation import evaluate_circuit
    from subcircuit.engine.threads import suitable_threads

    saved = load_circuits([] if circuit_file is None else [circuit_file])
    loaded = with_dictionaries(sc.load(model, dtype=dtype, device=device), dictionaries, hooks)
    warn_of_other_model(saved, loaded)
    prompts = sc.task(task, loaded, n=n, seed=seed, template=template, members=members, filter=only_answered)
    with progress_bars(quiet) as progress, suitable_threads(loaded):
        ablation = sc.Ablation(loaded, prompts, metric=metric.value, source=source)
        circuit = saved.get(circuit_file) if circuit_file else None
        if circuit is None:
            circuit = sc.discover(loaded, prompts, progress=lambda done, total: progress("pruning", done, total))
        found = evaluate_circuit(ablation, circuit, n_knockouts=n_knockouts, greedy=greedy, seed=seed)
        scores = sc.sweep(loaded, prompts, ablation.nodes, source=source, metric=metric.value)
        curve = ablation_curve(ablation, node_ranking(scores), seed=seed)
        baseline = None
        if n_random:
            baseline = random_baseline(
                ablation,
                circuit,
                n_random,
                match=match,  # type: ignore[arg-type]
                seed=seed,
                progress=lambda done, total: progress("random circuits", done, total),
            )
    if figure is not None:
        _write_figure(figure, curve, task)
    if as_json:
        print(json.dumps(_values(circuit, found, curve, baseline)))
    else:
        _print(circuit, found, curve, baseline)


def _values(circuit: sc.Circuit, found: Evaluation, curve: Curve, baseline: Baseline | None) -> dict[str, object]:
    return {
        "circuit": circuit.to_dict() | {"trace": []},
        **found.to_dict(),
        "curve": curve.to_dict(),
        "random": None if baseline is None else baseline.to_dict(),
    }


def _write_figure(file: Path, curve: Curve, task: str) -> None:
    from subcircuit.analysis.figures import curve_figure
    from subcircuit.analysis.store import write_whole

    write_whole(file, curve_figure({task: curve}, "Recovered by the most important nodes").encode("utf-8"))


def _print(circuit: sc.Circuit, found: Evaluation, curve: Curve, baseline: Baseline | None) -> None:
    out.print(f"{circuit}\n")
    if circuit.edges:
        out.print("Its nodes are judged, with all edges between them.\n")
    table = new_table("", "points", "95 % interval", "")
    rows = [("recovered", found.recovered, "by the circuit alone")]
    rows += [("destroyed", found.destroyed, "by ablating the circuit alone")]
    rows += [("score", found.score, "what the circuit keeps of the full model")]
    for name, interval, what in rows:
        mean, low, high = interval.at()
        table.add_row(name, f"{mean:.1f}", f"{low:.1f} to {high:.1f}", what)
    out.print(table)
    incomplete = found.completeness.incomplete
    if len(incomplete):
        worst = ", ".join(found.completeness.knockouts[found.completeness.worst])
        out.print(
            f"\nIncomplete by {float(incomplete.mean()):.1f} points on average over {len(incomplete)} knock-outs, "
            f"at most {float(incomplete.max()):.1f} (without {worst})"
        )
    needed = found.minimal()
    out.print(f"Minimal in {len(needed)} of {len(found.items)} nodes (interval of the drop above 0)")
    drops = sorted(((found.drops.at(i), name) for i, name in enumerate(found.items)), reverse=True)
    listed = new_table("node", "points lost", "95 % interval")
    for (mean, low, high), name in drops:
        listed.add_row(name, f"{mean:.1f}", f"{low:.1f} to {high:.1f}")
    out.print(listed)
    (cpr, *cpr_ends), (cmd, *cmd_ends) = curve.cpr.at(), curve.cmd.at()
    out.print(f"\nNodes by size of effect: CPR {cpr:.3f} ({_ends(cpr_ends)}), CMD {cmd:.3f} ({_ends(cmd_ends)})")
    if baseline is not None:
        low, high = baseline.middle
        out.print(
            f"{len(baseline.random)} random circuits alike in {baseline.match} recover {baseline.mean:.1f} on average, "
            f"95 % of them {low:.1f} to {high:.1f}, the best {baseline.most:.1f}; p = {baseline.p:.2g}"
        )


def _ends(ends: list[float]) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}"
