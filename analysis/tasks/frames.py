"""Texts with slots, fitted to a tokenizer: what every task that is not a sequence is made of.

A frame is a text such as `When {IO:name} and {S1:name} went out, {S2:name} gave a gift to {answer:name}`: slots with
the pool that their words come from, the last of which is the answer's. Fitted to a tokenizer, a pool keeps the words
that are one token in every slot of theirs, so that all prompts of a frame have one length and every slot stands at one
position. What stands between the slots may be split in any way.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from subcircuit.analysis.tasks.fitting import DoesNotFit, largest, single_tokens
from subcircuit.analysis.tasks.values import About
from subcircuit.engine.tokenizer import Tokenizer

Words = Mapping[str, tuple[str, ...]]
"""Per pool, the words that fit the tokenizer."""


@dataclass(frozen=True)
class Pool:
    """Words for slots: where they come from, how many a prompt needs, and what an error calls them."""

    words: tuple[str, ...] | Callable[[Tokenizer], tuple[str, ...]]
    n_needed: int
    are: str

    def words_for(self, tokenizer: Tokenizer) -> tuple[str, ...]:
        return self.words(tokenizer) if callable(self.words) else self.words


@dataclass(frozen=True)
class Slot:
    before: str
    """The text between the slot before and this one."""
    name: str
    pool: str


@dataclass(frozen=True)
class Frame:
    """A template's name and its text; several frames may share a name, as sentences of one form."""

    name: str
    text: str

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        found = re.findall(r"(.*?)\{(\w+):(\w+)\}", self.text, flags=re.DOTALL)
        return tuple(Slot(*parts) for parts in found)

    def render(self, words: Mapping[str, str]) -> str:
        """The prompt, without a space at its end; `words` has one for every slot but the answer's."""
        *told, answer = self.slots
        return ("".join(slot.before + words[slot.name] for slot in told) + answer.before).removesuffix(" ")

    @property
    def gap(self) -> str:
        """What stands between prompt and answer."""
        return " " if self.slots[-1].before.endswith(" ") else ""


@dataclass(frozen=True)
class Draw:
    """The words of one prompt pair."""

    clean: Mapping[str, str]
    """A word for every slot but the answer's."""
    changed: Mapping[str, str]
    """What the corrupted prompt has in place of some of them."""
    answers: tuple[str, ...]
    wrongs: tuple[str, ...]


Drawer = Callable[[random.Random, Frame, Words], Draw]
"""Chooses the words of a prompt pair from those that fit."""


@dataclass(frozen=True)
class FrameTask:
    """A task made of frames."""

    about: About
    frames: tuple[Frame, ...]
    pools: Mapping[str, Pool]
    draw: Drawer


@dataclass(frozen=True)
class Row:
    """One prompt pair as ids and as text."""

    clean: list[int]
    corrupted: list[int]
    answers: list[int]
    wrongs: list[int]
    prompt: str
    corrupted_prompt: str
    changed: frozenset[int]
    """The positions of the slots that the draw changed."""


@dataclass(frozen=True)
class FittedFrame:
    """A frame for one tokenizer."""

    frame: Frame
    tokenizer: Tokenizer
    words: Words
    skeleton: tuple[int, ...]
    """Tokens of one prompt, to be overwritten at the slots' positions."""
    slot_positions: Mapping[str, int]
    tokens: Mapping[str, Mapping[str, int]]
    """Per slot, word → token."""

    @property
    def positions(self) -> dict[str, tuple[int, ...]]:
        """Classes of positions: a slot's (`S2`), of numbered slots (`x` for `x_1`, `x_2`), a pool's, `last`."""
        classes: dict[str, list[int]] = {}
        for slot in self.frame.slots[:-1]:
            for name in dict.fromkeys((re.sub(r"_\d+$", "", slot.name), slot.pool)):
                classes.setdefault(name, []).append(self.slot_positions[slot.name])
        return {**{name: tuple(at) for name, at in classes.items()}, "last": (len(self.skeleton) - 1,)}

    @property
    def shape(self) -> tuple[int, tuple[tuple[str, int], ...]]:
        """Length, and the pool of the slot at each slot's position."""
        return len(self.skeleton), tuple((slot.pool, self.slot_positions[slot.name]) for slot in self.frame.slots)

    def row(self, draw: Draw) -> Row | None:
        """The prompt pair, or None where the tokenizer splits it unlike the frame's other prompts."""
        clean, prompt = self._side(draw.clean)
        corrupted, corrupted_prompt = self._side({**draw.clean, **draw.changed})
        last = self.frame.slots[-1].name
        answers, wrongs = ([self.tokens[last][word] for word in words] for words in (draw.answers, draw.wrongs))
        endings = zip((*draw.answers, *draw.wrongs), (*answers, *wrongs), strict=True)
        if any(self._encode(prompt, word) != [*clean, token] for word, token in endings):
            return None
        if self._encode(corrupted_prompt, draw.answers[0]) != [*corrupted, answers[0]]:
            return None
        space = self.frame.gap if len(self.tokenizer.encode(prompt)) < len(clean) else ""
        changed = frozenset(self.slot_positions[slot] for slot in draw.changed)
        return Row(clean, corrupted, answers, wrongs, prompt + space, corrupted_prompt + space, changed)

    def _side(self, words: Mapping[str, str]) -> tuple[list[int], str]:
        ids = list(self.skeleton)
        for slot in self.frame.slots[:-1]:
            ids[self.slot_positions[slot.name]] = self.tokens[slot.name][words[slot.name]]
        return ids, self.frame.render(words)

    def _encode(self, prompt: str, answer: str) -> list[int]:
        return self.tokenizer.encode(f"{prompt}{self.frame.gap}{answer}")


def fit(frame: Frame, pools: Mapping[str, Pool], tokenizer: Tokenizer) -> FittedFrame:
    """The frame for a tokenizer. Raises DoesNotFit, which says which words there are too few of."""
    words = {name: pools[name].words_for(tokenizer) for name in {slot.pool for slot in frame.slots}}
    found: dict[str, dict[str, int]] = {}
    text = ""
    for slot in frame.slots:
        text += slot.before
        gap = " " if text.endswith(" ") else ""
        found[slot.name] = largest(single_tokens(tokenizer, text.removesuffix(" "), words[slot.pool], gap))
        words[slot.pool] = tuple(word for word in words[slot.pool] if word in found[slot.name])
        _check_enough(words[slot.pool], pools[slot.pool], text, tokenizer)
        text += words[slot.pool][0]
    return _measured(frame, tokenizer, words, found)


def _check_enough(words: Sequence[str], pool: Pool, before: str, tokenizer: Tokenizer) -> None:
    if len(words) < pool.n_needed:
        where = f"after {before[-24:]!r}" if before else "at the start of a text"
        listed = ", ".join(words[:12]) or "none"
        raise DoesNotFit(
            f"needs {pool.n_needed} {pool.are} that are single tokens {where}; {tokenizer.name} has only: {listed}"
        )


def _measured(frame: Frame, tokenizer: Tokenizer, words: Words, found: Mapping[str, Mapping[str, int]]) -> FittedFrame:
    """Positions from the lengths of one prompt's beginnings."""
    text, positions = "", {}
    for slot in frame.slots:
        text += slot.before + words[slot.pool][0]
        positions[slot.name] = len(tokenizer.encode(text)) - 1
    skeleton = tuple(tokenizer.encode(text)[:-1])
    return FittedFrame(frame, tokenizer, words, skeleton, positions, found)
