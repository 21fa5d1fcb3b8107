"""subcircuit transfer."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import subcircuit as sc
from subcircuit.circuits import load_circuits, warn_of_other_model
from subcircuit.console import new_table, out, progress_bars, warn, write_text
from subcircuit.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    NOption,
    QuietOption,
    SeedOption,
    check_suffix,
    circuit_of_heads,
    names_in,
)

if TYPE_CHECKING:
    from subcircuit.analysis.circuit import Circuit
    from subcircuit.analysis.transfer import Transfer


class AblationValue(StrEnum):
    zero = "zero"
    mean = "mean"


def transfer(
    model: ModelOption,
    circuit: Annotated[
        list[Path] | None, typer.Option("--circuit", "-c", help="A circuit's JSON file; may be given several times.")
    ] = None,
    heads: Annotated[
        list[str] | None, typer.Option("--heads", help="A sub-circuit by its heads, such as a1.h0,a3.h2.")
    ] = None,
    kinds: Annotated[
        str,
        typer.Option("--kinds", "-k", help="interval_2, months, mine.csv, … joined by commas; or all."),
    ] = "all",
    n: NOption = 32,
    seed: SeedOption = 0,
    ablation: Annotated[
        AblationValue, typer.Option(help="What stands in for a head's output: 0, or its mean over the prompts' tokens.")
    ] = AblationValue.zero,
    n_random: Annotated[int, typer.Option("--random", min=0, help="Random sets of as many other heads.")] = 20,
    figure_file: Annotated[Path | None, typer.Option("--out", "-o", help="Draw the shares in this SVG file.")] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Ablate a circuit's heads and let the model go on. Does it still count, add, list months?"""
    from subcircuit.analysis.transfer_figures import transfer_figure
    from subcircuit.engine.threads import suitable_threads

    check_suffix(figure_file, ".svg")
    saved = load_circuits(circuit or [])
    circuits = _circuits(saved, heads or [])
    loaded = sc.load(model, dtype=dtype, device=device)
    warn_of_other_model(saved, loaded)
    with progress_bars(quiet) as progress, suitable_threads(loaded):
        found = sc.transfer(
            loaded,
            circuits,
            () if kinds == "all" else names_in(kinds),
            n=n,
            seed=seed,
            ablation=ablation.value,
            n_random=n_random,
            progress=progress,
        )
    if figure_file is not None:
        answered = [row for row in found.table() if row["n_answered"]]
        if answered:
            title = f"{model}: right answers without a circuit's heads"
            write_text(figure_file, transfer_figure(answered, title), silent=quiet or as_json)
        else:
            warn(f"{figure_file} is not written: the whole model continues no prompt rightly, so there are no shares")
    if as_json:
        print(json.dumps({"model": model, "ablation": found.ablation, "heads": found.heads, "kinds": _values(found)}))
        return
    _print(found)


def _circuits(saved: dict[Path, Circuit], heads: list[str]) -> dict[str, Circuit]:
    """By the task each was found on, or its file's name where tasks are the same; and what several files share."""
    tasks = [circuit.task or file.stem for file, circuit in saved.items()]
    names = [task if tasks.count(task) == 1 else str(file) for task, file in zip(tasks, saved, strict=True)]
    circuits = dict(zip(names, saved.values(), strict=True))
    shared = sc.intersection(list(saved.values())) if len(circuits) > 1 else None
    if shared is not None and shared.heads:
        circuits["shared"] = shared
    circuits |= {",".join(map(str, chosen.nodes)): chosen for chosen in map(circuit_of_heads, heads)}
    if not circuits:
        raise typer.BadParameter("nothing to ablate; expected --circuit or --heads")
    return circuits


def _values(found: Transfer) -> list[dict[str, Any]]:
    by_kind = {kind.kind: kind for kind in found.kinds}
    rows = []
    for row in found.table():
        kind = by_kind[row["kind"]]
        made = zip(kind.prompts, kind.completions[row["circuit"]], kind.correct[row["circuit"]].tolist(), strict=True)
        prompts = [
            {"prompt": prompt.prompt, "expected": prompt.expected, "completion": text, "correct": correct}
            for prompt, text, correct in made
        ]
        rows.append(row | {"prompts": prompts})
    return rows


def _print(found: Transfer) -> None:
    for name, heads in found.heads.items():
        out.print(f"{name}: without heads {' '.join(f'{layer}.{head}' for layer, head in heads)}")
        if not found.random_heads[name]:
            out.print("  no random sets: fewer other heads are left, or none were asked for")
    stands_in = "0" if found.ablation == "zero" else "their mean"
    out.print(f"\nHeads' outputs replaced by {stands_in}. Shares are of the prompts that the whole model answers.\n")
    table = new_table("kind", "circuit", "answered", "still right", "95 %", "random heads", "95 %", "worst", "p")
    for row in [row for row in found.table() if row["n_answered"]]:
        answered = f"{row['n_answered']}/{row['n_asked']}"
        intervals = [_interval(row, which) for which in ("share", "random")]
        p = "–" if row["p"] is None else f"{row['p']:.2g}"
        shares = _percent(row["share"]), intervals[0], _percent(row["random"]), intervals[1]
        table.add_row(row["kind"], row["circuit"], answered, *shares, _percent(row["random_least"]), p)
    if table.row_count:
        out.print(table)
        out.print()
    silent = [kind.kind for kind in found.kinds if not kind.prompts]
    if silent:
        out.print(f"The whole model continues no prompt of {', '.join(silent)} rightly: nothing to compare.")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _interval(row: dict[str, Any], which: str) -> str:
    return "–" if row[which] is None else f"{row[f'{which}_low']:.0%}–{row[f'{which}_high']:.0%}"
