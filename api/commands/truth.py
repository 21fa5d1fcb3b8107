"""subcircuit truth."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

import subcircuit as sc
from subcircuit.console import new_table, out, progress_bars
from subcircuit.options import JsonOption, QuietOption

if TYPE_CHECKING:
    from subcircuit.analysis.truth import TruthRow


def truth(
    models: Annotated[
        list[str] | None, typer.Argument(help="induction, successor, inhibition; all by default.")
    ] = None,
    family: Annotated[list[str] | None, typer.Option(help="gpt2 or llama; both by default.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="A method by its name in the table; all by default.")] = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Prompts per model.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the first model: weights, places and prompts.")] = 0,
    n_seeds: Annotated[int, typer.Option(min=1, help="Models of each kind.")] = 3,
    n_distractors: Annotated[
        int | None, typer.Option(min=0, help="Heads and MLPs that write noise; half of the free ones by default.")
    ] = None,
    noise: Annotated[
        float, typer.Option(min=0, help="Size of what they write, in units of what a true node does.")
    ] = 1,
    sharpness: Annotated[float, typer.Option(help="Score by which true heads prefer what they look for.")] = 12,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Test discovery methods on known circuits. Of models that are built around them."""
    from subcircuit.analysis.truth import FAMILIES

    with progress_bars(quiet) as progress:
        rows = sc.truth_table(
            models,
            families=family or FAMILIES,  # type: ignore[arg-type]  # another one is refused by name
            methods=method,
            n=n,
            seed=seed,
            n_seeds=n_seeds,
            n_distractors=n_distractors,
            noise=noise,
            sharpness=sharpness,
            progress=lambda done, total: progress("methods on known models", done, total),
        )
    if as_json:
        print(json.dumps([row.to_dict() for row in rows]))
    else:
        _print_table(rows)


def _print_table(rows: list[TruthRow]) -> None:
    table = new_table(
        "model", "form", "method", "exact", "of", "precision", "recall", "F1", "AUROC", "AP", "ms", "missed"
    )
    for row in rows:
        figures = (row.precision, row.recall, row.f1, row.auroc, row.average_precision)
        shown = ("" if figure is None else f"{figure:.3f}" for figure in figures)
        where = row.model, row.family, row.method, "yes" if row.exact else "", row.what
        table.add_row(*where, *shown, f"{1000 * row.seconds:.0f}", ", ".join(row.missed))
    out.print(table)
