"""Removing edges and patching paths in delta form: a session that keeps the clean run between calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.data_session import Count, DataSession, Effects
from subcircuit.engine.patching.delta import DeltaRun, Departures
from subcircuit.engine.patching.edge_delta import EdgeRun, EdgeSet, RemovedEdges, sender
from subcircuit.engine.patching.edge_reference import EdgeReference
from subcircuit.engine.patching.graph import Edge, EdgeIndex
from subcircuit.engine.patching.memory import Layout
from subcircuit.engine.patching.metric import Metric
from subcircuit.engine.patching.options import DeltaExecutor, Precision
from subcircuit.engine.patching.path_delta import Freeze, check_freeze, run_paths
from subcircuit.engine.patching.plan import Chunk, Start, prompt_chunks
from subcircuit.engine.patching.reference import Progress
from subcircuit.engine.patching.sites import Patch, PatchSet, Site, Source
from subcircuit.engine.patching.sources import AlignedPrompts, SourceKey

Propagate = Callable[[DeltaRun, Sequence[int], Departures, Count | None], None]
"""Computes some sets of a call with a run's products, into their places among the effects and departures."""

NOTHING = EdgeSet()


def as_edge_set(what: EdgeSet | Edge | Iterable[Edge]) -> EdgeSet:
    """One edge, or several in one row, from whatever names them."""
    if isinstance(what, EdgeSet):
        return what
    if isinstance(what, tuple) and len(what) == 2 and all(isinstance(end, str) for end in what):
        return EdgeSet((cast(Edge, what),))
    return EdgeSet(tuple(cast(Iterable[Edge], what)))


