"""Induction: a previous-token head, and a head that looks for what followed the last token before (Olsson et al. 2022,
arXiv 2209.11895)."""

from __future__ import annotations

import random

from subcircuit.analysis.truth.blueprint import ONE, OUT, Blueprint, Feature, Head, Match, Prompt

N_TOKENS = 12
N_SHOWN = 8

BOS = 0


def _draw(rng: random.Random) -> Prompt:
    """Random tokens, then one of them again.

    The corrupted prompt is another such prompt that has nothing in the same place: it ends in another token, the clean
    prompt's last token does not stand where it stood, nor the answer.
    """
    shown, at = _shown(rng), rng.randrange(N_SHOWN - 1)
    last, answer = shown[at], shown[at + 1]
    while True:
        others, other_at = _shown(rng), rng.randrange(N_SHOWN - 1)
        other_last, wrong = others[other_at], others[other_at + 1]
        last_moved = others.index(last) != at if last in others else True
        if other_last != last and last_moved and wrong != answer and others[at + 1] != answer:
            return Prompt((BOS, *shown, last), (BOS, *others, other_last), answer, wrong)


def _shown(rng: random.Random) -> list[int]:
    return rng.sample(range(1, N_TOKENS + 1), N_SHOWN)


def _embedding() -> tuple[tuple[Feature, ...], ...]:
    return (("bos", 0),), *((("token", token),) for token in range(N_TOKENS))


INDUCTION = Blueprint(
    name="induction",
    description="A previous-token head writes to each position which token stood before it; the induction head's key "
    "reads that, so that the last token finds what followed it the first time, whose token it writes to the logits.",
    sizes={"bos": 1, "token": N_TOKENS, "previous": N_TOKENS, OUT: N_TOKENS},
    embedding=_embedding(),
    predicts=tuple(range(1, N_TOKENS + 1)),
    stages=(
        {
            "previous token": Head(
                matches=(),
                offset=lambda distance: float(distance == 1),
                moves=(("token", "previous", 1.0),),
            )
        },
        {
            "induction": Head(
                # Where nothing is found, attention rests on the beginning.
                matches=(Match("token", "previous", 1.0), Match(ONE, "bos", 0.5)),
                moves=(("token", OUT, 1.0),),
            )
        },
    ),
    edges=(
        ("input", "previous token.v"),
        ("input", "induction.q"),
        ("previous token", "induction.k"),
        ("input", "induction.v"),
        ("induction", "logits"),
    ),
    n_pos=1 + N_SHOWN + 1,
    positions={"first": tuple(range(1, 1 + N_SHOWN)), "last": (1 + N_SHOWN,)},
    draw=_draw,
)
