"""A sweep over all heads of SmolLM2-135M: delta form against one hooked full forward per head, on the same engine.

Prints the time of both (medians), the ratio, and the error of the effects against full forwards in float64, beside the
error that ordinary bfloat16 re-runs make. The full forwards are timed on a sample of the heads, spread over the
layers, and scaled up to all of them: each costs the same, whichever head it patches.

    python benchmarks/bench_sweep.py [--model smollm2-135m] [--runs 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import subcircuit as sc


def median_seconds(run: Callable[[], object], n_runs: int) -> float:
    """Median wall time of n runs; the sample's effects, computed before, have warmed everything up."""
    seconds = []
    for _ in range(n_runs):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def relative_error(effects: torch.Tensor, reference: torch.Tensor) -> float:
    return float((effects.double() - reference).norm() / reference.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="months")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sample", type=int, default=10, help="heads that are also run as full forwards")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model = sc.load(options.model)
    task = sc.task(options.task, model, n=options.prompts, seed=0)
    config = model.config
    n_heads = config.n_layers * config.n_heads
    layers = torch.linspace(0, config.n_layers - 1, options.sample).round().int().tolist()
    sample = [f"a{layer}.h{layer % config.n_heads}" for layer in layers]

    def sweep(components: str | list[str], executor: str, precision: str) -> sc.Scores:
        return sc.sweep(model, task, components, executor=executor, precision=precision)  # type: ignore[arg-type]

    exact = sweep(sample, "reference", "fp64").effects
    rows = []
    full = 0.0
    for name, precision in (("full forwards, float32", "fp32"), ("full forwards, bfloat16", "bf16")):
        effects = sweep(sample, "reference", precision).effects
        # The clean and the corrupted run are shared by all heads: only what a further head costs is scaled up.
        one = median_seconds(lambda p=precision: sweep(sample[:1], "reference", p), options.runs)  # type: ignore[misc]
        several = median_seconds(lambda p=precision: sweep(sample, "reference", p), options.runs)  # type: ignore[misc]
        seconds = one + (several - one) / (len(sample) - 1) * (n_heads - 1)
        full = full or seconds
        rows.append((name, seconds, relative_error(effects, exact)))
    for name, precision in (("delta form, float32", "fp32"), ("delta form, bfloat16", "bf16")):
        effects = sweep(sample, "torch", precision).effects
        seconds = median_seconds(lambda precision=precision: sweep("heads", "torch", precision), options.runs)  # type: ignore[misc]
        rows.append((name, seconds, relative_error(effects, exact)))

    table = Table(
        title=f"{options.model}: {n_heads} heads × {options.prompts} prompts of {task.clean.shape[1]} tokens, "
        f"first difference at {task.first_difference}, {options.threads} threads"
    )
    for column in ("", "seconds", "patches/s", "times faster", "effect error"):
        table.add_column(column, justify="right" if column else "left")
    for name, seconds, error in rows:
        rate = n_heads * options.prompts / seconds
        table.add_row(name, f"{seconds:.1f}", f"{rate:.0f}", f"{full / seconds:.2f}", f"{error:.1e}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
