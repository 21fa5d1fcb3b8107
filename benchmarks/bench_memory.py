"""Peak memory of a sweep beside the weights, for several budgets, against the budget and the plan.

A random model of GPT-2 Small's shape, 1,536 prompts of 23 tokens that differ from the fifth on, and a head or a few:
more heads take longer, but no more memory. Each budget has a process of its own; measured is how much its resident set
grows, at its peak, over what it is once the model is in memory.

    python benchmarks/bench_memory.py [--budget 4GB --budget 1GB] [--heads 1] [--precision fp32]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import subcircuit as sc
from subcircuit.options import bytes_of

GPT2_SMALL = sc.ModelConfig(
    n_layers=12,
    d_model=768,
    n_heads=12,
    d_head=64,
    d_mlp=3072,
    d_vocab=50257,
    n_ctx=1024,
    qkv_bias=True,
    attn_out_bias=True,
    mlp_bias=True,
    tied_unembed=True,
    name="gpt2-small-shape",
)


def random_model(config: sc.ModelConfig) -> sc.HookedTransformer:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in sc.HookedTransformer.parameter_shapes(config).items():
        tensors[name] = torch.randn(shape, generator=generator) * 0.02
        if ".ln" in f".{name}" and name.endswith("weight"):
            tensors[name] += 1
    return sc.HookedTransformer(config, tensors)


def random_task(n_prompts: int, n_pos: int, first_difference: int, d_vocab: int) -> sc.Task:
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(0, d_vocab, (n_prompts, n_pos), generator=generator)
    corrupted = clean.clone()
    corrupted[:, first_difference] = (clean[:, first_difference] + 1) % d_vocab
    answer = torch.randint(0, d_vocab, (n_prompts,), generator=generator)
    return sc.task_from_tokens(clean=clean, corrupted=corrupted, answer=answer, wrong=(answer + 1) % d_vocab)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One budget's figures, in this process."""
    model = random_model(GPT2_SMALL)
    task = random_task(options.prompts, options.positions, 4, GPT2_SMALL.d_vocab)
    layers = torch.linspace(4, GPT2_SMALL.n_layers - 1, options.heads).round().int().tolist()
    heads = [f"a{layer}.h{layer}" for layer in layers]
    chosen = {"precision": options.precision, "budget_bytes": bytes_of(options.budget[0])}
    plan = sc.plan(model, task, heads, calibrate=False, **chosen)
    sc.sweep(model, first_prompts(task, 1), heads[:1])  # what libraries load at first use is not counted
    Path("/proc/self/clear_refs").write_text("5")  # peaks count from here
    before, start = resident_bytes(), time.perf_counter()
    sc.sweep(model, task, heads, **chosen)
    status = Path("/proc/self/status").read_text()
    peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    return {
        "budget": plan.budget_bytes,
        "predicted": plan.peak_bytes,
        "measured": peak - before,
        "prompt_chunks": plan.n_prompt_chunks,
        "seconds": time.perf_counter() - start,
    }


def first_prompts(task: sc.Task, n: int) -> sc.Task:
    """The first prompts of a task."""
    assert task.corrupted is not None
    parts = {"clean": task.clean, "corrupted": task.corrupted, "answer": task.answer, "wrong": task.wrong}
    return sc.task_from_tokens(**{name: tensor[:n] for name, tensor in parts.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", action="append")
    parser.add_argument("--prompts", type=int, default=1536)
    parser.add_argument("--positions", type=int, default=23)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options)))
        return
    title = f"GPT-2 Small's shape, {options.prompts:,} prompts of {options.positions} tokens, {options.precision}"
    table = Table(title=f"{title}: bytes beside the weights")
    for column in ("budget", "predicted", "measured", "measured / budget", "chunks of prompts", "seconds"):
        table.add_column(column, justify="right")
    for budget in options.budget or ["4GB", "2GB", "1GB", "500MB"]:
        arguments = [f"--{name}={getattr(options, name)}" for name in ("prompts", "positions", "heads", "precision")]
        command = [sys.executable, __file__, "--child", f"--budget={budget}", *arguments]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        sizes = (f"{found[name] / 1e6:,.0f} MB" for name in ("budget", "predicted", "measured"))
        share = f"{found['measured'] / found['budget']:.2f}"
        table.add_row(*sizes, share, str(found["prompt_chunks"]), f"{found['seconds']:.0f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
