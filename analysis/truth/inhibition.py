"""S-inhibition: which of two names was not repeated, with the main roles of the circuit for indirect object
identification (Wang et al. 2022, arXiv 2211.00593)."""

from __future__ import annotations

import random

from subcircuit.analysis.truth.blueprint import ONE, OUT, Blueprint, Feature, Head, Match, Prompt

N_NAMES = 10
N_WORDS = 6
NEGATIVE = 0.5
"""What the negative name mover takes away of the name that each name mover brings."""

BOS, FIRST_NAME, FIRST_WORD, END = 0, 1, 1 + N_NAMES, 1 + N_NAMES + N_WORDS


def _draw(rng: random.Random) -> Prompt:
    """Two names, one of them again, and END; the name to predict is the other.

    The corrupted prompt has other names. Were any the same, patching a single edge could lead to the right name by
    another way. The repetition is at one of two positions, in the corrupted prompt at the other one.
    """
    answer, repeated, wrong, other_repeated = rng.sample(range(FIRST_NAME, FIRST_NAME + N_NAMES), 4)
    words = [rng.randrange(FIRST_WORD, FIRST_WORD + N_WORDS) for _ in range(3)]
    late = rng.random() < 0.5
    return Prompt(
        clean=_prompt(answer, repeated, words, rng.random() < 0.5, late),
        corrupted=_prompt(wrong, other_repeated, words, rng.random() < 0.5, not late),
        answer=answer,
        wrong=wrong,
    )


def _prompt(name: int, repeated: int, words: list[int], repeated_first: bool, late: bool) -> tuple[int, ...]:
    first, second = (repeated, name) if repeated_first else (name, repeated)
    again = (words[2], repeated) if late else (repeated, words[2])
    return BOS, first, words[0], second, words[1], *again, END


def _embedding() -> tuple[tuple[Feature, ...], ...]:
    names = [(("name", i), ("a name", 0)) for i in range(N_NAMES)]
    return (("bos", 0),), *names, *((("word", i),) for i in range(N_WORDS)), (("end", 0),)


def _name_mover(weight: float) -> Head:
    return Head(
        matches=(
            Match(ONE, "a name", 1.0),
            Match("inhibited", "name", -1.0),
            Match(ONE, "bos", 0.5),
        ),
        moves=(("name", OUT, weight),),
    )


INHIBITION = Blueprint(
    name="inhibition",
    description="A duplicate-token head writes to a repeated name which name it is, and that it is a repetition; the "
    "S-inhibition head finds the repetition and brings its name to the last token; name movers attend from there to "
    "names, but not to that one, and write the name to the logits, which the negative name mover works against.",
    sizes={
        "bos": 1,
        "name": N_NAMES,
        "a name": 1,
        "word": N_WORDS,
        "end": 1,
        "duplicate": N_NAMES,
        "a duplicate": 1,
        "inhibited": N_NAMES,
        OUT: N_NAMES,
    },
    embedding=_embedding(),
    predicts=tuple(range(FIRST_NAME, FIRST_NAME + N_NAMES)),
    stages=(
        {
            "duplicate token": Head(
                matches=(Match("name", "name", 1.0), Match(ONE, "bos", 0.5)),
                # A name is no repetition of itself.
                offset=lambda distance: -2.0 * (distance == 0),
                moves=(("name", "duplicate", 1.0), ("a name", "a duplicate", 1.0)),
            )
        },
        {
            "S-inhibition": Head(
                matches=(Match("end", "a duplicate", 1.0), Match(ONE, "bos", 0.5)),
                moves=(("duplicate", "inhibited", 1.0),),
            )
        },
        {"name mover 1": _name_mover(1.0), "name mover 2": _name_mover(1.0)},
        {"negative name mover": _name_mover(-NEGATIVE)},
    ),
    edges=(
        ("input", "duplicate token.q"),
        ("input", "duplicate token.k"),
        ("input", "duplicate token.v"),
        ("duplicate token", "S-inhibition.k"),
        ("duplicate token", "S-inhibition.v"),
        *(
            edge
            for mover in ("name mover 1", "name mover 2", "negative name mover")
            for edge in (
                ("S-inhibition", f"{mover}.q"),
                ("input", f"{mover}.k"),
                ("input", f"{mover}.v"),
                (mover, "logits"),
            )
        ),
    ),
    n_pos=8,
    # The repetition is at one of two positions, which are one class.
    positions={"name": (1, 3, 5, 6), "S2": (5, 6), "last": (7,)},
    draw=_draw,
)
