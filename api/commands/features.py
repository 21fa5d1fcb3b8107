"""subcircuit features and subcircuit train-dictionary."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import subcircuit as sc
from subcircuit.console import interval_of, new_table, out, progress_bars, say_written
from subcircuit.options import (
    DeviceOption,
    DtypeOption,
    Executor,
    ExecutorOption,
    JsonOption,
    MembersOption,
    Metric,
    MetricOption,
    ModelOption,
    NOption,
    Precision,
    PrecisionOption,
    QuietOption,
    SeedOption,
    SourceOption,
    TaskOption,
    TemplateOption,
)


class Method(StrEnum):
    exact = "exact"
    attribution = "attribution"


class Activation(StrEnum):
    topk = "topk"
    relu = "relu"


def features(
    model: ModelOption,
    dictionary: Annotated[Path, typer.Option("--dictionary", "-d", help="A directory, safetensors or params.npz.")],
    task: TaskOption,
    method: Annotated[Method, typer.Option(help="exact patching, or its estimate by gradient.")] = Method.exact,
    chosen: Annotated[
        str, typer.Option("--features", help="Indices such as 3,17, or all that can have an effect.")
    ] = "active",
    hook: Annotated[str | None, typer.Option(help="Where it sits, for files that do not say.")] = None,
    n: NOption = 32,
    seed: SeedOption = 0,
    template: TemplateOption = "all",
    members: MembersOption = None,
    source: SourceOption = "corrupted",
    metric: MetricOption = Metric.logit_difference,
    precision: PrecisionOption = Precision.fp32,
    executor: ExecutorOption = Executor.torch,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    top: Annotated[int, typer.Option(min=1, help="Features to show, the largest effects first.")] = 10,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Patch every feature of a sparse dictionary. With the tokens that the strongest fire on."""
    from subcircuit.analysis.baselines import called, table_with_q
    from subcircuit.engine.threads import suitable_threads

    indices = _indices(chosen)
    loaded = sc.load(model, dtype=dtype, device=device)
    read = sc.load_dictionary(dictionary, hook=hook, dtype=dtype, device=device)
    prompts = sc.task(task, loaded, n=n, seed=seed, template=template, members=members)
    with progress_bars(quiet) as progress, suitable_threads(loaded):
        scores = sc.feature_scores(
            loaded,
            prompts,
            read,
            "active" if indices is None else indices,
            source=source,
            method=method.value,
            metric=metric.value,
            executor=executor.value,
            precision=precision.value,
            progress=lambda done, total: progress("sweep of features", done, total),
        )
    rows = sorted(table_with_q(scores, seed=seed), key=lambda row: -abs(row["effect"]))
    _add_tokens(rows[:top], loaded, read, prompts)
    if as_json:
        print(json.dumps({"settings": scores.settings, "features": rows}))
        return
    clean = f"clean {metric.value.replace('_', ' ')} {float(scores.clean_metric.mean()):.3f}"
    out.print(f"{len(rows)} of {read.d_sae} features × {prompts.n} prompts, {clean}; {scores.settings['method']}")
    table = new_table("site", "effect", "95 %", "share", "q", "fires on")
    for row in rows[:top]:
        share = "–" if row["share"] is None else f"{row['share']:+.1%}"
        fires = ", ".join(f"{each['token']!r} {each['share']:.0%}" for each in row["fires_on"])
        q = "–" if row["q"] is None else f"{row['q']:.2g}"
        table.add_row(row["site"], f"{row['effect']:+.3f}", interval_of(row), share, q, fires)
    out.print(table)
    if metric is not Metric.kl:
        out.print(called(rows, prompts.n))


def _indices(text: str) -> list[int] | None:
    """The listed features; None for all that are active."""
    if text == "active":
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise typer.BadParameter(f"features {text!r}: expected 'active' or indices such as 3,17")
    return [int(part) for part in parts]


def _add_tokens(
    rows: list[dict[str, Any]], model: sc.HookedTransformer, dictionary: sc.SparseDictionary, task: sc.Task
) -> None:
    """Say of each row which tokens of the task's prompts, clean and corrupted, its feature fires on."""
    import torch

    tokens = task.clean if task.corrupted is None else torch.cat((task.clean, task.corrupted))
    found = sc.firing_tokens(model, dictionary, tokens, [row["index"] for row in rows], top=4)
    for row, fires in zip(rows, found, strict=True):
        row["fires_on"] = [{"token": _text(model, token), "share": share} for token, share in fires]


def _text(model: sc.HookedTransformer, token: int) -> str:
    return str(token) if model.tokenizer is None else model.tokenizer.decode([token])


def train_dictionary(
    model: ModelOption,
    hook: Annotated[str, typer.Option(help="Where it sits, such as blocks.2.hook_resid_pre.")],
    out_directory: Annotated[Path, typer.Option("--out", "-o", help="Directory to write, in SAELens' layout.")],
    size: Annotated[int, typer.Option(min=1, help="Number of features.")] = 512,
    activation: Annotated[Activation, typer.Option(help="topk, or relu with an L1 penalty.")] = Activation.topk,
    k: Annotated[int, typer.Option("--k", min=1, help="Features active per token, for topk.")] = 16,
    l1: Annotated[float, typer.Option("--l1", min=0, help="Weight of the penalty, for relu.")] = 0.1,
    steps: Annotated[int, typer.Option(min=1, help="Of Adam, 512 tokens each.")] = 1000,
    n_rows: Annotated[int, typer.Option("--rows", min=2, help="Rows of 128 tokens of tiny-gpt2's text.")] = 600,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a sparse dictionary. On a model's activations over tiny-gpt2's training text."""
    from subcircuit.analysis.dictionary_training import held_out_rows, tiny_text_rows

    settings = sc.TrainingSettings(
        size=size, activation=activation.value, k=min(k, size), l1=l1, steps=steps, seed=seed
    )
    loaded = sc.load(model, device=device)
    tokens, start = tiny_text_rows(loaded, n_rows, seed=seed), time.perf_counter()
    with progress_bars(quiet) as progress:
        trained = sc.train_dictionary(
            loaded, hook, tokens, settings, progress=lambda done, total: progress("training", done, total)
        )
    elapsed_s = time.perf_counter() - start
    quality = sc.dictionary_quality(loaded, trained, held_out_rows(tokens))
    figures = {**asdict(quality), "loss_recovered": quality.loss_recovered}
    sc.save_dictionary(out_directory, trained, {"model_name": model, "training": asdict(settings), "quality": figures})
    say_written(out_directory, silent=quiet or as_json)
    if as_json:
        print(json.dumps({"out": str(out_directory), "elapsed_s": elapsed_s, **figures}))
        return
    out.print(f"{size} features at {hook}, trained in {elapsed_s:.0f} s")
    table = new_table("", "")
    table.add_row("explained variance", f"{quality.explained_variance:.1%}")
    table.add_row("features active per token", f"{quality.l0:.1f}")
    table.add_row("features that never fire", f"{quality.dead_share:.1%}")
    losses = (
        f"{quality.loss:.3f} → {quality.reconstructed_loss:.3f} nats, with 0 in its place {quality.zeroed_loss:.3f}"
    )
    table.add_row("loss recovered", f"{quality.loss_recovered:.2%} ({losses})")
    out.print(table)
    out.print(f"\nOn {quality.n_tokens:,} tokens that it was not trained on.")
