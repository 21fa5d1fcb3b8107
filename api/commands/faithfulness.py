"""subcircuit faithfulness."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import subcircuit as sc
from subcircuit.analysis.plural import counted
from subcircuit.circuits import load_circuits, warn_of_empty, warn_of_other_model
from subcircuit.console import new_table, out, progress_bars, write_text
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
    check_suffix,
    with_dictionaries,
)

if TYPE_CHECKING:
    from subcircuit.analysis.ablation import ItemAblation
    from subcircuit.analysis.baselines import Baseline
    from subcircuit.analysis.curves import Curve
    from subcircuit.analysis.evaluation import Evaluation
    from subcircuit.engine.patching.graph import Edge

N_DROPS = 50
"""Edges of a large model whose loss is measured one by one."""


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
    n_random: Annotated[
        int | None,
        typer.Option(
            "--random", min=0, help="Random circuits to compare with; 1000 (of edges 200) for a small model, else 100."
        ),
    ] = None,
    match: Annotated[
        str, typer.Option(help="Random circuits alike in size or in layers; of edges, or between the same nodes.")
    ] = "size",
    n_knockouts: Annotated[int, typer.Option("--knockouts", min=0, help="Random parts knocked out.")] = 20,
    greedy: Annotated[
        int | None,
        typer.Option(min=0, help="Parts of up to so many nodes or edges, chosen to tell most: 3 of nodes, 0 of edges."),
    ] = None,
    by_nodes: Annotated[
        bool, typer.Option("--nodes", help="Judge the nodes of a circuit that has edges, with all edges between them.")
    ] = False,
    n_drops: Annotated[
        int | None,
        typer.Option(
            "--drops", min=1, help="The strongest edges, whose loss is measured: all of a small model, else 50."
        ),
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Write the curve of recovered share to this SVG file.")] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Judge how faithful, complete and minimal a circuit is. Beside random circuits, with CPR and CMD.

    A circuit with edges is judged by these, another by its nodes.
    """
    from subcircuit.analysis.baselines import random_baseline, suitable_n_random
    from subcircuit.analysis.curves import ablation_curve
    from subcircuit.analysis.evaluation import evaluate_circuit
    from subcircuit.engine.threads import suitable_threads

    check_suffix(figure, ".svg")
    saved = load_circuits([] if circuit_file is None else [circuit_file])
    loaded = with_dictionaries(sc.load(model, dtype=dtype, device=device), dictionaries, hooks)
    warn_of_other_model(saved, loaded)
    prompts = sc.task(task, loaded, n=n, seed=seed, template=template, members=members, filter=only_answered)
    with progress_bars(quiet) as progress, suitable_threads(loaded):
        circuit = saved.get(circuit_file) if circuit_file else None
        if circuit is None:
            circuit = sc.discover(loaded, prompts, progress=lambda done, total: progress("pruning", done, total))
            warn_of_empty(circuit)
        of_edges = bool(circuit.edges) and not by_nodes
        judge = sc.EdgeAblation if of_edges else sc.Ablation
        ablation: ItemAblation[Any] = judge(loaded, prompts, metric=metric.value, source=source)
        found = evaluate_circuit(
            ablation,
            circuit,
            n_knockouts=n_knockouts,
            greedy=(0 if of_edges else 3) if greedy is None else greedy,
            asked=_strongest(circuit, n_drops, loaded) if of_edges else None,
            seed=seed,
        )
        curve = ablation_curve(ablation, _ranking(ablation, of_edges), seed=seed)
        baseline = None
        if n_random is None:
            n_random = suitable_n_random(loaded, 100, of_edges=of_edges)
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
        write_text(figure, _figure(curve, task, of_edges), silent=quiet or as_json)
    if as_json:
        print(json.dumps(_values(circuit, found, curve, baseline)))
    else:
        _print(circuit, found, curve, baseline, of_edges)


def _strongest(circuit: sc.Circuit, n: int | None, model: sc.HookedTransformer) -> list[Edge] | None:
    """The edges whose loss is measured; None for all."""
    from subcircuit.engine.threads import is_small

    if n is None and is_small(model):
        return None
    return circuit.strongest_edges()[: n or N_DROPS]


