"""subcircuit compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import subcircuit as sc
from subcircuit.circuits import load_circuits, warn_of_other_model
from subcircuit.console import new_table, out, write_text
from subcircuit.options import (
    DeviceOption,
    DictionariesOption,
    DtypeOption,
    FilterOption,
    HooksOption,
    JsonOption,
    MembersOption,
    NOption,
    QuietOption,
    SeedOption,
    SourceOption,
    TemplateOption,
    check_suffix,
    with_dictionaries,
)

if TYPE_CHECKING:
    from subcircuit.analysis.compare import Comparison
    from subcircuit.analysis.tasks import Task
    from subcircuit.engine.config import ModelConfig
    from subcircuit.engine.model import HookedTransformer
    from subcircuit.engine.patching import Component

Build = Callable[[str, "HookedTransformer"], "Task"]
"""Makes a model's prompts of a task."""
Candidates = dict["ModelConfig", "list[Component]"]
"""What circuits may consist of, by model; none of a model without dictionaries, where that is every head and MLP."""

Scored = dict[str, dict[str, tuple[float, float, float]]]
"""Points with interval, by task and circuit: of their nodes, and under `…, by edges` of their edges alone."""


def compare(
    files: Annotated[list[Path], typer.Argument(help="Circuits as JSON, from `subcircuit discover --out`.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Of all circuits; else each circuit's own is used.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", "-t", help="Score every circuit on it, a name or file; may be given several times."),
    ] = None,
    dictionaries: DictionariesOption = None,
    hooks: HooksOption = None,
    n: NOption = 32,
    seed: SeedOption = 0,
    template: TemplateOption = "all",
    members: MembersOption = None,
    only_answered: FilterOption = False,
    source: SourceOption = "mean",
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    figure: Annotated[
        Path | None,
        typer.Option(help="Write the overlap of heads, or with --dictionary of all nodes, to this SVG file."),
    ] = None,
    with_mlps: Annotated[
        bool, typer.Option("--with-mlps", help="Give every circuit all MLPs of its model: its heads are compared.")
    ] = False,
    overlay: Annotated[
        Path | None, typer.Option(help="Draw the circuits and their edges in one diagram, to this SVG file.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say what saved circuits share. Beside what circuits of their sizes share by chance."""
    from subcircuit.analysis.compare import compare_circuits
    from subcircuit.engine.threads import suitable_threads

    check_suffix(figure, ".svg")
    check_suffix(overlay, ".svg")
    saved = load_circuits(files)
    circuits = _named(saved, files)
    owner = _owners(circuits, model, dictionaries, hooks, dtype, device)
    for file, name in zip(saved, circuits, strict=True):
        warn_of_other_model({file: circuits[name]}, owner[name])
    if with_mlps:
        circuits = {name: _with_all_mlps(circuit, owner[name].config) for name, circuit in circuits.items()}
    build = partial(sc.task, n=n, seed=seed, template=template, members=members, filter=only_answered)
    groups = {
        each: {name: circuit for name, circuit in circuits.items() if owner[name] is each} for each in owner.values()
    }
    candidates = {
        each.config: _candidates(each, own, task, build, source) for each, own in groups.items() if each.dictionaries
    }
    comparison = compare_circuits({name: (circuits[name], owner[name].config) for name in circuits}, candidates)
    scored: Scored = {}
    for each, own in groups.items():
        with suitable_threads(each):
            scored |= _scored(each, own, task or [], build, source, seed, len(groups) > 1)
    if figure is not None:
        write_text(figure, _figure(comparison, owner, candidates), silent=quiet or as_json)
    if overlay is not None:
        write_text(overlay, _overlay(comparison, owner), silent=quiet or as_json)
    if as_json:
        print(json.dumps(comparison.to_dict() | {"scored": scored}))
    else:
        _print(comparison, scored)


def _with_all_mlps(circuit: sc.Circuit, config: ModelConfig) -> sc.Circuit:
    return replace(circuit, mlps=list(range(config.n_layers)), edges=(), edge_scores={})


def _owners(
    circuits: dict[str, sc.Circuit],
    model: str | None,
    dictionaries: list[Path] | None,
    hooks: list[str] | None,
    dtype: str,
    device: str,
) -> dict[str, HookedTransformer]:
    """The model of each circuit, loaded once; with the dictionaries where a circuit has features."""
    over_features = [name for name, circuit in circuits.items() if circuit.features]
    if over_features and not dictionaries:
        some = f"circuit '{over_features[0]}' has features (such as {circuits[over_features[0]].features[0]})"
        raise typer.BadParameter(f"{some}; expected their --dictionary")
    if (dictionaries or hooks) and not over_features:
        raise typer.BadParameter("no circuit has features; expected no --dictionary and no --hook")
    names = {name: _model_of(circuit, name, model) for name, circuit in circuits.items()}
    models = {each: sc.load(each, dtype=dtype, device=device) for each in dict.fromkeys(names.values())}
    for each in {names[name] for name in over_features}:
        models[each] = with_dictionaries(models[each], dictionaries, hooks)
    return {name: models[each] for name, each in names.items()}


def _candidates(
    model: HookedTransformer, circuits: dict[str, sc.Circuit], tasks: list[str] | None, build: Build, source: str
) -> list[Component]:
    """What circuits of a model with dictionaries may consist of on the given tasks, or on the circuits' own; and what
    these consist of, which may come from other prompts or another source."""
    from subcircuit.analysis.circuit import in_order
    from subcircuit.analysis.nodes import candidates_of, check_nodes

    for name, circuit in circuits.items():
        if not tasks and not circuit.task:
            raise typer.BadParameter(f"circuit '{name}' does not say on which task it was found; expected --task")
    of_tasks = tasks or list(dict.fromkeys(circuit.task for circuit in circuits.values()))
    nodes = set(candidates_of(model, [build(task, model) for task in of_tasks], [source]))
    nodes.update(node for circuit in circuits.values() for node in circuit.features)
    for name, circuit in circuits.items():
        try:
            check_nodes(circuit.nodes, model, beside=nodes)
        except sc.errors.PatchError as error:
            raise sc.errors.PatchError(f"circuit '{name}': {error}") from error
    return sorted(nodes, key=in_order)


def _model_of(circuit: sc.Circuit, name: str, model: str | None) -> str:
    if model is None and not circuit.model:
        raise typer.BadParameter(f"circuit '{name}' does not say of which model it is; expected --model")
    return model or circuit.model


def _named(saved: dict[Path, sc.Circuit], files: list[Path]) -> dict[str, sc.Circuit]:
    """Circuits by file name, with the folder where two have the same."""
    stems = [file.stem for file in files]
    unique = len(set(stems)) == len(stems)
    names = stems if unique else [str(file) for file in files]
    if len(set(names)) < len(names):
        raise typer.BadParameter(f"a circuit is given twice: {', '.join(names)}")
    return dict(zip(names, saved.values(), strict=True))


def _scored(
    model: HookedTransformer,
    circuits: dict[str, sc.Circuit],
    tasks: list[str],
    build: Build,
    source: str,
    seed: int,
    several_models: bool,
) -> Scored:
    from subcircuit.analysis.evaluation import circuits_scored

    with_edges = {name: circuit for name, circuit in circuits.items() if circuit.edges}
    circuits, with_edges = _with_combined(circuits), _with_combined(with_edges)
    scored: Scored = {}
    for name in tasks:
        prompts = build(name, model)
        label = f"{name} ({model.config.name})" if several_models else name
        scored[label] = circuits_scored(sc.Ablation(model, prompts, source=source), circuits, seed=seed)
        if with_edges:
            by_edges = sc.EdgeAblation(model, prompts, source=source)
            scored[f"{label}, by edges"] = circuits_scored(by_edges, with_edges, seed=seed)
    return scored


def _with_combined(circuits: dict[str, sc.Circuit]) -> dict[str, sc.Circuit]:
    """Several circuits, what all of them have, and what any of them has."""
    together = list(circuits.values())
    if len(together) < 2:
        return circuits
    return circuits | {"shared by all": sc.intersection(together), "union": sc.union(together)}


def _only_config(owner: dict[str, HookedTransformer], option: str) -> ModelConfig:
    """Of the one model that all circuits are of."""
    configs = {model.config for model in owner.values()}
    if len(configs) > 1:
        raise typer.BadParameter(f"{option} shows circuits of one model; these are of several")
    return configs.pop()


def _overlay(comparison: Comparison, owner: dict[str, HookedTransformer]) -> str:
    from subcircuit.analysis.circuit_figure import overlay_diagram

    config = _only_config(owner, "--overlay")
    return overlay_diagram(comparison.circuits, f"circuits in {config.name}", config.group_size)


def _figure(comparison: Comparison, owner: dict[str, HookedTransformer], candidates: Candidates) -> str:
    from subcircuit.analysis.figures import overlap_figure
    from subcircuit.analysis.overlap import overlap_matrix

    config = _only_config(owner, "--figure")
    kind, what = ("nodes", "Nodes") if config in candidates else ("heads", "Heads")
    circuits = comparison.circuits
    matrix = overlap_matrix(list(circuits.values()), config, kind, candidates.get(config))  # type: ignore[arg-type]
    return overlap_figure(matrix, list(circuits), f"{what} in common (Jaccard index)")


def _print(comparison: Comparison, scored: Scored) -> None:
    for name, circuit in comparison.circuits.items():
        out.print(f"{name}: {circuit}")
    table = new_table("circuits", "what", "both", "of", "Jaccard", "by chance", "p")
    for pair in comparison.pairs:
        for each in pair.overlaps:
            sizes = f"{each.n_a} and {each.n_b} of {each.n_all}"
            numbers = f"{each.jaccard:.2f}", f"{each.expected_jaccard:.2f}", f"{each.p:.2g}"
            table.add_row(f"{pair.a}, {pair.b}", each.kind, str(each.n_both), sizes, *numbers)
    if table.row_count:
        out.print()
        out.print(table)
    depths = new_table("circuits", "distance in depth", "by chance", "p")
    for pair in comparison.pairs:
        if pair.depths is not None:
            found = pair.depths
            numbers = f"{found.distance:.3f}", f"{found.expected_distance:.3f}", f"{found.p:.2g}"
            depths.add_row(f"{pair.a}, {pair.b}", *numbers)
    if depths.row_count:
        out.print()
        out.print(depths)
    for model, circuit in comparison.shared.items():
        out.print(f"\nShared by all of {model}: {circuit}")
    if scored:
        _print_scored(scored)


def _print_scored(scored: Scored) -> None:
    table = new_table("task", "circuit", "recovered", "95 % interval")
    for task, circuits in scored.items():
        for name, (mean, low, high) in circuits.items():
            table.add_row(task, name, f"{mean:.1f}", f"{low:.1f} to {high:.1f}")
    out.print()
    out.print(table)
