"""subcircuit sensitivity."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, cast

import typer

import subcircuit as sc
from subcircuit.circuits import load_circuits, warn_of_empty, warn_of_other_model
from subcircuit.console import new_table, out, progress_bars
from subcircuit.options import (
    CircuitOption,
    DeviceOption,
    DictionariesOption,
    DtypeOption,
    FilterOption,
    HooksOption,
    JsonOption,
    MembersOption,
    ModelOption,
    NOption,
    QuietOption,
    SeedOption,
    TaskOption,
    TemplateOption,
    ThresholdOption,
    with_dictionaries,
)

if TYPE_CHECKING:
    from subcircuit.analysis.sensitivity import Outcome, Sensitivity
    from subcircuit.engine.patching.metric import Metric


def sensitivity(
    model: ModelOption,
    task: TaskOption,
    circuit_file: CircuitOption = None,
    dictionaries: DictionariesOption = None,
    hooks: HooksOption = None,
    n: NOption = 32,
    seed: SeedOption = 0,
    n_seeds: Annotated[int, typer.Option("--seeds", min=1, help="Draws of prompts: this seed and the next ones.")] = 2,
    template: TemplateOption = "all",
    members: MembersOption = None,
    only_answered: FilterOption = False,
    sources: Annotated[str, typer.Option(help="What ablated nodes get, joined by commas.")] = "mean,corrupted,zero",
    metrics: Annotated[
        str, typer.Option(help="What is measured, joined by commas.")
    ] = "logit_difference,log_probability,kl,accuracy",
    scopes: Annotated[
        str, typer.Option(help="Where nodes are ablated, joined by commas: all, from_difference, members, last, …")
    ] = "all,from_difference,members,last",
    threshold: ThresholdOption = 20.0,
    n_random: Annotated[int, typer.Option("--random", min=0, help="Random circuits of the same size.")] = 50,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say what holds of a circuit however it is measured. Under every source, metric, scope and draw of prompts."""
    from subcircuit.analysis import sensitivity as conventions
    from subcircuit.engine.threads import suitable_threads

    saved = load_circuits([] if circuit_file is None else [circuit_file])
    loaded = with_dictionaries(sc.load(model, dtype=dtype, device=device), dictionaries, hooks)
    warn_of_other_model(saved, loaded)
    draws = {
        f"seed {each}": sc.task(task, loaded, n=n, seed=each, template=template, members=members, filter=only_answered)
        for each in range(seed, seed + n_seeds)
    }
    with progress_bars(quiet) as progress, suitable_threads(loaded):
        circuit = saved.get(circuit_file) if circuit_file else None
        if circuit is None:
            circuit = sc.discover(
                loaded,
                next(iter(draws.values())),
                threshold=threshold,
                progress=lambda done, total: progress("pruning", done, total),
            )
            warn_of_empty(circuit)
        found = conventions.sensitivity(
            loaded,
            draws,
            circuit,
            sources=sources.split(","),
            metrics=cast("list[Metric]", metrics.split(",")),
            scopes=scopes.split(","),
            threshold=threshold,
            n_random=n_random,
            seed=seed,
            progress=lambda done, total: progress("conventions", done, total),
        )
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        _print(found)


def _print(found: Sensitivity) -> None:
    from subcircuit.analysis.sensitivity import CHOICES, CONCLUSIONS, LEAST_AT_STAKE

    out.print(f"{found.circuit}\n")
    table = new_table(
        "prompts", "source", "scope", "metric", "at stake", "score", "recovered", "95 % interval", *CONCLUSIONS
    )
    for outcome in found.outcomes:
        convention = outcome.convention
        verdicts = [_verdict(outcome, name) for name in CONCLUSIONS]
        names = convention.prompts, convention.source, convention.scope, convention.metric
        table.add_row(*names, f"{outcome.at_stake:.2f} ({outcome.share_at_stake:.0%})", *_points(outcome), *verdicts)
    out.print(table)
    out.print("\nBeside yes and no: in how many of the bootstrap resamples of the prompts it holds.")
    out.print(
        "At stake: what ablating every node takes from the metric, and of the full model's score. "
        f"Below {LEAST_AT_STAKE:.0%} of it, or where that is unsure, nothing is concluded.\n"
    )
    counts = new_table("holds under", *CONCLUSIONS)
    counts.add_row("all conventions", *map(_count, found.survival().values()))
    for choice in CHOICES:
        for value, survival in found.survival_by(choice).items():
            counts.add_row(f"{choice} {value}", *map(_count, survival.values()))
    out.print(counts)
    out.print(f"Survives all: {', '.join(found.surviving()) or 'nothing'}")
    for name in CONCLUSIONS:
        weakest = found.weakest(name)
        if weakest is not None:
            choice, value, n_held, n_asked = weakest
            out.print(f"{name}: least by {choice} {value} ({n_held} of {n_asked})")
    for note in found.notes:
        out.print(f"Left out: {note}")


def _points(outcome: Outcome) -> tuple[str, str, str]:
    score = f"{outcome.score:.1f}"
    if outcome.recovered is None:
        return score, "–", "too little at stake"
    mean, low, high = outcome.recovered
    return score, f"{mean:.1f}", f"{low:.1f} to {high:.1f}"


def _count(counts: tuple[int, int]) -> str:
    return f"{counts[0]} of {counts[1]}"


def _verdict(outcome: Outcome, name: str) -> str:
    holds, share = outcome.holds[name], outcome.resamples[name]
    return "–" if holds is None or share is None else f"{'yes' if holds else 'no'} ({share:.0%})"
