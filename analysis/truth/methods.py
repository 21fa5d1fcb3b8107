"""The discovery methods held against known models, one row each, and the table of how they do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from statistics import fmean
from typing import Any

from subcircuit.analysis.discover import discover
from subcircuit.analysis.eap import EdgeMethod, edge_scores
from subcircuit.analysis.edge_ablation import EdgeAblation
from subcircuit.analysis.edge_masks import circuit_of_edge_masks, learn_edge_masks
from subcircuit.analysis.edges import prune_edges
from subcircuit.analysis.faithfulness import Ablation
from subcircuit.analysis.gradients import Method as GradientMethod
from subcircuit.analysis.gradients import gradient_scores
from subcircuit.analysis.masks import circuit_of_masks, learn_masks
from subcircuit.analysis.nodes import all_nodes
from subcircuit.analysis.paths import verify_edges
from subcircuit.analysis.screen import screen
from subcircuit.analysis.sweep import Scores, sweep
from subcircuit.analysis.tasks import Task
from subcircuit.analysis.truth.build import Truth
from subcircuit.analysis.truth.known import BLUEPRINTS, FAMILIES, truth
from subcircuit.analysis.truth.recovery import FIGURES, Found, truth_report
from subcircuit.analysis.truth.weights import Family
from subcircuit.engine.errors import PatchError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Site
from subcircuit.engine.patching.graph import edges
from subcircuit.engine.patching.path_delta import Freeze

Method = Callable[[HookedTransformer, Task], Found]


def _exact_sweep(source: str, model: HookedTransformer, task: Task) -> Found:
    return Found.of_scores(sweep(model, task, "heads+mlps", source=source), SHARE)


def _screening(model: HookedTransformer, task: Task) -> Found:
    """Of the k largest exact effects those that count; the rest behind them, by exact effects where they are known and
    else by gradient scores, which may say no more than that."""
    screening = screen(model, task, "heads+mlps", k=SCREENED)
    clean = float(screening.scores.clean_metric.mean())
    top = {str(site): effect / clean for site, effect in screening.top}
    last = min(map(abs, top.values()))
    ranked = (screening.gradient, screening.scores)
    rest = {str(site): min(abs(share), last) for scores in ranked for site, share in _shares(scores)}
    return Found(nodes={node for node, share in top.items() if abs(share) >= SHARE}, node_scores=rest | top)


def _shares(scores: Scores) -> Iterable[tuple[Site, float]]:
    return zip(scores.sites, scores.share.tolist(), strict=True)


def _exact_edges(model: HookedTransformer, task: Task) -> Found:
    verified = verify_edges(model, task, edges(model.config))
    scores = dict(zip(verified.edges, (verified.mean / verified.clean_metric.mean()).tolist(), strict=True))
    return Found.of_edges([edge for edge, share in scores.items() if abs(share) >= SHARE], scores)


def _pruning(source: str, both_sides: bool, model: HookedTransformer, task: Task) -> Found:
    return Found.of_circuit(discover(model, task, source=source, both_sides=both_sides), model.config)


def _edge_pruning(freeze: Freeze, model: HookedTransformer, task: Task) -> Found:
    """All edges within the circuit that pruning on both sides leaves, ranked by their costs; those outside it last."""
    nodes = discover(model, task, source="corrupted", both_sides=True)
    options: dict[str, Any] = {"source": "corrupted", "freeze": freeze, "both_sides": True}
    within = partial(prune_edges, model, task, nodes, **options, from_input=True, same_layer=True)
    # At a threshold of 1, all are kept that change anything: their costs rank them.
    costs = dict.fromkeys(edges(model.config), 0.0) | within(threshold=1.0).edge_scores
    return Found.of_edges(within().edges, costs)


def _acdc(both_sides: bool, model: HookedTransformer, task: Task) -> Found:
    circuit = discover(model, task, "acdc", source="corrupted", both_sides=both_sides)
    return Found.of_circuit(circuit, model.config)


def _gradients(method: GradientMethod, model: HookedTransformer, task: Task) -> Found:
    return Found.of_scores(gradient_scores(model, task, "heads+mlps", method=method), SHARE)


def _edge_gradients(method: EdgeMethod, model: HookedTransformer, task: Task) -> Found:
    scores = edge_scores(model, task, method)
    circuit = scores.circuit(threshold=SHARE * float(scores.clean_metric.mean().abs()))
    return Found.of_edges(circuit.edges, dict(scores.top(scores.n_edges)))


def _masks(model: HookedTransformer, task: Task) -> Found:
    masks = learn_masks(model, task, all_nodes(model.config), source="corrupted")
    circuit = circuit_of_masks(masks, Ablation(model, task, source="corrupted"), both_sides=True)
    strengths = {str(node): strength for node, strength in masks.strengths().items()}
    return Found(nodes={str(node) for node in circuit.nodes}, node_scores=strengths)


def _edge_masks(model: HookedTransformer, task: Task) -> Found:
    masks = learn_edge_masks(model, task)
    circuit = circuit_of_edge_masks(masks, EdgeAblation(model, task, source="corrupted"), both_sides=True)
    return Found.of_edges(circuit.edges, masks.strengths())


SHARE = 0.05
"""The least effect, as a share of the clean logit difference, that counts where a method has only a ranking."""

SCREENED = 8
"""How many of the largest effects screening looks for."""

METHODS: dict[str, Method] = {
    "exact sweep, corrupted": partial(_exact_sweep, "corrupted"),
    "exact sweep, mean": partial(_exact_sweep, "mean"),
    "exact sweep, zero": partial(_exact_sweep, "zero"),
    "screen, then verify": _screening,
    "pruning, mean": partial(_pruning, "mean", False),
    "pruning, corrupted": partial(_pruning, "corrupted", False),
    "pruning on both sides, mean": partial(_pruning, "mean", True),
    "pruning on both sides, corrupted": partial(_pruning, "corrupted", True),
    "attribution patching": partial(_gradients, "atp"),
    "integrated gradients": partial(_gradients, "ig"),
    "AtP*": partial(_gradients, "atp*"),
    "node masks": _masks,
    "exact edges": _exact_edges,
    "pruning, then paths": partial(_edge_pruning, "heads"),
    "pruning, then direct edges": partial(_edge_pruning, "heads+mlps"),
    "ACDC": partial(_acdc, False),
    "ACDC on both sides": partial(_acdc, True),
    "EAP": partial(_edge_gradients, "eap"),
    "EAP-IG": partial(_edge_gradients, "eap-ig"),
    "edge masks": _edge_masks,
}
"""Methods by name: each takes a model and a task and says which nodes and edges it finds, as a set or a ranking."""

ONE_SIDED = frozenset({"pruning, mean", "pruning, corrupted", "ACDC"})
"""Methods that keep what works for the answer alone."""

EXACT = ONE_SIDED | {
    "exact sweep, corrupted",
    "exact sweep, mean",
    "exact sweep, zero",
    "screen, then verify",
    "pruning on both sides, mean",
    "pruning on both sides, corrupted",
    "exact edges",
    "pruning, then direct edges",
    "ACDC on both sides",
}
"""Methods that find what they find by exact effects of the nodes or edges that the truth is about: they must recover
it fully, except that those on one side see nothing of what works against the answer."""


@dataclass(frozen=True)
class TruthRow:
    """How a method does on one known model in one form, on its `nodes` or its `edges`.

    Figures as in `Recovery`, each the mean over `n_seeds` models. `exact` says that the method is one of `EXACT`,
    `missed` are the roles that were not found in some of the models, `seconds` is the time per model.
    """

    model: str
    family: Family
    method: str
    what: str
    exact: bool
    n_seeds: int
    precision: float | None
    recall: float | None
    f1: float | None
    auroc: float | None
    average_precision: float | None
    missed: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def truth_table(
    models: Iterable[str] | None = None,
    *,
    families: Iterable[Family] = FAMILIES,
    methods: Iterable[str] | None = None,
    n_seeds: int = 3,
    seed: int = 0,
    n: int = 16,
    n_distractors: int | None = None,
    noise: float = 1.0,
    sharpness: float = 12.0,
    progress: Callable[[int, int], None] | None = None,
) -> list[TruthRow]:
    """Every method on every known model in every form, `n_seeds` models of each from `seed` on, with `n` prompts.

    `progress` is called with (rows done, rows in all). Raises PatchError for a method that is not registered, TaskError
    for a model or family that does not exist.
    """
    names, chosen = list(models or BLUEPRINTS), list(methods or METHODS)
    for method in chosen:
        if method not in METHODS:
            raise PatchError(f"method {method!r} is not known; expected one of: {'; '.join(METHODS)}")
    rows: list[TruthRow] = []
    cells = list(product(names, families))
    for i, (name, family) in enumerate(cells):
        seeds = range(seed, seed + n_seeds)
        make = partial(truth, name, family, n=n, n_distractors=n_distractors, noise=noise, sharpness=sharpness)
        known = [make(seed=each) for each in seeds]
        for j, method in enumerate(chosen):
            rows += _rows(method, known)
            if progress is not None:
                progress(i * len(chosen) + j + 1, len(cells) * len(chosen))
    return rows


def _rows(method: str, known: Sequence[Truth]) -> list[TruthRow]:
    """A method's row for nodes and, if it finds any, for edges, over models of one blueprint and form."""
    start = time.perf_counter()
    found = [METHODS[method](each.model, each.task) for each in known]
    seconds = (time.perf_counter() - start) / len(known)
    reports = [truth_report(what, each) for what, each in zip(found, known, strict=True)]
    rows = []
    for what in reports[0]:
        missed = {each.role(item) for each, report in zip(known, reports, strict=True) for item in report[what].missed}
        means = {figure: _mean([getattr(report[what], figure) for report in reports]) for figure in FIGURES}
        rows.append(
            TruthRow(
                model=known[0].name,
                family=known[0].family,
                method=method,
                what=what,
                exact=method in EXACT,
                n_seeds=len(known),
                missed=tuple(sorted(missed)),
                seconds=seconds,
                **means,
            )
        )
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return fmean(given) if given else None
