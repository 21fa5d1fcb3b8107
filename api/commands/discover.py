"""subcircuit discover."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import subcircuit as sc
from subcircuit.console import progress_bars
from subcircuit.options import (
    DeviceOption,
    Direction,
    DtypeOption,
    Executor,
    ExecutorOption,
    FilterOption,
    FirstOption,
    JsonOption,
    MaxSweepsOption,
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


def discover(
    model: ModelOption,
    task: TaskOption,
    method: Annotated[str, typer.Option(help="prune: the paper's pruning of nodes; acdc: edges one by one.")] = "prune",
    n: NOption = 32,
    seed: SeedOption = 0,
    template: TemplateOption = "all",
    only_answered: FilterOption = False,
    threshold: Annotated[
        float | None, typer.Option(help="Points of score that the circuit (20), or with acdc each edge (1), may lose.")
    ] = None,
    first: FirstOption = Direction.backward,
    max_sweeps: MaxSweepsOption = None,
    source: SourceOption = "mean",
    edges: Annotated[bool, typer.Option("--edges", help="Prune the circuit's edges too, by path patching.")] = False,
    edge_threshold: Annotated[
        float, typer.Option(help="An edge stays if its patch leaves less than this share of the logit difference.")
    ] = 0.8,
    precision: PrecisionOption = Precision.fp32,
    executor: ExecutorOption = Executor.torch,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    circuit_file: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the circuit to this file: JSON, Graphviz (.dot) or a diagram (.svg)."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find the circuit of one task: its heads and MLPs by iterative pruning, or its edges."""
    from subcircuit.analysis.circuit_figure import circuit_text
    from subcircuit.analysis.store import write_whole
    from subcircuit.analysis.study import suitable_threads

    loaded = sc.load(model, dtype=dtype, device=device)
    prompts = sc.task(task, loaded, n=n, seed=seed, template=template, filter=only_answered)
    with progress_bars(quiet) as progress, suitable_threads(loaded):
        circuit = sc.discover(
            loaded,
            prompts,
            method,
            threshold=threshold,
            first=first.value,
            max_sweeps=max_sweeps,
            source=source,
            precision=precision.value,
            executor=executor.value,
            progress=lambda done, total: progress("pruning", done, total),
        )
        if edges and not circuit.edges:
            circuit = sc.prune_edges(
                loaded,
                prompts,
                circuit,
                edge_threshold,
                source=source,
                precision=precision.value,
                executor=executor.value,
                progress=lambda done, total: progress("paths", done, total),
            )
    if circuit_file is not None:
        text = circuit_text(circuit, circuit_file.suffix, loaded.config.group_size)
        write_whole(circuit_file, text.encode("utf-8"))
    print(circuit.to_json() if as_json else str(circuit))
