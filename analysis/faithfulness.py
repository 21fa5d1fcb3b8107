"""What a circuit alone recovers of a task, what each of its nodes is worth, and what random circuits recover."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.nodes import candidate_nodes, check_nodes, random_nodes
from subcircuit.analysis.tasks import Task
from subcircuit.engine.errors import PatchError, TaskError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Component, DeltaSession, Effects, Patch, PatchSet, Site, Source, patch_effects
from subcircuit.engine.patching.metric import Metric
from subcircuit.engine.patching.session import Executor, Precision


def full_metric(clean: Float[Tensor, "prompt"], task: Task, metric: Metric) -> float:
    """Mean metric of the full model. Raises TaskError where it does not prefer the answers, or by `accuracy` gives
    none."""
    full = float(clean.double().mean())
    if metric in ("logit_difference", "accuracy") and full <= 0:
        raise TaskError(
            f"task '{task.name}': the model does not prefer the answers (mean {metric.replace('_', ' ')} {full:.3f}), "
            "so there is no score relative to it"
        )
    return full


def share_left(metric: Metric, ablated: Float[Tensor, "*any"], full: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """What is left of the full model, 1 for all of it, by mean metrics of the ablated and of the full one: see
    `Ablation`."""
    match metric:
        case "kl":
            return (-ablated).exp()
        case "log_probability":
            return (ablated - full).exp()
        case _:
            return ablated / full


class Ablation:
    """Scores of keep-sets on one task: the nodes outside a keep-set are replaced by their source, at all positions or
    at those given.

    `nodes` are what circuits may consist of: all that `candidate_nodes` finds unless given, which is every head and
    MLP, and of a model with dictionaries their features. What is no node is never replaced; nor is the error of a
    dictionary, which every row computes from its own activations.

    A score is what is left of the full model, which has 100. With m the mean of the metric over prompts, it is

    * 100 · m(ablated) / m(full) for `logit_difference` (Lan et al., arXiv 2311.04131; may be negative or above 100) and
      for `accuracy`;
    * 100 · exp(m(ablated) − m(full)) for `log_probability`: the answers' probability, in the geometric mean, as a share
      of what the full model gives them;
    * 100 · exp(−m(ablated)) for `kl`: the same share for tokens drawn from the full model's own predictions; at most
      100.

    The default source is the per-position mean over the corrupted prompts, measured in the unablated model (as Lan et
    al. do). The clean run is shared by all calls, and what is removed for every row is propagated once.

    Raises TaskError when the full model does not prefer the answers (by `accuracy`: gives none), so that there is
    nothing to recover, and PatchError for a metric that does not exist and for nodes that the model lacks.
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
        budget_bytes: int | None = None,
    ) -> None:
        self.model, self.task, self.metric, self._positions = model, task, metric, positions
        self.nodes = tuple(candidate_nodes(model, task, source, positions) if nodes is None else nodes)
        check_nodes(self.nodes, model)
        self.settings: dict[str, Any] = {
            "source": source if isinstance(source, str) else "tensors",
            "executor": executor,
            "precision": precision,
            "metric": metric,
        }
        if model.dictionaries:
            self.settings["dictionaries"] = {name: each.d_sae for name, each in model.dictionaries.items()}
        self._source, self._executor, self._precision, self._budget_bytes = source, executor, precision, budget_bytes
        self._session: DeltaSession | None = None
        if executor != "reference":
            self._session = DeltaSession(
                model,
                task,
                source=source,
                precision=precision,
                budget_bytes=budget_bytes,
                executor=executor,
                metric=metric,
            )
            self._session.prepare([self._patches(self.nodes)])
        self.clean: Float[Tensor, "prompt"] = self._effects([()], ()).clean_metric.double().cpu()
        self.full = full_metric(self.clean, task, metric)

    def values(
        self, removed: Sequence[Iterable[Component]], base: Iterable[Component] = ()
    ) -> Float[Tensor, "set prompt"]:
        """Metric of each prompt for each set of removed nodes, on top of the nodes of `base`; float64, on the CPU."""
        effects = self._effects([self._patches(nodes) for nodes in removed], self._patches(base)).effects
        return self.clean + effects.double().cpu()

    def kept_values(self, kept: Sequence[Collection[Component]]) -> Float[Tensor, "set prompt"]:
        """Metric of each prompt when only the nodes of each set are kept. What no set keeps is propagated once."""
        if not kept:
            return self.clean.new_empty(0, len(self.clean))
        base = self.complement(set[Component]().union(*kept))
        gone = set(base)
        rest = [node for node in self.nodes if node not in gone]
        return self.values([[node for node in rest if node not in nodes] for nodes in map(set, kept)], base)

    def scores(self, removed: Sequence[Iterable[Component]], base: Iterable[Component] = ()) -> list[float]:
        """Score of each set of removed nodes, on top of the nodes of `base`."""
        return (100 * self.share(self.values(removed, base).mean(1), self.clean.mean())).tolist()

    def share(self, ablated: Float[Tensor, "*any"], full: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """What is left of the full model, 1 for all of it, by mean metrics of the ablated and of the full one."""
        return share_left(self.metric, ablated, full)

    def score_of(self, kept: set[Component]) -> float:
        """Score of the circuit that consists of the kept nodes."""
        return self.scores([self.complement(kept)])[0]

    def complement(self, kept: set[Component]) -> list[Component]:
        """The nodes outside a keep-set, which may have others than `nodes`: those are kept in any case.

        Raises PatchError when it has a node that the model lacks, or one that features are the nodes in place of.
        """
        check_nodes(kept, self.model, self.nodes)
        return [node for node in self.nodes if node not in kept]

    def _patches(self, nodes: Iterable[Component]) -> PatchSet:
        return tuple(Patch(Site(node, self._positions)) for node in nodes)

    def _effects(self, sets: list[PatchSet], base: PatchSet) -> Effects:
        if self._session is not None:
            return self._session.effects(sets, base=base)
        return patch_effects(
            self.model,
            self.task,
            [(*base, *patch_set) for patch_set in sets],
            source=self._source,
            executor=self._executor,
            precision=self._precision,
            metric=self.metric,
            budget_bytes=self._budget_bytes,
        )


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


def node_drops(ablation: Ablation, circuit: Circuit) -> dict[str, float]:
    """Points of score that the circuit loses when each of its nodes is ablated as well, by node name."""
    nodes = circuit.nodes
    outside = ablation.complement(set(nodes))
    whole, *without = ablation.scores([(), *([node] for node in nodes)], base=outside)
    return {str(node): whole - lower for node, lower in zip(nodes, without, strict=True)}


def random_circuits(
    ablation: Ablation,
    circuit: Circuit,
    n: int,
    *,
    seed: int = 0,
    match: str = "size",
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Scores of n random circuits with as many heads, MLPs and features as the given one, the baseline for its score.

    `match="layers"` keeps their number in each layer as it is. Raises PatchError for another value, and for a circuit
    with a node that the model lacks.
    """
    if match not in ("size", "layers"):
        raise PatchError(f"match {match!r} is not known; expected 'size' or 'layers'")
    check_nodes(circuit.nodes, ablation.model, ablation.nodes)
    rng = random.Random(seed)
    removed = [ablation.complement(random_nodes(ablation.nodes, circuit, rng, match)) for _ in range(n)]
    scores: list[float] = []
    for first in range(0, n, 16):
        scores += ablation.scores(removed[first : first + 16])
        if progress is not None:
            progress(len(scores), n)
    return scores
