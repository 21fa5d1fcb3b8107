"""What a study asks of each circuit once it is found: stages that can be left out, each with a section of the report.

A stage is a function from what a study knows of one task to a `Section`: values for machines, and sentences, tables and
figures for people. Everything it draws at random follows from the study's seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from subcircuit.analysis import head_figures, lens_figures
from subcircuit.analysis.attribution import attribution
from subcircuit.analysis.baselines import random_baseline
from subcircuit.analysis.circuit import Circuit, intersection
from subcircuit.analysis.curves import ablation_curve, node_ranking
from subcircuit.analysis.drawing import words
from subcircuit.analysis.edge_stages import edge_faithfulness_stage, edges_stage
from subcircuit.analysis.evaluation import evaluate_circuit
from subcircuit.analysis.faithfulness import Ablation
from subcircuit.analysis.figures import curve_figure, matrix_figure
from subcircuit.analysis.head_lookups import LOOKUPS, head_lookups, lookup_tables
from subcircuit.analysis.head_profile import head_profiles, mean_profile
from subcircuit.analysis.heads import head_roles
from subcircuit.analysis.judgement import judgement
from subcircuit.analysis.lengths import by_length
from subcircuit.analysis.lens import lens, stage_in_words
from subcircuit.analysis.sections import Cell, Progress, Section, Subject, Table
from subcircuit.analysis.sensitivity import CHOICES, CONCLUSIONS, Outcome, Sensitivity, sensitivity
from subcircuit.analysis.sweep import sweep
from subcircuit.analysis.tasks import Task, transfer_kinds
from subcircuit.analysis.transfer import prompts_of_kind, transfer
from subcircuit.analysis.transfer_figures import transfer_figure
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.threads import is_small

N_ROWS = 25
"""Rows of a table that the report shows of what is in the stage's values as a whole."""
N_PATTERNS = 4
"""Heads whose attention is drawn."""
N_KNOCKOUTS = 10
N_SENSITIVITY_RANDOM, N_SENSITIVITY_RANDOM_OF_LARGE = 5, 3
"""Of a model that is not small, each random circuit costs as much as the drops of several nodes."""
SENSITIVITY_SCOPES = ("all", "members", "last")
"""From the first difference on is all there is to corrupt, so that scope would say little more than `all`."""
N_TRANSFER_PROMPTS, N_LISTS = 8, 3
"""Prompts of each kind, and of lists of months, each of which goes on for up to eleven months."""
N_TRANSFER_RANDOM = 10


def faithfulness_stage(subject: Subject, progress: Progress) -> Section:
    """What the circuit recovers and what its absence destroys, completeness, minimality, chance, CPR and CMD."""
    options: dict[str, Any] = {"executor": subject.executor, "precision": subject.precision}
    ablation = Ablation(subject.model, subject.task, **options)
    found = evaluate_circuit(ablation, subject.circuit, n_knockouts=N_KNOCKOUTS, seed=subject.seed)
    progress(1, 3)
    scores = subject.scores
    if scores is None:
        scores = sweep(subject.model, subject.task, "heads+mlps", source=subject.source, **options)
    curve = ablation_curve(ablation, node_ranking(scores), seed=subject.seed)
    progress(2, 3)
    baseline = random_baseline(ablation, subject.circuit, subject.n_random, match="layers", seed=subject.seed)
    progress(3, 3)
    sentences, tables, data = judgement(found, baseline, curve, "node", "nodes")
    figure = curve_figure({words(subject.task.name): curve}, "Recovered by the most important nodes")
    return Section("Faithfulness", sentences, tables, {"curve": figure}, data)


