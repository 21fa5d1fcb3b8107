"""subcircuit heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import subcircuit as sc
from subcircuit.analysis.plural import counted
from subcircuit.circuits import load_circuits, warn_of_other_model
from subcircuit.console import interval_of, new_table, out, progress_bars, write_figures
from subcircuit.options import (
    TASKS,
    DeviceOption,
    DtypeOption,
    FilterOption,
    JsonOption,
    MembersOption,
    ModelOption,
    NOption,
    QuietOption,
    SeedOption,
    TemplateOption,
    circuit_of_heads,
    names_in,
)

if TYPE_CHECKING:
    from subcircuit.analysis.circuit import Circuit
    from subcircuit.analysis.heads import HeadRoles
    from subcircuit.analysis.tasks import Task
    from subcircuit.engine.tokenizer import Tokenizer

Heads = list[tuple[int, int]]
N_PATTERNS = 12
"""Heads of a task whose attention is drawn."""
LEGEND = """\
→ before    attention from a member to the member before it;  → newest: from the last token to the newest member
OV          share of members for which the head writes that token of the sequence among its top 5
QK          how well it tells members from other tokens by content (0.50: chance), from members and from the last token
direct      what it adds itself to logit(answer) − logit(wrong)"""


def heads(
    model: ModelOption,
    tasks: Annotated[
        str, typer.Option("--tasks", "--task", "-t", help=f"{TASKS}, or .csv or .json files; joined by commas.")
    ],
    circuit: Annotated[
        list[Path] | None,
        typer.Option("--circuit", "-c", help="Only a circuit's heads, for its task; may be given several times."),
    ] = None,
    asked: Annotated[
        str | None, typer.Option("--heads", help="Only these, joined by commas, such as a4.h4,a5.h1.")
    ] = None,
    n: NOption = 32,
    seed: SeedOption = 0,
    template: TemplateOption = "all",
    members: MembersOption = None,
    only_answered: FilterOption = False,
    top: Annotated[int, typer.Option(min=1, help="Heads with a role to print per task, if none are asked for.")] = 20,
    figures: Annotated[Path | None, typer.Option("--out", "-o", help="Write figures (SVG) to this folder.")] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say what heads do in a task. The roles of those of a circuit, of a model, or asked for, with their evidence."""
    from subcircuit.analysis.head_lookups import head_lookups
    from subcircuit.analysis.heads import head_roles, repeated_measures, shared_roles
    from subcircuit.engine.threads import suitable_threads

    names = names_in(tasks)
    if asked is not None and circuit:
        raise typer.BadParameter("--heads and --circuit both say which heads; expected one of the two")
    chosen = [] if asked is None else [circuit_of_heads(asked)]
    saved = load_circuits(circuit or [])
    loaded = sc.load(model, dtype=dtype, device=device)
    warn_of_other_model(saved, loaded)
    circuits = chosen or list(saved.values())
    built = {
        name: sc.task(name, loaded, n=n, seed=seed, template=template, members=members, filter=only_answered)
        for name in dict.fromkeys(names)
    }
    if not built:
        raise typer.BadParameter("no task; expected --tasks with one or more")
    with progress_bars(quiet) as progress, suitable_threads(loaded):
        repeated = repeated_measures(loaded, seed)
        found = {
            name: head_roles(
                loaded,
                task,
                seed=seed,
                repeated=repeated,
                progress=lambda done, total, name=name: progress(f"{name}, OV scores", done, total),  # type: ignore[misc]
            )
            for name, task in built.items()
        }
    shown = {name: _heads_of(built[name].name, each, circuits, top) for name, each in found.items()}
    with suitable_threads(loaded):
        lookups = {name: head_lookups(loaded, task, shown[name], seed) for name, task in built.items()}
    shared = [row for row in shared_roles(found) if not circuits or _is_in_all(row, shown)]
    if figures is not None:
        drawn = _figures(model, loaded.tokenizer, built, found, shown, bool(circuits))
        write_figures(figures, drawn, silent=quiet or as_json)
    if as_json:
        print(json.dumps({"model": model, "tasks": _values(found, shown, lookups), "shared_roles": shared}))
        return
    which = "asked for" if chosen else "of the circuit" if circuits else "with the clearest roles"
    for name, each in found.items():
        _print_task(name, built[name], each, shown[name], which)
        _print_lookups(lookups[name])
    if len(found) > 1:
        _print_shared(shared)


def _heads_of(task: str, found: HeadRoles, circuits: list[Circuit], top: int) -> Heads:
    """Heads of the task's own circuit, or of one of no given task (a set operation's, or the heads asked for); without
    circuits the clearest.

    Raises PatchError for a head that the model lacks.
    """
    if not circuits:
        return found.with_roles()[:top]
    own = [circuit for circuit in circuits if circuit.task == task] or circuits
    heads = sorted({head for circuit in own for head in circuit.heads})
    for head in heads:
        found.of(head)
    return heads


