"""Colored objects: what color a thing among three has (Merullo et al. 2024, after BIG-bench)."""

from __future__ import annotations

import random

from subcircuit.analysis.tasks.frames import Draw, Frame, FrameTask, Pool, Words
from subcircuit.analysis.tasks.values import About

COLORS = tuple("red blue green black white yellow brown pink purple silver violet tan".split())
OBJECTS = tuple(
    "book cup pen ball box key ring hat bag phone lamp plate bottle knife watch mirror clock flag coin card".split()
)
# The worked example has colors and things of its own, so that it names no answer.
EXAMPLE = (
    "Q: On the {place} there is a gold pin, a gray stone and a cream shell. What color is the stone? A: gray\n"
    "Q: On the {place} there is a {{color_1:color}} {{object_1:object}}, a {{color_2:color}} {{object_2:object}} and "
    "a {{color_3:color}} {{object_3:object}}. What color is the {{asked:object}}? A: {{answer:color}}"
)


def _draw(rng: random.Random, frame: Frame, words: Words) -> Draw:
    colors, objects = rng.sample(words["color"], 3), rng.sample(words["object"], 3)
    asked, other = rng.sample(range(3), 2)
    clean = {f"color_{i + 1}": color for i, color in enumerate(colors)}
    clean |= {f"object_{i + 1}": each for i, each in enumerate(objects)}
    return Draw(clean | {"asked": objects[asked]}, {"asked": objects[other]}, (colors[asked],), (colors[other],))


COLORED_OBJECTS_TASKS = {
    "colored_objects": FrameTask(
        about=About(
            "Three things with a color each are listed and one is asked about, after one worked example. The model "
            "has to find the thing and to tell its color from the two others.",
            "Another of the three things is asked about; its color is the wrong answer. One position differs.",
            "Merullo et al. 2024, Circuit Component Reuse Across Tasks in Transformer Language Models, arXiv "
            "2310.08744; texts are our own",
        ),
        frames=tuple(Frame(place, EXAMPLE.format(place=place)) for place in ("table", "floor", "desk")),
        pools={"color": Pool(COLORS, 4, "colors"), "object": Pool(OBJECTS, 4, "things")},
        draw=_draw,
    )
}
