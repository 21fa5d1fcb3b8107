"""What the cards of the sequence tasks say."""

from __future__ import annotations

from subcircuit.analysis.tasks.sequences import RULES, SEQUENCES
from subcircuit.analysis.tasks.values import About

_LAN = "Lan et al. 2024, Towards Interpretable Sequence Continuation, arXiv 2311.04131"
_CORRUPTED = (
    "The same words with other members, at random, in place of those shown: the last steps follow no rule and the last "
    "member is neither the answer nor the wrong answer."
)
_NEXT = (
    "Four {members} in order (or as many as are asked for) are shown, in a sentence each or bare; the next one is the "
    "answer, the last one shown the wrong answer. The model has to see that there is a sequence and to count on from "
    "its newest member."
)
_MEASURES = {
    **{name: _NEXT.format(members=name.replace("_", " ")) for name in SEQUENCES},
    "decreasing_numerals": (
        "Four numerals that count down; the next lower one is the answer, the last one shown the wrong answer. A "
        "circuit that only counts up fails here."
    ),
    "repeated_numerals": (
        "Four times the same numeral; it is the answer, the next one the wrong answer. It tells whether a circuit "
        "counts on from any numeral or only where there is a sequence."
    ),
}


def sequence_about(name: str) -> About:
    """What the card of a sequence task says; KeyError for another task."""
    rule = RULES[name]
    wants = "to count on, from any number" if rule.step == 1 else "to find the step; a circuit that adds one fails here"
    interval = (
        f"Three numerals in steps of {rule.step}; the next in the same steps is the answer, the last one shown the "
        f"wrong answer. The model has {wants}."
    )
    return About(_MEASURES.get(name, interval), _CORRUPTED, _LAN)
