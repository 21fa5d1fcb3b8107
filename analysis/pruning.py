"""Iterative pruning of nodes: the discovery of Lan et al. (arXiv 2311.04131)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from subcircuit.analysis.ablation import check_threshold
from subcircuit.analysis.circuit import Circuit, TraceStep
from subcircuit.analysis.faithfulness import Ablation
from subcircuit.analysis.tasks import Task
from subcircuit.engine.errors import PatchError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Component, Source
from subcircuit.engine.patching.metric import Metric
from subcircuit.engine.patching.options import Executor, Precision

Direction = Literal["backward", "forward"]

# Products of one layer large enough to run at full speed; beyond it a wrong guess only costs more.
FLOPS_PER_LAYER = {"cpu": 1.5e9, "cuda": 3e11}


def prune_nodes(
    model: HookedTransformer,
    task: Task,
    *,
    nodes: Iterable[Component] | None = None,
    threshold: float = 20.0,
    both_sides: bool = False,
    first: Direction = "backward",
    max_sweeps: int | None = None,
    source: Source | None = None,
    metric: Metric | None = None,
    executor: Executor | None = None,
    precision: Precision | None = None,
    candidates_per_batch: int | None = None,
    budget_bytes: int | None = None,
    ablation: Ablation | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Circuit:
    """The heads and MLPs that iterative pruning leaves, and of a model with dictionaries the features.

    Start from every head and MLP, with features in their place where dictionaries sit, or from the `nodes` given (see
    `Ablation`). A backward sweep goes from the last layer down, in each layer the MLP and then the heads, or their
    features, and then those of the residual stream that enters it; a forward sweep from the first layer up, the heads
    and then the MLP. A candidate is removed for good if the score of what is left without it stays above 100 −
    `threshold`. Sweeps alternate until one changes nothing, or `max_sweeps` is reached. That rule lets go of every node
    that works against the answer, however much the score rises without it; with `both_sides` a node stays as well if
    the score would exceed 100 + `threshold`.

    Candidates are evaluated several at a time under a guess of how the ones before them end; a decision is taken only
    when all those guesses were right, so every decision is the one that the sequential rule takes. `progress` is
    called with (candidates decided in this sweep, candidates of this sweep). Scores are those of `metric`, as
    `Ablation` defines them, with its defaults: source `mean`, `logit_difference`, executor `torch`, `fp32`. An
    `ablation` made before for this model and task saves its clean run and brings its own, and its nodes; the options
    that it was made with are refused beside it.

    Raises PatchError for a bad option, TaskError when the model does not do the task.
    """
    if first not in ("backward", "forward"):
        raise PatchError(f"first sweep {first!r} is not known; expected 'backward' or 'forward'")
    check_threshold(threshold, "points of score that the circuit may lose")
    options: dict[str, Any] = {"source": source, "metric": metric, "executor": executor, "precision": precision}
    options |= {"budget_bytes": budget_bytes, "nodes": nodes}
    given = {name: value for name, value in options.items() if value is not None}
    if ablation is not None and given:
        raise PatchError(f"{', '.join(given)}: an ablation brings its own; expected one or the other")
    ablation = ablation or Ablation(model, task, **given)
    at_once = candidates_per_batch or candidates_at_once(model, task)
    pruning = _Pruning(ablation, threshold, both_sides, at_once, progress)
    pruning.run(first, max_sweeps)
    return Circuit.of_nodes(
        pruning.kept,
        model=model.config.name,
        task=task.name,
        method="prune",
        score=pruning.score,
        trace=tuple(pruning.trace),
        settings={
            **ablation.settings,
            "threshold": threshold,
            "first": first,
            "max_sweeps": max_sweeps,
            "both_sides": both_sides,
        },
    )


@dataclass
class _Pruning:
    """The state of iterative pruning: what is removed so far, and the trace of decisions."""

    ablation: Ablation
    threshold: float
    both_sides: bool
    at_once: int
    progress: Callable[[int, int], None] | None

    def run(self, first: Direction, max_sweeps: int | None) -> None:
        self.kept = list(self.ablation.nodes)
        self.removed: list[Component] = []
        self.score = 100.0
        self.trace: list[TraceStep] = []
        direction, n_sweeps = first, 0
        while max_sweeps is None or n_sweeps < max_sweeps:
            n_sweeps += 1
            if not self._sweep(n_sweeps, direction):
                break
            direction = "forward" if direction == "backward" else "backward"

    def _sweep(self, number: int, direction: Direction) -> bool:
        """One pass over the nodes that are left; whether it removed any."""
        candidates = _ordered(self.kept, direction)
        n_before, done = len(self.removed), 0
        # Most nodes go in the first sweep and stay in the later ones; after that, the last outcome is the best guess.
        guess = number == 1
        while done < len(candidates):
            batch = candidates[done : done + self.at_once]
            scores = self._speculate(batch, guess)
            for node, score_without in zip(batch, scores, strict=True):
                lost = 100 - score_without
                remove = (abs(lost) if self.both_sides else lost) < self.threshold
                self._decide(number, direction, node, score_without, remove)
                done += 1
                if remove != guess:
                    break
            if self.progress is not None:
                self.progress(done, len(candidates))
        return len(self.removed) > n_before

    def _speculate(self, batch: Sequence[Component], guess: bool) -> list[float]:
        """Score without each candidate, if all those before it in the batch end as guessed: removed or kept."""
        sets = [batch[: i + 1] if guess else batch[i : i + 1] for i in range(len(batch))]
        return self.ablation.scores(sets, base=self.removed)

    def _decide(self, number: int, direction: Direction, node: Component, score_without: float, remove: bool) -> None:
        self.trace.append(TraceStep(number, direction, str(node), score_without, remove))
        if remove:
            self.removed.append(node)
            self.kept.remove(node)
            self.score = score_without


def _ordered(nodes: Sequence[Component], direction: Direction) -> list[Component]:
    """Candidates in the order of a sweep; heads of a layer, or features of a dictionary, always from the first on."""
    up = -1 if direction == "backward" else 1
    return sorted(nodes, key=lambda node: (up * node.layer, up * node.stage, node.index))


def candidates_at_once(model: HookedTransformer, task: Task) -> int:
    """As many candidates at once as make a layer's products large enough to run at full speed on this device."""
    config = model.config
    per_layer = (config.n_params - 2 * config.d_vocab * config.d_model) / config.n_layers
    flops = 2 * max(per_layer, config.d_model**2) * task.clean.numel()
    return max(1, min(32, int(FLOPS_PER_LAYER.get(model.device.type, 3e11) / flops)))
