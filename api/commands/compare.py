"""subcircuit compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import subcircuit as sc
from subcircuit.circuits import load_circuits, warn_of_other_model
from subcircuit.console import new_table, out
from subcircuit.options import DeviceOption, DtypeOption, JsonOption, NOption, SeedOption, SourceOption, TemplateOption

if TYPE_CHECKING:
    from subcircuit.analysis.compare import Comparison
    from subcircuit.engine.model import HookedTransformer

Scored = dict[str, dict[str, tuple[float, float, float]]]
"""Points with interval, by task and circuit."""


def compare(
    files: Annotated[list[Path], typer.Argument(help="Circuits as JSON, from `subcircuit discover --out`.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Of all circuits; else each circuit's own is used.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", "-t", help="Score every circuit on it; may be given several times.")
    ] = None,
    n: NOption = 32,
    seed: SeedOption = 0,
    template: TemplateOption = "all",
    source: SourceOption = "mean",
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    figure: Annotated[Path | None, typer.Option(help="Write the overlap of heads to this SVG file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what saved circuits share. Beside what circuits of their sizes share by chance."""
    from subcircuit.analysis.compare import compare_circuits
    from subcircuit.engine.threads import suitable_threads

    saved = load_circuits(files)
    circuits = _named(saved, files)
    models = {
        name: sc.load(name, dtype=dtype, device=device)
        for name in dict.fromkeys(_model_of(circuit, name, model) for name, circuit in circuits.items())
    }
    owner = {name: models[_model_of(circuit, name, model)] for name, circuit in circuits.items()}
    if model is not None:
        warn_of_other_model(saved, models[model])
    comparison = compare_circuits({name: (circuit, owner[name].config) for name, circuit in circuits.items()})
    scored: Scored = {}
    for each in models.values():
        with suitable_threads(each):
            own = {name: circuit for name, circuit in circuits.items() if owner[name] is each}
            scored |= _scored(each, own, task or [], n, seed, template, source, len(models) > 1)
    if figure is not None:
        _write_figure(figure, comparison, owner)
    if as_json:
        print(json.dumps(comparison.to_dict() | {"scored": scored}))
    else:
        _print(comparison, scored)


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
    n: int,
    seed: int,
    template: str,
    source: str,
    several_models: bool,
) -> Scored:
    from subcircuit.analysis.evaluation import circuits_scored

    if len(circuits) > 1:
        together = list(circuits.values())
        circuits = circuits | {"shared by all": sc.intersection(together), "union": sc.union(together)}
    scored: Scored = {}
    for name in tasks:
        prompts = sc.task(name, model, n=n, seed=seed, template=template)
        label = f"{name} ({model.config.name})" if several_models else name
        scored[label] = circuits_scored(sc.Ablation(model, prompts, source=source), circuits, seed=seed)
    return scored


def _write_figure(file: Path, comparison: Comparison, owner: dict[str, HookedTransformer]) -> None:
    from subcircuit.analysis.figures import overlap_figure
    from subcircuit.analysis.overlap import overlap_matrix
    from subcircuit.analysis.store import write_whole

    configs = {owner[name].config for name in comparison.circuits}
    if len(configs) > 1:
        raise typer.BadParameter("--figure shows circuits of one model; these are of several")
    matrix = overlap_matrix(list(comparison.circuits.values()), configs.pop())
    svg = overlap_figure(matrix, list(comparison.circuits), "Heads in common (Jaccard index)")
    write_whole(file, svg.encode("utf-8"))


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
