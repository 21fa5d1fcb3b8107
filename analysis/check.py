"""The built-in oracle: some rows of a sweep once more, as full forward passes in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.engine.errors import PatchError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.metric import Metric
from subcircuit.engine.patching.options import Precision, in_dtype
from subcircuit.engine.patching.reference import last_logits, patched_metric
from subcircuit.engine.patching.sites import Patch, PatchSet, Site, Source, as_patch_set
from subcircuit.engine.patching.sources import AlignedPrompts, Sources

TOLERANCE: dict[Precision, float] = {"fp64": 1e-7, "fp32": 1e-4, "bf16": 1e-2}
"""‖Δ‖ / ‖effects‖ of many rows, by precision of the products."""

SLACK = 3
"""A few rows may lie this much further off: in bfloat16 single heads of SmolLM2 are at 1.2·10⁻² where all of them
together are at 5·10⁻³. A wrong effect is off by 1."""

NEGLIGIBLE = 1e-6
"""Effects are not asked to be more exact than an effect of this share of the logit difference would be: where nothing
changes, the float64 forward passes themselves leave rounding errors."""

LEAST_SHARE: dict[Precision, float] = {"fp64": 0.01, "fp32": 0.01, "bf16": 1.0}
"""A row's error follows its δ and not its effect, which may be small for a large δ. In bfloat16 that can exceed the
tolerance for any row but a typical one; otherwise only for one of hardly any effect."""

PROMPTS_AT_ONCE = 16


@dataclass(frozen=True)
class Check:
    """How far a sweep's effects are from those of full forward passes in float64, on a few of its rows."""

    rows: int
    relative_error: float
    """‖Δ‖ / ‖reference effects‖ over the rows together, so that a row without effect does not blow it up; rows count as
    having at least `LEAST_SHARE` of the root mean square effect of the whole sweep."""
    max_absolute_error: float
    """Of a single row, in the unit of the metric."""
    worst_site: str
    worst_prompt: int
    tolerance: float
    passed: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.rows} rows once more in float64: relative error {self.relative_error:.1e} "
            f"(tolerance {self.tolerance:.0e}), largest {self.max_absolute_error:.1e} "
            f"at '{self.worst_site}', prompt {self.worst_prompt}"
        )


@torch.no_grad()
def check_effects(
    model: HookedTransformer,
    prompts: AlignedPrompts,
    patch_sets: Sequence[Patch | Site | str | PatchSet],
    effects: Float[Tensor, "set prompt"],
    *,
    k: int,
    source: Source = "corrupted",
    precision: Precision = "fp32",
    metric: Metric = "logit_difference",
    seed: int = 0,
) -> Check:
    """Compare k effects, drawn at random, with full forward passes in float64 (all of them where there are fewer).

    A copy of the model in float64 is made for as long as it takes; with the source `mean`, its means are measured anew
    over all prompts.

    Raises PatchError for k below 1, or effects of another shape.
    """
    sets = [as_patch_set(patch_set) for patch_set in patch_sets]
    shape = len(sets), len(prompts.clean)
    if k < 1 or tuple(effects.shape) != shape or 0 in shape:
        raise PatchError(f"a check of {k} rows of effects {tuple(effects.shape)}; expected at least 1, of {shape}")
    chosen = torch.randperm(effects.numel(), generator=torch.Generator().manual_seed(seed))[:k]
    rows = [divmod(int(row), shape[1]) for row in chosen.sort().values]
    exact, clean = _reference(in_dtype(model, torch.float64), prompts, sets, rows, source, metric)
    found = torch.stack([effects[row] for row in rows]).double().cpu()
    least = NEGLIGIBLE * (1 + float(clean.square().mean().sqrt()))
    typical = float(effects.double().square().mean().sqrt())
    if math.isfinite(typical):
        least = max(least, LEAST_SHARE[precision] * typical)
    return _compared(rows, sets, found, exact, least, SLACK * TOLERANCE[precision])


def _reference(
    model: HookedTransformer,
    prompts: AlignedPrompts,
    sets: Sequence[PatchSet],
    rows: Sequence[tuple[int, int]],
    source: Source,
    metric: Metric,
) -> tuple[Float[Tensor, "row"], Float[Tensor, "row"]]:
    """Effects of single rows, and the metric without them."""
    sources = Sources(model, prompts, [sets[i] for i, _ in rows], source, PROMPTS_AT_ONCE)
    exact, clean = [], []
    for i, prompt in rows:
        at = torch.tensor([prompt])
        logits = last_logits(model, prompts, at)
        clean.append(patched_metric(model, prompts, at, (), sources, metric, logits))
        exact.append(patched_metric(model, prompts, at, sets[i], sources, metric, logits) - clean[-1])
        sources.forget()
    return torch.cat(exact).cpu(), torch.cat(clean).cpu()


def _compared(
    rows: Sequence[tuple[int, int]],
    sets: Sequence[PatchSet],
    found: Float[Tensor, "row"],
    exact: Float[Tensor, "row"],
    least: float,
    tolerance: float,
) -> Check:
    """Effects beside exact ones, each of which counts as at least `least`."""
    errors = (found - exact).abs().nan_to_num(float("inf"), float("inf"))
    error = float(errors.norm()) / max(float(exact.norm()), least * len(rows) ** 0.5)
    worst = int(errors.argmax())
    site, prompt = rows[worst]
    name = " + ".join(str(patch.site) for patch in sets[site])
    return Check(len(rows), error, float(errors[worst]), name, prompt, tolerance, error <= tolerance)