def _ranking(ablation: ItemAblation[Any], of_edges: bool) -> list[Any]:
    """All nodes of the model by their effects, or all of its edges by EAP-IG, the most important first."""
    from subcircuit.analysis.curves import node_ranking

    model, task, source = ablation.model, ablation.task, ablation.settings["source"]
    if of_edges:
        return sc.edge_scores(model, task, "eap-ig", source=source).ranking()
    return node_ranking(sc.sweep(model, task, ablation.items, source=source, metric=ablation.metric))


def _values(circuit: sc.Circuit, found: Evaluation, curve: Curve, baseline: Baseline | None) -> dict[str, object]:
    return {
        "circuit": circuit.to_dict() | {"trace": []},
        **found.to_dict(),
        "curve": curve.to_dict(),
        "random": None if baseline is None else baseline.to_dict(),
    }


def _figure(curve: Curve, task: str, of_edges: bool) -> str:
    from subcircuit.analysis.figures import curve_figure

    return curve_figure({task: curve}, f"Recovered by the most important {'edges' if of_edges else 'nodes'}")


def _print(circuit: sc.Circuit, found: Evaluation, curve: Curve, baseline: Baseline | None, of_edges: bool) -> None:
    noun = "edge" if of_edges else "node"
    out.print(f"{circuit}\n")
    if of_edges:
        out.print("Its edges are judged; all others of the model are removed.\n")
    elif circuit.edges:
        out.print("Its nodes are judged, with all edges between them.\n")
    table = new_table("", "points", "95 % interval", "")
    rows = [("recovered", found.recovered, "by the circuit alone")]
    rows += [("destroyed", found.destroyed, "by ablating the circuit alone")]
    rows += [("score", found.score, "what the circuit keeps of the full model")]
    for name, interval, what in rows:
        mean, *ends = interval.at()
        table.add_row(name, f"{mean:.1f}", _ends(ends, found, 1), what)
    out.print(table)
    incomplete = found.completeness.incomplete
    if len(incomplete):
        worst = _listed(found.completeness.knockouts[found.completeness.worst])
        out.print(
            f"\nIncomplete by {float(incomplete.mean()):.1f} points on average over {len(incomplete)} knock-outs, "
            f"at most {float(incomplete.max()):.1f} (without {worst})"
        )
    if found.settings["n_prompts"] > 1:
        needed = len(found.minimal())
        out.print(f"Minimal in {needed} of {counted(len(found.items), noun)} (interval of the drop above 0)")
    drops = sorted(((found.drops.at(i), name) for i, name in enumerate(found.items)), reverse=True)
    listed = new_table(noun, "points lost", "95 % interval")
    for (mean, *ends), name in drops:
        listed.add_row(name, f"{mean:.1f}", _ends(ends, found, 1))
    out.print(listed)
    (cpr, *cpr_ends), (cmd, *cmd_ends) = curve.cpr.at(), curve.cmd.at()
    ranked = "Edges of the model by EAP-IG" if of_edges else "Nodes by size of effect"
    out.print(f"\n{ranked}: CPR {cpr:.3f} ({_ends(cpr_ends, found)}), CMD {cmd:.3f} ({_ends(cmd_ends, found)})")
    if baseline is not None:
        low, high = baseline.middle
        out.print(
            f"{len(baseline.random)} random circuits alike in {baseline.match} recover {baseline.mean:.1f} on average, "
            f"95 % of them {low:.1f} to {high:.1f}, the least {baseline.least:.1f}, the best "
            f"{baseline.most:.1f}; p = {baseline.p:.2g}"
        )


def _listed(names: Sequence[str], n_most: int = 12) -> str:
    more = f" and {len(names) - n_most} more" if len(names) > n_most else ""
    return ", ".join(names[:n_most]) + more


def _ends(ends: Sequence[float], found: Evaluation, digits: int = 3) -> str:
    """An interval; a dash for that of a single prompt, which does not say how others differ."""
    return "–" if found.settings["n_prompts"] == 1 else f"{ends[0]:.{digits}f} to {ends[1]:.{digits}f}"
