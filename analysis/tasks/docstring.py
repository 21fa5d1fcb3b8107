"""Docstring: which parameter a docstring describes next (Heimersheim and Janiak 2023)."""

from __future__ import annotations

import random

from subcircuit.analysis.tasks.frames import Draw, Frame, FrameTask, Pool, Words
from subcircuit.analysis.tasks.values import About

PARAMETERS = tuple(
    "size path name value key file data index count mode type label color width height text user line node first last "
    "start end shape state order time date page table field group level score image model source target".split()
)
TEXT = '''def {function}(self, {{A:parameter}}, {{B:parameter}}, {{C:parameter}}, {{D:parameter}}):
    """{purpose}

    :param {{A_doc:parameter}}: {a}
    :param {{B_doc:parameter}}: {b}
    :param {{answer:parameter}}'''
FUNCTIONS = (
    ("port", "open a new road", "river market", "small garden"),
    ("merge", "find the best way", "winter season", "main office"),
    ("draw", "keep the old house", "summer music", "open water"),
)


def _draw(rng: random.Random, frame: Frame, words: Words) -> Draw:
    a, b, c, d, other = rng.sample(words["parameter"], 5)
    clean = {"A": a, "B": b, "C": c, "D": d, "A_doc": a, "B_doc": b}
    return Draw(clean, {"C": other}, (c,), (d,))


DOCSTRING_TASKS = {
    "docstring": FrameTask(
        about=About(
            "A function's docstring describes its parameters in their order; two are done, the third is to come. The "
            "model has to see how far the list has got and to copy the next name from the definition. The wrong "
            "answer is the parameter after it.",
            "The definition has another name in the answer's place. One position differs, and the answer is nowhere.",
            "Heimersheim and Janiak 2023, A circuit for Python docstrings in a 4-layer attention-only transformer "
            "(Alignment Forum); texts are our own",
        ),
        frames=tuple(
            Frame(function, TEXT.format(function=function, purpose=purpose, a=a, b=b))
            for function, purpose, a, b in FUNCTIONS
        ),
        pools={"parameter": Pool(PARAMETERS, 5, "parameter names")},
        draw=_draw,
    )
}