def roles_stage(subject: Subject, progress: Progress) -> Section:
    """What the circuit's heads do: roles with their evidence, attention, OV scores, direct effect."""
    heads = list(subject.circuit.heads)
    found = head_roles(subject.model, subject.task, seed=subject.seed, repeated=subject.repeated(), progress=progress)
    named = [(head, role) for head in heads for role in found.of(head)]
    with_role = {head for head, _ in named}
    sentences = [f"{len(with_role)} of the circuit's {len(heads)} heads have a role that the measures show."]
    if found.untested:
        sentences.append(f"Not asked for, as these prompts cannot show it: {', '.join(found.untested)}.")
    profiles, mean = head_profiles(found, heads) if heads else [], mean_profile(found)
    tables = [
        Table(
            "Roles, and what each measure had to exceed.",
            ("head", "role", "evidence"),
            [[_name(head), role, found.evidence(head, role)] for head, role in named],
        )
    ]
    if profiles:
        tables.append(
            Table(
                "Every head: attention from a member to the one before and from the last token to the newest member, "
                "share of members whose copy or successor is among its top 5, what it adds to the logit difference "
                f"(95 % interval). Last the mean of the model's {mean['n_heads']} heads.",
                ("head", "to member before", "to newest", *mean["ov"], "direct", "low", "high"),
                [
                    [
                        *(row[name] for name in ("head", "to_previous_member", "last_to_newest")),
                        *row["ov"].values(),
                        *(row[name] for name in ("direct", "direct_low", "direct_high")),
                    ]
                    for row in [*profiles, mean | {"head": "mean of all"}]
                ],
            )
        )
    lookups = head_lookups(subject.model, subject.task, heads, subject.seed)
    tables += [
        Table(f"Attention {what}, with 95 % intervals over prompts.", tuple(columns), [list(row) for row in rows])
        for what, (columns, rows) in zip(LOOKUPS, lookup_tables(lookups), strict=False)
    ]
    task = words(subject.task.name)
    figures = {
        "roles": head_figures.roles_figure({subject.task.name: found}, {subject.task.name: heads}, f"{task}: roles")
    }
    if found.ov is not None:
        figures["ov"] = head_figures.ov_figure(found, f"{task}: what heads write for a member", marked=heads)
    tokens = head_figures.token_texts(subject.task.clean[0].tolist(), subject.model.tokenizer)
    for layer, head in [head for head in heads if head in with_role][:N_PATTERNS]:
        title = f"{task}: attention of {layer}.{head} ({', '.join(found.of((layer, head)))})"
        figures[f"attention.a{layer}.h{head}"] = head_figures.attention_figure(
            found.lookups.pattern[layer, head], tokens, title
        )
    data = {"heads": found.table(heads), "profiles": profiles, "untested": list(found.untested)}
    data |= {"mean_of_all_heads": mean, "lookups": lookups}
    return Section("What its heads do", tuple(sentences), tuple(tables), figures, data)


def lens_stage(subject: Subject, progress: Progress) -> Section:
    """What the model would say after each layer, and what adds to the answer directly."""
    read = lens(subject.model, subject.task)
    progress(1, 2)
    rows = attribution(subject.model, subject.task, seed=subject.seed).table(5)
    progress(2, 2)
    rival = "last member" if read.newest is not None else "wrong answer"
    takeover = read.takeover()
    median = int(takeover.double().quantile(0.5, interpolation="lower"))
    ahead = float((takeover < len(read.stages)).double().mean())
    sentences = [f"In the end the answer leads the {rival} in {100 * ahead:.0f} % of the prompts."]
    if median < len(read.stages):
        sentences.append(f"In half of them it does so for good after {stage_in_words(read.stages[median])}.")
    if subject.task.member_positions:
        layer, share = read.best_handover()
        if share:
            sentences.append(
                f"Layer {layer} turns the likeliest token from a member into the answer in {100 * share:.0f} %."
            )
    parts = sorted((row for row in rows if row["kind"] != "neuron"), key=lambda row: -abs(row["direct"]))
    table = Table(
        "What adds to logit(answer) − logit(wrong answer) directly, with 95 % intervals over prompts.",
        ("component", "logits", "low", "high"),
        [[row["component"], row["direct"], row["low"], row["high"]] for row in parts[:N_ROWS]],
    )
    task = words(subject.task.name)
    figures = {
        "lens": lens_figures.lens_figure(read, f"{task}: the answer by layer"),
        "direct": lens_figures.attribution_figure(rows, f"{task}: what adds to the answer directly"),
    }
    tables = [table]
    lengths = _lengths(subject)
    if lengths:
        tables.append(
            Table(
                "Probability of the next member, and share of prompts in which it is the likeliest token, by how many "
                "members are shown, with 95 % intervals over prompts.",
                ("members", "p", "low", "high", "top-1", "low", "high"),
                [[row["members"], *(row[name] for name in _LENGTH_COLUMNS)] for row in lengths],
            )
        )
        figures["lengths"] = lens_figures.lengths_figure(lengths, f"{task}: the next member, by members shown")
    handovers = read.handovers().tolist() if subject.task.member_positions else None
    data = {"stages": read.table(), "takeover": takeover.tolist(), "handovers": handovers, "direct": rows}
    data["lengths"] = lengths
    return Section("By layer", tuple(sentences), tuple(tables), figures, data)


