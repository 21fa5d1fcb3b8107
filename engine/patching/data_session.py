"""One data set in delta form: its clean runs, kept from call to call, and the way of all rows over them, in chunks that
fit memory. `session` runs patched nodes on it, `edge_session` removed edges and paths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.engine.blocks import Block
from subcircuit.engine.errors import PatchError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.delta import DeltaRun, Departures, LayerWeights
from subcircuit.engine.patching.memory import Layout, Sizes, copied_bytes, fits, halves, keep_freed_memory
from subcircuit.engine.patching.metric import Metrics, check_metric, metric_shape
from subcircuit.engine.patching.options import (
    DeltaExecutor,
    Precision,
    check_delta_executor,
    check_prompts,
    default_budget,
    dtype_of,
    in_dtype,
)
from subcircuit.engine.patching.plan import Chunk
from subcircuit.engine.patching.reference import Progress
from subcircuit.engine.patching.sites import PatchSet, Source
from subcircuit.engine.patching.sources import AlignedPrompts, PromptChunk, SourceKey, Sources, first_differences
from subcircuit.kernels.backend import Backend

# In bfloat16 the error of an effect is relative to δ. Where δ is this large beside the residual stream it enters (at
# any position, on leaving the first layer that differs; of an edge, at its receiver too), that is no longer small
# beside the effect.
LARGE_DELTA = 0.45

# Where x + δ is this many times smaller than x, their sum has lost a digit, in float32 too; in float64 as many more
# times as it has digits more.
LARGE_SHRINKAGE = 10


Count = Callable[[int], None]
"""Takes note of so many more rows that are done."""


@dataclass(frozen=True)
class Effects:
    """What patch sets did to the metric of each prompt."""

    effects: Float[Tensor, "set prompt *metric"]
    """metric(patched row) − metric(clean run of that prompt), of the prediction after the last position. Where several
    metrics were asked for, a last dimension has them in their order."""
    clean_metric: Float[Tensor, "prompt *metric"]
    n_precise: int = 0
    """Rows whose δ was too large for products in bfloat16, and which were computed in float32 instead."""
    n_full: int = 0
    """Rows that take away nearly all of a residual stream, and which were computed as full forwards instead."""
    n_halvings: int = 0
    """Times that memory ran out and a chunk was cut in two."""


class Counter:
    """Rows done so far, told to whoever asked for progress."""

    def __init__(self, n_rows: int, progress: Progress | None) -> None:
        self.n_done, self._n_rows, self._progress = 0, n_rows, progress

    def __call__(self, n_more: int) -> None:
        self.n_done += n_more
        if self._progress is not None:
            self._progress(min(self.n_done, self._n_rows), self._n_rows)


class DataSession:
    """One data set, made ready for rows of a kind that a subclass defines.

    `precision` is that of the δ products: `fp32`, `bf16` (everything else stays float32), or `fp64` (all of it). Clean
    activations are kept for as many prompts as `budget_bytes` holds beside the rows in work (`default_budget` if None);
    with more prompts than that, each call runs the clean prompts anew, chunk by chunk. Prompts that start to differ
    from their corrupted twins at different positions are run apart where that saves more than it costs. `metric` is one
    of `engine.patching.metric`, or a tuple of them to be read from the same rows. `parts`, which together are all
    prompts, may be asked for one by one.

    Where memory runs out all the same, the chunk in work is cut in two and run again: rows first, then prompts.

    Raises PatchError for prompts that are not aligned, for a metric that does not exist, for an executor that cannot
    run where the model is, and for a single row that memory has no room for.
    """

    _run_class = DeltaRun

    def __init__(
        self,
        model: HookedTransformer,
        prompts: AlignedPrompts,
        *,
        source: Source = "corrupted",
        executor: DeltaExecutor = "torch",
        precision: Precision = "fp32",
        metric: Metrics = "logit_difference",
        budget_bytes: int | None = None,
        parts: Sequence[PromptChunk] | None = None,
    ) -> None:
        check_prompts(model, prompts)
        check_metric(metric)
        check_delta_executor(executor, model.device)
        product_dtype = dtype_of(precision)
        compute_dtype = torch.float64 if product_dtype == torch.float64 else torch.float32
        self.model = in_dtype(model, compute_dtype)
        self.prompts, self.metric = prompts, metric
        self._product_dtype, self._compute_dtype = product_dtype, compute_dtype
        blocks = [cast(Block, block) for block in self.model.blocks]
        self.budget_bytes = default_budget(self.model.device) if budget_bytes is None else budget_bytes
        self.copied_bytes = copied_bytes(model, product_dtype, compute_dtype)
        self.weights_of = partial(LayerWeights.of, dtype=product_dtype)
        self._weights = cache(lambda layer: self.weights_of(blocks[layer]))
        self._precise_weights = cache(lambda layer: LayerWeights.of(blocks[layer], compute_dtype))
        self.n_prompts, self.n_pos = prompts.clean.shape
        on_cpu = self.model.device.type == "cpu"
        self._backend: Backend = "triton" if executor == "triton" else "native" if on_cpu else "torch"
        element_size, product_size = (torch.finfo(dtype).bits // 8 for dtype in (compute_dtype, product_dtype))
        fused = self._backend != "torch"
        self.sizes = Sizes(model.config, self.n_pos, element_size, product_size, fused, metric, self.model.dictionaries)
        self._firsts = first_differences(prompts)
        # Sources other than `corrupted` change every position of every prompt.
        self._run_firsts = self._firsts if source == "corrupted" else torch.zeros_like(self._firsts)
        self._parts = [torch.arange(self.n_prompts)] if parts is None else parts
        self._layout = self.layout({})
        n_at_once = max(map(len, self._layout.prompt_chunks))
        self._sources = Sources(self.model, prompts, [], source, n_at_once)
        self._runs: dict[int, DeltaRun] = {}
        self._n_halvings = 0
        if on_cpu:
            keep_freed_memory()

    def prepare(self, patch_sets: Iterable[PatchSet]) -> None:
        """Say beforehand what later calls will patch, so that one clean run serves them all."""
        known = self._sources.names
        self._sources.add(patch_sets)
        if self._sources.names != known:
            self._lay_out(self.layout(self._sources.names))

    def layout(self, names: Mapping[SourceKey, Iterable[str]]) -> Layout:
        """How the budget cuts the work, given the hook points patched from each source. Copies of weights take from it,
        but not more than half."""
        left = max(self.budget_bytes - self.copied_bytes, self.budget_bytes // 2)
        return Layout.fitting(left, self.sizes, names, self._run_firsts, self._parts, self.model.device.type == "cpu")

    def _lay_out(self, layout: Layout) -> None:
        """Cut the work so from now on; clean runs of other chunks are dropped."""
        if [*map(len, layout.prompt_chunks)] != [*map(len, self._layout.prompt_chunks)]:
            self._runs.clear()
            self._sources.forget()
        else:
            layout = replace(layout, prompt_chunks=self._layout.prompt_chunks)
        self._layout = layout

    def wanted_names(self, patch_sets: Iterable[PatchSet]) -> dict[SourceKey, list[str]]:
        """Hook points that will be patched from each source, by what calls so far and these patch sets say."""
        return self._sources.wanted(patch_sets)

    @property
    def product_dtype(self) -> torch.dtype:
        """Of the operands of the δ products."""
        return self._product_dtype

    @property
    def backend(self) -> Backend:
        """What the elementwise steps between them run on."""
        return self._backend

    def check(self, patch_sets: Iterable[PatchSet]) -> None:
        """Raises PatchError for a component or position that does not exist."""
        for patch_set in patch_sets:
            for patch in patch_set:
                patch.site.component.check(self.model.config, self.model.dictionaries)
                patch.site.resolve(self.n_pos)

    def _over_prompts(
        self,
        n_sets: int,
        run_sets: Callable[[DeltaRun, Float[Tensor, "set prompt *metric"], Count], tuple[int, int]],
        progress: Progress | None,
        part: int | None = None,
    ) -> Effects:
        """Effects of sets on every prompt, or on those of a part, and 0 on the others. `run_sets` computes those of one
        chunk of prompts into their places, and returns how many sets it had to compute again in float32, and in full.
        """
        shape = metric_shape(self.n_prompts, self.metric)
        effects = torch.zeros(n_sets, *shape, dtype=self.model.dtype, device=self.model.device)
        clean_metric = torch.empty(shape, dtype=self.model.dtype, device=self.model.device)
        chosen = set((torch.arange(self.n_prompts) if part is None else self._parts[part]).tolist())
        count, n_halvings = Counter(n_sets * len(chosen), progress), self._n_halvings
        n_precise = n_full = 0

        def run_chunk(prompts: PromptChunk) -> None:
            nonlocal n_precise, n_full
            run = self._run(prompts)
            clean_metric[prompts] = run.clean_metric
            precise, full = run_sets(run, effects, count)
            n_precise, n_full = n_precise + precise * len(prompts), n_full + full * len(prompts)

        waiting = [chunk for chunk in self._layout.prompt_chunks if int(chunk[0]) in chosen]
        while waiting:
            prompts, before = waiting.pop(0), count.n_done
            if not fits(partial(run_chunk, prompts)):
                count.n_done = before
                waiting[:0] = self._halve_prompts(prompts)
        return Effects(effects, clean_metric, n_precise, n_full, self._n_halvings - n_halvings)

    def _halve_prompts(self, prompts: PromptChunk) -> list[PromptChunk]:
        """Two chunks in place of one that memory has no room for."""
        if len(prompts) == 1:
            raise PatchError(
                f"memory has no room for a single row of {self.n_pos} tokens and its clean run; "
                "expected shorter prompts or more memory"
            )
        self._n_halvings += 1
        self._runs.clear()
        self._sources.forget()
        known = {id(chunk) for chunk in self._layout.prompt_chunks}
        self._layout = self._layout.halved(prompts)
        return [chunk for chunk in self._layout.prompt_chunks if id(chunk) not in known]

    def _over_rows(
        self, run: DeltaRun, chunks: Iterable[Chunk], work: Callable[[Chunk], None], count: Count | None
    ) -> None:
        """Do the work of chunks of sets, all of them with the prompts of a run."""
        waiting = list(chunks)
        while waiting:
            chunk = waiting.pop(0)
            if len(chunk.sets) == 1:
                work(chunk)  # where memory runs out now, the prompts are cut
            elif not fits(partial(work, chunk)):
                self._n_halvings += 1
                n_tokens = len(chunk.sets) * run.n_prompts * (self.n_pos - chunk.start.first)
                fewer = max(1, min(n_tokens, self._layout.max_tokens) // 2)
                self._layout = replace(self._layout, max_tokens=fewer)  # for the chunks to come
                waiting[:0] = [replace(chunk, sets=tuple(half)) for half in halves(chunk.sets)]
                continue
            if count is not None:
                count(len(chunk.sets) * run.n_prompts)

    def _run(self, prompts: PromptChunk) -> DeltaRun:
        names = sorted({name for names in self._sources.names.values() for name in names})
        run = self._runs.get(id(prompts))
        if run is None or not run.covers(names):
            kept = sum(other.n_prompts for other in self._runs.values())
            if run is not None or kept + len(prompts) > self._layout.prompts_kept:
                self._runs.clear()  # what does not fit beside the others is made anew, what lacks a hook point too
                self._sources.forget()
            run = self._runs[id(prompts)] = self._run_class(
                self.model,
                self._weights,
                self._product_dtype,
                self.prompts,
                prompts,
                self._sources,
                self._backend,
                self.metric,
            )
        return run

    def _to_repeat(self, departures: Departures) -> tuple[list[int], list[int]]:
        """Sets to compute once more with products in the precision of the clean run, and as full forwards."""
        size, shrinkage = torch.stack((departures.size, departures.shrinkage)).cpu()
        full = shrinkage > LARGE_SHRINKAGE * torch.finfo(torch.float32).eps / torch.finfo(self._compute_dtype).eps
        precise = (size > LARGE_DELTA) & ~full
        if not self._rounds:
            precise[:] = False
        return precise.nonzero()[:, 0].tolist(), full.nonzero()[:, 0].tolist()

    @property
    def _rounds(self) -> bool:
        """Whether the products have fewer digits than all else."""
        return self._product_dtype != self._compute_dtype

    def _precise(self, run: DeltaRun) -> DeltaRun:
        """The same clean run with products as precise as all else."""
        return run.with_weights(self._precise_weights, self._compute_dtype)
