"""Greater-than: a span of years ends later than it begins (Hanna et al. 2023). Every later year is right."""

from __future__ import annotations

import random
from itertools import product

from subcircuit.analysis.tasks.frames import Draw, Frame, FrameTask, Pool, Words
from subcircuit.analysis.tasks.values import About

CENTURIES = tuple(str(century) for century in range(11, 18))
EVENTS = ("war", "trip", "strike", "project")
TWO_DIGITS = "The {event} lasted from the year {century}{{YY:year}} to the year {century}{{answer:year}}"
ONE_DIGIT = "The {event} lasted from the year {century}{{D:digit}}{{U:digit}} to the year {century}{{answer:digit}}"
"""Where digits are tokens of their own, the decade is asked for."""


def _draw(rng: random.Random, frame: Frame, words: Words) -> Draw:
    return _draw_digit(rng, words) if "digit" in words else _draw_year(rng, words)


def _draw_year(rng: random.Random, words: Words) -> Draw:
    """Answers: years after YY. Wrong: YY and those before. Corrupted: the first year there is, 01, as in the paper."""
    years = sorted(words["year"])
    i = rng.randrange(1, len(years) - 1)
    return Draw({"YY": years[i]}, {"YY": years[0]}, tuple(years[i + 1 :]), tuple(reversed(years[: i + 1])))


def _draw_digit(rng: random.Random, words: Words) -> Draw:
    """Answers: later decades. Wrong: earlier ones; the same decade can be right or wrong and is neither."""
    digits = sorted(words["digit"])
    i = rng.randrange(1, len(digits) - 1)
    clean = {"D": digits[i], "U": rng.choice(digits)}
    return Draw(clean, {"D": digits[0]}, tuple(digits[i + 1 :]), tuple(reversed(digits[:i])))


GREATER_THAN_TASKS = {
    "greater_than": FrameTask(
        about=About(
            "Something lasted from a year to a year of the same century. The answers are all later years, the wrong "
            "ones the first year and all before it, so the model has to compare two numbers. The metric is the mean "
            "logit of the answers minus that of the wrong ones; the paper's is the sum of probabilities "
            "(`metrics.probability_difference`). Where digits are tokens of their own, only the decade is asked "
            "for: later ones against earlier ones.",
            "The first year is 01, or with single digits one of the century's first ten: nearly every year is later.",
            "Hanna et al. 2023, How does GPT-2 compute greater-than?, arXiv 2305.00586",
        ),
        frames=tuple(
            Frame(event, text.format(event=event, century=century))
            for text, event, century in product((TWO_DIGITS, ONE_DIGIT), EVENTS, CENTURIES)
        ),
        pools={
            "year": Pool(tuple(f"{year:02}" for year in range(1, 100)), 60, "years of a century"),
            "digit": Pool(tuple("0123456789"), 10, "digits"),
        },
        draw=_draw,
    )
}
