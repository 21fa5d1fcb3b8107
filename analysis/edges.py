"""Edges of circuits: what a set of edges alone recovers, which edges of a node circuit matter, and ACDC.

An edge is removed when its sender's value in the receiver's input is replaced by the source's; everything else is
computed as always (`engine.patching.edges`). Scores are those of circuits of nodes: 100 · LD(row) / LD(full).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from subcircuit.analysis.ablation import ItemAblation, full_metric
from subcircuit.analysis.circuit import Circuit, TraceStep, check_no_features
from subcircuit.analysis.nodes import all_nodes
from subcircuit.analysis.pruning import candidates_at_once
from subcircuit.analysis.tasks import Task
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import PatchError, TaskError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Effects, Patch, PatchSet, Site, Source
from subcircuit.engine.patching.edge_delta import EdgeSet
from subcircuit.engine.patching.edge_session import EdgeSession
from subcircuit.engine.patching.edges import edge_effects, patched_activations, path_effects
from subcircuit.engine.patching.graph import INPUT, LOGITS, Edge, check_edge, edges, edges_among, layer_of, readers
from subcircuit.engine.patching.metric import Metric
from subcircuit.engine.patching.options import Executor, Precision
from subcircuit.engine.patching.path_delta import Freeze, check_freeze
from subcircuit.engine.patching.sites import source_name

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class EdgeEffects:
    """Exact effects of removing edges one at a time: the change of each prompt's logit(answer) − logit(wrong)."""

    edges: tuple[Edge, ...]
    effects: Float[Tensor, "edge prompt"]
    clean_metric: Float[Tensor, "prompt"]
    settings: dict[str, Any]

    @property
    def mean(self) -> Float[Tensor, "edge"]:
        """Mean effect of each edge over prompts."""
        return self.effects.mean(1)

    def top(self, k: int = 10) -> list[tuple[Edge, float]]:
        """The k edges with the largest mean effects by size, each with its mean effect."""
        order = self.mean.abs().argsort(descending=True, stable=True)[:k].tolist()
        return [(self.edges[i], float(self.mean[i])) for i in order]


def verify_edges(
    model: HookedTransformer,
    task: Task,
    chosen: Iterable[Edge],
    *,
    source: Source = "corrupted",
    executor: Executor = "torch",
    precision: Precision = "fp32",
    budget_bytes: int | None = None,
    progress: Progress | None = None,
) -> EdgeEffects:
    """The exact effect of every chosen edge alone, such as those that a gradient method ranks highest.

    Raises PatchError for an edge that the model lacks.
    """
    chosen = tuple(chosen)
    options: dict[str, Any] = {"source": source, "executor": executor, "precision": precision}
    result = edge_effects(model, task, chosen, budget_bytes=budget_bytes, progress=progress, **options)
    settings = {**options, "source": source_name(source), "method": "exact", "model": model.config.name}
    return EdgeEffects(chosen, result.effects, result.clean_metric, {**settings, "task": task.name})


class EdgeAblation(ItemAblation[Edge]):
    """Scores of keep-sets of edges on one task, sharing a clean run, as `Ablation` gives those of nodes.

    Raises TaskError when the full model does not prefer the answers, so that there is nothing to recover, and
    PatchError for a metric that does not exist.
    """

    def __init__(
        self,
        model: HookedTransformer,
        task: Task,
        *,
        source: Source = "mean",
        executor: Executor = "torch",
        precision: Precision = "fp32",
        metric: Metric = "logit_difference",
        budget_bytes: int | None = None,
    ) -> None:
        options: dict[str, Any] = {"source": source, "executor": executor, "precision": precision, "metric": metric}
        super().__init__(model, task, edges(model.config), budget_bytes=budget_bytes, **options)

    def _prepare(self) -> None:
        reference = self._options["executor"] == "reference"
        self._session = None if reference else EdgeSession(self.model, self.task, **self._options)

    def _effects(self, removed: Sequence[Iterable[Edge]], base: Iterable[Edge]) -> Effects:
        sets, shared = [EdgeSet(tuple(chosen)) for chosen in removed], EdgeSet(tuple(base))
        if self._session is not None:
            return self._session.edge_effects(sets, shared)
        return edge_effects(self.model, self.task, sets, base=shared, **self._options)

    def _check(self, kept: Collection[Edge]) -> None:
        for edge in kept:
            check_edge(edge, self.model.config)


def edge_score(
    model: HookedTransformer,
    task: Task,
    circuit: Circuit,
    *,
    source: Source = "mean",
    executor: Executor = "torch",
    precision: Precision = "fp32",
    metric: Metric = "logit_difference",
    budget_bytes: int | None = None,
) -> float:
    """100 · LD(circuit) / LD(full), or the score of another metric as `Ablation` defines it: what a circuit of edges
    recovers when every other edge of the model is removed.

    Raises PatchError for a circuit without edges or with one that the model lacks, TaskError when the full model does
    not prefer the answers.
    """
    if not circuit.edges:
        raise PatchError("the circuit has no edges to score; `score` takes circuits of nodes")
    options: dict[str, Any] = {"source": source, "executor": executor, "precision": precision, "metric": metric}
    return EdgeAblation(model, task, budget_bytes=budget_bytes, **options).score_of(circuit.edges)


