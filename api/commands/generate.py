"""subcircuit generate."""

from __future__ import annotations

import json
from typing import Annotated

import typer

import subcircuit as sc
from subcircuit.console import out
from subcircuit.options import DeviceOption, DtypeOption, JsonOption, ModelOption


def generate(
    model: ModelOption,
    texts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="Prompts to continue.")] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="The same as an option.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 20,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the likeliest so many.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest that have this probability.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    bos: Annotated[bool | None, typer.Option("--bos/--no-bos", help="Override the tokenizer's own rule.")] = None,
    steer: Annotated[
        list[str] | None,
        typer.Option(help="Add a vector, FILE@SITE*COEFFICIENT, as v.safetensors@r12*4; may be given several times."),
    ] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Continue prompts."""
    prompts = [*(texts or []), *(prompt or [])]
    if not prompts:
        raise typer.BadParameter("no prompt to continue; expected one or more")
    from subcircuit.analysis.vectors import parse_steering

    steering = [parse_steering(text) for text in steer or []]
    loaded = sc.load(model, dtype=dtype, device=device, bos=bos)
    result = loaded.generate(
        prompts, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, steering=steering
    )
    made = list(zip(prompts, result.texts or [], result.tokens, strict=True))
    if as_json:
        print(json.dumps([{"prompt": start, "text": text, "tokens": tokens} for start, text, tokens in made]))
        return
    for start, text, _ in made:
        out.print(start, style="dim", end="")
        out.print(text)