def _lengths(subject: Subject) -> list[dict[str, Any]]:
    """What a sequence's next member is given after each number of members; nothing of another task."""
    task = subject.task
    if not task.starts:
        return []
    return by_length(subject.model, task.name, n=task.n, seed=subject.seed, template=task.template).table()


_LENGTH_COLUMNS = ("answer", "answer_low", "answer_high", "top1", "top1_low", "top1_high")


def sensitivity_stage(subject: Subject, progress: Progress) -> Section:
    """What holds of the circuit under every source, metric and scope, on the first `n_sensitivity_prompts` prompts."""
    n = min(subject.task.n, subject.n_sensitivity_prompts)
    found = sensitivity(
        subject.model,
        {f"{n} prompts": subject.task.subset(range(n))},
        subject.circuit,
        scopes=SENSITIVITY_SCOPES,
        threshold=subject.circuit.settings["threshold"],
        n_random=N_SENSITIVITY_RANDOM if is_small(subject.model) else N_SENSITIVITY_RANDOM_OF_LARGE,
        seed=subject.seed,
        executor=subject.executor,
        precision=subject.precision,
        progress=progress,
    )
    groups = {"all": found.survival()}
    for choice in [choice for choice in CHOICES if choice != "prompts"]:
        groups |= {f"{choice} {words(value)}": counts for value, counts in found.survival_by(choice).items()}
    tables = (
        Table(
            "Under how many conventions each conclusion holds, of those that allow one.",
            ("conventions", *CONCLUSIONS),
            [[name, *(f"{held} of {n_all}" for held, n_all in counts.values())] for name, counts in groups.items()],
        ),
        Table(
            "Every convention: points recovered with their 95 % interval, the best random circuit, the node that costs "
            "least, and ρ of the ranking of nodes with the first one's. A dash: too little to recover.",
            ("source", "metric", "scope", "recovered", "low", "high", "random", "least", "costs", "ρ"),
            [_convention_row(outcome) for outcome in found.outcomes],
            digits=1,
        ),
    )
    shares = [
        [held / n_all if n_all else float("nan") for held, n_all in counts.values()] for counts in groups.values()
    ]
    columns = [name.replace(" ", "_") for name in CONCLUSIONS]
    title = f"{words(subject.task.name)}: share of conventions under which it holds"
    figure = matrix_figure(shares, list(groups), columns, title, "{:.0%}")
    data = {name: value for name, value in found.to_dict().items() if name != "circuit"} | {"n_prompts": n}
    return Section("Sensitivity", _surviving(found, n), tables, {"survival": figure}, data)


def _surviving(found: Sensitivity, n_prompts: int) -> tuple[str, ...]:
    """Sentences: what was varied, what holds in any case, and on what the rest hangs."""
    tried = [f"{len(found.survival_by(choice))} {choice}s" for choice in ("source", "metric", "scope")]
    n_all = max(total for _, total in found.survival().values())
    sentences = [
        f"The circuit under {len(found.outcomes)} conventions, {', '.join(tried)}, on {n_prompts} prompts and "
        f"bootstrap resamples of them. In {n_all} there surely is enough to recover.",
    ]
    always = found.surviving()
    held = ", ".join(found.meaning(name) for name in always)
    sentences.append(f"What holds under all of these: {held}." if always else "No conclusion survives all of these.")
    for name in [name for name in CONCLUSIONS if name not in always]:
        n_held, n_asked = found.survival()[name]
        weakest = found.weakest(name)
        where = ""
        if weakest is not None:
            choice, value, n_there, n_asked_there = weakest
            where = f", least by {choice} {words(value)} ({n_there} of {n_asked_there})"
        sentences.append(f"{found.meaning(name)} holds in {n_held} of {n_asked}{where}.")
    return (*sentences, *(f"Left out: {note}." for note in found.notes))


