"""Patching features of sparse dictionaries in delta form.

A feature f of a dictionary at a hook point with row value x + δ is set to its source's activation, the error kept:

    δ' = δ + (f_source − f(x + δ)) W_dec[f]

All features that a row sets at one hook point are read from the same x + δ. Where nothing below has changed, δ is None
and f(x) is the clean run's activation: then a patch is a rank-one δ per prompt, and nothing is encoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from subcircuit.engine.dictionary import ACTS, SparseDictionary
from subcircuit.engine.patching.sites import Patch, PatchSet
from subcircuit.engine.patching.sources import PromptChunk, SourceKey, Sources

ENTRIES_AT_ONCE = 4096
"""Columns of the encoder and rows of the decoder that are gathered at once: megabytes, however large the dictionary."""


@dataclass(frozen=True)
class FeaturePatch:
    """Which features the sets of a chunk set at one hook point, and to what; positions from the chunk's first one on.

    A set of fewer features than the widest has places left over, at which nothing is masked in.
    """

    dictionary: SparseDictionary
    features: Int[Tensor, "set place"]
    parts: Sequence[tuple[Bool[Tensor, "set #pos place"], Float[Tensor, "#prompt pos d_sae"]]]
    """By source: where it holds, and its activations."""
    clean: Float[Tensor, "prompt pos d_in"]
    clean_acts: Float[Tensor, "prompt pos d_sae"]

    def patched(
        self, delta: Float[Tensor, "#set prompt pos d_in"] | None, n_read: int | None = None
    ) -> Float[Tensor, "set prompt pos d_in"]:
        """δ at the hook point after the patches. With `n_read`, δ covers only the last `n_read` positions."""
        n_read = self.clean.shape[1] if n_read is None else n_read
        n_sets, n_places = self.features.shape
        competing = delta is not None and self.dictionary.activation == "topk"
        n_at_once = max(1, ENTRIES_AT_ONCE // (self.dictionary.d_sae if competing else n_places))
        changes = []
        for start in range(0, n_sets, n_at_once):
            sets = slice(start, start + n_at_once)
            below = delta if delta is None or len(delta) == 1 else delta[sets]
            changes.append(self._change(sets, below, n_read))
        change = torch.cat(changes)
        return change if delta is None else delta + change.to(delta.dtype)

    def _change(
        self, sets: slice, delta: Float[Tensor, "#set prompt pos d_in"] | None, n_read: int
    ) -> Float[Tensor, "set prompt pos d_in"]:
        features = self.features[sets]
        if delta is None:
            acts = _gathered(self.clean_acts[:, -n_read:], features)
        else:
            acts = self.dictionary.encode_chosen(self.clean[:, -n_read:] + delta, features)
        change = torch.zeros_like(acts)
        for mask, source in self.parts:
            here = mask[sets, -n_read:, :][:, None]
            change = torch.where(here, _gathered(source[:, -n_read:], features) - acts, change)
        return torch.einsum("spqf,sfd->spqd", change, self.dictionary.W_dec[features])


def feature_patches(
    patch_sets: Sequence[PatchSet],
    dictionaries: Mapping[str, SparseDictionary],
    clean: Mapping[str, Tensor],
    sources: Sources,
    prompts: PromptChunk,
    first: int,
    from_layer: int,
) -> dict[str, FeaturePatch]:
    """Feature patches by the hook point that the dictionary sits at, in layers from `from_layer` on.

    `clean` holds the clean values of that hook point and of its features, for the chunk of prompts.
    """
    chosen: dict[str, list[dict[int, list[Patch]]]] = {}
    for i, patch_set in enumerate(patch_sets):
        for patch in patch_set:
            component = patch.site.component
            if component.is_feature and component.layer >= from_layer:
                by_set = chosen.setdefault(component.hook_name, [{} for _ in patch_sets])
                by_set[i].setdefault(component.index, []).append(patch)
    compiled = {}
    for name, by_set in chosen.items():
        where, value = name.removesuffix(f".{ACTS}"), clean[name]
        n_pos, device = value.shape[1], value.device
        features, masks = _masks(by_set, sources, n_pos, first)
        parts = [
            (
                torch.from_numpy(mask).to(device, non_blocking=True),
                sources.value(key, name, prompts)[:, :n_pos].expand(-1, n_pos, -1)[:, first:],
            )
            for key, mask in masks.items()
        ]
        at = torch.from_numpy(features).to(device, non_blocking=True)
        clean_value = clean[where].flatten(2)[:, first:]
        compiled[where] = FeaturePatch(dictionaries[where], at, parts, clean_value, value[:, first:])
    return compiled


def _masks(
    by_set: Sequence[Mapping[int, Sequence[Patch]]], sources: Sources, n_pos: int, first: int
) -> tuple[
    np.ndarray[tuple[int, ...], np.dtype[np.int64]], dict[SourceKey, np.ndarray[tuple[int, ...], np.dtype[np.bool_]]]
]:
    """Every set's features, and by source at which (set, position, place) it holds: that of the last patch there."""
    everywhere = all(p.site.positions is None for patches in by_set for each in patches.values() for p in each)
    shape = len(by_set), 1 if everywhere else n_pos - first, max(map(len, by_set))
    features = np.zeros((shape[0], shape[2]), dtype=np.int64)
    masks: dict[SourceKey, np.ndarray[tuple[int, ...], np.dtype[np.bool_]]] = {}
    for i, patches_of in enumerate(by_set):
        for place, (feature, patches) in enumerate(patches_of.items()):
            features[i, place] = feature
            for patch in patches:
                key, positions = sources.key(patch.source), patch.site.resolve(n_pos)
                masks.setdefault(key, np.zeros(shape, dtype=bool))
                where = slice(None) if positions is None else [p - first for p in positions if p >= first]
                for other, mask in masks.items():
                    mask[i, where, place] = other == key
    return features, masks


def _gathered(
    acts: Float[Tensor, "#prompt pos d_sae"], features: Int[Tensor, "set place"]
) -> Float[Tensor, "set #prompt pos place"]:
    return acts[..., features].movedim(2, 0)
