"""Error of the effects against full forwards in float64: ‖Δ‖ / ‖effects‖ for heads and MLPs and each source.

The delta form in float32 and bfloat16, beside ordinary patched runs in bfloat16.

    python benchmarks/bench_accuracy.py [--model smollm2-135m --model tiny-gpt2] [--prompts 4] [--sample 6]
"""

from __future__ import annotations

import argparse

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
    parser.add_argument("--sample", type=int, default=6, help="heads and MLPs, spread over the layers")
    options = parser.parse_args()

    table = Table(title=f"error of the effects, {options.task}, {options.prompts} prompts")
    for column in ("model", "components", "source", *COLUMNS):
        table.add_column(column, justify="right" if column in COLUMNS else "left")
    for name in options.model or ["smollm2-135m", "tiny-gpt2"]:
        model = sc.load(name)
        task = sc.task(options.task, model, n=options.prompts, seed=0)
        layers = torch.linspace(0, model.config.n_layers - 1, options.sample).round().int().unique().tolist()
        components = {
            "heads": [f"a{layer}.h{layer % model.config.n_heads}" for layer in layers],
            "MLPs": [f"m{layer}" for layer in layers],
        }
        for family, sites in components.items():
            for source in SOURCES:
                exact = sc.patch_effects(
                    model, task, sites, source=source, executor="reference", precision="fp64"
                ).effects
                errors = []
                for executor, precision in COLUMNS.values():
                    effects = sc.patch_effects(
                        model,
                        task,
                        sites,
                        source=source,
                        executor=executor,  # type: ignore[arg-type]
                        precision=precision,  # type: ignore[arg-type]
                    ).effects
                    errors.append(f"{float((effects.double() - exact).norm() / exact.norm()):.1e}")
                table.add_row(name, family, source, *errors)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
