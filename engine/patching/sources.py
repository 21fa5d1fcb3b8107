"""What a patch puts in place of a clean activation: the values of each source at each hook point."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subcircuit.engine.config import ModelConfig
from subcircuit.engine.dictionary import ACTS, SparseDictionary
from subcircuit.engine.errors import PatchError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.sites import PatchSet, Source


class AlignedPrompts(Protocol):
    """Prompts of one length with their corrupted twins, and the two tokens whose logits are compared."""

    @property
    def clean(self) -> Int[Tensor, "prompt pos"]: ...

    @property
    def corrupted(self) -> Int[Tensor, "prompt pos"] | None: ...

    @property
    def answer(self) -> Int[Tensor, "prompt"]: ...

    @property
    def wrong(self) -> Int[Tensor, "prompt"]: ...


PromptChunk = Int[Tensor, "chunk"]
"""Prompts of the data set by index."""

SourceKey = str | int
"""A source by name, or a mapping by identity (mappings of tensors do not hash)."""


class Sources:
    """The sources of a set of rows, and their values for any chunk of the prompts.

    Of features, `mean` is the mean of their activations, and a mapping may hold the value that they are read from.
    `mean` is the mean per position over the corrupted prompts of the data set (over the clean ones where there are no
    corrupted ones), as in the ablations of Lan et al. (arXiv 2311.04131); it is measured once, in chunks.

    Raises PatchError for an unknown source, `corrupted` without corrupted prompts, or a mapping that lacks a hook
    point.
    """

    def __init__(
        self,
        model: HookedTransformer,
        prompts: AlignedPrompts,
        patch_sets: Iterable[PatchSet],
        default: Source,
        prompts_per_chunk: int,
    ) -> None:
        self._model, self._prompts, self._default = model, prompts, default
        self._prompts_per_chunk = prompts_per_chunk
        self._mappings: dict[SourceKey, Mapping[str, Tensor]] = {}
        self._means: dict[str, Tensor] = {}
        self._corrupted: dict[int, tuple[PromptChunk, Mapping[str, Tensor]]] = {}
        self.names: dict[SourceKey, list[str]] = {}
        self.add(patch_sets)

    def add(self, patch_sets: Iterable[PatchSet]) -> None:
        """Take in the sources and hook points of further patch sets."""
        self.names = self.wanted(patch_sets)
        self._measure_means()

    def wanted(self, patch_sets: Iterable[PatchSet]) -> dict[SourceKey, list[str]]:
        """Hook points by source, those of further patch sets included."""
        wanted: dict[SourceKey, set[str]] = {key: set(names) for key, names in self.names.items()}
        for patch_set in patch_sets:
            for patch in patch_set:
                wanted.setdefault(self.key(patch.source), set()).add(patch.site.component.hook_name)
        for key in wanted:
            self._check(key)
        return {key: sorted(names) for key, names in wanted.items()}

    def key(self, source: Source | None) -> SourceKey:
        """What `value` knows a patch's source by; None is the default source."""
        source = self._default if source is None else source
        if isinstance(source, str):
            return source
        self._mappings[id(source)] = source
        return id(source)

    def _check(self, key: SourceKey) -> None:
        if isinstance(key, str) and key not in ("corrupted", "mean", "zero"):
            raise PatchError(
                f"source {key!r} is not known; expected 'corrupted', 'mean', 'zero' or tensors by hook name"
            )
        if key == "corrupted" and self._prompts.corrupted is None:
            raise PatchError("source 'corrupted' needs corrupted prompts, and this task has none")

    def _measure_means(self) -> None:
        missing = [name for name in self.names.get("mean", []) if name not in self._means]
        if not missing:
            return
        tokens = self._prompts.clean if self._prompts.corrupted is None else self._prompts.corrupted
        totals: dict[str, Tensor] = {}
        for chunk in tokens.split(self._prompts_per_chunk):
            for name, value in activations(self._model, chunk, missing).items():
                totals[name] = totals.get(name, torch.zeros((), dtype=value.dtype)) + value.sum(0, keepdim=True)
        self._means |= {name: total / len(tokens) for name, total in totals.items()}

    def value(self, key: SourceKey, hook_name: str, prompts: PromptChunk) -> Float[Tensor, "#prompt pos ..."]:
        """A source's value at a hook point for a chunk of prompts; the prompt axis is 1 where all prompts share it."""
        if key == "mean":
            return self._means[hook_name]
        if key == "zero":
            return torch.zeros(1, 1, *self._tail_shape(hook_name), dtype=self._model.dtype, device=self._model.device)
        if key == "corrupted":
            return self._corrupted_values(prompts)[hook_name]
        return self._mapped(self._mappings[key], hook_name, prompts)

    def forget(self) -> None:
        """Drop the corrupted prompts' values, which are otherwise kept for every chunk that was asked for."""
        self._corrupted.clear()

    def _corrupted_values(self, prompts: PromptChunk) -> Mapping[str, Tensor]:
        names = self.names["corrupted"]
        _, values = self._corrupted.get(id(prompts), (prompts, {}))
        if not set(names) <= set(values):
            assert self._prompts.corrupted is not None
            values = activations(self._model, self._prompts.corrupted[prompts], names)
            self._corrupted[id(prompts)] = prompts, values
        return values

    def _mapped(self, mapping: Mapping[str, Tensor], hook_name: str, prompts: PromptChunk) -> Tensor:
        where = hook_name.removesuffix(f".{ACTS}")
        if hook_name not in mapping and where in mapping and where in self._model.dictionaries:
            return self._model.dictionaries[where].encode(self._mapped(mapping, where, prompts).flatten(2))
        if hook_name not in mapping:
            raise PatchError(f"source has no value for {hook_name!r}; it holds {len(mapping)} other hook points")
        value = mapping[hook_name].to(dtype=self._model.dtype, device=self._model.device)
        n_prompts, n_pos = self._prompts.clean.shape
        tail = self._tail_shape(hook_name)
        if value.ndim != len(tail) + 2 or value.shape[2:] != tail or value.shape[1] not in (1, n_pos):
            raise PatchError(
                f"source for {hook_name!r} has shape {tuple(value.shape)}; "
                f"expected ({n_prompts} or 1, {n_pos} or 1, *{tuple(tail)})"
            )
        if value.shape[0] == 1:
            return value
        if value.shape[0] != n_prompts:
            raise PatchError(f"source for {hook_name!r} has {value.shape[0]} prompts; expected {n_prompts} or 1")
        return value[prompts]

    def _tail_shape(self, hook_name: str) -> torch.Size:
        return tail_shape(self._model.config, hook_name, self._model.dictionaries)


