"""Ablations by full forwards with hooks, under any metric: slow and plain, what `Ablation` is tested against."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.analysis import metrics
from subcircuit.analysis.faithfulness import Ablation, all_nodes, outside
from subcircuit.analysis.tasks import Task
from subcircuit.engine.errors import PatchError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Component, Patch, Site, Source
from subcircuit.engine.patching.session import check_prompts
from subcircuit.engine.patching.sources import Sources

Metric = Literal["logit_difference", "log_probability", "kl", "accuracy"]
METRICS: tuple[Metric, ...] = get_args(Metric)
METRICS_WITH_ZERO = ("logit_difference", "accuracy")
"""Of which 0 means that the task is not done, so that a share of the full model's is a score."""


class ForwardAblation:
    """As `Ablation`, with a full forward for every set, so that any function of the logits can be the metric.

    `kl` is KL(full model ‖ ablated), 0 for the full model and lower for what is like it; of the others more is better.

    Raises PatchError for an unknown metric, or where source and prompts do not fit.
    """

    def __init__(
        self,
        model: HookedTransformer,
        task: Task,
        *,
        source: Source = "mean",
        metric: Metric = "logit_difference",
        positions: tuple[int, ...] | None = None,
    ) -> None:
        check_metric(metric)
        check_prompts(model, task)
        self.model, self.task, self.metric = model, task, metric
        self._positions = None if positions is None else list(positions)
        every_node = tuple(Patch(Site(node)) for node in all_nodes(model.config))
        self._sources = Sources(model, task, [every_node], source, len(task.clean))
        self._source_key = self._sources.key(None)
        self._prompts = torch.arange(len(task.clean))
        self._clean_logits: Tensor = self._logits(frozenset())
        self.clean: Float[Tensor, "prompt"] = self._metric(self._clean_logits)
        self.full = float(self.clean.mean())
        name = source if isinstance(source, str) else "tensors"
        self.settings = {"source": name, "metric": metric, "executor": "reference", "precision": str(model.dtype)[6:]}

    def values(
        self, removed: Sequence[Iterable[Component]], base: Iterable[Component] = ()
    ) -> Float[Tensor, "set prompt"]:
        """Metric of each prompt for each set of removed nodes, on top of the nodes of `base`; float64, on the CPU."""
        always = frozenset(base)
        rows = [self._metric(self._logits(always | frozenset(nodes))) for nodes in removed]
        return torch.stack(rows) if rows else self.clean.new_empty(0, len(self.clean))

    def kept_values(self, kept: Sequence[Collection[Component]]) -> Float[Tensor, "set prompt"]:
        """Metric of each prompt when only the nodes of each set are kept."""
        return self.values([self.complement(set(nodes)) for nodes in kept])

    def complement(self, kept: set[Component]) -> list[Component]:
        """The nodes outside a keep-set. Raises PatchError when the keep-set has a node that the model lacks."""
        return outside(kept, self.model.config)

    @torch.no_grad()
    def _logits(self, removed: frozenset[Component]) -> Float[Tensor, "prompt d_vocab"]:
        names = sorted({node.hook_name for node in removed})
        hooks = [(name, self._replace([node for node in removed if node.hook_name == name])) for name in names]
        logits: Tensor = self.model.run_with_hooks(self.task.clean, hooks)
        return logits[:, -1]

    def _replace(self, nodes: Sequence[Component]) -> Callable[[Tensor, str], Tensor]:
        """A hook that puts the source in place of some nodes of one hook point."""
        where: slice | list[int] = slice(None) if self._positions is None else self._positions
        source_value = self._sources.value(self._source_key, nodes[0].hook_name, self._prompts)

        def replace(value: Tensor, name: str) -> Tensor:
            value, source = value.clone(), source_value.expand_as(value)
            for node in nodes:
                at = (slice(None), where) if node.kind == "mlp" else (slice(None), where, node.index)
                value[at] = source[at]
            return value

        return replace

    def _metric(self, logits: Float[Tensor, "prompt d_vocab"]) -> Float[Tensor, "prompt"]:
        answers, wrongs = self.task.answer_sets
        if self.metric == "logit_difference":
            values = metrics.logit_difference(logits, answers.to(logits.device), wrongs.to(logits.device))
        elif self.metric == "log_probability":
            values = metrics.log_probability(logits, self.task.answer.to(logits.device))
        elif self.metric == "kl":
            values = metrics.kl_divergence(logits, self._clean_logits)
        else:
            values = metrics.is_top(logits, answers)
        return values.double().cpu()


AnyAblation = Ablation | ForwardAblation
"""What scores sets of nodes on a task: by differences, or by full forwards."""


def ablation_of(
    model: HookedTransformer,
    task: Task,
    *,
    metric: str = "logit_difference",
    source: Source = "mean",
    positions: tuple[int, ...] | None = None,
) -> AnyAblation:
    """The fastest ablation that knows the metric. Raises PatchError for an unknown one."""
    check_metric(metric)
    if metric == "logit_difference":
        return Ablation(model, task, source=source, positions=positions)
    return ForwardAblation(model, task, source=source, metric=cast(Metric, metric), positions=positions)


def check_metric(metric: str) -> None:
    """Raises PatchError for a metric that is not known."""
    if metric not in METRICS:
        raise PatchError(f"metric {metric!r} is not known; expected one of {', '.join(METRICS)}")
