"""subcircuit vector."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import subcircuit as sc
from subcircuit.console import say_written
from subcircuit.options import DeviceOption, DtypeOption, ModelOption


def vector(
    model: ModelOption,
    site: Annotated[str, typer.Option("--at", help="Where it is read: r12 (residual entering a layer), m3, a5.h1.")],
    towards: Annotated[list[str], typer.Option(help="A prompt of the one set; may be given several times.")],
    away_from: Annotated[list[str], typer.Option(help="A prompt of the other set; may be given several times.")],
    file: Annotated[Path, typer.Option("--out", "-o", help="The safetensors file to write.")],
    position: Annotated[int, typer.Option(help="Token of each prompt, counted from its end.")] = -1,
    everywhere: Annotated[bool, typer.Option("--everywhere", help="The mean over all tokens of a prompt.")] = False,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
) -> None:
    """Make a steering vector. The mean activation on some prompts minus that on others."""
    from subcircuit.analysis.vectors import save_vector

    loaded = sc.load(model, dtype=dtype, device=device)
    found = sc.mean_difference(loaded, site, towards, away_from, None if everywhere else position)
    save_vector(file, found, {"model": model, "site": site})
    say_written(file, silent=False)
    print(f"{len(found)} entries, norm {float(found.norm()):.3f}; use it as --steer {file}@{site}")
