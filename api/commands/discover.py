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
    StepsOption,
    TaskOption,
    TemplateOption,
    ThresholdOption,
)


def discover(
    model: ModelOption,
    task: TaskOption,
    method: Annotated[
        str, typer.Option(help="prune: the paper's iterative node pruning; eap, eap-ig: strongest edges.")
    ] = "prune",
    n: NOption = 32,
    seed: SeedOption = 0,
    template: TemplateOption = "all",
    only_answered: FilterOption = False,
    threshold: ThresholdOption = 20.0,
    first: FirstOption = Direction.backward,
    max_sweeps: MaxSweepsOption = None,
    edges: Annotated[int | None, typer.Option(min=1, help="Edges to take, for eap and eap-ig.")] = None,
    steps: StepsOption = 5,
    precision: PrecisionOption = Precision.fp32,
    executor: ExecutorOption = Executor.torch,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    circuit_file: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the circuit to this file: JSON, or Graphviz for .dot.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find the circuit of one task, by iterative pruning or by edge attribution."""
    from subcircuit.analysis.store import write_whole
    from subcircuit.analysis.study import suitable_threads

    loaded = sc.load(model, dtype=dtype, device=device)
    prompts = sc.task(task, loaded, n=n, seed=seed, template=template, filter=only_answered)
    with progress_bars(quiet) as progress, suitable_threads(loaded):
        if method in ("eap", "eap-ig"):
            if edges is None:
                raise typer.BadParameter(f"method {method} needs --edges, the number of edges to take")
            scores = sc.edge_scores(
                loaded,
                prompts,
                method,  # type: ignore[arg-type]
                steps=steps,
                precision=precision.value,  # type: ignore[arg-type]
                progress=lambda done, total: progress("edges", done, total),
            )
            circuit = scores.circuit(edges)
        else:
            circuit = sc.discover(
                loaded,
                prompts,
                method,
                threshold=threshold,
                first=first.value,
                max_sweeps=max_sweeps,
                precision=precision.value,
                executor=executor.value,
                progress=lambda done, total: progress("pruning", done, total),
            )
    if circuit_file is not None:
        text = circuit.to_dot() if circuit_file.suffix == ".dot" else circuit.to_json() + "\n"
        write_whole(circuit_file, text.encode("utf-8"))
    print(circuit.to_json() if as_json else str(circuit))
