"""Rows of one batch that each go without components of their own, in a forward pass or while they generate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import PatchError
from subcircuit.engine.hooks import Hook
from subcircuit.engine.patching.sites import Component


class RowAblations:
    """Which components each row of a batch goes without, at every position, those it generates included.

        ablations = RowAblations([["a5.h1", "m3"], []])
        model.generate([text, text], hooks=ablations.hooks(model.config))

    One batch can hold a circuit's row, rows of random heads and the whole model's: each equals the run in which that
    row is alone and its components are replaced by an ordinary hook.

    rows: per row of the batch, components or their names; none for the whole model.
    values: what stands in for a component, by hook name, in a shape that expands to the hook point's value (such as
    `[1, 1, head, d_head]` for `hook_z`); 0 if none are given.

    Raises PatchError for a name of no known form, or values that lack a hook point.
    """

    def __init__(self, rows: Sequence[Iterable[Component | str]], values: Mapping[str, Tensor] | None = None) -> None:
        self.rows = [
            [Component.parse(part) if isinstance(part, str) else part for part in components] for components in rows
        ]
        self.values = values
        missing = {part.hook_name for row in self.rows for part in row} - set(values if values is not None else ())
        if values is not None and missing:
            raise PatchError(f"no value to stand in at {sorted(missing)[0]!r}; got values of {len(values)} hook points")

    def hooks(self, config: ModelConfig) -> list[Hook]:
        """A hook for every hook point of a component that any row goes without.

        Raises PatchError for a component that the model lacks, and in the forward pass for a batch of another size.
        """
        masks: dict[str, Bool[Tensor, "row entry"]] = {}
        for i, row in enumerate(self.rows):
            for part in row:
                part.check(config)
                mask = masks.setdefault(part.hook_name, torch.zeros(len(self.rows), part.axis_size(config)).bool())
                mask[i, list(part.indices(config))] = True
        return [(name, self._replace(name, mask)) for name, mask in masks.items()]

    def _replace(self, name: str, mask: Bool[Tensor, "row entry"]) -> Callable[[Tensor, str], Tensor]:
        value_there = torch.zeros(()) if self.values is None else self.values[name]

        def replace(value: Tensor, name: str) -> Tensor:
            if len(value) != len(mask):
                raise PatchError(f"{len(mask)} rows of ablations for a batch of {len(value)} at {name!r}")
            # One entry for a whole output, else one per head or neuron: [row, 1, entry] and, for heads, d_head.
            where = mask.to(value.device)[:, None].reshape(len(mask), 1, -1, *[1] * (value.ndim - 3))
            return torch.where(where, value_there.to(value), value)

        return replace
