"""subcircuit convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from subcircuit.circuits import load_circuit
from subcircuit.console import write_text
from subcircuit.options import DeviceOption, QuietOption, check_suffix


def convert(
    circuit_file: Annotated[Path, typer.Argument(help="A circuit as JSON: ours, or MIB's.")],
    file: Annotated[
        Path,
        typer.Argument(help="What to write: JSON, MIB's JSON (.mib.json), Graphviz (.dot) or a diagram (.svg)."),
    ],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Whose circuit it is; else the one that the file names.")
    ] = None,
    task: Annotated[str, typer.Option("--task", "-t", help="Of a circuit of MIB's, which does not say it.")] = "",
    device: DeviceOption = "cpu",
    quiet: QuietOption = False,
) -> None:
    """Write a circuit in another format. Those of the MIB benchmark, Graphviz and SVG."""
    from subcircuit.analysis.circuit_formats import SUFFIXES, circuit_text

    check_suffix(file, *SUFFIXES)
    circuit, config = load_circuit(circuit_file, model, task, device)
    write_text(file, circuit_text(circuit, file.name, config), silent=quiet)
    print(circuit)
