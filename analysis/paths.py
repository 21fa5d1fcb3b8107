"""Exact effects of edges and of paths, one at a time: what each does to every prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from subcircuit.analysis.statistics import benjamini_hochberg, interval_columns, sign_flip_p
from subcircuit.analysis.tasks import Task
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Effects, Source
from subcircuit.engine.patching.edges import edge_effects, path_effects
from subcircuit.engine.patching.graph import LOGITS, Edge, check_edge, parse_receiver, receivers, senders_to
from subcircuit.engine.patching.options import Executor, Precision
from subcircuit.engine.patching.path_delta import Freeze
from subcircuit.engine.patching.sites import source_name

Progress = Callable[[int, int], None]
RECEIVERS = f"{LOGITS}, m9, a7.q11, a7.k2, a7.v2, or a7.h11 for its query, key and value"


@dataclass(frozen=True)
class EdgeEffects:
    """Exact effects of edges, removed or as paths, one at a time: the change of each prompt's logit(answer) −
    logit(wrong)."""

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

    def table(self) -> list[dict[str, Any]]:
        """A row per edge: sender, receiver, mean effect with the ends of its 95 % bootstrap interval over prompts (None
        of one prompt), share of the mean clean metric, and q-value (`baselines.cell_q_values` says how to read it)."""
        q = benjamini_hochberg(sign_flip_p(self.effects)).tolist()
        full = float(self.clean_metric.mean())
        rows = zip(self.edges, self.mean.tolist(), interval_columns(self.effects), q, strict=True)
        return [
            {"sender": edge[0], "receiver": edge[1], "effect": effect, **ends, "share": effect / full, "q": value}
            for edge, effect, ends, value in rows
        ]


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
    return _as_edge_effects(chosen, result, model, task, {**options, "method": "exact"})


def trace_paths(
    model: HookedTransformer,
    task: Task,
    chosen: Iterable[Edge],
    *,
    freeze: Freeze = "heads",
    source: Source = "corrupted",
    executor: Executor = "torch",
    precision: Precision = "fp32",
    budget_bytes: int | None = None,
    progress: Progress | None = None,
) -> EdgeEffects:
    """The exact effect of path patching from each sender to each receiver: the sender's source value reaches that
    receiver alone, with `freeze` held fixed on the way (`engine.patching.edges.path_effects`).

    Raises PatchError for an edge that the model lacks, or another `freeze`.
    """
    chosen = tuple(chosen)
    options: dict[str, Any] = {"source": source, "freeze": freeze, "executor": executor, "precision": precision}
    result = path_effects(model, task, chosen, budget_bytes=budget_bytes, progress=progress, **options)
    return _as_edge_effects(chosen, result, model, task, {**options, "method": "path patching"})


def _as_edge_effects(
    chosen: tuple[Edge, ...], result: Effects, model: HookedTransformer, task: Task, how: dict[str, Any]
) -> EdgeEffects:
    about = {"source": source_name(how["source"]), "model": model.config.name, "task": task.name}
    return EdgeEffects(chosen, result.effects, result.clean_metric, how | about)


def paths_between(config: ModelConfig, from_: Sequence[str], to: Sequence[str]) -> list[Edge]:
    """Edges from some senders (`input`, `a4.h4`, `m3`; all that there are below if none is named) to some receivers
    (`a7.q11`, `m9`, `logits`; `a7.h11` stands for its query, key and value).

    Raises PatchError for a sender below none of the receivers, and for what is no receiver.
    """
    into = dict.fromkeys(name for receiver in to for name in _inputs(receiver, config))
    found = [
        (sender, receiver)
        for receiver in into
        for sender in senders_to(receiver, config)
        if sender in from_ or not from_
    ]
    for sender in set(from_).difference(sender for sender, _ in found):
        check_edge((sender, max(into, key=receivers(config).index)), config)
    return found


def _inputs(name: str, config: ModelConfig) -> list[str]:
    """What reads at a receiver, or at a head: its query, and the key and value of its group."""
    if name == LOGITS:
        return [name]
    part = parse_receiver(name, ("z", "q", "k", "v", "mlp"), RECEIVERS)
    if part.kind != "z":
        return [name]
    part.check(config)
    group = part.index // config.group_size
    return [f"a{part.layer}.q{part.index}", f"a{part.layer}.k{group}", f"a{part.layer}.v{group}"]
