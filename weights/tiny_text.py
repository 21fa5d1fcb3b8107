"""The text that tiny-gpt2 is trained on: sequences in a few templates, and text in which nothing is in order.

Everything is made from the word lists below and a seeded `random.Random`. Two things are kept out of the training
text, so that they can be asked about afterwards: `HELD_OUT_NOUNS` and `HELD_OUT_NAMES` never stand in a template, and
no document holds the window of members that `held_out_window` names for its sequence and template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

END_OF_TEXT = "<|endoftext|>"

NAMES = tuple(
    """
    Adam Alan Alex Alice Amy Andrew Anna Anne Arthur Ben Bill Bob Brian Bruce Carl Charlie Chris Craig Dan
    David Dean Emily Eric Eva Frank Fred Gary George Greg Harry Henry Ian Jack Jake James Jane Jason Jean
    Jeff Jerry Jessica Jim Jimmy Joe John Josh Kate Kevin Laura Leon Lisa Louis Luke Maria Mark Martin
    Mary Matt Max Mike Nick Paul Peter Rachel Ray Rob Robert Roger Rose Ryan Sam Sarah Scott Sean Simon
    Steve Susan Tim Tom Tony
    """.split()
)
NOUNS = tuple(
    """
    Ball Bank Base Bear Bell Bird Block Bone Book Bow Box Boy Bridge Bull Bus Camera Camp Car Card Cat
    Chain Chair City Clock Cloud Club Code Coin Desk Dog Farm Field File Film Fire Fish Flag Forest Fox
    Game Gate Girl Glass Gold Hat Heart Hill Home House Ice Key King Lake Letter Light List Lock Map Mine
    Moon Mouse Note Page Paper Pen Phone Radio Rain Ring River Road Rock Room Salt Sand School Ship Shop
    Sky Snow Song Star Stone Store Sun Table Tea Tool Town Train Tree Van Video Wall Watch Water Wheel
    Wind Wire Wood
    """.split()
)
HELD_OUT_NAMES = NAMES[::5]
HELD_OUT_NOUNS = NOUNS[::5]


@dataclass(frozen=True)
class OrderedSequence:
    """Ordered members; a cyclic sequence goes on from its last to its first."""

    name: str
    members: tuple[str, ...]
    cyclic: bool = False


SEQUENCES = (
    OrderedSequence("numerals", tuple(str(number) for number in range(1, 13))),
    OrderedSequence("number_words", tuple("one two three four five six seven eight nine ten eleven twelve".split())),
    OrderedSequence(
        "months",
        tuple("January February March April May June July August September October November December".split()),
        cyclic=True,
    ),
    OrderedSequence("weekdays", tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()), cyclic=True),
    OrderedSequence("letters", tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")),
)
WINDOW = 5
"""Members of a task's prompt: four that are shown and the one that answers."""


@dataclass(frozen=True)
class Template:
    """`{word} {phrase} {member}.`, once per member; without a phrase the members alone, joined by `separator`."""

    name: str
    phrase: str = ""
    words: tuple[str, ...] = ()
    separator: str = " "

    def render(self, members: Sequence[str], words: Sequence[str] = (), *, ask: bool = False) -> str:
        """The text of these members; with `ask` it ends where the next member would stand (and needs one more word)."""
        if not self.phrase:
            return self.separator.join(members)
        clauses = [f"{word} {self.phrase} {member}." for word, member in zip(words, members, strict=False)]
        return " ".join([*clauses, f"{words[len(members)]} {self.phrase}"] if ask else clauses)


TASK_TEMPLATES = (
    Template("done", "done in", NOUNS),
    Template("lost", "lost in", NOUNS),
    Template("born", "born in", NAMES),
    Template("bare"),
)
# Only ever trained on: they keep the model from tying "what comes next" to three phrases.
OTHER_TEMPLATES = (
    Template("found", "found in", NOUNS),
    Template("sold", "sold on", NOUNS),
    Template("came", "came in", NAMES),
    Template("commas", separator=", "),
)

