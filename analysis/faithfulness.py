"""What a circuit alone recovers of a task, what each of its nodes is worth, and random circuits like it."""

from __future__ import annotations

import copy
import random
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from subcircuit.analysis.ablation import ItemAblation
from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.nodes import candidate_nodes, check_nodes, random_nodes
from subcircuit.analysis.statistics import percentile_interval
from subcircuit.analysis.tasks import Task
from subcircuit.engine.errors import PatchError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Component, DeltaSession, Effects, Patch, PatchSet, Site, Source, patch_effects
from subcircuit.engine.patching.metric import Metric
from subcircuit.engine.patching.options import Executor, Precision


class Ablation(ItemAblation[Component]):
    """Scores of keep-sets of nodes on one task (`ItemAblation` says how): the nodes outside a keep-set are replaced by
    their source, at all positions or at those given.

    `nodes` are what circuits may consist of: all that `candidate_nodes` finds unless given, which is every head and
    MLP, and of a model with dictionaries their features. What is no node is never replaced; nor is the error of a
    dictionary, which every row computes from its own activations. A keep-set may have others than `nodes`: those are
    kept in any case.

    The default source is the per-position mean over the corrupted prompts, measured in the unablated model (as Lan et
    al. do). The clean run is shared by all calls, and what is removed for every row is propagated once.

    Raises TaskError when the full model does not prefer the answers (by `accuracy`: gives none), so that there is
    nothing to recover, and PatchError for a metric that does not exist, for nodes that the model lacks, and for an MLP
    or head among nodes that are features in place of it.
    """

    def __init__(
        self,
        model: HookedTransformer,
        task: Task,
        *,
        nodes: Iterable[Component] | None = None,
        source: Source = "mean",
        positions: tuple[int, ...] | None = None,
        executor: Executor = "torch",
        precision: Precision = "fp32",
        metric: Metric = "logit_difference",
        also: Sequence[Metric] = (),
        budget_bytes: int | None = None,
    ) -> None:
        nodes = tuple(candidate_nodes(model, task, source, positions) if nodes is None else nodes)
        check_nodes(nodes, model)
        self._positions = positions
        options: dict[str, Any] = {"source": source, "executor": executor, "precision": precision, "metric": metric}
        super().__init__(model, task, nodes, also=also, budget_bytes=budget_bytes, **options)
        if model.dictionaries:
            self.settings["dictionaries"] = {name: each.d_sae for name, each in model.dictionaries.items()}
            prints = {name: each.fingerprint() for name, each in model.dictionaries.items()}
            self.settings["dictionary_fingerprints"] = prints

    @property
    def nodes(self) -> tuple[Component, ...]:
        """What circuits may consist of."""
        return self.items

    def at(self, positions: tuple[int, ...] | None) -> Ablation:
        """The same at other positions, None for all of them, with the clean run shared."""
        other = copy.copy(self)
        other._positions = positions
        return other

    def items_of(self, circuit: Circuit) -> list[Component]:
        return circuit.nodes

    def drawn_like(self, circuit: Circuit, rng: random.Random, match: str) -> set[Component]:
        if match not in ("size", "layers"):
            raise PatchError(f"random circuits matched by {match!r} are of edges; expected 'size' or 'layers' of nodes")
        return random_nodes(self.nodes, circuit, rng, match)

    def _prepare(self) -> None:
        self._session: DeltaSession | None = None
        if self._options["executor"] != "reference":
            self._session = DeltaSession(self.model, self.task, **self._options)
            self._session.prepare([self._patches(self.nodes)])

    def _effects(self, removed: Sequence[Iterable[Component]], base: Iterable[Component]) -> Effects:
        sets, shared = [self._patches(nodes) for nodes in removed], self._patches(base)
        if self._session is not None:
            return self._session.effects(sets, base=shared)
        return patch_effects(self.model, self.task, [(*shared, *each) for each in sets], **self._options)

    def _check(self, kept: Collection[Component]) -> None:
        check_nodes(kept, self.model, self.nodes)

    def _patches(self, nodes: Iterable[Component]) -> PatchSet:
        return tuple(Patch(Site(node, self._positions)) for node in nodes)


def score(
    model: HookedTransformer,
    task: Task,
    circuit: Circuit,
    *,
    nodes: Iterable[Component] | None = None,
    source: Source = "mean",
    executor: Executor = "torch",
    precision: Precision = "fp32",
    metric: Metric = "logit_difference",
    budget_bytes: int | None = None,
) -> float:
    """100 · LD(circuit) / LD(full), or the score of another metric as `Ablation` defines it: what the circuit recovers
    when every other node is ablated: every head and MLP, and of a model with dictionaries their features, unless
    `nodes` says which.

    Raises TaskError when the full model does not prefer the answers, PatchError for a node that the model lacks.
    """
    options: dict[str, Any] = {"source": source, "executor": executor, "precision": precision, "metric": metric}
    ablation = Ablation(model, task, nodes=nodes, budget_bytes=budget_bytes, **options)
    return ablation.score_of(set(circuit.nodes))


def node_drops(ablation: Ablation, circuit: Circuit, *, seed: int = 0) -> dict[str, tuple[float, float, float]]:
    """Points of score that the circuit loses when each of its nodes is ablated as well, by node name: the mean, and the
    ends of its 95 % bootstrap interval over prompts."""
    nodes = circuit.nodes
    outside = ablation.complement(set(nodes))
    values = ablation.values([(), *([node] for node in nodes)], base=outside)
    scores, drawn = ablation.resampled_scores(values, seed=seed)
    found = percentile_interval(scores[0] - scores[1:], drawn[0] - drawn[1:])
    return {str(node): found.at(i) for i, node in enumerate(nodes)}
