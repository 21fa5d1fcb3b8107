"""The known models by name."""

from __future__ import annotations

import torch

from subcircuit.analysis.truth.blueprint import Blueprint
from subcircuit.analysis.truth.build import Truth, build
from subcircuit.analysis.truth.induction import INDUCTION
from subcircuit.analysis.truth.inhibition import INHIBITION
from subcircuit.analysis.truth.successor import SUCCESSOR
from subcircuit.analysis.truth.weights import Family
from subcircuit.engine.errors import TaskError

BLUEPRINTS: dict[str, Blueprint] = {blueprint.name: blueprint for blueprint in (INDUCTION, SUCCESSOR, INHIBITION)}
FAMILIES: tuple[Family, ...] = ("gpt2", "llama")


def truth_names() -> tuple[str, ...]:
    """Names of the known models: `induction`, `successor`, `inhibition`."""
    return tuple(BLUEPRINTS)


def truth(
    name: str,
    family: Family = "gpt2",
    *,
    n: int = 16,
    n_layers: int | None = None,
    n_heads: int = 4,
    n_distractors: int | None = None,
    noise: float = 1.0,
    sharpness: float = 12.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Truth:
    """A model with hand-set weights whose circuit is known, with a task of `n` prompts (docs/truth.md).

    `family` is `gpt2` (LayerNorm, learned positions, GELU) or `llama` (RMSNorm, rotary positions, grouped keys and
    values, gated SiLU). The circuit's parts sit at random places among `n_layers` layers (two more than it needs by
    default) of `n_heads` heads; of the places that are left, `n_distractors` (half of them by default) write noise of
    size `noise`, in units of what the circuit writes, and the others write nothing. `sharpness` is the score by which
    heads prefer what they look for: at 12, e⁻¹² of the attention goes to each other position, and hardly any gradient
    flows through it. All that is random, prompts included, comes from `seed`.

    Raises TaskError for a name or family that is not known, or sizes into which the circuit does not fit.
    """
    if name not in BLUEPRINTS:
        raise TaskError(f"known model {name!r} does not exist; expected one of {', '.join(BLUEPRINTS)}")
    if family not in FAMILIES:
        raise TaskError(f"family {family!r} is not known; expected one of {', '.join(FAMILIES)}")
    if not (noise >= 0 and sharpness > 0):
        raise TaskError(f"noise={noise}, sharpness={sharpness}: expected no negative noise, and a positive sharpness")
    if n < 1 or n_heads < 2 or n_heads % 2:
        raise TaskError(f"n={n}, n_heads={n_heads}: expected at least one prompt and an even number of heads")
    return build(
        BLUEPRINTS[name],
        family,
        n_prompts=n,
        n_layers=n_layers,
        n_heads=n_heads,
        n_distractors=n_distractors,
        noise=noise,
        sharpness=sharpness,
        seed=seed,
        dtype=dtype,
    )
