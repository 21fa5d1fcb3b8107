"""How fast this machine runs a chunk of rows: real blocks of the model, timed on random δ of the chunk's shape."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import cast, get_args

import torch

from subcircuit.engine.blocks import Block
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.delta import DeltaRun, Departures, Patches
from subcircuit.engine.patching.flops import chunk_flops, clean_flops
from subcircuit.engine.patching.plan import Chunk, Start
from subcircuit.engine.patching.session import DeltaSession
from subcircuit.engine.patching.sites import Component, Kind, Patch, PatchSet, Site
from subcircuit.engine.patching.sources import PromptChunk, Sources

# What one run of a block may take: a chunk that takes longer is timed on fewer rows, and first on very few.
SECONDS = 0.2
FEW_FLOPS = 2 * 10**9

# What one timing goes on for, so that it sees the machine's other work as a long sweep does.
TIMING_SECONDS = 0.06


@dataclass(frozen=True)
class Cost:
    """Seconds as a fixed part and a part per unit of size."""

    fixed_s: float
    unit_s: float

    def seconds(self, size: float) -> float:
        return self.fixed_s + self.unit_s * size

    @classmethod
    def through(cls, few: tuple[float, float], many: tuple[float, float]) -> Cost:
        """From (size, seconds) of a small and of a large piece of work; exact at the large one.

        Many small products are slower than one large one, and timings are noisy: neither part is negative, and size
        explains at least half of the larger time.
        """
        (few_size, few_s), (size, seconds) = few, many
        seconds = max(seconds, 0.0)
        slope = (seconds - few_s) / (size - few_size) if size > few_size else seconds / size
        unit_s = min(max(slope, seconds / size / 2), seconds / size)
        return cls(seconds - unit_s * size, unit_s)


@dataclass(frozen=True)
class Speed:
    """Seconds that the parts of a sweep take."""

    block: Cost
    """Of a block of a chunk, by its FLOPs: the elementwise steps between the products included."""
    entry: Cost
    """Of a chunk, once, by its row tokens: compiling patches, measuring δ, reading effects."""
    clean_flop_s: float
    """Per FLOP of the clean run."""
    copy_s: float
    """For the copies of the weights."""


@torch.no_grad()
def measure_speed(session: DeltaSession, patch_sets: Sequence[PatchSet], prompts: PromptChunk, chunk: Chunk) -> Speed:
    """Seconds of the parts of a sweep, measured on one of its chunks in a second or two."""
    bench = _Bench(session, prompts, chunk.start.first)
    sets = [patch_sets[i] for i in chunk.sets]
    n_rows = len(sets) * len(prompts)
    part = min(1 / 8, FEW_FLOPS / bench.block_flops(n_rows, 1))
    few = _part(len(sets), len(prompts), part)
    few_point = bench.block_flops(*few), bench.block_seconds(*few)
    many = _part(len(sets), len(prompts), min(1, SECONDS / few_point[1] * part))
    block = Cost.through(few_point, (bench.block_flops(*many), bench.block_seconds(*many)))

    def entry(n_sets: int, n_prompts: int) -> tuple[float, float]:
        moved = _in_last_layer(sets[:n_sets], bench.config.n_layers)
        seconds = bench.entry_seconds(moved, n_prompts) - block.seconds(bench.entry_flops(moved, n_prompts))
        return len(moved) * n_prompts * (session.n_pos - bench.first), seconds

    n_layers = session.model.config.n_layers
    return Speed(
        block,
        Cost.through(entry(*few), entry(*many)),
        bench.clean_flop_seconds(),
        bench.layer_copy_seconds() * n_layers,
    )


def _part(n_sets: int, n_prompts: int, part: float) -> tuple[int, int]:
    """About a part of the rows of so many sets and prompts, by fewer sets, then by fewer prompts of one set."""
    n_rows = max(1, round(n_sets * n_prompts * part))
    return max(1, n_rows // n_prompts), min(n_rows, n_prompts)


def _in_last_layer(patch_sets: Sequence[PatchSet], n_layers: int) -> list[PatchSet]:
    """The first patch of each set, moved to the last layer, with zeros for its source."""

    def moved(patch_set: PatchSet) -> PatchSet:
        site = patch_set[0].site if patch_set else Site(Component(0, "z"))
        return (Patch(replace(site, component=replace(site.component, layer=n_layers - 1)), "zero"),)

    return [moved(patch_set) for patch_set in patch_sets]


class _Bench:
    """The first two layers of a session's model, as a model of its own that shares their weights."""

    def __init__(self, session: DeltaSession, prompts: PromptChunk, first: int) -> None:
        self.session, self.prompts, self.first = session, prompts, first
        self.config = replace(session.model.config, n_layers=min(2, session.model.config.n_layers))
        parameters = dict(session.model.named_parameters())
        tensors = {name: parameters[name] for name in HookedTransformer.parameter_shapes(self.config)}
        self.model = HookedTransformer(self.config, tensors)
        self.blocks = [cast(Block, block) for block in self.model.blocks]
        self.weights = cache(lambda layer: session.weights_of(self.blocks[layer]))
        self.run = cache(self._run)

    def _run(self, n_prompts: int) -> DeltaRun:
        """A clean run of some prompts that has what any patch in the last layer needs."""
        sources = Sources(self.model, self.session.prompts, [], "zero", n_prompts)
        anything = [Component(self.config.n_layers - 1, kind) for kind in get_args(Kind)]
        sources.add([tuple(Patch(Site(component)) for component in anything if not component.is_feature)])
        dtype, backend = self.session.product_dtype, self.session.backend
        chunk = self.prompts[:n_prompts]
        metric = self.session.metric
        return DeltaRun(self.model, self.weights, dtype, self.session.prompts, chunk, sources, backend, metric)

    def block_flops(self, n_sets: int, n_prompts: int) -> int:
        session = self.session
        size = n_sets, n_prompts, session.n_pos
        return chunk_flops(self.config, session.backend, {}, *size, 0, self.first, entering=True)[0].all

    def block_seconds(self, n_sets: int, n_prompts: int) -> float:
        """Of the first block, for a δ of random numbers."""
        shape = (n_sets, n_prompts, self.session.n_pos - self.first, self.config.d_model)
        resid = 0.1 * torch.randn(shape, dtype=self.model.dtype, device=self.model.device)
        delta = resid, resid.to(self.session.product_dtype)
        run = self.run(n_prompts)
        return self._seconds(lambda: run._block(0, delta, Patches({}, {}), self.first))

    def entry_flops(self, patch_sets: Sequence[PatchSet], n_prompts: int) -> int:
        start, session = self._last_layer(), self.session
        masks = session.masks(patch_sets, start)
        size = len(patch_sets), n_prompts, session.n_pos
        return chunk_flops(self.config, session.backend, masks, *size, start.layer, self.first)[start.layer].all

    def entry_seconds(self, patch_sets: Sequence[PatchSet], n_prompts: int) -> float:
        """Of rows that start in the last layer, from their patches to their effects."""
        run, start = self.run(n_prompts), self._last_layer()

        def work() -> None:
            run.leave(run.enter(patch_sets, start, Departures.none(len(patch_sets), run.final)))

        return self._seconds(work)

    def _last_layer(self) -> Start:
        return Start(self.config.n_layers - 1, 0, self.first)

    def clean_flop_seconds(self) -> float:
        flops = clean_flops(self.config, self.session.n_pos, self.config.n_layers).all
        n_prompts = max(1, min(len(self.prompts), 2 * FEW_FLOPS // flops))
        return self._seconds(lambda: self._run(n_prompts)) / (flops * n_prompts)

    def layer_copy_seconds(self) -> float:
        return self._seconds(lambda: self.session.weights_of(self.blocks[0]))

    def _seconds(self, work: Callable[[], object]) -> float:
        """Mean over several runs, after one that warms up."""
        work()
        self._wait()
        n_runs, start = 0, time.perf_counter()
        while n_runs < 2 or time.perf_counter() - start < TIMING_SECONDS:
            work()
            self._wait()
            n_runs += 1
        return (time.perf_counter() - start) / n_runs

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
