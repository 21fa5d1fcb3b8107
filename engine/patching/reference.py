"""The reference executor: one full forward with hooks per patch set and prompt chunk. Slow, plain, the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.engine.hooks import Hook
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.answers import mean_at, token_sets
from subcircuit.engine.patching.sites import Patch, PatchSet, Source
from subcircuit.engine.patching.sources import AlignedPrompts, PromptChunk, Sources

Progress = Callable[[int, int], None]
"""Called with (rows done, rows in all)."""


@torch.no_grad()
def reference_effects(
    model: HookedTransformer,
    prompts: AlignedPrompts,
    patch_sets: Sequence[PatchSet],
    source: Source,
    prompts_per_chunk: int,
    progress: Progress | None = None,
) -> tuple[Float[Tensor, "set prompt"], Float[Tensor, "prompt"]]:
    """Effects of every patch set on every prompt, and the clean metric, from full forwards in the model's own dtype."""
    n_prompts = len(prompts.clean)
    sources = Sources(model, prompts, patch_sets, source, prompts_per_chunk)
    patched = torch.empty(len(patch_sets), n_prompts, dtype=model.dtype, device=model.device)
    clean = torch.empty(n_prompts, dtype=model.dtype, device=model.device)
    n_done = 0
    for chunk in torch.arange(n_prompts).split(prompts_per_chunk):
        clean[chunk] = logit_difference(model(prompts.clean[chunk]), prompts, chunk)
        for i, patch_set in enumerate(patch_sets):
            patched[i, chunk] = patched_metric(model, prompts, chunk, patch_set, sources)
            n_done += len(chunk)
            if progress is not None:
                progress(n_done, len(patch_sets) * n_prompts)
        sources.forget()
    return patched - clean, clean


def patched_metric(
    model: HookedTransformer, prompts: AlignedPrompts, chunk: PromptChunk, patch_set: PatchSet, sources: Sources
) -> Float[Tensor, "chunk"]:
    """The metric of a chunk of prompts from one full forward with the patches of one set."""
    hooks = patch_hooks(model, patch_set, sources, chunk, prompts.clean.shape[1])
    return logit_difference(model.run_with_hooks(prompts.clean[chunk], hooks), prompts, chunk)


def patch_hooks(
    model: HookedTransformer, patch_set: PatchSet, sources: Sources, chunk: PromptChunk, n_pos: int
) -> list[Hook]:
    """Hooks that put a patch set's source values in place, for a chunk of prompts."""
    return [(patch.site.component.hook_name, _replace(model, patch, sources, chunk, n_pos)) for patch in patch_set]


def logit_difference(logits: Tensor, prompts: AlignedPrompts, chunk: PromptChunk) -> Float[Tensor, "prompt"]:
    """What the metric reads from logits `[prompt, pos, d_vocab]` of a chunk of prompts."""
    last = logits[:, -1]
    answers, wrongs = (tokens[chunk] for tokens in token_sets(prompts))
    return mean_at(last, answers) - mean_at(last, wrongs)


def _replace(
    model: HookedTransformer, patch: Patch, sources: Sources, chunk: PromptChunk, n_pos: int
) -> Callable[[Tensor, str], Tensor]:
    component = patch.site.component
    positions = patch.site.resolve(n_pos)
    where = list(range(n_pos)) if positions is None else list(positions)
    indices = list(component.indices(model.config))
    source_value = sources.value(sources.key(patch.source), component.hook_name, chunk)

    def replace(value: Tensor, name: str) -> Tensor:
        source = source_value.expand_as(value)
        value = value.clone()
        for position in where:
            if component.kind in ("mlp", "resid"):
                value[:, position] = source[:, position]
            else:
                value[:, position, indices] = source[:, position, indices]
        return value

    return replace