def first_differences(prompts: AlignedPrompts) -> Int[Tensor, "prompt"]:
    """First position at which each prompt differs from its corrupted twin; the last one where none does."""
    if prompts.corrupted is None:
        return torch.zeros(len(prompts.clean), dtype=torch.int64)
    different = prompts.clean.cpu() != prompts.corrupted.cpu()
    different[:, -1] = True
    return different.int().argmax(1)


def tail_shape(config: ModelConfig, hook_name: str, dictionaries: Mapping[str, SparseDictionary]) -> torch.Size:
    """Shape of a patchable hook point's value behind prompt and position."""
    if hook_name.endswith(ACTS):
        return torch.Size([dictionaries[hook_name.removesuffix(f".{ACTS}")].d_sae])
    tails = {
        "hook_z": (config.n_heads, config.d_head),
        "hook_q": (config.n_heads, config.d_head),
        "hook_k": (config.kv_heads, config.d_head),
        "hook_v": (config.kv_heads, config.d_head),
        "hook_post": (config.d_mlp,),
    }
    return torch.Size(tails.get(hook_name.split(".")[-1], (config.d_model,)))


@torch.no_grad()
def activations(
    model: HookedTransformer, tokens: Int[Tensor, "prompt pos"], names: list[str]
) -> Mapping[str, Float[Tensor, "prompt pos ..."]]:
    """Activations at the named hook points, running no layer above the last of them."""
    last = max((int(name.split(".")[1]) for name in names if name.startswith("blocks.")), default=-1)
    return model.run_with_cache(tokens, names, stop_at_layer=last + 1)[1] if names else {}
