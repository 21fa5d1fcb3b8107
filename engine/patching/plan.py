"""Which rows are run together: prompts that start to differ at the same position, and patch sets that start at the same
place, in chunks that fit a memory budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Int
from torch import Tensor

from subcircuit.engine.patching.sites import STAGES, PatchSet

# Rows enough for full-speed GEMMs, few enough for a core's cache to help the elementwise steps between them.
TOKENS_PER_CHUNK = 4096

# What a chunk of prompts more costs each patch set, in row tokens: launches, and products of fewer rows.
TOKENS_OF_A_CHUNK = 4


@dataclass(frozen=True)
class Start:
    """Where a patch set's first difference arises: layer, stage within the layer, position. Nothing before is
    computed."""

    layer: int
    stage: int
    first: int


@dataclass(frozen=True)
class Chunk:
    """Patch sets (by index) that start together and are run as one batch for every prompt of a prompt chunk."""

    start: Start
    sets: tuple[int, ...]


def start_of(patch_set: PatchSet, first_position: Callable[[PatchSet], int]) -> Start:
    """The start of a non-empty patch set."""
    layer, stage = min((patch.site.component.layer, patch.site.component.stage) for patch in patch_set)
    return Start(layer, stage, first_position(patch_set))


def last_changed(patch_sets: Sequence[PatchSet], start: Start, n_layers: int, n_pos: int) -> int:
    """The last position at which what starts at `start` can leave that layer: attention, which carries a difference to
    all later positions, is below what is patched there, or it is not. In the last layer that does not matter."""
    if start.stage < STAGES["z"] or start.layer >= n_layers - 1:
        return n_pos - 1
    here = [patch.site for patches in patch_sets for patch in patches if patch.site.component.layer == start.layer]
    return max((-1 if at is None else at[-1]) % n_pos for at in (site.resolve(n_pos) for site in here))


def prompt_chunks(firsts: Int[Tensor, "prompt"], n_pos: int, at_most: int) -> list[Int[Tensor, "chunk"]]:
    """Prompts (by index) that are run together, given the position at which each starts to differ.

    A prompt runs from the first position that differs in any prompt of its chunk; a chunk more costs as much as some
    row tokens of every patch set. The cut of the sorted prompts that costs least in all, by dynamic programming over
    the distinct positions; then none has more than `at_most` prompts.
    """
    order = firsts.argsort(stable=True)
    values, counts = (part.tolist() for part in firsts[order].unique_consecutive(return_counts=True))
    ends = [0, *itertools.accumulate(counts)]
    best: list[tuple[int, list[int]]] = [(0, [])]
    for end in range(1, len(ends)):
        cuts = [
            (best[i][0] + (ends[end] - ends[i]) * (n_pos - values[i]) + TOKENS_OF_A_CHUNK, [*best[i][1], ends[end]])
            for i in range(end)
        ]
        best.append(min(cuts))
    chunks: list[Tensor] = []
    for start, end in itertools.pairwise([0, *best[-1][1]]):
        n_chunks = -(-(end - start) // at_most)
        chunks += order[start:end].tensor_split(n_chunks)
    return chunks


def plan_chunks(starts: Sequence[Start], n_prompts: int, n_pos: int, max_tokens: int) -> list[Chunk]:
    """Group patch sets by start and cut each group so that one chunk holds at most about `max_tokens` row tokens."""
    groups: dict[Start, list[int]] = {}
    for index, start in enumerate(starts):
        groups.setdefault(start, []).append(index)
    chunks = []
    for start, sets in sorted(groups.items(), key=lambda item: (item[0].layer, item[0].stage, item[0].first)):
        at_most = max(1, max_tokens // (n_prompts * (n_pos - start.first)))
        n_chunks = -(-len(sets) // at_most)
        size = -(-len(sets) // n_chunks)
        chunks += [Chunk(start, tuple(sets[i : i + size])) for i in range(0, len(sets), size)]
    return chunks


def climbing_chunks(chunks: Sequence[Chunk], n_prompts: int, n_pos: int, max_tokens: int) -> list[Chunk]:
    """Chunks of sets on a base that join others on the way up: from one position on, in the order in which they start,
    as many as hold at most about `max_tokens` row tokens. Each has the first one's start.

    Alone, each would fetch the weights of all layers above it, for a few rows.
    """
    joined: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.start.first):
        last, first = joined[-1] if joined else None, chunk.start.first
        if last is not None and last.start.first == first:
            sets = last.sets + chunk.sets
            if len(sets) * n_prompts * (n_pos - first) <= max_tokens:
                joined[-1] = replace(last, sets=sets)
                continue
        joined.append(chunk)
    return joined
