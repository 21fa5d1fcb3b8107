"""ACDC: the edges that a model cannot do a task without, tried one after another from the logits down."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from subcircuit.analysis.ablation import check_threshold
from subcircuit.analysis.circuit import Circuit, TraceStep
from subcircuit.analysis.edge_ablation import EdgeAblation
from subcircuit.analysis.pruning import candidates_at_once
from subcircuit.analysis.tasks import Task
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Source
from subcircuit.engine.patching.graph import INPUT, LOGITS, Edge, edges, layer_of, readers
from subcircuit.engine.patching.metric import Metric
from subcircuit.engine.patching.options import Executor, Precision

Progress = Callable[[int, int], None]


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
    check_threshold(threshold, "points of score that an edge may cost")
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
