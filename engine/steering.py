"""Steering: a vector added to what a component writes, while a prompt is read and while it is continued.

Turner et al. 2023, "Activation Addition" (arXiv 2308.10248); Rimsky et al. 2023 (arXiv 2312.06681) for the mean
difference between two sets of prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import PatchError
from subcircuit.engine.hooks import Hook
from subcircuit.engine.patching.sites import Component, Site

if TYPE_CHECKING:
    from subcircuit.engine.inputs import Prompts
    from subcircuit.engine.model import HookedTransformer


@dataclass(frozen=True, eq=False)
class Steering:
    """A vector and where it is added, `coefficient` times.

        steering = Steering.of("r2", vector, 4.0)
        model.generate("May June", steering=[steering])
        model.run_with_hooks("May June", steering.hooks(model.config))

    site: the residual stream that enters a layer (`r12`), an MLP's output (`m3`), or a head's output or its query, key
    or value before rotary embedding (`a5.h1`, `a5.q1`, `a5.k0`, `a5.v0`); a `Site` for some positions of the prompt
    alone. Without positions the vector is added everywhere, at generated tokens too.
    vector: `[d_model]`, or `[d_head]` for a head.

    Raises PatchError for another kind of component, a vector that is no vector, or a number that is not finite.
    """

    site: Site
    vector: Float[Tensor, " d"]
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        if self.component.kind in ("neuron", "group"):
            raise PatchError(f"'{self.component}' cannot be steered; expected r4, m3, or a5.h1 and its q, k and v")
        if self.vector.ndim != 1:
            raise PatchError(f"steering vector for '{self.component}' has shape {tuple(self.vector.shape)}; expected 1")
        if not bool(self.vector.isfinite().all()) or not torch.tensor(self.coefficient).isfinite():
            raise PatchError(f"steering of '{self.component}' has a vector or coefficient that is not finite")

    @classmethod
    def of(cls, where: Site | Component | str, vector: Float[Tensor, " d"], coefficient: float = 1.0) -> Self:
        """Steering at a site, a component, or a component's name."""
        return cls(Site.of(where), vector, coefficient)

    @property
    def component(self) -> Component:
        return self.site.component

    @property
    def positions(self) -> tuple[int, ...] | None:
        """Positions of the prompt, or None for all and generated ones too."""
        return self.site.positions

    def hooks(self, config: ModelConfig, mask: Bool[Tensor, "batch pos"] | None = None) -> list[Hook]:
        """What adds the vector to whole prompts.

        mask: which tokens of left-padded prompts are real. Positions are those of each prompt without its padding:
        from 0 at its first token, negative ones from its end.

        Raises PatchError for a component that the model lacks, or a vector of the wrong length; in the forward pass
        for a position outside a prompt.
        """
        self.component.check(config)
        d = config.d_model if self.component.kind in ("resid", "mlp") else config.d_head
        if len(self.vector) != d:
            raise PatchError(f"steering vector for '{self.component}' has {len(self.vector)} entries; expected {d}")
        return [(self.component.hook_name, self._add(mask))]

    def _add(self, mask: Bool[Tensor, "batch pos"] | None) -> Callable[[Tensor, str], Tensor]:
        is_head = self.component.kind not in ("resid", "mlp")

        def add(value: Tensor, name: str) -> Tensor:
            added = (self.coefficient * self.vector).to(value)
            value = value.clone()
            part = value[:, :, self.component.index] if is_head else value  # a view
            part += self._where(part, mask)[..., None] * added
            return value

        return add

    def _where(self, value: Float[Tensor, "batch pos d"], mask: Bool[Tensor, "batch pos"] | None) -> Tensor:
        """1 where the vector is added, 0 elsewhere, `[batch, pos]`."""
        n_batch, n_pos = value.shape[:2]
        if self.positions is None:
            return value.new_ones(n_batch, n_pos)
        where = value.new_zeros(n_batch, n_pos)
        for row in range(n_batch):
            n_real = n_pos if mask is None else int(mask[row].sum())
            # Padding is on the left, so counting from the end needs no correction.
            resolved = Site(self.component, self.positions).resolve(n_real)
            where[row, [position - n_real for position in resolved or ()]] = 1
        return where


@torch.no_grad()
def mean_difference(
    model: HookedTransformer,
    component: Component | str,
    towards: Prompts,
    away_from: Prompts,
    position: int | None = -1,
) -> Float[Tensor, " d"]:
    """A steering vector: mean activation of a component on some prompts minus that on others.

    position: where it is read in every prompt, counted from the end; None for the mean over all of its tokens.

    Raises PatchError for a component that the model lacks or that cannot be steered, or a position outside a prompt;
    PromptError for prompts that cannot be read.
    """
    part = Component.parse(component) if isinstance(component, str) else component
    Steering.of(part, torch.zeros(1))  # the same components are allowed
    part.check(model.config)
    means = [_mean_activation(model, part, prompts, position) for prompts in (towards, away_from)]
    return means[0] - means[1]


def _mean_activation(
    model: HookedTransformer, part: Component, prompts: Prompts, position: int | None
) -> Float[Tensor, " d"]:
    batch = model.prompt_batch(prompts)
    real = batch.mask if batch.mask is not None else torch.ones_like(batch.tokens, dtype=torch.bool)
    if position is not None and not -int(real.sum(1).min()) <= position < 0:
        raise PatchError(f"position {position} is not in every prompt; expected -1 for the last token, -2, …")
    _, cache = model.run_with_cache(
        batch.tokens, part.hook_name, stop_at_layer=part.layer + 1, attention_mask=batch.mask
    )
    value = cache[part.hook_name]
    value = value if part.kind in ("resid", "mlp") else value[:, :, part.index]
    if position is not None:
        return value[:, position].mean(0)
    weights = real / real.sum(1, keepdim=True) / len(real)
    return torch.einsum("bp,bpd->d", weights.to(value), value)


@torch.no_grad()
def steered_source(model: HookedTransformer, tokens: Tensor, steering: Steering) -> Mapping[str, Tensor]:
    """Steering as the source of a patch: the clean activation plus the vector, by hook name, `[prompt, pos, …]`.

        source = steered_source(model, task.clean, steering)
        effects = patch_effects(model, task, [Patch(steering.site, source)])

    tokens: the clean prompts that are patched, `[prompt, pos]`. The whole hook point is held in memory.
    """
    name = steering.component.hook_name
    kept: dict[str, Tensor] = {}

    def keep(value: Tensor, name: str) -> None:
        kept[name] = value

    hooks: list[Hook] = [*steering.hooks(model.config), (name, keep)]
    model.run_with_hooks(tokens, hooks, stop_at_layer=steering.component.layer + 1)
    return kept
