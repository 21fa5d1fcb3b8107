"""Induction: random words are shown twice; the next one is known from the first time (Olsson et al. 2022)."""

from __future__ import annotations

import random

from subcircuit.analysis.tasks.frames import Draw, Frame, FrameTask, Pool, Words
from subcircuit.analysis.tasks.values import About
from subcircuit.engine.tokenizer import Tokenizer

N_FIRST = 10
N_AGAIN = 5
N_WORDS = 256
"""Words drawn from the vocabulary, once for each tokenizer."""


def vocabulary_words(tokenizer: Tokenizer) -> tuple[str, ...]:
    """At most N_WORDS words of two letters or more that the vocabulary holds with a space before them."""
    texts = (tokenizer.token_bytes(token).decode("utf-8", errors="replace") for token in range(tokenizer.n_vocab))
    words = sorted({text[1:] for text in texts if text[:1] in (" ", "▁") and len(text) > 2})
    letters_only = [word for word in words if word.isascii() and word.isalpha()]
    return tuple(random.Random("vocabulary").sample(letters_only, min(N_WORDS, len(letters_only))))


def _draw(rng: random.Random, frame: Frame, words: Words) -> Draw:
    drawn = rng.sample(words["word"], N_FIRST + N_AGAIN)
    first, others = drawn[:N_FIRST], drawn[N_FIRST:]
    clean = {f"first_{i}": word for i, word in enumerate(first)}
    clean |= {f"again_{i}": word for i, word in enumerate(first[:N_AGAIN])}
    changed = {f"first_{i}": word for i, word in enumerate(others)}
    return Draw(clean, changed, (first[N_AGAIN],), (rng.choice(first[N_AGAIN + 1 :]),))


_SLOTS = [f"{{first_{i}:word}}" for i in range(N_FIRST)] + [f"{{again_{i}:word}}" for i in range(N_AGAIN)]
INDUCTION_TASKS = {
    "induction": FrameTask(
        about=About(
            f"{N_FIRST} random words of the vocabulary, then the first {N_AGAIN} of them again: the answer is the word "
            "that followed the first time. There is no meaning to go by, so the model has to look up where the last "
            "word stood and what came next; the wrong answer is a later word of the list.",
            f"The first {N_AGAIN} words are others the first time, so that nothing is repeated. The answer still "
            "stands in its place.",
            "Olsson et al. 2022, In-context Learning and Induction Heads, arXiv 2209.11895",
        ),
        frames=(Frame("repeat", " ".join([*_SLOTS, "{answer:word}"])),),
        pools={"word": Pool(vocabulary_words, N_FIRST + N_AGAIN, "words")},
        draw=_draw,
    )
}
