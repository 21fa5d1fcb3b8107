"""Sweeping many rows: one call for a list of patch sets, or a session that keeps the clean run between calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subcircuit.engine.blocks import Block
from subcircuit.engine.errors import PatchError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.compile import Masks, compile_masks
from subcircuit.engine.patching.delta import DeltaRun, Departures, LayerWeights
from subcircuit.engine.patching.memory import Layout, Sizes, clean_bytes, fits, halves
from subcircuit.engine.patching.metric import Metrics, check_metric, metric_shape
from subcircuit.engine.patching.plan import Chunk, Start, plan_chunks, start_of
from subcircuit.engine.patching.reference import Progress, patched_metric, reference_effects
from subcircuit.engine.patching.sites import Patch, PatchSet, Site, Source, as_patch_set
from subcircuit.engine.patching.sources import AlignedPrompts, PromptChunk, SourceKey, Sources
from subcircuit.kernels.backend import Backend, triton_runs_on

DeltaExecutor = Literal["torch", "triton"]
Executor = Literal["torch", "triton", "reference"]
Precision = Literal["fp64", "fp32", "bf16"]

EXECUTORS: tuple[Executor, ...] = ("torch", "triton", "reference")
_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
CPU_BUDGET_BYTES = 2 * 2**30

# In bfloat16 the error of an effect is relative to δ. Where δ is this large beside the residual stream it enters (at
# any position, on leaving the first patched layer), that is no longer small beside the effect.
LARGE_DELTA = 0.45

# Where x + δ is this many times smaller than x, their sum has lost a digit, in float32 too.
LARGE_SHRINKAGE = 10


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


def default_budget(device: torch.device) -> int:
    """Bytes that a session may take beside the weights: 2 GiB on a CPU, four fifths of what is free on a GPU."""
    return int(0.8 * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else CPU_BUDGET_BYTES


def in_dtype(model: HookedTransformer, dtype: torch.dtype) -> HookedTransformer:
    """The model itself, or a copy of it in another dtype."""
    return model if model.dtype == dtype else copy.deepcopy(model).to(dtype)


def check_prompts(model: HookedTransformer, prompts: AlignedPrompts) -> None:
    """Raises PatchError when clean and corrupted prompts are not aligned token by token."""
    clean, corrupted = prompts.clean, prompts.corrupted
    if clean.ndim != 2 or 0 in clean.shape:
        raise PatchError(f"clean prompts have shape {tuple(clean.shape)}; patching needs aligned prompts [prompt, pos]")
    if corrupted is not None and corrupted.shape != clean.shape:
        raise PatchError(
            f"corrupted prompts have shape {tuple(corrupted.shape)}, clean ones {tuple(clean.shape)}; "
            "they must be aligned"
        )
    if clean.shape[1] > model.config.n_ctx:
        raise PatchError(
            f"prompts of {clean.shape[1]} tokens are longer than the model's context of {model.config.n_ctx}"
        )


class DeltaSession:
    """Delta-form patching of one data set: the clean run is made once and serves every call of `effects`.

    `precision` is that of the δ products: `fp32`, `bf16` (everything else stays float32), or `fp64` (all of it). Clean
    activations are kept for as many prompts as `budget_bytes` holds beside the rows in work (`default_budget` if None);
    with more prompts than that, each call runs the clean prompts anew, chunk by chunk. Prompts that start to differ
    from their corrupted twins at different positions are run apart where that saves more than it costs. `metric` is one
    of `engine.patching.metric`, or a tuple of them to be read from the same rows.

    Where memory runs out all the same, the chunk in work is cut in two and run again.

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
    ) -> None:
        check_prompts(model, prompts)
        check_metric(metric)
        if executor not in get_args(DeltaExecutor):
            raise PatchError(
                f"executor {executor!r} is not known; expected one of {', '.join(get_args(DeltaExecutor))}"
            )
        if executor == "triton" and not triton_runs_on(model.device):
            raise PatchError(
                f"executor 'triton' needs Triton and a GPU, and the model is on {model.device}; executor 'torch' runs "
                "everywhere (TRITON_INTERPRET=1 in the environment runs Triton's kernels on a CPU, slowly)"
            )
        product_dtype = dtype_of(precision)
        compute_dtype = torch.float64 if product_dtype == torch.float64 else torch.float32
        self.model = in_dtype(model, compute_dtype)
        self.prompts, self.metric = prompts, metric
        self._product_dtype, self._compute_dtype = product_dtype, compute_dtype
        blocks = [cast(Block, block) for block in self.model.blocks]
        self._weights = cache(lambda layer: LayerWeights.of(blocks[layer], product_dtype))
        self._precise_weights = lambda layer: LayerWeights.of(blocks[layer], compute_dtype)
        self.n_prompts, self.n_pos = prompts.clean.shape
        on_cpu = self.model.device.type == "cpu"
        self._backend: Backend = "triton" if executor == "triton" else "native" if on_cpu else "torch"
        self.budget_bytes = default_budget(self.model.device) if budget_bytes is None else budget_bytes
        self.copied_bytes = copied_bytes(model, product_dtype, compute_dtype)
        element_size, product_size = (torch.finfo(dtype).bits // 8 for dtype in (compute_dtype, product_dtype))
        fused = self._backend != "torch"
        self.sizes = Sizes(model.config, self.n_pos, element_size, product_size, fused, metric, self.model.dictionaries)
        self._firsts = _first_differences(prompts)
        # Sources other than `corrupted` change every position of every prompt.
        self._run_firsts = self._firsts if source == "corrupted" else torch.zeros_like(self._firsts)
        self._layout = self.layout({})
        n_at_once = max(map(len, self._layout.prompt_chunks))
        self._sources = Sources(self.model, prompts, [], source, n_at_once)
        self._runs: dict[int, DeltaRun] = {}
        self._n_halvings = 0
        # A row that will be computed again need not be finished; a GPU would have to be waited for to know it.
        self._drops_early = on_cpu
        if on_cpu:
            _keep_freed_memory()

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
        return Layout.fitting(left, self.sizes, names, self._run_firsts, self.model.device.type == "cpu")

    def _lay_out(self, layout: Layout) -> None:
        """Cut the work so from now on; clean runs of other chunks are dropped."""
        if [*map(len, layout.prompt_chunks)] != [*map(len, self._layout.prompt_chunks)]:
            self._runs.clear()
            self._sources.forget()
        else:
            layout = replace(layout, prompt_chunks=self._layout.prompt_chunks)
        self._layout = layout

    def work(self, patch_sets: Sequence[PatchSet]) -> Iterator[tuple[PromptChunk, list[Chunk]]]:
        """What `effects` would run for these patch sets, in order: chunks of prompts, each with its chunks of rows."""
        layout = self.layout(self.wanted_names(patch_sets))
        for prompts in layout.prompt_chunks:
            starts = self._starts(patch_sets, (), int(self._firsts[prompts].min()))
            yield prompts, plan_chunks(starts, len(prompts), self.n_pos, layout.max_tokens)

    def wanted_names(self, patch_sets: Iterable[PatchSet]) -> dict[SourceKey, list[str]]:
        """Hook points that will be patched from each source, by what calls so far and these patch sets say."""
        return self._sources.wanted(patch_sets)

    def masks(self, patch_sets: Sequence[PatchSet], start: Start) -> Masks:
        """What patch sets that start together replace, hook point by hook point."""
        return compile_masks(patch_sets, self.model.config, self.n_pos, start.first, self._sources, start.layer)

    @property
    def product_dtype(self) -> torch.dtype:
        """Of the operands of the δ products."""
        return self._product_dtype

    @property
    def backend(self) -> Backend:
        """What the elementwise steps between them run on."""
        return self._backend

    @torch.no_grad()
    def effects(
        self,
        patch_sets: Sequence[Patch | Site | str | PatchSet],
        base: PatchSet = (),
        progress: Progress | None = None,
    ) -> Effects:
        """Effects of patch sets on every prompt, each set on top of the patches of `base`.

        A base's δ is kept from call to call: what changes in it costs only the layers from there on.
        """
        sets = [as_patch_set(patch_set) for patch_set in patch_sets]
        self.check([*sets, base])
        self.prepare([*sets, base])
        shape = metric_shape(self.n_prompts, self.metric)
        effects = torch.zeros(len(sets), *shape, dtype=self.model.dtype, device=self.model.device)
        clean_metric = torch.empty(shape, dtype=self.model.dtype, device=self.model.device)
        n_done, n_rows, n_halvings = 0, len(sets) * self.n_prompts, self._n_halvings
        repeated = {}

        def count(n_more: int) -> None:
            nonlocal n_done
            n_done += n_more
            if progress is not None:
                progress(min(n_done, n_rows), n_rows)

        def run_chunk(prompts: PromptChunk) -> None:
            repeated[id(prompts)] = self._chunk_effects(prompts, sets, base, effects, clean_metric, count)

        waiting = list(self._layout.prompt_chunks)
        while waiting:
            prompts, before = waiting.pop(0), n_done
            if not fits(partial(run_chunk, prompts)):
                n_done = before
                waiting[:0] = self._halve_prompts(prompts)
        n_precise, n_full = (sum(counts) for counts in zip(*repeated.values(), strict=True))
        return Effects(effects, clean_metric, n_precise, n_full, self._n_halvings - n_halvings)

    def _chunk_effects(
        self,
        prompts: PromptChunk,
        sets: Sequence[PatchSet],
        base: PatchSet,
        effects: Float[Tensor, "set prompt *metric"],
        clean_metric: Float[Tensor, "prompt *metric"],
        count: Callable[[int], None],
    ) -> tuple[int, int]:
        """Effects on one chunk of prompts, into their places; how many rows were repeated in float32 and in full."""
        run, first_different = self._run(prompts), int(self._firsts[prompts].min())
        clean_metric[prompts] = run.clean_metric
        run.set_base(base, self._first_position(base, first_different))
        starts = self._starts(sets, base, first_different)
        if base or self._compute_dtype != torch.float32:
            self._propagate(run, sets, starts, range(len(sets)), effects, None, count)
            return 0, 0
        departures = Departures.none(len(sets), effects)
        self._propagate(run, sets, starts, range(len(sets)), effects, departures, count)
        precise, full = self._to_repeat(departures)
        again = run.with_weights(self._precise_weights, self._compute_dtype)
        self._propagate(again, sets, starts, precise, effects)
        self._repeat_fully(run, sets, full, effects)
        return len(precise) * run.n_prompts, len(full) * run.n_prompts

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

    def _propagate(
        self,
        run: DeltaRun,
        sets: Sequence[PatchSet],
        starts: Sequence[Start],
        chosen: Sequence[int],
        effects: Float[Tensor, "set prompt *metric"],
        departures: Departures | None = None,
        count: Callable[[int], None] | None = None,
    ) -> None:
        """Compute the chosen sets for one chunk of prompts, into their places among the effects and departures."""
        chunks = plan_chunks([starts[i] for i in chosen], run.n_prompts, self.n_pos, self._layout.max_tokens)
        waiting = [replace(chunk, sets=tuple(chosen[i] for i in chunk.sets)) for chunk in chunks]
        while waiting:
            chunk = waiting.pop(0)
            work = partial(self._propagate_chunk, run, sets, chunk, effects, departures)
            if len(chunk.sets) == 1:
                work()  # where memory runs out now, the prompts are cut
            elif not fits(work):
                self._n_halvings += 1
                n_tokens = len(chunk.sets) * run.n_prompts * (self.n_pos - chunk.start.first)
                self._layout = replace(self._layout, max_tokens=max(1, n_tokens // 2))  # for the chunks to come
                waiting[:0] = [replace(chunk, sets=tuple(half)) for half in halves(chunk.sets)]
                continue
            if count is not None:
                count(len(chunk.sets) * run.n_prompts)

    def _propagate_chunk(
        self,
        run: DeltaRun,
        sets: Sequence[PatchSet],
        chunk: Chunk,
        effects: Float[Tensor, "set prompt *metric"],
        departures: Departures | None,
    ) -> None:
        indices = list(chunk.sets)
        found = None if departures is None else Departures.none(len(indices), effects)
        rows = run.enter([sets[i] for i in indices], chunk.start, found)
        if departures is not None and found is not None:
            at = torch.tensor(indices)
            departures.size[at], departures.shrinkage[at] = found.size, found.shrinkage
            if self._drops_early:
                again = {i for repeated in self._to_repeat(found) for i in repeated}
                left = [i for i in range(len(indices)) if i not in again]
                rows, indices = run.select(rows, left), [indices[i] for i in left]
        if indices:
            effects[torch.tensor(indices)[:, None], run.chunk] = run.leave(rows)

    def _to_repeat(self, departures: Departures) -> tuple[list[int], list[int]]:
        """Sets to compute once more with products in the precision of the clean run, and as full forwards."""
        size, shrinkage = torch.stack((departures.size, departures.shrinkage)).cpu()
        full = shrinkage > LARGE_SHRINKAGE
        precise = (size > LARGE_DELTA) & ~full
        if self._product_dtype == self._compute_dtype:
            precise[:] = False
        return precise.nonzero()[:, 0].tolist(), full.nonzero()[:, 0].tolist()

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

    def check(self, patch_sets: Iterable[PatchSet]) -> None:
        """Raises PatchError for a component or position that does not exist."""
        for patch_set in patch_sets:
            for patch in patch_set:
                patch.site.component.check(self.model.config, self.model.dictionaries)
                patch.site.resolve(self.n_pos)

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
    if executor in get_args(DeltaExecutor):
        session = DeltaSession(
            model,
            prompts,
            source=source,
            precision=precision,
            budget_bytes=budget_bytes,
            executor=cast(DeltaExecutor, executor),
            metric=metric,
        )
        return session.effects(patch_sets, progress=progress)
    if executor != "reference":
        raise PatchError(f"executor {executor!r} is not known; expected one of {', '.join(EXECUTORS)}")
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


def copied_bytes(model: HookedTransformer, product_dtype: torch.dtype, compute_dtype: torch.dtype) -> int:
    """Bytes of the copies of weights that a session makes: in another precision, and where products share an input."""
    n_bytes = 0
    if model.dtype != compute_dtype:
        n_bytes += sum(weight.numel() for weight in model.parameters()) * torch.finfo(compute_dtype).bits // 8
    config = model.config
    stacked = config.d_model * (config.n_heads + 2 * config.kv_heads) * config.d_head
    stacked += 2 * config.d_model * config.d_mlp if config.gated_mlp else 0
    alone = config.d_model * config.n_heads * config.d_head
    alone += (1 if config.gated_mlp else 2) * config.d_model * config.d_mlp
    copied = stacked if product_dtype == compute_dtype else stacked + alone
    return n_bytes + config.n_layers * copied * torch.finfo(product_dtype).bits // 8


def _keep_freed_memory() -> None:
    """Let the C allocator keep what chunks free for the next chunk, instead of paging it in anew each time.

    glibc raises the size below which it does so to the largest block it has seen freed, up to 32 MiB. Without this a
    bfloat16 sweep of GPT-2 Small spent a seventh of its processor time on page faults.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def dtype_of(precision: str) -> torch.dtype:
    """A precision as torch knows it. Raises PatchError for one that does not exist."""
    if precision not in _DTYPES:
        raise PatchError(f"precision {precision!r} is not known; expected one of {', '.join(_DTYPES)}")
    return _DTYPES[precision]


def _first_differences(prompts: AlignedPrompts) -> Int[Tensor, "prompt"]:
    """First position at which each prompt differs from its corrupted twin; the last one where none does."""
    if prompts.corrupted is None:
        return torch.zeros(len(prompts.clean), dtype=torch.int64)
    different = prompts.clean.cpu() != prompts.corrupted.cpu()
    different[:, -1] = True
    return different.int().argmax(1)
