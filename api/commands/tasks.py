"""subcircuit tasks."""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING, Annotated

import typer

import subcircuit as sc
from subcircuit.console import interval, new_table, out
from subcircuit.options import JsonOption, NOption, SeedOption, TemplateOption

if TYPE_CHECKING:
    from rich.table import Table

    from subcircuit.analysis.tasks.cards import TaskCard


def tasks(
    name: Annotated[str | None, typer.Argument(metavar="TASK", help="A task or its file; its card is shown.")] = None,
    model: Annotated[list[str] | None, typer.Option("--model", "-m", help="Measure a model on it.")] = None,
    n: NOption = 32,
    seed: SeedOption = 0,
    template: TemplateOption = "all",
    markdown: Annotated[bool, typer.Option("--markdown", help="Cards of all tasks as a page, for --model.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the tasks, or show one. What it measures, its prompts, how well a model does it."""
    models = model or []
    if markdown:
        _print_page(name, models, n, seed)
    elif name is None:
        _print_list(as_json)
    elif len(models) != 1:
        raise typer.BadParameter(f"a card is of one model; got {len(models)}, expected --model once")
    else:
        from subcircuit.analysis.tasks.cards import task_card

        card = task_card(name, sc.load(models[0]), n=n, seed=seed, template=template)
        if as_json:
            print(json.dumps({"model": models[0], **card.to_dict()}))
        else:
            _print_card(models[0], card)


def _print_page(name: str | None, models: list[str], n: int, seed: int) -> None:
    from subcircuit.analysis.tasks.cards import tasks_page

    if not models:
        raise typer.BadParameter("--markdown measures models; expected --model at least once")
    command = shlex.join(["subcircuit", *sys.argv[1:]])
    loaded = {each: sc.load(each) for each in models}
    print(tasks_page(loaded, command, n, seed, [name] if name else []))


def _print_list(as_json: bool) -> None:
    from subcircuit.analysis.tasks import about

    said = {name: about(name) for name in sc.task_names()}
    if as_json:
        print(json.dumps([{"name": name, **vars(each)} for name, each in said.items()]))
        return
    table = new_table("name", "source")
    for name, each in said.items():
        table.add_row(name, each.source)
    out.print(table)
    out.print("\nAlso a .csv or .json file with the columns clean, corrupted, answer, wrong.")


def _print_card(model: str, card: TaskCard) -> None:
    from subcircuit.analysis.tasks.cards import N_EXAMPLES

    out.print(
        f"{card.name}\n\n{card.about.measures}\n\nCorrupted: {card.about.corrupted}\n\nSource: {card.about.source}\n"
    )
    table = new_table("", "")
    table.add_row("model", f"{model} ({card.tokenizer})")
    table.add_row("templates", card.template)
    table.add_row("prompts", f"{card.n}, seed {card.seed}")
    table.add_row("tokens per prompt", str(card.n_pos))
    has_corrupted = card.first_difference < card.n_pos
    table.add_row("first difference", f"position {card.first_difference}" if has_corrupted else "–")
    for name, at in card.positions.items():
        table.add_row(f"positions of {name}", ", ".join(map(str, at)))
    ends = {name: interval(pair, ".1%" if name == "accuracy" else ".3f") for name, pair in card.intervals.items()}
    table.add_row("top-1", f"{card.accuracy:.1%} {ends['accuracy']}")
    corrupted = card.corrupted_logit_difference
    beside = "" if corrupted is None else f" (corrupted {corrupted:.3f} {ends['corrupted_logit_difference']})"
    table.add_row("logit difference", f"{card.logit_difference:.3f} {ends['logit_difference']}{beside}")
    table.add_row("probability difference", f"{card.probability_difference:.3f} {ends['probability_difference']}")
    out.print(table)
    for example in card.examples[:N_EXAMPLES]:
        out.print(f"\nclean      {example['clean']!r}")
        if example["corrupted"] is not None:
            out.print(f"corrupted  {example['corrupted']!r}")
        out.print(f"answer     {_listed(example['answers'])}    wrong {_listed(example['wrongs'])}")
        out.print(f"tokens     {'|'.join(example['tokens'])!r}")
    if len(card.examples) > N_EXAMPLES:
        out.print()
        out.print(_rows(card))


def _rows(card: TaskCard) -> Table:
    """Every row of a file, numbered as its errors number them."""
    table = new_table("row", "clean", "corrupted", "answer", "wrong")
    for i, example in enumerate(card.examples, start=1):
        prompts = (example["clean"], "–" if example["corrupted"] is None else example["corrupted"])
        table.add_row(str(i), *prompts, _listed(example["answers"]), _listed(example["wrongs"]))
    return table


def _listed(words: list[str]) -> str:
    return ", ".join(map(repr, words[:6])) + (f", … ({len(words)})" if len(words) > 6 else "")