def _convention_row(outcome: Outcome) -> list[Cell]:
    convention = outcome.convention
    recovered = outcome.recovered or (None, None, None)
    least = outcome.least_drop or (None, None)
    how = [words(part) for part in (convention.source, convention.metric, convention.scope)]
    return [*how, *recovered, outcome.random_most, *least, outcome.rank_correlation]


TASK_STAGES: dict[str, Callable[[Subject, Progress], Section]] = {
    "faithfulness": faithfulness_stage,
    "sensitivity": sensitivity_stage,
    "edges": edges_stage,
    "edge-faithfulness": edge_faithfulness_stage,
    "roles": roles_stage,
    "lens": lens_stage,
}
STAGES = ("sweep", "prune", "random", *TASK_STAGES, "compare", "transfer")
"""All that can be asked for, in the order in which they are run; the last two are one for all tasks."""
NEEDS_NO_NODES = ("lens",)


def why_not(stage: str, circuit: Circuit | None, task: Task) -> str | None:
    """Why a stage cannot be asked of this circuit on this task; None where it can."""
    if stage in NEEDS_NO_NODES:
        return None
    if circuit is None:
        return "no circuit was looked for"
    if not circuit.nodes:
        return "its circuit is empty"
    if stage == "edges" and task.corrupted is None:
        return "paths are patched with corrupted prompts, which the task lacks"
    if stage == "edge-faithfulness" and not circuit.edges:
        return "its circuit has no edges"
    return None


def left_out(stage: str, reason: str) -> Section:
    """The section of a stage that cannot be asked."""
    return Section(words(stage).capitalize(), (f"Left out: {reason}.",), left_out=True)


def transfer_stage(
    model: HookedTransformer,
    circuits: Mapping[str, Circuit],
    given: Mapping[str, str],
    seed: int,
    progress: Callable[[str, int, int], None],
) -> Section:
    """What becomes of other prompts without the circuits' heads, and without those that all circuits share.

    `circuits` are by task; `given` says what each was given as, its name or file.
    """
    named = {name: circuit for name, circuit in circuits.items() if circuit.heads}
    shared = intersection(list(named.values())) if len(named) > 1 else None
    if shared is not None and shared.heads:
        named["shared"] = shared
    asked_for = {name: given[name] for name in circuits} | {kind: kind for kind in transfer_kinds()}
    n_of = {"month_lists": N_LISTS}
    kinds = {
        name: prompts_of_kind(model, kind, n_of.get(kind, N_TRANSFER_PROMPTS), seed) for name, kind in asked_for.items()
    }
    found = transfer(model, named, kinds, n_random=N_TRANSFER_RANDOM, seed=seed, progress=progress)
    rows = found.table()
    asked = [row for row in rows if row["n_answered"]]
    silent = sorted({row["kind"] for row in rows if not row["n_answered"]})
    sentences = [
        f"Heads are ablated to 0, and {N_TRANSFER_PROMPTS} prompts of each kind continued ({N_LISTS} of lists). Only "
        "those count that the whole model continues rightly."
    ]
    if silent:
        sentences.append(f"It continues none of {', '.join(map(words, silent))}.")
    table = Table(
        "Share of the prompts that is still right, with 95 % intervals, and p that random heads do as badly.",
        ("kind", "without", "prompts", "right", "low", "high", "random heads", "low", "high", "worst random", "p"),
        [[words(row["kind"]), *(row[name] for name in _TRANSFER_COLUMNS)] for row in asked],
    )
    figures = {"transfer": transfer_figure(asked, "Right answers without a circuit's heads")} if asked else {}
    return Section("Other prompts without the circuits' heads", tuple(sentences), (table,), figures, {"rows": rows})


_TRANSFER_COLUMNS = (
    *("circuit", "n_answered", "share", "share_low", "share_high"),
    *("random", "random_low", "random_high", "random_least", "p"),
)


def _name(head: tuple[int, int]) -> str:
    return f"a{head[0]}.h{head[1]}"
