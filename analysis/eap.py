"""Edge attribution patching: what every edge of a model is worth, to first order, from two forwards and one backward.

    score(u → v) = Σ over positions of (source_u − clean_u) · ∂metric/∂input_v

u is a sender (the embeddings, a head's output in the residual stream, an MLP's output), v a receiver (a head's query, a
KV head's key or value, an MLP, or the final norm) with an input of its own, before its norm. The score estimates what
the edge's patch does to logit(answer) − logit(wrong).

* `eap`: the gradient is that of the clean run (Syed et al. 2023, arXiv 2310.10348).
* `eap-ig`: it is the mean over runs whose embedded prompts lie k/steps of the way from the source's to the clean ones,
  k from 1 to `steps` (Hanna et al. 2024, arXiv 2403.17806). One step is `eap`.

Edges are never taken one by one: a layer's receivers and everything below it are one product per prompt,
[sender, pos · d_model] × [pos · d_model, receiver]. Keys and values of grouped-query attention are one receiver per KV
head, as the model has them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.gradients import DTYPES, GRAPH_COPIES, GradientPrecision, check_method
from subcircuit.analysis.tasks import Task
from subcircuit.engine.blocks import Block, Norm
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import PatchError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Component, Patch, Site, Source
from subcircuit.engine.patching.gradients import ENTRY, MetricPass
from subcircuit.engine.patching.graph import INPUT, LOGITS, Edge, check_edge, n_senders_to, readers, receivers, senders
from subcircuit.engine.patching.memory import clean_bytes
from subcircuit.engine.patching.options import check_prompts, default_budget, in_dtype
from subcircuit.engine.patching.sites import source_name
from subcircuit.engine.patching.sources import PromptChunk, Sources

EdgeMethod = Literal["eap", "eap-ig"]
Selection = Literal["top", "greedy"]


@dataclass(frozen=True, eq=False)
class EdgeScores:
    """A score for every edge of a model; NaN where a sender does not reach a receiver."""

    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    effects: Float[Tensor, "sender receiver"]
    """Mean over prompts, in logits; the sign is that of the patch's effect on logit(answer) − logit(wrong)."""
    clean_metric: Float[Tensor, "prompt"]
    config: ModelConfig
    settings: dict[str, Any]
    per_prompt: Float[Tensor, "prompt sender receiver"] | None = None
    """Each prompt's scores, where they were asked for."""

    @property
    def n_edges(self) -> int:
        return int((~self.effects.isnan()).sum())

    def of(self, edge: Edge) -> float:
        """Mean score of one edge. Raises PatchError for an edge that the model does not have."""
        check_edge(edge, self.config)
        return float(self.effects[self.senders.index(edge[0]), self.receivers.index(edge[1])])

    def top(self, n: int = 10) -> list[tuple[Edge, float]]:
        """The n edges with the largest scores by size, each with its score."""
        sizes = self.effects.abs().nan_to_num(nan=-1.0).flatten()
        order = sizes.argsort(descending=True, stable=True)[: min(n, self.n_edges)].tolist()
        places = [divmod(place, len(self.receivers)) for place in order]
        return [((self.senders[i], self.receivers[j]), float(self.effects[i, j])) for i, j in places]

    def ranking(self) -> list[Edge]:
        """All edges, those with the largest scores by size first."""
        return [edge for edge, _ in self.top(self.n_edges)]

    def circuit(
        self, n_edges: int | None = None, *, threshold: float | None = None, selection: Selection = "top"
    ) -> Circuit:
        """The circuit of the strongest edges, without those that no path through it joins to input and logits.

        Take `n_edges` edges, or all whose score is at least `threshold` by size. `top` takes the largest of all;
        `greedy` starts from the edges into the logits and opens the edges into a node when the first edge out of it is
        taken (Hanna et al. 2024), so that it keeps more of what it takes. What remains may be fewer edges than
        `settings["n_taken"]` were taken.

        Its `edge_scores` are estimates of what each edge's patch costs, in points of the mean clean metric where that
        is known and positive, else in logits.

        Raises PatchError unless exactly one of `n_edges` and `threshold` is given, in range.
        """
        if (n_edges is None) == (threshold is None) or selection not in get_args(Selection):
            raise PatchError(
                f"n_edges {n_edges}, threshold {threshold}, selection {selection!r}: expected one of the first "
                f"two, and one of {', '.join(get_args(Selection))}"
            )
        if n_edges is not None and not 1 <= n_edges <= self.n_edges:
            raise PatchError(f"n_edges {n_edges} is out of range: the model has {self.n_edges} edges")
        if threshold is not None and not threshold >= 0:
            raise PatchError(f"threshold {threshold} is out of range; expected the least score of an edge, from 0 up")
        ranked = self.top(self.n_edges) if selection == "top" else _greedy(self)
        chosen = [edge for edge, score in ranked if threshold is None or abs(score) >= threshold][:n_edges]
        edges = connected(chosen, self.config)
        return Circuit.of_nodes(
            {sender for sender, _ in edges} - {INPUT},
            edges=tuple(edges),
            edge_scores=self._points(edges),
            model=self.settings["model"],
            task=self.settings["task"],
            method=self.settings["method"],
            settings={
                **self.settings,
                "n_edges": n_edges,
                "threshold": threshold,
                "selection": selection,
                "n_taken": len(chosen),
            },
        )

    def _points(self, edges: Iterable[Edge]) -> dict[Edge, float]:
        full = float(self.clean_metric.mean()) if self.clean_metric.numel() else 0.0
        scale = -100 / full if full > 0 else -1.0
        return {edge: scale * self.of(edge) for edge in edges}


