"""subcircuit lens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import subcircuit as sc
from subcircuit.analysis.plural import counted
from subcircuit.console import interval_of, new_table, out, write_figures
from subcircuit.options import (
    DeviceOption,
    DtypeOption,
    FilterOption,
    JsonOption,
    MembersOption,
    ModelOption,
    NOption,
    QuietOption,
    SeedOption,
    TaskOption,
    TemplateOption,
    positions_of,
)

if TYPE_CHECKING:
    from subcircuit.analysis.attribution import Attribution
    from subcircuit.analysis.lens import Lens


def lens(
    model: ModelOption,
    task: TaskOption,
    positions: Annotated[
        str | None, typer.Option(help="Positions to read, such as -1 or 4,-1, or 'each'; the last if left out.")
    ] = None,
    top: Annotated[int, typer.Option("--top", "-k", min=1, help="Likeliest tokens per layer and position.")] = 5,
    components: Annotated[int, typer.Option(min=0, help="Heads and MLPs to print by their direct effect.")] = 12,
    neurons: Annotated[int, typer.Option(min=0, help="Neurons to print by their direct effect.")] = 5,
    n: NOption = 32,
    seed: SeedOption = 0,
    template: TemplateOption = "all",
    members: MembersOption = None,
    only_answered: FilterOption = False,
    figures: Annotated[Path | None, typer.Option("--out", "-o", help="Write figures (SVG) to this folder.")] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Read the prediction after every layer. When the answer takes over, and what adds to it directly."""
    from subcircuit.analysis.attribution import attribution
    from subcircuit.analysis.lens import lens as read_lens
    from subcircuit.engine.threads import suitable_threads

    where = positions_of(positions) or "last"
    loaded = sc.load(model, dtype=dtype, device=device)
    prompts = sc.task(task, loaded, n=n, seed=seed, template=template, members=members, filter=only_answered)
    with suitable_threads(loaded):
        read = read_lens(loaded, prompts, positions=where, top=top)  # type: ignore[arg-type]
        terms = attribution(loaded, prompts, seed=seed)
    rows = terms.table(neurons)
    if figures is not None:
        drawn = {f"{prompts.name}.{name}": svg for name, svg in _figures(read, rows).items()}
        write_figures(figures, drawn, silent=quiet or as_json)
    if as_json:
        print(json.dumps({"model": model, **_values(read, terms, rows)}))
        return
    _print_stages(read)
    if positions is not None:
        _print_positions(read)
    _print_direct(terms, rows, components)


def _figures(read: Lens, rows: list[dict[str, Any]]) -> dict[str, str]:
    from subcircuit.analysis import lens_figures as figures
    from subcircuit.analysis.drawing import words

    name = words(Path(read.task.name).stem)
    return {
        "lens": figures.lens_figure(read, f"{name}: the answer by layer"),
        "tokens": figures.top_tokens_figure(read, f"{name}: likeliest tokens, first prompt"),
        "direct": figures.attribution_figure(rows, f"{name}: what adds to the answer directly"),
    }


def _values(read: Lens, terms: Attribution, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything for machines; likeliest tokens of the first prompt, by stage and position."""
    first = [
        [
            [[read.text(int(token)), float(p)] for token, p in zip(tokens, sure, strict=True)]
            for tokens, sure in zip(read.top_tokens[i, 0], read.top_probabilities[i, 0], strict=True)
        ]
        for i in range(len(read.stages))
    ]
    has_members = bool(read.task.member_positions)
    return {
        "task": read.task.name,
        "n_prompts": read.task.n,
        "positions": list(read.positions),
        "stages": read.table(),
        "takeover_stages": read.takeover().tolist(),
        "handovers": read.handovers().tolist() if has_members else None,
        "first_prompt": {"tokens": [read.text(int(token)) for token in read.task.clean[0]], "top": first},
        "logit_difference": float(terms.logit_difference.mean()),
        "direct": rows,
    }


def _print_stages(read: Lens) -> None:
    from subcircuit.analysis.lens import stage_in_words

    rival = "last member" if read.newest is not None else "wrong answer"
    where = "the last token" if read.positions[-1] == read.task.pos - 1 else f"position {read.positions[-1]}"
    prompts = counted(read.task.n, "prompt")
    out.print(f"{read.task.name}: {prompts}, read after every attention and MLP at {where}\n", style="bold")
    columns = ("after", "answer first", "p(answer)", "95 %", f"p({rival})", "95 %", "rank", f"rank, {rival}")
    table = new_table(*columns, "lead", "95 %", "commonest token")
    for row in read.table():
        ranks = f"{row['answer_rank']:.0f}", f"{row['rival_rank']:.0f}"
        ends = [interval_of(row, f"{name}_", ".2f") for name in ("answer", "rival")]
        likely = f"{row['answer']:.2f}", ends[0], f"{row['rival']:.2f}", ends[1]
        lead = f"{row['lead']:+.2f}", interval_of(row, "lead_", "+.2f")
        commonest = f"{row['commonest']!r} {row['commonest_share']:.0%}"
        table.add_row(stage_in_words(row["stage"]), f"{row['top1']:.0%}", *likely, *ranks, *lead, commonest)
    out.print(table)
    takeover = read.takeover()
    median = int(takeover.double().quantile(0.5, interpolation="lower"))
    ends_ahead = float((takeover < len(read.stages)).double().mean())
    out.print("")
    if median < len(read.stages):
        after = stage_in_words(read.stages[median])
        out.print(f"In half of the prompts the answer leads the {rival} for good after {after};")
        out.print(f"in the end it leads in {ends_ahead:.0%}.")
    else:
        out.print(f"The answer leads the {rival} in the end in only {ends_ahead:.0%} of the prompts.")
    if read.task.member_positions:
        layer, share = read.best_handover()
        turns = f"Most often layer {layer} does: in {share:.0%} of the prompts." if share else "None does."
        out.print(f"Which layer turns the likeliest token from a member shown into the answer? {turns}")


def _print_positions(read: Lens) -> None:
    """For the first prompt, the likeliest tokens after every layer, a block per position."""
    from subcircuit.analysis.lens import stage_in_words

    for column, position in enumerate(read.positions):
        token = read.text(int(read.task.clean[0, position]))
        out.print(f"\nFirst prompt, position {position}, {token!r}\n", style="bold")
        table = new_table("after", "likeliest tokens")
        for i in range(0, len(read.stages), 2):
            tops = zip(read.top_tokens[i, 0, column], read.top_probabilities[i, 0, column], strict=True)
            likeliest = "  ".join(f"{read.text(int(t))!r} {float(p):.2f}" for t, p in tops)
            table.add_row(stage_in_words(read.stages[i]), likeliest)
        out.print(table)


def _print_direct(terms: Attribution, rows: list[dict[str, Any]], n_components: int) -> None:
    whole = float(terms.logit_difference.mean())
    out.print(f"\nAdded directly to logit(answer) − logit(wrong), {whole:.3f} in all\n", style="bold")
    table = new_table("component", "logits", "95 %", "share")
    parts = sorted((row for row in rows if row["kind"] != "neuron"), key=lambda row: -abs(row["direct"]))
    for row in [*parts[:n_components], *(row for row in rows if row["kind"] == "neuron")]:
        share = "–" if row["share"] is None else f"{row['share']:+.1%}"
        table.add_row(row["component"], f"{row['direct']:+.3f}", interval_of(row), share)
    rest = float((terms.embeddings + terms.attn_bias.sum(0) + terms.norm_bias).mean())
    table.add_row("embeddings and biases", f"{rest:+.3f}", "", "")
    out.print(table)
