"""Removing edges and patching paths: one call for many, or a session that keeps the clean run between calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.engine.errors import PatchError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.edge_delta import EdgeRun, EdgeSet, RemovedEdges, sender
from subcircuit.engine.patching.edge_reference import EdgeReference
from subcircuit.engine.patching.graph import Edge, EdgeIndex
from subcircuit.engine.patching.memory import clean_bytes
from subcircuit.engine.patching.metric import Metric, check_metric
from subcircuit.engine.patching.path_delta import Freeze, run_paths
from subcircuit.engine.patching.plan import prompt_chunks
from subcircuit.engine.patching.reference import Progress, patch_hooks
from subcircuit.engine.patching.session import (
    EXECUTORS,
    DeltaExecutor,
    DeltaSession,
    Effects,
    Executor,
    Precision,
    check_prompts,
    default_budget,
    dtype_of,
    in_dtype,
)
from subcircuit.engine.patching.sites import Patch, PatchSet, Site, Source
from subcircuit.engine.patching.sources import AlignedPrompts, Sources

NOTHING = EdgeSet()


def as_edge_set(what: EdgeSet | Edge | Iterable[Edge]) -> EdgeSet:
    """One edge, or several in one row, from whatever names them."""
    if isinstance(what, EdgeSet):
        return what
    if isinstance(what, tuple) and len(what) == 2 and all(isinstance(end, str) for end in what):
        return EdgeSet((cast(Edge, what),))
    return EdgeSet(tuple(cast(Iterable[Edge], what)))


class EdgeSession(DeltaSession):
    """Edges and paths of one data set: the clean run is made once and serves every call.

    Options and errors are those of `DeltaSession`. Prompts are run in chunks so small that a row which lacks all edges
    of the model still fits the budget: it keeps the output of every sender, and a residual stream per receiver of a
    layer. In bfloat16 large differences are not computed again in float32.
    """

    _run_class = EdgeRun

    def __init__(
        self,
        model: HookedTransformer,
        prompts: AlignedPrompts,
        *,
        source: Source = "corrupted",
        executor: DeltaExecutor = "torch",
        precision: Precision = "fp32",
        metric: Metric = "logit_difference",
        budget_bytes: int | None = None,
    ) -> None:
        super().__init__(
            model,
            prompts,
            source=source,
            precision=precision,
            budget_bytes=budget_bytes,
            executor=executor,
            metric=metric,
        )
        config = self.model.config
        self._index = EdgeIndex(config)
        self.prepare([_every_sender(self._index)])
        stream_bytes = config.d_model * torch.finfo(self.model.dtype).bits // 8
        self._stream_budget = self.budget_bytes // 4 // stream_bytes
        streams = len(self._index.senders) + 3 * (config.n_heads + 2 * config.kv_heads)
        at_most = max(1, min(self._layout.prompts_kept, self._stream_budget // (streams * self.n_pos)))
        self._edge_chunks = prompt_chunks(self._run_firsts, self.n_pos, at_most)

    @torch.no_grad()
    def edge_effects(
        self,
        edge_sets: Sequence[EdgeSet | Edge | Iterable[Edge]],
        base: EdgeSet = NOTHING,
        progress: Progress | None = None,
    ) -> Effects:
        """Effects of removing edges: each sender's source value in place of its own in the receiver's input, all else
        computed from there. Every set comes on top of what `base` removes and patches.

        Raises PatchError for an edge or node that the model lacks.
        """
        sets = [as_edge_set(edge_set) for edge_set in edge_sets]
        self.check([base.patches, *(edge_set.patches for edge_set in sets)])
        self._sources.add([base.patches, *(edge_set.patches for edge_set in sets)])
        base_places = self._index.places(base.removed)
        all_patches = [*base.patches, *(patch for edge_set in sets for patch in edge_set.patches)]

        def run_up(run: EdgeRun, first: int, effects: Tensor, count: Callable[[int], None]) -> None:
            for start, indices in self._plan(sets, base, run.n_prompts * (self.n_pos - first)):
                removed = np.zeros((len(indices), len(self._index.receivers), len(self._index.senders)), dtype=bool)
                removed[:, *base_places] = True
                for row, i in enumerate(indices):
                    removed[row, *self._index.places(sets[i].removed)] = True
                changes = RemovedEdges(run, removed, self._index, base.patches, start, first)
                patches = [(*base.patches, *sets[i].patches) for i in indices]
                patches = patches if any(sets[i].patches for i in indices) else [base.patches]
                effects[torch.tensor(indices)[:, None], run.chunk] = run.climb(
                    changes, patches, base.patches, start, first
                )
                count(len(indices) * run.n_prompts)

        return self._over_chunks(len(sets), all_patches, run_up, progress)

    @torch.no_grad()
    def path_effects(
        self,
        edges: Sequence[Edge],
        freeze: Freeze = "heads",
        base: PatchSet = (),
        progress: Progress | None = None,
    ) -> Effects:
        """Effects of path patching: the sender's source value reaches the receiver alone, with `freeze` held fixed on
        the way, and the receiver's new value goes on with everything recomputed.

        Raises PatchError for an edge or node that the model lacks, or another `freeze`.
        """
        check_freeze(freeze)
        self.check([base])
        self._sources.add([base])
        self._index.places(edges)

        def run_up(run: EdgeRun, first: int, effects: Tensor, count: Callable[[int], None]) -> None:
            max_rows = max(1, self._layout.max_tokens // (run.n_prompts * (self.n_pos - first)))
            effects[:, run.chunk] = run_paths(run, edges, freeze, base, first, max_rows)
            count(len(edges) * run.n_prompts)

        return self._over_chunks(len(edges), base, run_up, progress)

    def _over_chunks(
        self,
        n_sets: int,
        patches: Sequence[Patch],
        run_up: Callable[[EdgeRun, int, Tensor, Callable[[int], None]], None],
        progress: Progress | None,
    ) -> Effects:
        effects = torch.zeros(n_sets, self.n_prompts, dtype=self.model.dtype, device=self.model.device)
        clean_metric = torch.empty(self.n_prompts, dtype=self.model.dtype, device=self.model.device)
        corrupted = all(self._sources.key(source) == "corrupted" for source in (None, *(p.source for p in patches)))
        n_done = 0

        def count(n_more: int) -> None:
            nonlocal n_done
            n_done += n_more
            if progress is not None:
                progress(n_done, effects.numel())

        for prompts in self._edge_chunks:
            run = cast(EdgeRun, self._run(prompts))
            clean_metric[prompts] = run.clean_metric
            run_up(run, int(self._firsts[prompts].min()) if corrupted else 0, effects, count)
        return Effects(effects, clean_metric)

    def _start(self, edge_set: EdgeSet) -> int:
        """The lowest layer that a set changes; the number of layers where it is empty or cuts only the logits."""
        layers = [self._index.start(edge) for edge in edge_set.removed]
        layers += [patch.site.component.layer for patch in edge_set.patches]
        return min(layers, default=self.model.config.n_layers)

    def _plan(self, sets: Sequence[EdgeSet], base: EdgeSet, n_tokens: int) -> list[tuple[int, list[int]]]:
        """Sets (by index) that start in the same layer, in chunks that fit the budget.

        A row keeps the output of every sender that some row of its chunk is cut off from, unless it lies below the
        start, and takes some residual streams for every receiver of a layer that reads something of its own.
        """
        lowest = self._start(EdgeSet(base.removed))
        starts = [min(lowest, self._start(edge_set)) for edge_set in sets]
        max_rows, max_streams = max(1, self._layout.max_tokens // n_tokens), max(1, self._stream_budget // n_tokens)
        base_senders, base_width = self._streams(base)
        chunks: list[tuple[int, list[int]]] = []
        names: set[str] = set()
        width = 0
        for i in sorted(range(len(sets)), key=starts.__getitem__):
            own_senders, own_width = self._streams(sets[i])
            if chunks and chunks[-1][0] == starts[i] and len(chunks[-1][1]) < max_rows:
                both, wider = names | own_senders, max(width, base_width + own_width)
                if (len(chunks[-1][1]) + 1) * (self._n_from(starts[i], both) + 3 * wider) <= max_streams:
                    chunks[-1][1].append(i)
                    names, width = both, wider
                    continue
            chunks.append((starts[i], [i]))
            names, width = base_senders | own_senders, base_width + own_width
        return chunks

    def _streams(self, edge_set: EdgeSet) -> tuple[set[str], int]:
        """Senders that a set cuts, and the most receivers of one layer that it cuts."""
        receivers = {receiver for _, receiver in edge_set.removed}
        per_layer = Counter(self._index.receiver_layers[self._index.receiver_at[name]] for name in receivers)
        return {name for name, _ in edge_set.removed}, max(per_layer.values(), default=0)

    def _n_from(self, layer: int, names: Iterable[str]) -> int:
        return sum(self._index.sender_layers[self._index.sender_at[name]] >= layer for name in names)


def edge_effects(
    model: HookedTransformer,
    prompts: AlignedPrompts,
    edge_sets: Sequence[EdgeSet | Edge | Iterable[Edge]],
    *,
    source: Source = "corrupted",
    base: EdgeSet = NOTHING,
    executor: Executor = "torch",
    precision: Precision = "fp32",
    metric: Metric = "logit_difference",
    budget_bytes: int | None = None,
    progress: Progress | None = None,
) -> Effects:
    """Effects of removing sets of edges on every prompt: `[set, prompt]`, metric(row) − metric(clean run).

    In a row, each removed edge's sender contributes its source value (`corrupted`, `mean`, `zero` or tensors) to that
    receiver's input in place of its current value; everything else is computed as always, so that changes travel on.
    Edges are named as in `graph`, ("a4.h4", "a7.q11"). `base` is what every row lacks besides: edges, and patches of
    nodes. Executors are those of `patch_effects`.

    Raises PatchError for an edge, node, source, executor precision or metric that does not exist.
    """
    options: dict[str, Any] = {"source": source, "precision": precision, "metric": metric}
    options["budget_bytes"] = budget_bytes
    if executor != "reference":
        session = EdgeSession(model, prompts, executor=_delta_executor(executor), **options)
        return session.edge_effects(edge_sets, base, progress)
    sets = [as_edge_set(edge_set) for edge_set in edge_sets]
    index = EdgeIndex(model.config)
    index.places([edge for edge_set in (base, *sets) for edge in edge_set.removed])
    whole = [EdgeSet((*base.removed, *s.removed), (*base.patches, *s.patches)) for s in sets]
    rows = [lambda reference, s=s: reference.without_edges(s) for s in whole]
    return _reference(model, prompts, rows, [s.patches for s in whole], (), progress, **options)


def path_effects(
    model: HookedTransformer,
    prompts: AlignedPrompts,
    edges: Sequence[Edge],
    *,
    source: Source = "corrupted",
    freeze: Freeze = "heads",
    base: PatchSet = (),
    executor: Executor = "torch",
    precision: Precision = "fp32",
    metric: Metric = "logit_difference",
    budget_bytes: int | None = None,
    progress: Progress | None = None,
) -> Effects:
    """Effects of path patching on every prompt: `[edge, prompt]`, metric(row) − metric(clean run).

    The sender's source value travels to the one receiver's input, and the receiver's new value from there on, with
    everything recomputed (Wang et al. 2022, arXiv 2211.00593, section 3.1; Goldowsky-Dill et al. 2023, arXiv
    2304.05969). On the way to the receiver, `freeze` holds fixed, at its value in the run with `base` alone: `heads`,
    all other heads, while MLPs are recomputed, as in the papers; `heads+mlps`, the direct edge alone (the same as
    removing it); `none`, every path from sender to receiver.

    Raises PatchError for an edge, node, source, freeze, executor precision or metric that does not exist.
    """
    check_freeze(freeze)
    options: dict[str, Any] = {"source": source, "precision": precision, "metric": metric}
    options["budget_bytes"] = budget_bytes
    if executor != "reference":
        session = EdgeSession(model, prompts, executor=_delta_executor(executor), **options)
        return session.path_effects(edges, freeze, base, progress)
    EdgeIndex(model.config).places(edges)
    rows = [lambda reference, edge=edge: reference.along_path(edge, freeze) for edge in edges]
    return _reference(model, prompts, rows, [base], base, progress, **options)


@torch.no_grad()
def patched_activations(
    model: HookedTransformer,
    prompts: AlignedPrompts,
    patch_set: PatchSet,
    *,
    precision: Precision = "fp32",
    budget_bytes: int | None = None,
) -> dict[str, Float[Tensor, "prompt pos ..."]]:
    """What every sender's hook point holds in runs on the corrupted prompts with nodes patched: a source of tensors.

    The patches name their own sources. Raises PatchError for prompts without corrupted twins.
    """
    check_prompts(model, prompts)
    if prompts.corrupted is None:
        raise PatchError("source 'corrupted' needs corrupted prompts, and this task has none")
    dtype = dtype_of(precision)
    model = in_dtype(model, dtype if dtype == torch.float64 else torch.float32)
    n_prompts, n_pos = prompts.clean.shape
    budget = default_budget(model.device) if budget_bytes is None else budget_bytes
    size = max(1, budget // 4 // clean_bytes(model.config, n_pos, 8))
    sources = Sources(model, prompts, [patch_set], "corrupted", size)
    names = sorted({sender(name).hook_name for name in EdgeIndex(model.config).senders})
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for chunk in torch.arange(n_prompts).split(size):
        with model.hooks(patch_hooks(model, patch_set, sources, chunk, n_pos)):
            cache = model.run_with_cache(prompts.corrupted[chunk], names, stop_at_layer=model.config.n_layers)[1]
        for name in names:
            parts[name].append(cache[name])
        sources.forget()
    return {name: torch.cat(values) for name, values in parts.items()}


def check_freeze(freeze: str) -> None:
    """Raises PatchError for what path patching cannot hold fixed."""
    if freeze not in get_args(Freeze):
        raise PatchError(f"freeze {freeze!r} is not known; expected one of {', '.join(get_args(Freeze))}")


def _reference(
    model: HookedTransformer,
    prompts: AlignedPrompts,
    rows: Sequence[Callable[[EdgeReference], Float[Tensor, "chunk"]]],
    patch_sets: Sequence[PatchSet],
    base: PatchSet,
    progress: Progress | None,
    *,
    source: Source,
    precision: Precision,
    metric: Metric,
    budget_bytes: int | None,
) -> Effects:
    """Rows as full forwards, in the model's own form and the given precision."""
    check_prompts(model, prompts)
    check_metric(metric)
    for patch in (patch for patch_set in patch_sets for patch in patch_set):
        patch.site.component.check(model.config)
    model = in_dtype(model, dtype_of(precision))
    n_prompts, n_pos = prompts.clean.shape
    budget = default_budget(model.device) if budget_bytes is None else budget_bytes
    size = max(1, budget // 4 // clean_bytes(model.config, n_pos, 8))
    sources = Sources(model, prompts, [*patch_sets, _every_sender(EdgeIndex(model.config))], source, size)
    dtype = torch.promote_types(model.dtype, torch.float32)  # differences of rounded metrics are not rounded again
    effects = torch.empty(len(rows), n_prompts, dtype=dtype, device=model.device)
    clean_metric = torch.empty(n_prompts, dtype=dtype, device=model.device)
    n_done = 0
    for chunk in torch.arange(n_prompts).split(size):
        with torch.no_grad():
            reference = EdgeReference(model, prompts, chunk, sources, base, metric)
            clean_metric[chunk] = reference.clean().to(dtype)
            for i, row in enumerate(rows):
                effects[i, chunk] = row(reference) - clean_metric[chunk]
                n_done += len(chunk)
                if progress is not None:
                    progress(n_done, effects.numel())
        sources.forget()
    return Effects(effects, clean_metric)


def _every_sender(index: EdgeIndex) -> PatchSet:
    return tuple(Patch(Site(sender(name))) for name in index.senders)


def _delta_executor(executor: str) -> DeltaExecutor:
    if executor not in EXECUTORS:
        raise PatchError(f"executor {executor!r} is not known; expected one of {', '.join(EXECUTORS)}")
    return cast(DeltaExecutor, executor)