def edge_scores(
    model: HookedTransformer,
    task: Task,
    method: EdgeMethod = "eap",
    *,
    source: Source = "corrupted",
    steps: int = 5,
    per_prompt: bool = False,
    precision: GradientPrecision = "fp32",
    budget_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EdgeScores:
    """Scores of all edges by edge attribution patching; see this module.

    `source` is what `sweep` takes, read at every sender; `steps` are `eap-ig`'s. `per_prompt` keeps the scores of each
    prompt. Prompts are run in chunks that fit `budget_bytes` beside the weights. `progress` is called with (prompts
    done, prompts in all).

    Raises PatchError for an unknown method or source, or prompts that are not aligned.
    """
    check_method(method, get_args(EdgeMethod), steps, precision)
    check_prompts(model, task)
    run = _Run(in_dtype(model, DTYPES[precision]), task, source, steps if method == "eap-ig" else 1)
    n_prompts = len(task.clean)
    budget = default_budget(model.device) if budget_bytes is None else budget_bytes
    chunks = torch.arange(n_prompts).split(max(1, budget // run.bytes_per_prompt()))
    sources = Sources(run.model, task, [run.patches], source, len(chunks[0]))
    total = run.empty(1)[0].nan_to_num(nan=0.0)
    kept, metrics, n_done = [], [], 0
    for chunk in chunks:
        scores, metric = run.chunk(chunk, sources)
        sources.forget()
        total += scores.sum(0)
        metrics.append(metric)
        kept += [scores.cpu()] if per_prompt else []
        n_done += len(chunk)
        if progress is not None:
            progress(n_done, n_prompts)
    settings = {
        "method": method,
        **({"steps": steps} if method == "eap-ig" else {}),
        "source": source_name(source),
        "precision": precision,
        "task": task.name,
        "model": model.config.name,
        "n_prompts": n_prompts,
    }
    return EdgeScores(
        tuple(run.senders),
        tuple(run.receivers),
        (total / n_prompts).cpu(),
        torch.cat(metrics).cpu(),
        model.config,
        settings,
        torch.cat(kept) if per_prompt else None,
    )


class _Run:
    """One call of `edge_scores`."""

    def __init__(self, model: HookedTransformer, task: Task, source: Source, steps: int) -> None:
        self.model, self.task, self.steps = model, task, steps
        self.config = model.config
        self.blocks = [cast(Block, block) for block in model.blocks]
        self.senders, self.receivers = senders(self.config), receivers(self.config)
        kinds = [Component(layer, kind) for layer in range(self.config.n_layers) for kind in ("z", "mlp")]
        self.patches = tuple(Patch(Site(component)) for component in (Component(0, "resid"), *kinds))
        self.sender_names = [patch.site.component.hook_name for patch in self.patches]

    def bytes_per_prompt(self) -> int:
        """Bytes of the differentiable run, of every sender's difference (twice) and of one layer's gradients."""
        n_pos, element_size = self.task.clean.shape[1], torch.finfo(self.model.dtype).bits // 8
        n_rows = 2 * len(self.senders) + 4 * (self.config.n_heads + 2 * self.config.kv_heads)
        rows = n_rows * n_pos * self.config.d_model + len(self.senders) * len(self.receivers)
        return GRAPH_COPIES * clean_bytes(self.config, n_pos, element_size) + rows * element_size

    def empty(self, n_prompts: int) -> Float[Tensor, "prompt sender receiver"]:
        """Scores of 0 for the model's edges, NaN elsewhere."""
        scores = torch.full((n_prompts, len(self.senders), len(self.receivers)), float("nan"), dtype=self.model.dtype)
        for column, receiver in enumerate(self.receivers):
            scores[:, : n_senders_to(receiver, self.config), column] = 0
        return scores.to(self.model.device)

    def chunk(
        self, chunk: PromptChunk, sources: Sources
    ) -> tuple[Float[Tensor, "chunk sender receiver"], Float[Tensor, "chunk"]]:
        names = {*self.sender_names, *self._receiver_names()}
        clean = MetricPass(self.model, self.task, chunk, sorted(names))
        values = clean.values
        key = sources.key(None)
        moves = {name: sources.value(key, name, chunk) - values[name] for name in self.sender_names}
        deltas = torch.cat(list(self._sender_deltas(moves)), 1).flatten(2)
        scores = self.empty(len(chunk))
        self._add(scores, deltas, clean)
        for step in range(1, self.steps):
            entry = values[ENTRY] + (1 - step / self.steps) * moves[ENTRY]
            self._add(scores, deltas, MetricPass(self.model, self.task, chunk, self._receiver_names(), entry=entry))
        return scores / self.steps, clean.metric

    def _sender_deltas(self, moves: dict[str, Tensor]) -> Iterator[Float[Tensor, "prompt sender pos d_model"]]:
        """What every sender's patch changes in the residual stream, in the order of `senders`."""
        yield moves[ENTRY][:, None]
        for layer, block in enumerate(self.blocks):
            yield torch.einsum("pthk,hkd->phtd", moves[f"blocks.{layer}.attn.hook_z"], block.attn.W_O)
            yield moves[f"blocks.{layer}.hook_mlp_out"][:, None]

    def _receiver_names(self) -> list[str]:
        per_layer = ("hook_resid_pre", "attn.hook_q", "attn.hook_k", "attn.hook_v", "hook_mlp_in")
        names = [f"blocks.{layer}.{name}" for layer in range(self.config.n_layers) for name in per_layer]
        return [*names, f"blocks.{self.config.n_layers - 1}.hook_resid_post"]

    def _add(self, scores: Float[Tensor, "prompt sender receiver"], deltas: Tensor, run: MetricPass) -> None:
        """Add to the scores the products of all senders' differences with the gradients of one run."""
        column = 0
        for n_below, gradients in self._receiver_gradients(run):
            products = deltas[:, :n_below] @ gradients.flatten(2).mT
            scores[:, :n_below, column : column + products.shape[2]] += products
            column += products.shape[2]

    def _receiver_gradients(
        self, run: MetricPass
    ) -> Iterator[tuple[int, Float[Tensor, "prompt receiver pos d_model"]]]:
        """∂metric/∂input of receivers that the same senders reach, with the number of these, in the order of
        `receivers`."""
        values, gradients = run.values, run.gradients()
        per_layer = self.config.n_heads + 1
        for layer, block in enumerate(self.blocks):
            name = f"blocks.{layer}"
            weights = (("q", block.attn.W_Q), ("k", block.attn.W_K), ("v", block.attn.W_V))
            normed = [
                torch.einsum("pthk,hdk->phtd", gradients[f"{name}.attn.hook_{letter}"], weight)
                for letter, weight in weights
            ]
            n_below = 1 + layer * per_layer
            yield n_below, _through_norm(block.ln1, values[f"{name}.hook_resid_pre"], torch.cat(normed, 1))
            yield n_below + self.config.n_heads, gradients[f"{name}.hook_mlp_in"][:, None]
        yield len(self.senders), gradients[f"blocks.{self.config.n_layers - 1}.hook_resid_post"][:, None]


def _through_norm(
    norm: Norm, x: Float[Tensor, "prompt pos d_model"], gradients: Float[Tensor, "prompt receiver pos d_model"]
) -> Float[Tensor, "prompt receiver pos d_model"]:
    """Gradients with respect to a norm's input, from those with respect to its output, for many at the same input."""
    with torch.enable_grad():
        inputs = x[:, None].expand_as(gradients).detach().requires_grad_()
        return torch.autograd.grad(norm(inputs), inputs, gradients)[0]


def connected(edges: Iterable[Edge], config: ModelConfig) -> list[Edge]:
    """The edges, in forward order, that lie on a path from `input` to `logits` within the set.

    A path goes through a node from any edge into it to any edge out of it; an edge into a shared key or value enters
    every head that reads it. Raises PatchError for an edge that the model does not have.
    """
    taken: dict[str, set[str]] = {name: set() for name in receivers(config)}
    for sender, receiver in edges:
        if receiver not in taken:
            check_edge((sender, receiver), config)
        taken[receiver].add(sender)
    everything = senders(config)
    by_receiver: dict[str, list[str]] = {}
    reached = {INPUT}
    for receiver, below in taken.items():
        possible = everything[: n_senders_to(receiver, config)]
        for sender in below.difference(possible):
            check_edge((sender, receiver), config)
        by_receiver[receiver] = [sender for sender in possible if sender in below and sender in reached]
        if by_receiver[receiver]:
            reached.update(readers(receiver, config))
    needed = {LOGITS}
    for receiver in reversed(by_receiver):
        if needed.isdisjoint(readers(receiver, config)):
            by_receiver[receiver] = []
        needed.update(by_receiver[receiver])
    return [(sender, receiver) for receiver, below in by_receiver.items() for sender in below]


def _greedy(scores: EdgeScores) -> Iterator[tuple[Edge, float]]:
    """Edges in the order in which the greedy search from the logits takes them."""
    sizes = scores.effects.abs().tolist()
    into: dict[str, list[int]] = {}
    for column, receiver in enumerate(scores.receivers):
        for node in readers(receiver, scores.config):
            into.setdefault(node, []).append(column)
    opened: set[str] = set()
    columns: set[int] = set()
    open_edges: list[tuple[float, int, int]] = []

    def open_node(node: str) -> None:
        opened.add(node)
        for column in set(into.get(node, ())) - columns:
            columns.add(column)
            n_below = n_senders_to(scores.receivers[column], scores.config)
            for row in range(n_below):
                heapq.heappush(open_edges, (-sizes[row][column], row, column))

    open_node(LOGITS)
    while open_edges:
        _, row, column = heapq.heappop(open_edges)
        yield (scores.senders[row], scores.receivers[column]), float(scores.effects[row, column])
        if scores.senders[row] not in opened:
            open_node(scores.senders[row])
