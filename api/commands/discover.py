"""subcircuit discover."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import subcircuit as sc
from subcircuit.analysis.plural import counted
from subcircuit.circuits import warn_of_empty
from subcircuit.console import progress_bars, write_text
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
    check_suffix,
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
    freeze: Annotated[
        str | None,
        typer.Option(help="With --edges: held fixed on the way: heads, heads+mlps (the direct edge alone) or none."),
    ] = None,
    relative_to: Annotated[
        str | None, typer.Option(help="With --edges: the logit difference of the full model or of the circuit.")
    ] = None,
    from_input: Annotated[
        bool, typer.Option("--from-input", help="With --edges: those from the embeddings are judged too.")
    ] = False,
    same_layer: Annotated[
        bool, typer.Option("--same-layer", help="With --edges: those from heads to the MLP beside them are judged too.")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Patch every edge kept exactly: eap, eap-ig.")] = False,
    precision: Annotated[Precision | None, typer.Option(help="Of the products of differences: fp32.")] = None,
    executor: Annotated[Executor | None, typer.Option(help="torch, triton (on a GPU) or reference.")] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    circuit_file: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Write the circuit to this file: .json, .mib.json (MIB), .dot (Graphviz) or .svg.",
        ),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find the circuit of one task. Of heads, MLPs and features of dictionaries, or of edges."""
    from subcircuit.analysis.circuit_formats import SUFFIXES, circuit_text
    from subcircuit.engine.threads import suitable_threads

    check_suffix(circuit_file, *SUFFIXES)
    how = {"source": source, "precision": precision, "executor": executor}
    asked = _asked(
        method,
        **how,
        threshold=threshold,
        metric=metric,
        n_edges=n_edges,
        both_sides=both_sides or None,
        first=first,
        max_sweeps=max_sweeps,
        steps=steps,
        verify=verify or None,
    )
    if method in ("masks", "edge-masks"):
        asked["seed"] = seed
    if method in ("eap", "eap-ig") and (n_edges is None) == (threshold is None):
        raise typer.BadParameter(
            f"method {method!r} takes the strongest edges; expected --n-edges or --threshold, one of the two"
        )
    if edges and metric not in (None, Metric.logit_difference):
        raise typer.BadParameter(f"--edges judges by logit difference; expected no --metric {metric.value} with it")
    if edges and dictionaries:
        raise typer.BadParameter("--edges leads between heads and MLPs; expected no --dictionary with it")
    if edges and method in _OF_EDGES:
        raise typer.BadParameter(f"method {method!r} finds edges itself; expected --edges with prune or masks")
    of_edges = _given(
        threshold=edge_threshold,
        freeze=freeze,
        relative_to=relative_to,
        from_input=from_input or None,
        same_layer=same_layer or None,
    )
    if of_edges and not edges:
        flag = "--edge-threshold" if "threshold" in of_edges else _flag(next(iter(of_edges)))
        raise typer.BadParameter(f"{flag} is of edges that are pruned; expected --edges with it")
    if edge_threshold is not None and not edge_threshold > 0:
        raise typer.BadParameter(f"--edge-threshold {edge_threshold} must be positive: a share of the logit difference")
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
        if edges and circuit.nodes:
            circuit = sc.prune_edges(
                loaded,
                prompts,
                circuit,
                both_sides=both_sides,
                progress=lambda done, total: progress("paths", done, total),
                **_given(**how),
                **of_edges,
            )
    if circuit_file is not None:
        text = circuit_text(circuit, circuit_file.name, loaded.config)
        write_text(circuit_file, text, silent=quiet or as_json)
    print(circuit.to_json() if as_json else _described(circuit))
    warn_of_empty(circuit)


_OF_EDGES = ("acdc", "eap", "eap-ig", "edge-masks")
_WHAT = {"prune": "pruning", "masks": "learning", "edge-masks": "learning"}


def _described(circuit: sc.Circuit) -> str:
    """The circuit, with what its method says of its edges: which are lost, how exact they are, what they score."""
    lines = [str(circuit)]
    n_taken = circuit.settings.get("n_taken", 0)
    n_lost = n_taken - len(circuit.edges)
    if n_lost > 0:
        lines.append(f"without {n_lost} of the {n_taken} edges taken: no path of these joins them to input and logits")
    if verified := circuit.settings.get("verified"):
        lines.append(
            f"exact effects of its edges: rank correlation with the gradients' {verified['rank_correlation']:.2f}, "
            f"{verified['same_sign']:.0%} with the same sign"
        )
    if how := circuit.settings.get("edges"):
        judged = counted(how["n_candidates"], "edge")
        lines.append(
            f"{len(circuit.edges)} of {judged} that were judged matter; without the others the score is "
            f"{how['score']:.1f}"
        )
    return "\n".join(lines)


def _asked(method: str, **options: Any) -> dict[str, Any]:
    """The options that were given. Refuses, by its name on the command line, one that the method does not take."""
    from subcircuit.analysis.discover import METHODS, options_of

    given = _given(**options)
    if method in METHODS:  # others are refused by name where they are looked up
        takes = [name for name in options if name in options_of(method)]
        for name in [name for name in given if name not in takes]:
            listed = ", ".join(map(_flag, takes))
            raise typer.BadParameter(f"method {method!r} has no {_flag(name)}; expected some of {listed}")
    return given


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _given(**options: Any) -> dict[str, Any]:
    """The options that have a value."""
    values = {name: getattr(value, "value", value) for name, value in options.items()}
    return {name: value for name, value in values.items() if value is not None}
