"""Sweeping many rows: one call for a list of patch sets, or a session that keeps the clean run between calls."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.compile import Masks, compile_masks
from subcircuit.engine.patching.data_session import LARGE_DELTA, Count, DataSession, Effects
from subcircuit.engine.patching.delta import DeltaRun, Departures, Rows
from subcircuit.engine.patching.memory import clean_bytes
from subcircuit.engine.patching.metric import Metrics, check_metric
from subcircuit.engine.patching.options import (
    Executor,
    Precision,
    check_prompts,
    default_budget,
    delta_executor,
    dtype_of,
    in_dtype,
)
from subcircuit.engine.patching.plan import Chunk, Start, climbing_chunks, plan_chunks, start_of
from subcircuit.engine.patching.reference import Progress, patched_metric, reference_effects
from subcircuit.engine.patching.sites import Patch, PatchSet, Site, Source, as_patch_set
from subcircuit.engine.patching.sources import AlignedPrompts, PromptChunk

# Of a vocabulary that is read for fewer rows, most of the time goes to fetching it.
ROWS_READ_AT_ONCE = 256


class _Reading:
    """Rows of a run that have passed the last layer, and wait for others to be read with them."""

    def __init__(self, run: DeltaRun, effects: Float[Tensor, "set prompt *metric"]) -> None:
        self._run, self._effects = run, effects
        self._waiting: list[tuple[list[int], Float[Tensor, "set prompt d_model"]]] = []

    def add(self, sets: list[int], final: Float[Tensor, "set prompt d_model"]) -> None:
        """Take the final δ of sets, by index."""
        self._waiting.append((sets, final))
        if sum(len(sets) for sets, _ in self._waiting) * self._run.n_prompts >= ROWS_READ_AT_ONCE:
            self.finish()

    def finish(self) -> None:
        """Read the effects of all that wait, into their places."""
        if self._waiting:
            indices = torch.tensor([i for sets, _ in self._waiting for i in sets])
            final = torch.cat([final for _, final in self._waiting])
            self._effects[indices[:, None], self._run.chunk] = self._run.readout.effects(final)
            self._waiting.clear()


class DeltaSession(DataSession):
    """Delta-form patching of one data set: the clean run is made once and serves every call of `effects`.

    Options and errors are those of `DataSession`. Rows whose δ is large are computed with products as precise as all
    else, and rows that take away nearly all of a residual stream as full forwards.
    """

    def work(self, patch_sets: Sequence[PatchSet]) -> Iterator[tuple[PromptChunk, list[Chunk]]]:
        """What `effects` would run for these patch sets, in order: chunks of prompts, each with its chunks of rows."""
        layout = self.layout(self.wanted_names(patch_sets))
        for prompts in layout.prompt_chunks:
            starts = self._starts(patch_sets, (), int(self._firsts[prompts].min()))
            yield prompts, plan_chunks(starts, len(prompts), self.n_pos, layout.max_tokens)

    def masks(self, patch_sets: Sequence[PatchSet], start: Start, n_pos: int | None = None) -> Masks:
        """What patch sets that start together replace, hook point by hook point; with `n_pos`, before that position."""
        n_pos = self.n_pos if n_pos is None else n_pos
        return compile_masks(patch_sets, self.model.config, n_pos, start.first, self._sources, start.layer)

    @torch.no_grad()
    def effects(
        self,
        patch_sets: Sequence[Patch | Site | str | PatchSet],
        base: PatchSet = (),
        progress: Progress | None = None,
        part: int | None = None,
    ) -> Effects:
        """Effects of patch sets on every prompt, each set on top of the patches of `base`; with `part`, on the prompts
        of that one of the session's parts, and 0 on the others.

        A base's δ is kept from call to call: what changes in it costs only the layers from there on. Where it is large,
        bfloat16 has no digits for it, and all rows on it have float32 products.
        """
        sets = [as_patch_set(patch_set) for patch_set in patch_sets]
        self.check([*sets, base])
        self.prepare([*sets, base])
        return self._over_prompts(len(sets), partial(self._run_sets, sets, base), progress, part)

    def _run_sets(
        self,
        sets: Sequence[PatchSet],
        base: PatchSet,
        run: DeltaRun,
        effects: Float[Tensor, "set prompt *metric"],
        count: Count,
    ) -> tuple[int, int]:
        """Effects on the prompts of a run, into their places; how many sets were repeated in float32 and in full."""
        first_different = int(self._firsts[run.chunk].min())
        first = self._first_position(base, first_different)
        run.set_base(base, first)
        starts = self._starts(sets, base, first_different)
        on_large_base = self._rounds and run.base_size() > LARGE_DELTA
        if on_large_base:
            run = self._precise(run)
            run.set_base(base, first)
        if base or self._compute_dtype != torch.float32:
            self._propagate(run, sets, starts, range(len(sets)), effects, None, count)
            return len(sets) if on_large_base else 0, 0
        departures = Departures.none(len(sets), effects)
        self._propagate(run, sets, starts, range(len(sets)), effects, departures, count)
        precise, full = self._to_repeat(departures)
        self._propagate(self._precise(run), sets, starts, precise, effects)
        self._repeat_fully(run, sets, full, effects)
        return len(precise), len(full)

    def _propagate(
        self,
        run: DeltaRun,
        sets: Sequence[PatchSet],
        starts: Sequence[Start],
        chosen: Sequence[int],
        effects: Float[Tensor, "set prompt *metric"],
        departures: Departures | None = None,
        count: Count | None = None,
    ) -> None:
        """Compute the chosen sets for one chunk of prompts, into their places among the effects and departures."""
        chunks = plan_chunks([starts[i] for i in chosen], run.n_prompts, self.n_pos, self._layout.max_tokens)
        if run.has_base:
            chunks = climbing_chunks(chunks, run.n_prompts, self.n_pos, self._layout.max_tokens)
        chunks = [replace(chunk, sets=tuple(chosen[i] for i in chunk.sets)) for chunk in chunks]
        reading = _Reading(run, effects)
        self._over_rows(run, chunks, partial(self._propagate_chunk, run, sets, starts, reading, departures), count)
        reading.finish()

    def _propagate_chunk(
        self,
        run: DeltaRun,
        sets: Sequence[PatchSet],
        starts: Sequence[Start],
        reading: _Reading,
        departures: Departures | None,
        chunk: Chunk,
    ) -> None:
        """Run sets up together, each from where it starts, and leave them to be read."""
        rows: Rows | None = None
        done: list[int] = []
        for start, group in itertools.groupby(chunk.sets, key=lambda i: starts[i]):
            entered, indices = self._enter(run, sets, start, list(group), departures)
            if indices:
                rows = entered if rows is None else run.joined(run.raised(rows, entered.layer), entered)
                done += indices
        if rows is not None:
            reading.add(done, run.rise(rows))

    def _enter(
        self,
        run: DeltaRun,
        sets: Sequence[PatchSet],
        start: Start,
        indices: list[int],
        departures: Departures | None,
    ) -> tuple[Rows, list[int]]:
        """Chosen sets through the layer that they start in, into their places among the departures; and which of them
        are to be run on."""
        found = None if departures is None else Departures.none(len(indices), run.final)
        rows = run.enter([sets[i] for i in indices], start, found)
        if departures is not None and found is not None:
            at = torch.tensor(indices)
            departures.size[at], departures.shrinkage[at] = found.size, found.shrinkage
            # A row that will be computed again need not be finished; a GPU would have to be waited for to know it.
            if self.model.device.type == "cpu":
                again = {i for repeated in self._to_repeat(found) for i in repeated}
                left = [i for i in range(len(indices)) if i not in again]
                rows, indices = run.select(rows, left), [indices[i] for i in left]
        # What is patched nowhere has no effect that would have to be read.
        return rows, [] if rows.is_nothing else indices

    def _repeat_fully(
        self,
        run: DeltaRun,
        sets: Sequence[PatchSet],
        chosen: Sequence[int],
        effects: Float[Tensor, "set prompt *metric"],
    ) -> None:
        for i in chosen:
            inputs = self.model, self.prompts, run.chunk, sets[i], self._sources
            metric = patched_metric(*inputs, self.metric, run.readout.log_p)
            effects[i, run.chunk] = metric - run.clean_metric

    def _starts(self, sets: Sequence[PatchSet], base: PatchSet, first_different: int) -> list[Start]:
        """Where each set starts; one that differs nowhere starts above the last layer."""

        def first_position(patch_set: PatchSet) -> int:
            return self._first_position(patch_set, first_different)

        above = Start(self.model.config.n_layers, 0, self.n_pos - 1)
        starts = [
            start_of(patch_set, first_position)
            if any(self._differs(patch, first_different) for patch in patch_set)
            else above
            for patch_set in sets
        ]
        # A base's δ enters the layer from below: every row computes all of the layer then, from the base's own
        # position.
        first = first_position(base)
        return [Start(s.layer, 0, min(s.first, first)) for s in starts] if base else starts

    def _differs(self, patch: Patch, first_different: int) -> bool:
        """Whether a patch can change anything: before the first token that differs, corrupted values are clean ones."""
        positions = patch.site.resolve(self.n_pos)
        only_equal = positions is not None and positions[-1] < first_different
        return not (only_equal and self._sources.key(patch.source) == "corrupted")

    def _first_position(self, patch_set: PatchSet, first_different: int) -> int:
        """First position at which a patch set can make a difference."""
        firsts = [self.n_pos - 1]
        for patch in patch_set:
            positions = patch.site.resolve(self.n_pos)
            first = 0 if positions is None else positions[0]
            corrupted = self._sources.key(patch.source) == "corrupted"
            firsts.append(max(first, first_different) if corrupted else first)
        return min(firsts)


def patch_effects(
    model: HookedTransformer,
    prompts: AlignedPrompts,
    patch_sets: Sequence[Patch | Site | str | PatchSet],
    *,
    source: Source = "corrupted",
    executor: Executor = "torch",
    precision: Precision = "fp32",
    metric: Metrics = "logit_difference",
    budget_bytes: int | None = None,
    progress: Progress | None = None,
) -> Effects:
    """Effects of patch sets on every prompt: `[set, prompt]`, metric(patched row) − metric(clean run).

    `metric` is `logit_difference`, `log_probability` (of the answers, in nats), `kl` (of the row's prediction from the
    clean run's, in nats) or `accuracy`; `engine.patching.metric` defines them. A tuple of them gives
    `[set, prompt, metric]`, all read from the same rows.

    Executors: `reference` runs one full forward with hooks per patch set in the given precision; `torch` propagates δ
    only, `triton` the same with fused kernels on a GPU. `budget_bytes` is what they may take beside the weights.

    Raises PatchError for a component, position, source, executor, precision or metric that does not exist.
    """
    if executor != "reference":
        session = DeltaSession(
            model,
            prompts,
            source=source,
            precision=precision,
            budget_bytes=budget_bytes,
            executor=delta_executor(executor),
            metric=metric,
        )
        return session.effects(patch_sets, progress=progress)
    check_prompts(model, prompts)
    check_metric(metric)
    sets = [as_patch_set(patch_set) for patch_set in patch_sets]
    for patch_set in sets:
        for patch in patch_set:
            patch.site.component.check(model.config, model.dictionaries)
    model = in_dtype(model, dtype_of(precision))
    budget = default_budget(model.device) if budget_bytes is None else budget_bytes
    # A forward with hooks holds one layer and its sources; a quarter of the budget's prompts leave room for both.
    chunk = max(1, budget // 4 // clean_bytes(model.config, prompts.clean.shape[1], 8))
    return Effects(*reference_effects(model, prompts, sets, source, chunk, progress, metric))