def _is_in_all(row: dict[str, Any], shown: dict[str, Heads]) -> bool:
    return all((row["layer"], row["index"]) in shown[task] for task in row["tasks"])


def _values(
    found: dict[str, HeadRoles], shown: dict[str, Heads], looked_up: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    from subcircuit.analysis.head_profile import head_profiles, mean_profile

    values = {}
    for name, each in found.items():
        lookups = each.lookups
        classes = {"classes": {key: list(at) for key, at in lookups.classes.items()}, "columns": list(lookups.columns)}
        rows = [
            {**said, **profile, "attention": lookups.mass[profile["layer"], profile["index"]].tolist()}
            for said, profile in zip(each.table(shown[name]), head_profiles(each, shown[name]), strict=True)
        ]
        values[name] = {"heads": rows, "attention": classes, "untested_roles": list(each.untested)}
        values[name] |= {"mean_of_all_heads": mean_profile(each), "lookups": looked_up[name]}
    return values


def _print_task(name: str, task: Task, found: HeadRoles, heads: Heads, which: str) -> None:
    from subcircuit.analysis.head_profile import head_profiles, mean_profile

    out.print(f"\n{name}: {counted(len(heads), 'head')} {which}, {counted(task.n, 'prompt')}\n", style="bold")
    table = new_table("head", "role", "evidence")
    for head in heads:
        roles = found.of(head)
        for i, role in enumerate(roles or ("–",)):
            evidence = found.evidence(head, role) if roles else ""
            table.add_row(f"a{head[0]}.h{head[1]}" if i == 0 else "", role, evidence)
    out.print(table)
    if found.untested:
        out.print(f"\nNot asked for, as these prompts cannot show it: {', '.join(found.untested)}.")
    profiles = head_profiles(found, heads)
    if not profiles:
        return
    shifts = list(profiles[0]["ov"])
    out.print(f"\n{LEGEND}\n")
    ov = [f"OV {shift}" for shift in shifts]
    table = new_table("head", "→ before", "→ newest", *ov, "QK similar", "QK last", "direct", "95 %")
    for row in [*profiles, mean_profile(found) | {"head": "mean of all"}]:
        numbers = [row["to_previous_member"], row["last_to_newest"], *row["ov"].values()]
        numbers += [row["qk_similar"], row["qk_last"]]
        direct = f"{row['direct']:+.3f}", interval_of(row, "direct_")
        table.add_row(row["head"], *("–" if value is None else f"{value:.2f}" for value in numbers), *direct)
    out.print(table)


def _print_lookups(rows: list[dict[str, Any]]) -> None:
    from subcircuit.analysis.head_lookups import LOOKUPS, lookup_tables

    for what, (columns, cells) in zip(LOOKUPS, lookup_tables(rows), strict=False):
        out.print(f"\nAttention {what}, 95 % intervals over prompts\n")
        table = new_table(*columns)
        for row in cells:
            table.add_row(*row)
        out.print(table)


def _print_shared(shared: list[dict[str, Any]]) -> None:
    out.print("\nThe same role in several tasks\n", style="bold")
    if not shared:
        out.print("none")
        return
    table = new_table("head", "role", "tasks")
    for row in shared:
        table.add_row(row["head"], row["role"], ", ".join(row["tasks"]))
    out.print(table)


def _figures(
    model: str,
    tokenizer: Tokenizer | None,
    tasks: dict[str, Task],
    found: dict[str, HeadRoles],
    shown: dict[str, Heads],
    of_circuits: bool,
) -> dict[str, str]:
    """SVG texts by name: the roles of all tasks, and per task OV scores and each head's attention."""
    from subcircuit.analysis import head_figures as figures
    from subcircuit.analysis.drawing import words

    drawn = {"roles": figures.roles_figure(found, shown, f"{model}: what heads do")}
    for name, each in found.items():
        slug, marked = Path(name).stem, shown[name] if of_circuits else ()
        drawn[f"{slug}.ov"] = figures.ov_figure(each, f"{words(slug)}: what heads write for a member", marked=marked)
        tokens = figures.token_texts(tasks[name].clean[0].tolist(), tokenizer)
        for layer, head in shown[name][:N_PATTERNS]:
            roles = ", ".join(each.of((layer, head))) or "no role"
            title = f"{words(slug)}: attention of {layer}.{head} ({roles})"
            drawn[f"{slug}.attention.a{layer}.h{head}"] = figures.attention_figure(
                each.lookups.pattern[layer, head], tokens, title
            )
    return drawn
