"""From patch sets to masks: what each row of a chunk replaces at each hook point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from subcircuit.engine.config import ModelConfig
from subcircuit.engine.patching.sites import PatchSet
from subcircuit.engine.patching.sources import PromptChunk, SourceKey, Sources

MaskArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


@dataclass(frozen=True)
class HookPatch:
    """What the sets of a chunk put at one hook point, as a difference to the clean value there.

    `mask` says which (set, position, head or neuron) are replaced; a position axis of 1 means all alike. `delta` is
    source − clean at the chunk's positions.
    """

    mask: Bool[Tensor, "set #pos index"]
    delta: Float[Tensor, "#prompt pos index d"]
    single_heads: Int[Tensor, "set"] | None
    """The one index each set replaces at all positions, where that is all the sets do here."""
    complete: bool
    """Whether every set replaces everything here, so that what would have been there need not be computed."""


Masks = dict[str, dict[SourceKey, MaskArray]]
"""By hook point and source: which (set, position, index) are replaced."""


def compile_masks(
    patch_sets: Sequence[PatchSet],
    config: ModelConfig,
    n_pos: int,
    first: int,
    sources: Sources,
    from_layer: int,
    base: PatchSet = (),
) -> Masks:
    """Masks over positions from `first` on, for the patches in layers from `from_layer` on, but for features; the
    patches of each set on top of those of `base`."""
    masks: Masks = {}
    everywhere = all(patch.site.positions is None for patches in (base, *patch_sets) for patch in patches)
    n_rows = 1 if everywhere else n_pos - first
    of_each: list[tuple[slice | int, PatchSet]] = [(slice(None), base), *enumerate(patch_sets)]
    for i, patches in of_each:
        for patch in patches:
            component = patch.site.component
            if component.layer < from_layer or component.is_feature:
                continue
            key, indices = sources.key(patch.source), component.indices(config)
            by_source = masks.setdefault(component.hook_name, {})
            if key not in by_source:
                by_source[key] = np.zeros((len(patch_sets), n_rows, component.axis_size(config)), dtype=bool)
            positions = patch.site.resolve(n_pos)
            where: slice | list[int] = slice(None)
            if positions is not None:
                where = [position - first for position in positions if position >= first]
            for other, mask in by_source.items():
                mask[i, where, indices.start : indices.stop] = other == key
    return masks


def one_head_each(mask: MaskArray) -> bool:
    """Whether every set replaces one index, at all positions."""
    return mask.shape[1] == 1 and bool((mask[:, 0].sum(1) == 1).all())


def replaces_all(mask: MaskArray) -> bool:
    """Whether every set replaces everything, so that what would have been there need not be computed."""
    return bool(mask.all())


def hook_patches(
    masks: Masks, clean: Mapping[str, Tensor], sources: Sources, prompts: PromptChunk, first: int
) -> dict[str, list[HookPatch]]:
    """Give masks their values, source − clean, for a chunk of prompts."""
    compiled: dict[str, list[HookPatch]] = {}
    for name, by_source in masks.items():
        for key, array in by_source.items():
            device, n_pos = clean[name].device, clean[name].shape[1]
            delta = (sources.value(key, name, prompts)[:, :n_pos] - clean[name])[:, first:]
            delta = delta.reshape(*delta.shape[:2], array.shape[2], -1)
            # What the host decides by is read from the host's own copy: a GPU is not waited for.
            one_each = one_head_each(array)
            heads = torch.from_numpy(array[:, 0].argmax(1)).to(device, non_blocking=True) if one_each else None
            mask = torch.from_numpy(array).to(device, non_blocking=True)
            compiled.setdefault(name, []).append(HookPatch(mask, delta, heads, replaces_all(array)))
    return compiled


def patched(
    delta: Float[Tensor, "#set prompt pos d"] | None, patches: Sequence[HookPatch], n_read: int | None = None
) -> Float[Tensor, "set prompt pos d"] | None:
    """δ at a hook point after the sets' patches there; None stands for no difference at all.

    With `n_read`, δ covers only the last `n_read` positions.
    """
    for patch in patches:
        mask, source = patch.mask, patch.delta
        if n_read is not None:
            mask, source = mask[:, -n_read:], source[:, -n_read:]
        mask = mask[:, None, :, :, None]
        if delta is None:
            delta = torch.where(mask, source, source.new_zeros(()))
        else:
            delta = torch.where(mask, source.to(delta.dtype), delta.unflatten(-1, source.shape[-2:]))
        delta = delta.flatten(3)
    return delta
