"""The reference executor: one full forward with hooks per patch set and prompt chunk. Slow, plain, the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.engine.hooks import Hook
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.answers import token_sets
from subcircuit.engine.patching.metric import Metrics, measure, metric_shape
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
    metric: Metrics = "logit_difference",
) -> tuple[Float[Tensor, "set prompt *metric"], Float[Tensor, "prompt *metric"]]:
    """Effects of every patch set on every prompt, and the clean metric, from full forwards in the model's own dtype."""
    n_prompts = len(prompts.clean)
    sources = Sources(model, prompts, patch_sets, source, prompts_per_chunk)
    dtype = torch.promote_types(model.dtype, torch.float32)
    shape = metric_shape(n_prompts, metric)
    patched = torch.empty(len(patch_sets), *shape, dtype=dtype, device=model.device)
    clean = torch.empty(shape, dtype=dtype, device=model.device)
    n_done = 0
    for chunk in torch.arange(n_prompts).split(prompts_per_chunk):
        clean_logits = last_logits(model, prompts, chunk)
        clean[chunk] = metric_of(clean_logits, clean_logits, prompts, chunk, metric).to(dtype)
        for i, patch_set in enumerate(patch_sets):
            row = patched_metric(model, prompts, chunk, patch_set, sources, metric, clean_logits)
            patched[i, chunk] = row.to(dtype)
            n_done += len(chunk)
            if progress is not None:
                progress(n_done, len(patch_sets) * n_prompts)
        sources.forget()
    return patched - clean, clean


def patched_metric(
    model: HookedTransformer,
    prompts: AlignedPrompts,
    chunk: PromptChunk,
    patch_set: PatchSet,
    sources: Sources,
    metric: Metrics,
    clean_logits: Float[Tensor, "chunk d_vocab"] | None,
) -> Float[Tensor, "chunk *metric"]:
    """The metric of a chunk of prompts from one full forward with the patches of one set.

    `clean_logits` are those of the clean run, or its log-probabilities; only `kl` needs them.
    """
    hooks = patch_hooks(model, patch_set, sources, chunk, prompts.clean.shape[1])
    return metric_of(last_logits(model, prompts, chunk, hooks), clean_logits, prompts, chunk, metric)


def patch_hooks(
    model: HookedTransformer, patch_set: PatchSet, sources: Sources, chunk: PromptChunk, n_pos: int
) -> list[Hook]:
    """Hooks that put a patch set's source values in place, for a chunk of prompts."""
    return [(patch.site.component.hook_name, _replace(model, patch, sources, chunk, n_pos)) for patch in patch_set]


def last_logits(
    model: HookedTransformer, prompts: AlignedPrompts, chunk: PromptChunk, hooks: Sequence[Hook] = ()
) -> Float[Tensor, "chunk d_vocab"]:
    """Logits at the last position only: at all of them they would be the largest tensor of all."""
    resid = model.run_with_hooks(prompts.clean[chunk], hooks, stop_at_layer=model.config.n_layers)
    return model.unembed_normed(resid[:, -1])


def metric_of(
    logits: Float[Tensor, "chunk d_vocab"],
    clean_logits: Float[Tensor, "chunk d_vocab"] | None,
    prompts: AlignedPrompts,
    chunk: PromptChunk,
    metric: Metrics,
) -> Float[Tensor, "chunk *metric"]:
    """A metric of a chunk of prompts from logits after their last positions."""
    answers, wrongs = (tokens[chunk] for tokens in token_sets(prompts))
    return measure(logits, clean_logits, answers, wrongs, metric)


def _replace(
    model: HookedTransformer, patch: Patch, sources: Sources, chunk: PromptChunk, n_pos: int
) -> Callable[[Tensor, str], Tensor]:
    component = patch.site.component
    positions = patch.site.resolve(n_pos)
    where = list(range(n_pos)) if positions is None else list(positions)
    indices = list(component.indices(model.config))
    source_value = sources.value(sources.key(patch.source), component.hook_name, chunk)
    whole = component.kind in ("mlp", "resid")
    at = (slice(None), where) if whole else (slice(None), [[position] for position in where], indices)

    def replace(value: Tensor, name: str) -> Tensor:
        value = value.clone()
        value[at] = source_value.expand_as(value)[at]
        return value

    return replace
