"""Error of the effects against full forwards in float64: ‖Δ‖ / ‖effects‖ for heads, MLPs or edges, and each source.

The delta form in float32 and bfloat16, beside ordinary patched runs in bfloat16. With --edges: edges removed, and paths
with heads or nothing frozen.

    python benchmarks/bench_accuracy.py [--model smollm2-135m --model tiny-gpt2] [--prompts 4] [--sample 6] [--edges]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import subcircuit as sc

SOURCES = ("corrupted", "mean", "zero")
COLUMNS = {
    "delta form, float32": ("torch", "fp32"),
    "delta form, bfloat16": ("torch", "bf16"),
    "full forwards, bfloat16": ("reference", "bf16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append")
    parser.add_argument("--task", default="months")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--sample", type=int, default=6, help="layers, spread over the model")
    parser.add_argument("--edges", action="store_true", help="edges and paths instead of heads and MLPs")
    options = parser.parse_args()

    table = Table(title=f"error of the effects, {options.task}, {options.prompts} prompts")
    for column in ("model", "components", "source", *COLUMNS):
        table.add_column(column, justify="right" if column in COLUMNS else "left")
    for name in options.model or ["smollm2-135m", "tiny-gpt2"]:
        model = sc.load(name)
        task = sc.task(options.task, model, n=options.prompts, seed=0)
        layers = torch.linspace(0, model.config.n_layers - 1, options.sample).round().int().unique().tolist()
        families = edges_and_paths if options.edges else heads_and_mlps
        for family, effects in families(model, task, layers).items():
            for source in SOURCES:
                table.add_row(name, family, source, *errors(partial(effects, source=source)))
    Console(width=120).print(table)


def heads_and_mlps(model: sc.HookedTransformer, task: sc.Task, layers: list[int]) -> dict[str, Callable[..., Any]]:
    """A head and the MLP of every layer."""
    heads = [f"a{layer}.h{layer % model.config.n_heads}" for layer in layers]
    mlps = [f"m{layer}" for layer in layers]
    return {
        name: partial(sc.patch_effects, model, task, sites) for name, sites in {"heads": heads, "MLPs": mlps}.items()
    }


def edges_and_paths(model: sc.HookedTransformer, task: sc.Task, layers: list[int]) -> dict[str, Callable[..., Any]]:
    """In every layer: from the embeddings to a value and the MLP, from the MLP before, from a head to the logits."""
    edges = []
    for layer in layers:
        edges += [("input", f"a{layer}.v0"), ("input", f"m{layer}")]
        edges += [(f"a{layer}.h{layer % model.config.n_heads}", "logits")]
        edges += [(f"m{before}", f"m{layer}") for before in layers[: layers.index(layer)][-1:]]
    paths = partial(sc.path_effects, model, task, edges)
    return {
        "edges": partial(sc.edge_effects, model, task, edges),
        "paths, heads frozen": partial(paths, freeze="heads"),
        "paths, nothing frozen": partial(paths, freeze="none"),
    }


def errors(effects: Callable[..., Any]) -> list[str]:
    """Of each column."""
    exact = effects(executor="reference", precision="fp64").effects
    found = []
    for executor, precision in COLUMNS.values():
        values = effects(executor=executor, precision=precision).effects
        found.append(f"{float((values.double() - exact).norm() / exact.norm()):.1e}")
    return found


if __name__ == "__main__":
    main()