def edges_between(
    circuit: Circuit, config: ModelConfig, *, from_input: bool = False, same_layer: bool = False
) -> list[Edge]:
    """Edges that a circuit of nodes may have, receiver by receiver from the first layer up.

    Receivers are the queries of its heads, the keys and values that they read, its MLPs and the logits; senders are its
    nodes of earlier layers, with `from_input` the embeddings too, with `same_layer` the heads beside an MLP too.

    Raises PatchError for a node that the model lacks, and for a circuit with features.
    """
    check_no_features(circuit, "a search of edges")
    for node in circuit.nodes:
        node.check(config)

    def taken(sender: str, receiver: str) -> bool:
        if sender == INPUT:
            return from_input
        return same_layer or layer_of(sender, config) < layer_of(receiver, config)

    return [edge for edge in edges_among(map(str, circuit.nodes), config) if taken(*edge)]


def prune_edges(
    model: HookedTransformer,
    task: Task,
    circuit: Circuit,
    threshold: float = 0.8,
    *,
    source: Source = "mean",
    freeze: Freeze = "heads",
    relative_to: Literal["full", "circuit"] = "full",
    both_sides: bool = False,
    from_input: bool = False,
    same_layer: bool = False,
    executor: Executor = "torch",
    precision: Precision = "fp32",
    budget_bytes: int | None = None,
    progress: Progress | None = None,
) -> Circuit:
    """The edges that matter within a circuit of nodes, by path patching (Lan et al., arXiv 2311.04131).

    With every node outside the circuit ablated (`source`), each edge of `edges_between` is path-patched alone: the
    sender's value in the corrupted run, under the same ablation, reaches that receiver only, with `freeze` held fixed
    on the way. The edge is kept if LD / LD(full) falls below `threshold`; with `relative_to="circuit"`, if LD / LD of
    the circuit alone does; with `both_sides` also if it exceeds 2 − `threshold`. Receivers into which no edge leads are
    dropped with that.

    The circuit comes back with its edges, and for each the points of score that its patch costs (`edge_scores`);
    `settings["edges"]` says how they were found, and the circuit's score when all other candidates are removed
    together. Only with `from_input` and `same_layer` are the candidates all edges of the circuit, so that `edge_score`
    can score what is kept of them. The corrupted values of all prompts are held in memory meanwhile, 8 · n_layers ·
    d_model bytes per token.

    Raises PatchError for an unknown option, a circuit with features or a node that the model lacks, or a task without
    corrupted prompts, TaskError when the full model (or the circuit) does not prefer the answers.
    """
    if relative_to not in ("full", "circuit"):
        raise PatchError(f"relative_to {relative_to!r} is not known; expected 'full' or 'circuit'")
    check_freeze(freeze)
    candidates = edges_between(circuit, model.config, from_input=from_input, same_layer=same_layer)
    base: PatchSet = tuple(
        Patch(Site(node), source) for node in all_nodes(model.config) if node not in set(circuit.nodes)
    )
    corrupted = patched_activations(model, task, base, precision=precision, budget_bytes=budget_bytes)
    options: dict[str, Any] = {"executor": executor, "precision": precision, "budget_bytes": budget_bytes}
    result = path_effects(
        model, task, candidates, source=corrupted, freeze=freeze, base=base, progress=progress, **options
    )
    full = full_metric(result.clean_metric, task, "logit_difference")
    metrics = dict(zip(candidates, _metrics(result), strict=True))

    def score_without(removed: Iterable[Edge]) -> float:
        rows = edge_effects(model, task, [()], source=source, base=EdgeSet(tuple(removed), base), **options)
        return 100 * _metrics(rows)[0] / full

    alone = score_without(())
    if relative_to == "circuit" and alone <= 0:
        raise TaskError(f"task '{task.name}': the circuit does not prefer the answers, so no edge is relative to it")
    whole = 100.0 if relative_to == "full" else alone
    scores = {edge: 100 * metric / full for edge, metric in metrics.items()}
    most = 2 - threshold if both_sides else float("inf")
    kept = tuple(edge for edge in candidates if not threshold <= scores[edge] / whole <= most)
    how = {
        "method": "path patching",
        "threshold": threshold,
        "relative_to": relative_to,
        "both_sides": both_sides,
        "freeze": freeze,
        "from_input": from_input,
        "same_layer": same_layer,
        "source": source_name(source),
        "n_candidates": len(candidates),
        "score": score_without(edge for edge in candidates if edge not in set(kept)),
    }
    costs = {edge: alone - scores[edge] for edge in kept}
    return replace(circuit, edges=kept, edge_scores=costs, settings={**circuit.settings, "edges": how})


