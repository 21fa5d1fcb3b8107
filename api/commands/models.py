"""subcircuit models, subcircuit info."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

import subcircuit as sc
from subcircuit.console import new_table, out
from subcircuit.options import JsonOption


def models(as_json: JsonOption = False) -> None:
    """List the models that have a short name. Where each is or how to get it."""
    known = sc.known_models()
    if as_json:
        print(json.dumps([{"name": m.name, "description": m.description, "where": m.where()} for m in known]))
        return
    table = new_table("name", "model", "where")
    for model in known:
        table.add_row(model.name, model.description, model.where())
    out.print(table)
    out.print("\nAlso a directory in Hugging Face's form, a .gguf file, a llama2.c .bin file, or a hub id.")


def info(
    name: Annotated[str | None, typer.Argument(metavar="MODEL", help="A model.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="The same as an option.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a model's configuration and tokenizer."""
    wanted = name or model
    if wanted is None:
        raise typer.BadParameter("no model; expected a name, a directory or a file")
    loaded = sc.load(wanted)
    tokenizer = loaded.tokenizer
    values: dict[str, Any] = {**vars(loaded.config), "n_params": loaded.config.n_params}
    values["n_hook_points"] = len(loaded.hook_names())
    if tokenizer is not None:
        values |= {"tokenizer": tokenizer.name, "adds_bos": tokenizer.adds_bos, "bos_id": tokenizer.bos_id}
    if as_json:
        print(json.dumps(values, default=vars))
        return
    table = new_table("", "")
    for key, value in values.items():
        table.add_row(key, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
    out.print(table)
