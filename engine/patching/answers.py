"""What a prompt's metric compares: one right and one wrong token, or sets of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from subcircuit.engine.patching.sources import AlignedPrompts

TokenSet = Int[Tensor, "prompt token"]
"""Tokens of each prompt, rows filled up with −1."""


def token_sets(prompts: AlignedPrompts) -> tuple[TokenSet, TokenSet]:
    """All right and all wrong tokens of each prompt: its `answers` and `wrongs` where it has these sets, else its
    `answer` and `wrong`."""
    answers, wrongs = getattr(prompts, "answers", None), getattr(prompts, "wrongs", None)
    return (
        prompts.answer[:, None] if answers is None else answers,
        prompts.wrong[:, None] if wrongs is None else wrongs,
    )


def mean_at(values: Float[Tensor, "prompt d_vocab"], tokens: TokenSet) -> Float[Tensor, "prompt"]:
    """Mean of each prompt's values at its tokens."""
    tokens = tokens.to(values.device)
    return _mean(values.gather(1, tokens.clamp(min=0)), tokens)


def answer_directions(
    unembed: Float[Tensor, "d_vocab d_model"], answers: TokenSet, wrongs: TokenSet
) -> Float[Tensor, "prompt d_model"]:
    """Along which the normed residual stream is mean logit(answers) − mean logit(wrongs)."""
    return mean_unembed(unembed, answers) - mean_unembed(unembed, wrongs)


def mean_unembed(unembed: Float[Tensor, "d_vocab d_model"], tokens: TokenSet) -> Float[Tensor, "prompt d_model"]:
    """Along which the normed residual stream is the mean logit of each prompt's tokens."""
    tokens = tokens.to(unembed.device)
    return _mean(unembed[tokens.clamp(min=0)], tokens)


def _mean(values: Float[Tensor, "prompt token *d"], tokens: TokenSet) -> Float[Tensor, "prompt *d"]:
    there = tokens >= 0
    there = there.view(*there.shape, *[1] * (values.ndim - 2))
    return values.where(there, 0).sum(1) / there.sum(1)
