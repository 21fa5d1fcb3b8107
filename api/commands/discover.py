"""subcircuit discover."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import subcircuit as sc
from subcircuit.console import progress_bars
from subcircuit.options import (
    DeviceOption,
    DictionariesOption,
    Direction,
    DtypeOption,
    Executor,
    FilterOption,
    HooksOption,
    JsonOption,
    MembersOption,
    Metric,
    ModelOption,
    NOption,
    Precision,
    QuietOption,
    SeedOption,
    TaskOption,
    TemplateOption,
    with_dictionaries,
)


def discover(
    model: ModelOption,
    task: TaskOption,
    method: Annotated[
        str,
        typer.Option(
            help="Of nodes: prune (the paper's iterative pruning), masks (learned gates); of edges: acdc, eap, eap-ig, "
            "edge-masks."
        ),
    ] = "prune",
    dictionaries: DictionariesOption = None,
    hooks: HooksOption = None,
    n: NOption = 32,
    seed: SeedOption = 0,
    template: TemplateOption = "all",
    members: MembersOption = None,
    only_answered: FilterOption = False,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Points of score that the circuit (prune, masks, edge-masks: 20) or each edge (acdc: 1) may lose; "
            "eap: least score of an edge."
        ),
    ] = None,
    n_edges: Annotated[int | None, typer.Option(min=1, help="Edges to take: eap, eap-ig.")] = None,
    both_sides: Annotated[
        bool, typer.Option("--both-sides", help="Keep what works against the answer too: all but eap and eap-ig.")
    ] = False,
    first: Annotated[Direction | None, typer.Option(help="Direction of the first pruning sweep: backward.")] = None,
    max_sweeps: Annotated[int | None, typer.Option(min=1, help="At most so many pruning sweeps.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of learning (both masks: 200), of the path (eap-ig: 5).")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(help="What is put in place: mean, corrupted (the default of eap and edge-masks) or zero."),
    ] = None,
    metric: Annotated[
        Metric | None, typer.Option(help="What scores are made of: logit_difference; all but eap and eap-ig.")
    ] = None,
    edges: Annotated[
        bool, typer.Option("--edges", help="Prune edges too, by path patching and logit difference.")
    ] = False,
    edge_threshold: Annotated[
        float | None,
        typer.Option(
            help="With --edges: one stays if its patch leaves less than this share of the logit difference, 0.8."
        ),
    ] = None,
    precision: Annotated[Precision | None, typer.Option(help="Of the products of differences: fp32.")] = None,
    executor: Annotated[Executor | None, typer.Option(help="torch, triton (on a GPU) or reference.")] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    circuit_file: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the circuit to this file: JSON, Graphviz (.dot) or a diagram (.svg)."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find the circuit of one task: heads, MLPs and features of dictionaries, or edges."""
    from subcircuit.analysis.circuit_figure import circuit_text
    from subcircuit.analysis.store import write_whole
    from subcircuit.engine.threads import suitable_threads

    # Only what was asked for is passed on, so that a method can refuse what it does not take.
    how = {"source": source, "precision": precision, "executor": executor}
    asked = _given(
        **how,
        threshold=threshold,
        metric=metric,
        n_edges=n_edges,
        both_sides=both_sides or None,
        first=first,
        max_sweeps=max_sweeps,
        steps=steps,
        seed=seed if method in ("masks", "edge-masks") else None,
    )
    if edges and dictionaries:
        raise typer.BadParameter("--edges leads between heads and MLPs; expected no --dictionary with it")
    if edges and method in _OF_EDGES:
        raise typer.BadParameter(f"method {method!r} finds edges itself; expected --edges with prune or masks")
    if edge_threshold is not None and not edges:
        raise typer.BadParameter("--edge-threshold is of edges that are pruned; expected --edges with it")
    loaded = with_dictionaries(sc.load(model, dtype=dtype, device=device), dictionaries, hooks)
    prompts = sc.task(task, loaded, n=n, seed=seed, template=template, members=members, filter=only_answered)
    with progress_bars(quiet) as progress, suitable_threads(loaded):
        circuit = sc.discover(
            loaded,
            prompts,
            method,
            progress=lambda done, total: progress(_WHAT.get(method, "edges"), done, total),
            **asked,
        )
        if edges:
            circuit = sc.prune_edges(
                loaded,
                prompts,
                circuit,
                both_sides=both_sides,
                progress=lambda done, total: progress("paths", done, total),
                **_given(**how, threshold=edge_threshold),
            )
    if circuit_file is not None:
        text = circuit_text(circuit, circuit_file.suffix, loaded.config.group_size)
        write_whole(circuit_file, text.encode("utf-8"))
    print(circuit.to_json() if as_json else str(circuit))


_OF_EDGES = ("acdc", "eap", "eap-ig", "edge-masks")
_WHAT = {"prune": "pruning", "masks": "learning", "edge-masks": "learning"}


def _given(**options: Any) -> dict[str, Any]:
    """The options that have a value."""
    values = {name: getattr(value, "value", value) for name, value in options.items()}
    return {name: value for name, value in values.items() if value is not None}