def acdc(
    model: HookedTransformer,
    task: Task,
    *,
    threshold: float = 1.0,
    both_sides: bool = False,
    source: Source = "mean",
    metric: Metric = "logit_difference",
    executor: Executor = "torch",
    precision: Precision = "fp32",
    candidates_per_batch: int | None = None,
    budget_bytes: int | None = None,
    progress: Progress | None = None,
) -> Circuit:
    """The circuit of edges that automatic circuit discovery finds (Conmy et al. 2023, arXiv 2304.14997, algorithm 1).

    Receivers are visited from the logits down, and the senders of each from the last to the first. An edge is removed
    for good if the score of what is left falls by less than `threshold` points without it; with `both_sides`, only if
    it rises by less than that too, which keeps edges that work against the answer. Edges into a node that nothing
    reads any more change nothing and go at once. Scores are those of `metric`, as `Ablation` defines them; the paper's
    own metric is `kl`, whose threshold is in points of exp(−KL) here.

    Candidates are evaluated several at a time under the guess that all before them are removed; a decision is taken
    only when that was right, so every decision is the one that the sequential rule takes. `progress` is called with
    (edges decided, edges of the model). `edge_scores` are the points that each kept edge would have cost.

    Raises PatchError for a threshold that is not positive or a metric that does not exist, TaskError when the model
    does not do the task.
    """
    if threshold <= 0:
        raise PatchError(f"threshold {threshold} must be positive: points of score that an edge may cost")
    ablation = EdgeAblation(
        model,
        task,
        source=source,
        metric=metric,
        executor=executor,
        precision=precision,
        budget_bytes=budget_bytes,
    )
    at_once = candidates_per_batch or candidates_at_once(model, task)
    search = _Acdc(ablation, threshold, both_sides, at_once, progress)
    search.run()
    return Circuit.of_nodes(
        {sender for sender, _ in search.kept} - {INPUT},
        edges=tuple(edge for edge in edges(model.config) if edge in search.kept),
        edge_scores=search.kept,
        model=model.config.name,
        task=task.name,
        method="acdc",
        score=search.score,
        trace=tuple(search.trace),
        settings={**ablation.settings, "threshold": threshold, "both_sides": both_sides},
    )


class _Acdc:
    """The state of ACDC: what is removed so far, what is kept and what each kept edge would have cost."""

    def __init__(
        self, ablation: EdgeAblation, threshold: float, both_sides: bool, at_once: int, progress: Progress | None
    ) -> None:
        self.ablation, self.threshold, self.both_sides, self.progress = ablation, threshold, both_sides, progress
        self.at_once = self.most_at_once = at_once
        self.removed: list[Edge] = []
        self.kept: dict[Edge, float] = {}
        self.score = 100.0
        self.trace: list[TraceStep] = []

    def run(self) -> None:
        everything = edges(self.ablation.model.config)
        for group in self._groups(everything):
            alive = {receiver for _, receiver in group if self._is_read(receiver)}
            self.removed += [edge for edge in group if edge[1] not in alive]
            candidates = [edge for edge in group if edge[1] in alive]
            while candidates:
                candidates = candidates[self._decide(candidates[: self.at_once]) :]
                if self.progress is not None:
                    self.progress(len(self.removed) + len(self.kept), len(everything))

    def _groups(self, everything: Sequence[Edge]) -> list[list[Edge]]:
        """Edges from the last to the first, those together whose receivers do not write to each other."""
        config = self.ablation.model.config
        groups: dict[tuple[int, bool], list[Edge]] = {}
        for edge in reversed(everything):
            groups.setdefault((layer_of(edge[1], config), edge[1].startswith("m")), []).append(edge)
        return list(groups.values())

    def _is_read(self, receiver: str) -> bool:
        """Whether an edge is kept that leads on from where a receiver sits."""
        if receiver == LOGITS:
            return True
        nodes = readers(receiver, self.ablation.model.config)
        return any(sender in nodes for sender, _ in self.kept)

    def _decide(self, batch: Sequence[Edge]) -> int:
        """Decide the first candidates of a batch, up to the first that is kept; how many."""
        scores = self.ablation.scores([batch[: i + 1] for i in range(len(batch))], base=self.removed)
        n_decided = 0
        for edge, without in zip(batch, scores, strict=True):
            cost = self.score - without
            removed = (abs(cost) if self.both_sides else cost) < self.threshold
            self.trace.append(TraceStep(1, "backward", f"{edge[0]}->{edge[1]}", without, removed))
            n_decided += 1
            if not removed:
                self.kept[edge] = cost
                break
            self.removed.append(edge)
            self.score = without
        # Where many edges are kept, long guesses are thrown away.
        self.at_once = min(self.most_at_once, 2 * n_decided)
        return n_decided


def _metrics(result: Effects) -> list[float]:
    """Mean logit difference of each set."""
    means: list[float] = (result.effects.double().mean(1) + result.clean_metric.double().mean()).tolist()
    return means
