"""A head in numbers: where it attends among the members, what it writes for them, what it matches, what it adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from subcircuit.analysis.heads import HeadRoles
from subcircuit.analysis.statistics import interval_columns
from subcircuit.engine.errors import TaskError

SHIFTS = (-1, 0, 1, 2, 3)
"""Places in the sequence, from the member attended to, whose tokens a head may write."""


def head_profiles(found: HeadRoles, heads: Sequence[tuple[int, int]], top: int = 5) -> list[dict[str, Any]]:
    """A row per head, with None for what the task does not show.

    `to_previous_members`: attention from each member to the one before it (`to_previous_member`: their mean);
    `last_to_newest` and `last_to_members`: from the last token to the newest member, and to all. `ov`: by place in the
    sequence (`copy`, `next`, `+2`, …) the share of members for which the token so many places on is among the `top`
    that the head writes (`ov_intervals`: with 95 % confidence, bootstrap over prompts), `ov_anti_copy` the member
    itself among the bottom ones. `qk_similar` and `qk_last`: how well it tells members from other tokens by content,
    0.5 by chance. `direct`: logits that it adds to logit(answer) − logit(wrong) directly, between `direct_low` and
    `direct_high`.
    """
    ov = ov_by_prompt(found, top)
    anti_copy = found.ov.hits(0, top, suppressed=True) if found.ov is not None else None
    return [_profile(found, head, ov, anti_copy) for head in heads]


def mean_profile(found: HeadRoles, top: int = 5) -> dict[str, Any]:
    """The numbers of `head_profiles` averaged over all heads of the model, to hold one against: Lan et al. report that
    9.1 of GPT-2 Small writes the next member for 87 % of numerals, and the mean head for 3 %."""
    members = found.lookups.classes.get("members", ())
    pairs, from_last = found.lookups.between_members(), found.lookups.pattern[:, :, -1]
    has_pairs = pairs.shape[-1] > 0
    return {
        "n_heads": found.config.n_layers * found.config.n_heads,
        "to_previous_member": float(pairs.mean()) if has_pairs else None,
        "last_to_newest": float(from_last[..., members[-1]].mean()) if members else None,
        "last_to_members": float(from_last[..., list(members)].sum(-1).mean()) if members else None,
        "ov": {name: float(share.mean()) for name, share in ov_shares(found, top).items()},
        "ov_anti_copy": None if found.ov is None else float(found.ov.hits(0, top, suppressed=True).mean()),
        "qk_similar": None if found.qk is None else float(found.qk.similar.mean()),
        "qk_last": None if found.qk is None else float(found.qk.last.mean()),
        "direct": float(found.attribution.heads.double().mean()),
        **interval_columns(found.attribution.heads.double().mean((0, 1))[None], "direct_")[0],
    }


def ov_shares(found: HeadRoles, top: int = 5) -> dict[str, Float[Tensor, "layer head"]]:
    """OV scores of every place in the sequence that the task's chain of tokens has, by name."""
    return {name: share.mean(-1) for name, share in ov_by_prompt(found, top).items()}


def ov_by_prompt(found: HeadRoles, top: int = 5) -> dict[str, Float[Tensor, "layer head prompt"]]:
    """The same of each prompt."""
    if found.ov is None:
        return {}
    shares = {}
    for shift in SHIFTS if found.ov.is_sequence else (0,):
        try:
            name = {-1: "previous", 0: "copy", 1: "next"}.get(shift, f"{shift:+d}")
            shares[name] = found.ov.hits_by_prompt(shift, top)
        except TaskError:  # the chain is too short for it
            continue
    return shares


def _profile(
    found: HeadRoles,
    head: tuple[int, int],
    ov: dict[str, Float[Tensor, "layer head prompt"]],
    anti_copy: Float[Tensor, "layer head"] | None,
) -> dict[str, Any]:
    pairs = found.lookups.between_members()[head]
    members = found.lookups.classes.get("members", ())
    from_last = found.lookups.pattern[head][-1]
    terms = found.attribution.heads[head].double()
    shares = {name: share[head] for name, share in ov.items()}
    return {
        "head": f"a{head[0]}.h{head[1]}",
        "layer": head[0],
        "index": head[1],
        "roles": list(found.of(head)),
        "to_previous_members": pairs.tolist(),
        "to_previous_member": float(pairs.mean()) if len(pairs) else None,
        "last_to_newest": float(from_last[members[-1]]) if members else None,
        "last_to_members": float(from_last[list(members)].sum()) if members else None,
        "ov": {name: float(share.mean()) for name, share in shares.items()},
        "ov_intervals": {name: list(interval_columns(share[None])[0].values()) for name, share in shares.items()},
        "ov_anti_copy": None if anti_copy is None else float(anti_copy[head]),
        "qk_similar": None if found.qk is None else float(found.qk.similar[head]),
        "qk_last": None if found.qk is None else float(found.qk.last[head]),
        "direct": float(terms.mean()),
        **interval_columns(terms[None], "direct_")[0],
    }
