"""Indirect object identification: which of two people is given something (Wang et al. 2022)."""

from __future__ import annotations

import random
from itertools import product

from subcircuit.analysis.tasks.frames import Draw, Frame, FrameTask, Pool, Words
from subcircuit.analysis.tasks.values import About
from subcircuit.analysis.words import FIRST_NAMES

SOURCE = "Wang et al. 2022, Interpretability in the Wild, arXiv 2211.00593; sentences are our own"
SENTENCES = (
    "When {0} and {1} went to the store, {{S2:name}} gave a drink to {{answer:name}}",
    "After {0} and {1} got to the park, {{S2:name}} threw a ball to {{answer:name}}",
    "While {0} and {1} sat in the office, {{S2:name}} handed a letter to {{answer:name}}",
    "Once {0} and {1} came to the school, {{S2:name}} showed a picture to {{answer:name}}",
)
ORDERS = {"abba": ("{IO:name}", "{S1:name}"), "baba": ("{S1:name}", "{IO:name}")}
"""Where the indirect object stands among the first two names: first, or second."""


def _draw(rng: random.Random, frame: Frame, words: Words) -> Draw:
    """The giver's second mention becomes somebody not mentioned: no name is repeated, so neither is ruled out."""
    indirect_object, subject, third = rng.sample(words["name"], 3)
    clean = {"IO": indirect_object, "S1": subject, "S2": subject}
    return Draw(clean, {"S2": third}, (indirect_object,), (subject,))


def _draw_swapped(rng: random.Random, frame: Frame, words: Words) -> Draw:
    """The giver's second mention becomes the receiver: now the other of the two is to be named."""
    indirect_object, subject = rng.sample(words["name"], 2)
    clean = {"IO": indirect_object, "S1": subject, "S2": subject}
    return Draw(clean, {"S2": indirect_object}, (indirect_object,), (subject,))


_FRAMES = tuple(Frame(name, sentence.format(*pair)) for sentence, (name, pair) in product(SENTENCES, ORDERS.items()))
_NAMES = {"name": Pool(FIRST_NAMES, 3, "first names")}
_MEASURES = (
    "Two people are named, then one of them again as the giver; the one to receive is the other. The model has to "
    "notice which name is repeated and to keep from naming it. In `abba` the receiver stands first, in `baba` second."
)

IOI_TASKS = {
    "ioi": FrameTask(
        about=About(
            _MEASURES,
            "The giver's second mention is a third name: nothing says any more which of the two has been taken.",
            SOURCE,
        ),
        frames=_FRAMES,
        pools=_NAMES,
        draw=_draw,
    ),
    "ioi_swap": FrameTask(
        about=About(
            _MEASURES,
            "The giver's second mention is the other of the two names, so that answer and wrong answer change places: "
            "what the repeated name says is reversed, all else stays.",
            SOURCE,
        ),
        frames=_FRAMES,
        pools=_NAMES,
        draw=_draw_swapped,
    ),
}
