"""Sweeping many rows: one call for a list of patch sets, or a session that keeps the clean run between calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subcircuit.engine.blocks import Block
from subcircuit.engine.errors import PatchError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.delta import DeltaRun, Departures, LayerWeights
from subcircuit.engine.patching.plan import (
    TOKENS_PER_CHUNK,
    Start,
    clean_bytes,
    plan_chunks,
    prompt_chunks,
    row_bytes,
    start_of,
)
from subcircuit.engine.patching.reference import Progress, patched_metric, reference_effects
from subcircuit.engine.patching.sites import Patch, PatchSet, Site, Source, as_patch_set
from subcircuit.engine.patching.sources import AlignedPrompts, PromptChunk, Sources
from subcircuit.kernels.backend import Backend, triton_runs_on

DeltaExecutor = Literal["torch", "triton"]
Executor = Literal["torch", "triton", "reference"]
Precision = Literal["fp64", "fp32", "bf16"]

EXECUTORS: tuple[Executor, ...] = ("torch", "triton", "reference")
_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
CPU_BUDGET_BYTES = 2 * 2**30

# In bfloat16 the error of an effect is relative to δ. Where δ is this large beside the residual stream it enters (root
# mean square, on leaving the first patched layer), that is no longer small beside the effect.
LARGE_DELTA = 0.2

# Where x + δ is this many times smaller than x, their sum has lost a digit, in float32 too.
LARGE_SHRINKAGE = 10


@dataclass(frozen=True)
class Effects:
    """What patch sets did to the metric of each prompt."""

    effects: Float[Tensor, "set prompt"]
    """metric(patched row) − metric(clean run of that prompt): logit(answer) − logit(wrong) at the last position,
    means over the tokens where a prompt has several."""
    clean_metric: Float[Tensor, "prompt"]
    n_precise: int = 0
    """Rows whose δ was too large for products in bfloat16, and which were computed in float32 instead."""
    n_full: int = 0
    """Rows that take away nearly all of a residual stream, and which were computed as full forwards instead."""


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
    activations are kept for as many prompts as half of `budget_bytes` holds (`default_budget` if None); with more
    prompts than that, each call runs the clean prompts anew, chunk by chunk. Prompts that start to differ from their
    corrupted twins at different positions are run apart where that saves more than it costs.

    Raises PatchError for prompts that are not aligned, and for an executor that cannot run where the model is.
    """

    def __init__(
        self,
        model: HookedTransformer,
        prompts: AlignedPrompts,
        *,
        source: Source = "corrupted",
        precision: Precision = "fp32",
        budget_bytes: int | None = None,
        executor: DeltaExecutor = "torch",
    ) -> None:
        check_prompts(model, prompts)
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
        self.prompts = prompts
        self._product_dtype, self._compute_dtype = product_dtype, compute_dtype
        blocks = [cast(Block, block) for block in self.model.blocks]
        self._weights = [LayerWeights.of(block, product_dtype) for block in blocks].__getitem__
        self._precise_weights = lambda layer: LayerWeights.of(blocks[layer], compute_dtype)
        self.n_prompts, self.n_pos = prompts.clean.shape
        on_cpu = self.model.device.type == "cpu"
        budget = default_budget(self.model.device) if budget_bytes is None else budget_bytes
        element_size = torch.finfo(compute_dtype).bits // 8
        self._prompts_kept = max(1, budget // 2 // clean_bytes(model.config, self.n_pos, element_size))
        self._sources = Sources(self.model, prompts, [], source, min(self._prompts_kept, self.n_prompts))
        row_tokens = budget // 4 // (row_bytes(model.config, self.n_pos, element_size) // self.n_pos)
        self._max_tokens = max(1, min(TOKENS_PER_CHUNK, row_tokens) if on_cpu else row_tokens)
        self._firsts = _first_differences(prompts)
        starts_differ = source == "corrupted"  # other sources change every position of every prompt
        firsts = self._firsts if starts_differ else torch.zeros_like(self._firsts)
        self._chunks = prompt_chunks(firsts, self.n_pos, self._prompts_kept)
        self._runs: dict[int, DeltaRun] = {}
        self._backend: Backend = "triton" if executor == "triton" else "native" if on_cpu else "torch"
        # A row that will be computed again need not be finished; a GPU would have to be waited for to know it.
        self._drops_early = on_cpu
        if on_cpu:
            _keep_freed_memory()

    def prepare(self, patch_sets: Iterable[PatchSet]) -> None:
        """Say beforehand what later calls will patch, so that one clean run serves them all."""
        self._sources.add(patch_sets)

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
        self._check(sets, base)
        self._sources.add([*sets, base])
        effects = torch.zeros(len(sets), self.n_prompts, dtype=self.model.dtype, device=self.model.device)
        clean_metric = torch.empty(self.n_prompts, dtype=self.model.dtype, device=self.model.device)
        n_done, n_precise, n_full, n_rows = 0, 0, 0, len(sets) * self.n_prompts

        def count(n_more: int) -> None:
            nonlocal n_done
            n_done += n_more
            if progress is not None:
                progress(n_done, n_rows)

        check = not base and self._compute_dtype == torch.float32
        for prompts in self._chunks:
            run, first_different = self._run(prompts), int(self._firsts[prompts].min())
            clean_metric[prompts] = run.clean_metric
            run.set_base(base, self._first_position(base, first_different))
            starts = self._starts(sets, base, first_different)
            departures = Departures.none(len(sets), effects) if check else None
            self._propagate(run, sets, starts, range(len(sets)), effects, departures, count)
            if departures is not None:
                precise, full = self._to_repeat(departures)
                again = run.with_weights(self._precise_weights, self._compute_dtype)
                self._propagate(again, sets, starts, precise, effects)
                self._repeat_fully(run, sets, full, effects)
                n_precise += len(precise) * run.n_prompts
                n_full += len(full) * run.n_prompts
        return Effects(effects, clean_metric, n_precise, n_full)

    def _propagate(
        self,
        run: DeltaRun,
        sets: Sequence[PatchSet],
        starts: Sequence[Start],
        chosen: Sequence[int],
        effects: Float[Tensor, "set prompt"],
        departures: Departures | None = None,
        count: Callable[[int], None] | None = None,
    ) -> None:
        """Compute the chosen sets for one chunk of prompts, into their places among the effects and departures."""
        for chunk in plan_chunks([starts[i] for i in chosen], run.n_prompts, self.n_pos, self._max_tokens):
            indices = [chosen[i] for i in chunk.sets]
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
            if count is not None:
                count(len(chunk.sets) * run.n_prompts)

    def _to_repeat(self, departures: Departures) -> tuple[list[int], list[int]]:
        """Sets to compute once more with products in the precision of the clean run, and as full forwards."""
        size, shrinkage = torch.stack((departures.size, departures.shrinkage)).cpu()
        full = shrinkage > LARGE_SHRINKAGE
        precise = (size > LARGE_DELTA) & ~full
        if self._product_dtype == self._compute_dtype:
            precise[:] = False
        return precise.nonzero()[:, 0].tolist(), full.nonzero()[:, 0].tolist()

    def _repeat_fully(
        self, run: DeltaRun, sets: Sequence[PatchSet], chosen: Sequence[int], effects: Float[Tensor, "set prompt"]
    ) -> None:
        for i in chosen:
            metric = patched_metric(self.model, self.prompts, run.chunk, sets[i], self._sources)
            effects[i, run.chunk] = metric - run.clean_metric

    def _check(self, sets: Iterable[PatchSet], base: PatchSet) -> None:
        for patch_set in [*sets, base]:
            for patch in patch_set:
                patch.site.component.check(self.model.config)
                patch.site.resolve(self.n_pos)

    def _run(self, prompts: PromptChunk) -> DeltaRun:
        names = sorted({name for names in self._sources.names.values() for name in names})
        run = self._runs.get(id(prompts))
        if run is None or not run.covers(names):
            kept = sum(other.n_prompts for other in self._runs.values())
            if run is not None or kept + len(prompts) > self._prompts_kept:
                self._runs.clear()  # what does not fit beside the others is made anew, what lacks a hook point too
                self._sources.forget()
            run = self._runs[id(prompts)] = self._new_run(prompts)
        return run

    def _new_run(self, prompts: PromptChunk) -> DeltaRun:
        return DeltaRun(
            self.model, self._weights, self._product_dtype, self.prompts, prompts, self._sources, self._backend
        )

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
    budget_bytes: int | None = None,
    progress: Progress | None = None,
) -> Effects:
    """Effects of patch sets on every prompt: `[set, prompt]`, metric(patched row) − metric(clean run).

    Executors: `reference` runs one full forward with hooks per patch set in the given precision; `torch` propagates δ
    only, `triton` the same with fused kernels on a GPU. `budget_bytes` is what they may take beside the weights.

    Raises PatchError for a component, position, source, executor or precision that does not exist.
    """
    if executor in get_args(DeltaExecutor):
        session = DeltaSession(
            model,
            prompts,
            source=source,
            precision=precision,
            budget_bytes=budget_bytes,
            executor=cast(DeltaExecutor, executor),
        )
        return session.effects(patch_sets, progress=progress)
    if executor != "reference":
        raise PatchError(f"executor {executor!r} is not known; expected one of {', '.join(EXECUTORS)}")
    check_prompts(model, prompts)
    sets = [as_patch_set(patch_set) for patch_set in patch_sets]
    for patch_set in sets:
        for patch in patch_set:
            patch.site.component.check(model.config)
    model = in_dtype(model, dtype_of(precision))
    budget = default_budget(model.device) if budget_bytes is None else budget_bytes
    chunk = max(1, budget // 4 // clean_bytes(model.config, prompts.clean.shape[1], 8))
    return Effects(*reference_effects(model, prompts, sets, source, chunk, progress))


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