class EdgeSession(DataSession):
    """Edges and paths of one data set: the clean run is made once and serves every call.

    Options and errors are those of `DataSession`. Prompts are run in chunks so small that a row which lacks all edges
    of the model still fits the budget: it keeps the output of every sender, and a residual stream per receiver of a
    layer.

    In bfloat16, rows whose δ is large, at what a receiver reads of its own or where the row leaves its first layer, are
    computed with products in float32; on top of a base all are, because its δ is in every row and they differ by less.
    Paths whose sender takes away nearly all of a residual stream on the way are full forwards.
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
        self._index = EdgeIndex(model.config)  # what the layout counts
        super().__init__(
            model,
            prompts,
            source=source,
            precision=precision,
            budget_bytes=budget_bytes,
            executor=executor,
            metric=metric,
        )
        self.prepare([every_sender(self._index)])

    def layout(self, names: Mapping[SourceKey, Iterable[str]]) -> Layout:
        """As for all rows, but with as few prompts at once as a row that lacks all edges leaves room for."""
        layout, config = super().layout(names), self.model.config
        streams = len(self._index.senders) + 3 * (config.n_heads + 2 * config.kv_heads)
        at_most = max(1, min(layout.prompts_kept, self._max_streams // (streams * self.n_pos)))
        return replace(layout, prompt_chunks=tuple(prompt_chunks(self._run_firsts, self.n_pos, at_most)))

    @property
    def _max_streams(self) -> int:
        """Tokens of residual streams that a quarter of the budget holds."""
        return self.budget_bytes // 4 // (self.model.config.d_model * torch.finfo(self.model.dtype).bits // 8)

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
        patch_sets = [base.patches, *(edge_set.patches for edge_set in sets)]
        self.check(patch_sets)
        self.prepare(patch_sets)
        self._index.places([edge for edge_set in (base, *sets) for edge in edge_set.removed])

        def run_sets(run: DeltaRun, effects: Tensor, count: Count) -> tuple[int, int]:
            propagate = partial(self._remove, sets, base, self._first(run, patch_sets), effects)
            precise, _ = self._repeating(run, len(sets), bool(base.removed or base.patches), propagate, count)
            return len(precise), 0

        return self._over_prompts(len(sets), run_sets, progress)

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
        self.prepare([base])
        self._index.places(edges)

        def run_sets(run: DeltaRun, effects: Tensor, count: Count) -> tuple[int, int]:
            propagate = partial(self._follow, edges, freeze, base, self._first(run, [base]), effects)
            precise, full = self._repeating(run, len(edges), bool(base), propagate, count)
            if full:
                reference = EdgeReference(
                    self.model, self.prompts, run.chunk, self._sources, base, cast(Metric, self.metric)
                )
                for i in full:
                    effects[i, run.chunk] = reference.along_path(edges[i], freeze) - run.clean_metric
            return len(precise), len(full)

        return self._over_prompts(len(edges), run_sets, progress)

    def _first(self, run: DeltaRun, patch_sets: Iterable[PatchSet]) -> int:
        """First position at which rows with these patches, beside their edges, can differ from a chunk's clean run."""
        sources = [None, *(patch.source for patch_set in patch_sets for patch in patch_set)]
        corrupted = all(self._sources.key(source) == "corrupted" for source in sources)
        return int(self._firsts[run.chunk].min()) if corrupted else 0

    def _repeating(
        self, run: DeltaRun, n_sets: int, on_base: bool, propagate: Propagate, count: Count
    ) -> tuple[list[int], list[int]]:
        """Propagate all sets, and what bfloat16 has no digits for with float32 products; which these were, and which
        are left to full forwards."""
        departures = Departures.none(n_sets, run.final)
        everything = list(range(n_sets))
        if on_base and self._rounds:
            propagate(self._precise(run), everything, departures, count)
            _, full = self._to_repeat(departures)
            return [i for i in everything if i not in full], full
        propagate(run, everything, departures, count)
        precise, full = self._to_repeat(departures)
        if precise:
            propagate(self._precise(run), precise, departures, None)
        return precise, full

    def _remove(
        self,
        sets: Sequence[EdgeSet],
        base: EdgeSet,
        first: int,
        effects: Float[Tensor, "set prompt"],
        run: DeltaRun,
        chosen: Sequence[int],
        departures: Departures,
        count: Count | None,
    ) -> None:
        """Compute the chosen sets of removed edges into their places among the effects and departures."""
        chunks = self._plan(sets, chosen, base, first, run.n_prompts)
        work = partial(self._remove_chunk, sets, base, effects, cast(EdgeRun, run), departures)
        self._over_rows(run, chunks, work, count)

    def _remove_chunk(
        self,
        sets: Sequence[EdgeSet],
        base: EdgeSet,
        effects: Float[Tensor, "set prompt"],
        run: EdgeRun,
        departures: Departures,
        chunk: Chunk,
    ) -> None:
        chosen, layer, first = [sets[i] for i in chunk.sets], chunk.start.layer, chunk.start.first
        removed = np.zeros((len(chosen), len(self._index.receivers), len(self._index.senders)), dtype=bool)
        removed[:, *self._index.places(base.removed)] = True
        for row, edge_set in enumerate(chosen):
            removed[row, *self._index.places(edge_set.removed)] = True
        found = departures.size.new_zeros(len(chosen)) if self._rounds else None
        changes = RemovedEdges(run, removed, self._index, base.patches, layer, first, found)
        patches = [base.patches]
        if any(edge_set.patches for edge_set in chosen):
            patches = [(*base.patches, *edge_set.patches) for edge_set in chosen]
        at = torch.tensor(chunk.sets)
        effects[at[:, None], run.chunk] = run.climb(changes, patches, base.patches, layer, first)
        if found is not None:
            departures.size[at] = found

    def _follow(
        self,
        edges: Sequence[Edge],
        freeze: Freeze,
        base: PatchSet,
        first: int,
        effects: Float[Tensor, "edge prompt"],
        run: DeltaRun,
        chosen: Sequence[int],
        departures: Departures,
        count: Count | None,
    ) -> None:
        """Compute the chosen paths into their places among the effects and departures: all of them side by side."""

        def work(chunk: Chunk) -> None:
            at, max_rows = list(chunk.sets), max(1, self._layout.max_tokens // (run.n_prompts * (self.n_pos - first)))
            found = Departures.none(len(at), departures.size)
            paths = run_paths(cast(EdgeRun, run), [edges[i] for i in at], freeze, base, first, max_rows, found)
            effects[torch.tensor(at)[:, None], run.chunk] = paths
            departures.size[at], departures.shrinkage[at] = found.size, found.shrinkage

        self._over_rows(run, [Chunk(Start(0, 0, first), tuple(chosen))] if chosen else [], work, count)

    def _start(self, edge_set: EdgeSet) -> int:
        """The lowest layer that a set changes; the number of layers where it is empty or cuts only the logits."""
        layers = [self._index.start(edge) for edge in edge_set.removed]
        layers += [patch.site.component.layer for patch in edge_set.patches]
        return min(layers, default=self.model.config.n_layers)

    def _plan(
        self, sets: Sequence[EdgeSet], chosen: Sequence[int], base: EdgeSet, first: int, n_prompts: int
    ) -> list[Chunk]:
        """The chosen sets, those together that start in the same layer, in chunks that fit the budget.

        A row keeps the output of every sender that some row of its chunk is cut off from, unless it lies below the
        start, and takes some residual streams for every receiver of a layer that reads something of its own.
        """
        lowest, n_tokens = self._start(EdgeSet(base.removed)), n_prompts * (self.n_pos - first)
        starts = {i: min(lowest, self._start(sets[i])) for i in chosen}
        max_rows, max_streams = max(1, self._layout.max_tokens // n_tokens), max(1, self._max_streams // n_tokens)
        base_senders, base_width = self._streams(base)
        chunks: list[tuple[int, list[int]]] = []
        names: set[str] = set()
        width = 0
        for i in sorted(chosen, key=starts.__getitem__):
            own_senders, own_width = self._streams(sets[i])
            if chunks and chunks[-1][0] == starts[i] and len(chunks[-1][1]) < max_rows:
                both, wider = names | own_senders, max(width, base_width + own_width)
                if (len(chunks[-1][1]) + 1) * (self._n_from(starts[i], both) + 3 * wider) <= max_streams:
                    chunks[-1][1].append(i)
                    names, width = both, wider
                    continue
            chunks.append((starts[i], [i]))
            names, width = base_senders | own_senders, base_width + own_width
        return [Chunk(Start(layer, 0, first), tuple(indices)) for layer, indices in chunks]

    def _streams(self, edge_set: EdgeSet) -> tuple[set[str], int]:
        """Senders that a set cuts, and the most receivers of one layer that it cuts."""
        receivers = {receiver for _, receiver in edge_set.removed}
        per_layer = Counter(self._index.receiver_layers[self._index.receiver_at[name]] for name in receivers)
        return {name for name, _ in edge_set.removed}, max(per_layer.values(), default=0)

    def _n_from(self, layer: int, names: Iterable[str]) -> int:
        return sum(self._index.sender_layers[self._index.sender_at[name]] >= layer for name in names)


def every_sender(index: EdgeIndex) -> PatchSet:
    return tuple(Patch(Site(sender(name))) for name in index.senders)