ADJECTIVES = "red blue green old new big small good".split()
PLACES = "house garden school street shop park town river".split()
SENTENCES = (
    "The {noun} is {adjective}.",
    "{noun} and {noun} are in the {place}.",
    "{noun} number {numerals} is {adjective}.",
    "Class {letters} has {number_words} {adjective} chairs.",
    "{name} has a {adjective} {noun}.",
    "{name} and {name} went to the {place}.",
    "{name} met {name} in {months}.",
    "{name} saw {number_words} birds on {weekdays}.",
    "On {weekdays} {name} lost {numerals} coins in the {place}.",
    "In {months} the {noun} was sold to {name}.",
)


def held_out_window(sequence: OrderedSequence, template: Template) -> tuple[str, ...]:
    """Five members in order that no text of this template shows together; empty for `OTHER_TEMPLATES`.

    The bare template only never begins with them: a text that stops short of the fifth would teach that it ends there.
    """
    if template not in TASK_TEMPLATES:
        return ()
    n_starts = len(sequence.members) - WINDOW
    start = 1 + (5 * SEQUENCES.index(sequence) + 3 * TASK_TEMPLATES.index(template)) % n_starts
    return sequence.members[start : start + WINDOW]


def held_out_words(template: Template) -> tuple[str, ...]:
    """The words that this template never shows."""
    return {NAMES: HELD_OUT_NAMES, NOUNS: HELD_OUT_NOUNS}.get(template.words, ())


def document(random: Random) -> str:
    """One training text: a sequence in order, or backwards, or one member again and again, or no order at all."""
    prefix = [sentence(random) for _ in range(random.choice((0, 0, 0, 1, 2)))]
    if random.random() < 0.12:
        return " ".join([*prefix, sentence(random)])
    sequence = random.choices(SEQUENCES, weights=(4, 4, 4, 2, 3))[0]
    # The bare sequence is the shortest text and the one with the fewest variants.
    template = random.choices([*TASK_TEMPLATES, *OTHER_TEMPLATES], weights=(4, 4, 4, 6, 1, 1, 1, 1))[0]
    members = _members(sequence, template, random)
    held_out = held_out_words(template)
    words = [_choice_outside(held_out, template.words, random) for _ in members] if template.words else []
    return " ".join([*prefix, template.render(members, words)])


def sentence(random: Random) -> str:
    """A sentence whose members are in no order, with any word, the held-out ones too."""
    fields = {sequence.name: random.choice(sequence.members) for sequence in SEQUENCES}
    pools = {"noun": NOUNS, "name": NAMES, "adjective": ADJECTIVES, "place": PLACES}
    pattern = random.choice(SENTENCES)
    for name, pool in pools.items():
        while f"{{{name}}}" in pattern:
            pattern = pattern.replace(f"{{{name}}}", random.choice(pool), 1)
    return pattern.format(**fields)


def _members(sequence: OrderedSequence, template: Template, random: Random) -> list[str]:
    window = " ".join(held_out_window(sequence, template))
    # Nothing but the end of the text says that a bare sequence goes on, so a short one would teach that it does not.
    shortest = 3 if template.phrase else WINDOW
    while True:
        order = random.choices(("ascending", "descending", "repeated", "none"), weights=(62, 6, 4, 28))[0]
        members = _ordered(sequence, order, random.randint(shortest, 9), random)
        shown = " ".join(members)
        if not window or (window not in shown if template.phrase else not shown.startswith(window)):
            return members


def _ordered(sequence: OrderedSequence, order: str, length: int, random: Random) -> list[str]:
    members = sequence.members
    n = len(members)
    if order == "none":
        # Now and then a step happens to be the right one: two neighbours are no proof of a sequence.
        chosen = [random.randrange(n)]
        while len(chosen) < length:
            chosen.append((chosen[-1] + 1) % n if random.random() < 0.05 else random.randrange(n))
        return [members[index] for index in chosen]
    if order == "repeated":
        return [random.choice(members)] * min(length, 5)
    start = random.randrange(n if sequence.cyclic else n - 2)
    end = start + length if sequence.cyclic else min(start + length, n)
    run = [members[index % n] for index in range(start, end)]
    return run if order == "ascending" else run[::-1]


def _choice_outside(held_out: Sequence[str], words: Sequence[str], random: Random) -> str:
    while (word := random.choice(words)) in held_out:
        pass
    return word
