"""What a circuit alone recovers of a task, what each of its nodes is worth, and random circuits like it."""

from __future__ import annotations

import copy
import random
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.tasks import Task
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import TaskError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Component, DeltaSession, Effects, Patch, PatchSet, Site, Source, patch_effects
from subcircuit.engine.patching.metric import Metric
from subcircuit.engine.patching.session import Executor, Precision


def all_nodes(config: ModelConfig) -> list[Component]:
    """Every head and MLP, layer by layer, heads before the MLP."""
    return [node for layer in range(config.n_layers) for node in layer_nodes(config, layer)]


def layer_nodes(config: ModelConfig, layer: int) -> list[Component]:
    """The heads of a layer, then its MLP: the order in which the layer computes them."""
    return [*(Component(layer, "z", head) for head in range(config.n_heads)), Component(layer, "mlp")]


def outside(kept: Collection[Component], config: ModelConfig) -> list[Component]:
    """The nodes outside a keep-set. Raises PatchError when the keep-set has a node that the model lacks."""
    for node in kept:
        node.check(config)
    chosen = set(kept)
    return [node for node in all_nodes(config) if node not in chosen]


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
    """Scores of keep-sets on one task: everything outside a keep-set is replaced by its source, at all positions or
    at those given.

    A score is what is left of the full model, which has 100. With m the mean of the metric over prompts, it is

    * 100 · m(ablated) / m(full) for `logit_difference` (Lan et al., arXiv 2311.04131; may be negative or above 100) and
      for `accuracy`;
    * 100 · exp(m(ablated) − m(full)) for `log_probability`: the answers' probability, in the geometric mean, as a share
      of what the full model gives them;
    * 100 · exp(−m(ablated)) for `kl`: the same share for tokens drawn from the full model's own predictions; at most
      100.

    The default source is the per-position mean over the corrupted prompts, measured in the unablated model (as Lan et
    al. do). The clean run is shared by all calls, and what is removed for every row is propagated once. `also` are
    other metrics to be read from the same rows (`values_by_metric`); scores are those of `metric`.

    Raises TaskError when the full model does not prefer the answers (by `accuracy`: gives none), so that there is
    nothing to recover, and PatchError for a metric that does not exist.
    """

    def __init__(
        self,
        model: HookedTransformer,
        task: Task,
        *,
        source: Source = "mean",
        positions: tuple[int, ...] | None = None,
        executor: Executor = "torch",
        precision: Precision = "fp32",
        metric: Metric = "logit_difference",
        also: Sequence[Metric] = (),
        budget_bytes: int | None = None,
    ) -> None:
        self.model, self.task, self.metric, self._positions = model, task, metric, positions
        self._metrics = tuple(dict.fromkeys((metric, *also)))
        self.settings = {
            "source": source if isinstance(source, str) else "tensors",
            "executor": executor,
            "precision": precision,
            "metric": metric,
        }
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
                metric=self._metrics,
            )
            self._session.prepare([self._patches(all_nodes(model.config))])
        clean = self._effects([()], ()).clean_metric.double().cpu().unbind(-1)
        self.clean_by_metric: dict[Metric, Float[Tensor, "prompt"]] = dict(zip(self._metrics, clean, strict=True))
        self.clean = self.clean_by_metric[metric]
        self.full = full_metric(self.clean, task, metric)

    def at(self, positions: tuple[int, ...] | None) -> Ablation:
        """The same at other positions, None for all of them, with the clean run shared."""
        other = copy.copy(self)
        other._positions = positions
        return other

    def values(
        self, removed: Sequence[Iterable[Component]], base: Iterable[Component] = ()
    ) -> Float[Tensor, "set prompt"]:
        """Metric of each prompt for each set of removed nodes, on top of the nodes of `base`; float64, on the CPU."""
        return self.values_by_metric(removed, base)[self.metric]

    def values_by_metric(
        self, removed: Sequence[Iterable[Component]], base: Iterable[Component] = ()
    ) -> dict[Metric, Float[Tensor, "set prompt"]]:
        """The same for `metric` and each of `also`, all of them from the same rows."""
        effects = self._effects([self._patches(nodes) for nodes in removed], self._patches(base)).effects
        each = zip(self.clean_by_metric.items(), effects.double().cpu().unbind(-1), strict=True)
        return {metric: clean + changes for (metric, clean), changes in each}

    def kept_values(self, kept: Sequence[Collection[Component]]) -> Float[Tensor, "set prompt"]:
        """Metric of each prompt when only the nodes of each set are kept. What no set keeps is propagated once."""
        if not kept:
            return self.clean.new_empty(0, len(self.clean))
        base = self.complement(set[Component]().union(*kept))
        rest = [node for node in all_nodes(self.model.config) if node not in set(base)]
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
        """The nodes outside a keep-set. Raises PatchError when the keep-set has a node that the model lacks."""
        return outside(kept, self.model.config)

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
            metric=self._metrics,
            budget_bytes=self._budget_bytes,
        )


def score(
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
    """100 · LD(circuit) / LD(full), or the score of another metric as `Ablation` defines it: what the circuit recovers
    when every other head and MLP is ablated.

    Raises TaskError when the full model does not prefer the answers, PatchError for a node that the model lacks.
    """
    options: dict[str, Any] = {"source": source, "executor": executor, "precision": precision, "metric": metric}
    ablation = Ablation(model, task, budget_bytes=budget_bytes, **options)
    return ablation.score_of(set(circuit.nodes))


def node_drops(ablation: Ablation, circuit: Circuit) -> dict[str, float]:
    """Points of score that the circuit loses when each of its nodes is ablated as well, by node name."""
    nodes = circuit.nodes
    outside = ablation.complement(set(nodes))
    whole, *without = ablation.scores([(), *([node] for node in nodes)], base=outside)
    return {str(node): whole - lower for node, lower in zip(nodes, without, strict=True)}


def random_nodes(config: ModelConfig, circuit: Circuit, rng: random.Random, match: str) -> set[Component]:
    """Nodes of one random circuit: `size` as many heads and MLPs, `layers` as many heads in each layer, same MLPs.

    Raises PatchError for a circuit with a node that the model lacks.
    """
    for node in circuit.nodes:
        node.check(config)
    if match == "layers":
        per_layer = [sum(layer == at for at, _ in circuit.heads) for layer in range(config.n_layers)]
        heads = [(layer, head) for layer, n in enumerate(per_layer) for head in rng.sample(range(config.n_heads), n)]
        mlps = list(circuit.mlps)
    else:
        every_head = [(layer, head) for layer in range(config.n_layers) for head in range(config.n_heads)]
        heads = rng.sample(every_head, len(circuit.heads))
        mlps = rng.sample(range(config.n_layers), len(circuit.mlps))
    return {Component(layer, "z", head) for layer, head in heads} | {Component(layer, "mlp") for layer in mlps}
