"""Successor: members of a cyclic sequence between words, with the roles that Lan et al. (arXiv 2311.04131) found."""

from __future__ import annotations

import random

from subcircuit.analysis.truth.blueprint import ONE, OUT, Blueprint, Conjunctions, Feature, Head, Match, Prompt

N_MEMBERS = 10
N_WORDS = 6
N_SHOWN = 4

BOS, FIRST_MEMBER, FIRST_WORD = 0, 1, 1 + N_MEMBERS


def _draw(rng: random.Random) -> Prompt:
    """Four members that go up by one.

    The corrupted prompt has the same words, and members that go down by one to another newest member, such that the
    newest member of one prompt and the one before it of the other never make the clean answer.
    """
    newest = rng.randrange(N_MEMBERS)
    other_newest = newest + rng.choice([step for step in range(N_MEMBERS) if step not in (0, 2, N_MEMBERS - 2)])
    words = [rng.randrange(FIRST_WORD, FIRST_WORD + N_WORDS) for _ in range(N_SHOWN + 1)]
    return Prompt(
        clean=_prompt(words, [newest - back for back in reversed(range(N_SHOWN))]),
        corrupted=_prompt(words, [other_newest + back for back in reversed(range(N_SHOWN))]),
        answer=_member(newest + 1),
        wrong=_member(other_newest - 1),
    )


def _prompt(words: list[int], members: list[int]) -> tuple[int, ...]:
    pairs = [token for word, member in zip(words, members, strict=False) for token in (word, _member(member))]
    return BOS, *pairs, words[-1]


def _member(index: int) -> int:
    return FIRST_MEMBER + index % N_MEMBERS


def _embedding() -> tuple[tuple[Feature, ...], ...]:
    members = [(("member", i), ("a member", 0)) for i in range(N_MEMBERS)]
    return (("bos", 0),), *members, *((("word", i),) for i in range(N_WORDS))


def _neurons(step: int) -> list[tuple[Feature, Feature, Feature]]:
    """Fire where the newest member is `step` from the one before, and promote the one `step` on."""
    return [
        (("before", i), ("newest", (i + step) % N_MEMBERS), (OUT, (i + 2 * step) % N_MEMBERS)) for i in range(N_MEMBERS)
    ]


SUCCESSOR = Blueprint(
    name="successor",
    description="A similar-member head writes to each member which member came before it; the next-member head brings "
    "the newest member and what was written there to the last token; an MLP has a neuron for each pair of members one "
    "step apart, up or down, that promotes the member one step on.",
    sizes={
        "bos": 1,
        "member": N_MEMBERS,
        "word": N_WORDS,
        "a member": 1,
        "earlier": N_MEMBERS,
        "before": N_MEMBERS,
        "newest": N_MEMBERS,
        OUT: N_MEMBERS,
    },
    embedding=_embedding(),
    predicts=tuple(range(FIRST_MEMBER, FIRST_MEMBER + N_MEMBERS)),
    stages=(
        {
            "similar member": Head(
                # Attention rests on the beginning, unless a member stands two back from a member.
                matches=(Match("a member", "a member", 1.0), Match(ONE, "bos", 1.5)),
                offset=lambda distance: float(distance == 2),
                moves=(("member", "earlier", 1.0),),
            )
        },
        {
            "next member": Head(
                # Every member outdoes every word, and a newer one an older one.
                matches=(Match(ONE, "member", 2.0),),
                offset=lambda distance: -0.5 * distance,
                moves=(("member", "newest", 1.0), ("earlier", "before", 1.0)),
            )
        },
        {"successor": Conjunctions(tuple(_neurons(1) + _neurons(-1)))},
    ),
    edges=(
        ("input", "similar member.v"),
        ("similar member", "next member.v"),
        ("input", "next member.v"),
        ("next member", "successor"),
        ("successor", "logits"),
    ),
    n_pos=2 + 2 * N_SHOWN,
    positions={
        "words": tuple(range(1, 2 + 2 * N_SHOWN, 2)),
        "members": tuple(range(2, 2 + 2 * N_SHOWN, 2)),
        "last": (1 + 2 * N_SHOWN,),
    },
    draw=_draw,
)
