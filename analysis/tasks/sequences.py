"""Sequence tasks: some members of a sequence are shown, the next one is asked for, in a template of sentences or bare.

A template is fitted to a tokenizer as a `Layout`: members and words are used only where they are one token in the
place where they stand, so all prompts have the same length and member i stands at the same position in each. Where a
space is a token of its own before a member (SmolLM2, Llama: before digits), the prompt ends in that space token;
numbers of two digits drop out where they are two tokens. The tokenizer's own rule decides about a BOS token, which
only shifts the positions.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from subcircuit.analysis.tasks.fitting import DoesNotFit, largest, single_tokens
from subcircuit.analysis.words import FIRST_NAMES, NOUNS
from subcircuit.engine.errors import TaskError
from subcircuit.engine.tokenizer import Tokenizer

N_MEMBERS = 4
"""Members a prompt shows before it asks for the next, where neither the rule nor the caller says otherwise."""

SEQUENCES: dict[str, tuple[str, ...]] = {
    "numerals": tuple(str(number) for number in range(1, 13)),
    "number_words": tuple("one two three four five six seven eight nine ten eleven twelve".split()),
    "months": tuple("January February March April May June July August September October November December".split()),
    "weekdays": tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()),
    "letters": tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}


@dataclass(frozen=True)
class Rule:
    """How a task goes through its members: from the one at `start` in steps, so many shown before the one asked for."""

    members: tuple[str, ...]
    step: int = 1
    n_shown: int = N_MEMBERS

    def shown(self, start: int) -> tuple[int, ...]:
        """Indices of the members that a prompt shows."""
        return tuple(start + i * self.step for i in range(self.n_shown))

    def answer(self, start: int) -> int:
        return start + self.n_shown * self.step

    def wrong(self, start: int) -> int:
        """The last member shown; where that is the answer, the one that counting on would give."""
        return self.shown(start)[-1] if self.step else start + 1

    def needs(self, start: int) -> tuple[int, ...]:
        return *self.shown(start), self.answer(start), self.wrong(start)


_FROM_ZERO = tuple(str(number) for number in range(1000))
RULES: dict[str, Rule] = {
    **{name: Rule(members) for name, members in SEQUENCES.items()},
    "interval_1": Rule(_FROM_ZERO[:50], 1, n_shown=3),
    "interval_2": Rule(_FROM_ZERO[:50], 2, n_shown=3),
    "interval_3": Rule(_FROM_ZERO[:50], 3, n_shown=3),
    "interval_10": Rule(_FROM_ZERO[:100], 10, n_shown=3),
    "interval_100": Rule(_FROM_ZERO, 100, n_shown=3),
    "decreasing_numerals": Rule(SEQUENCES["numerals"], -1),
    "repeated_numerals": Rule(SEQUENCES["numerals"], 0),
}
"""Sequence tasks by name. Intervals show three members, so that +3 fits where only digits are single tokens."""


def rule_of(name: str, members: int | None = None) -> Rule:
    """The rule of a sequence task, with so many members shown in place of its own number. TaskError for none."""
    if members is None:
        return RULES[name]
    if members < 1:
        raise TaskError(f"task {name!r}: {members} members; expected at least one to be shown")
    return replace(RULES[name], n_shown=members)


FILTERED_TOGETHER = {"number_words": "months", "months": "number_words"}
"""Tasks whose filter wants the words to pass with the other task's members put in as well, as in the paper."""


@dataclass(frozen=True)
class Template:
    """How members become a prompt: `W1 {verb} in s. … W5 {verb} in`, or the bare sequence where there are no words."""

    name: str
    verb: str = ""
    words: tuple[str, ...] = ()
    words_are: str = ""

    def render(self, words: Sequence[str], members: Sequence[str]) -> str:
        """The prompt, without a space at its end."""
        if not self.words:
            return " ".join(members)
        told = [f"{word} {self.verb} in {member}." for word, member in zip(words[:-1], members, strict=True)]
        return " ".join([*told, f"{words[-1]} {self.verb} in"])


TEMPLATES = {
    template.name: template
    for template in (
        Template("done", "done", NOUNS, "capitalised nouns"),
        Template("lost", "lost", NOUNS, "capitalised nouns"),
        Template("born", "born", FIRST_NAMES, "first names"),
        Template("bare"),
    )
}
MIXED = ("done", "lost", "born")
"""What `template="all"` stands for."""


@dataclass(frozen=True)
class Layout:
    """A task's template for one tokenizer: which members and words are one token, and where they stand."""

    task_name: str
    template: Template
    tokenizer: Tokenizer
    rule: Rule
    spaced: bool
    """Whether the space before a member is a token of its own, so that the prompt ends in it."""
    members: dict[int, int]
    """Index in the sequence → token, after a space."""
    first_members: dict[int, int]
    """The same where the prompt begins with the member (`bare`); else equal to `members`."""
    words: dict[str, int]
    first_words: dict[str, int]
    starts: tuple[int, ...]
    """Indices from which all that the rule needs is there."""
    frame: tuple[int, ...]
    """Tokens of one prompt, to be overwritten at the positions below."""
    word_positions: tuple[int, ...]
    member_positions: tuple[int, ...]

    @property
    def n_words(self) -> int:
        return self.rule.n_shown + 1 if self.template.words else 0

    @property
    def positions(self) -> dict[str, tuple[int, ...]]:
        """Classes of positions, as in `Task.positions`."""
        words = {"words": self.word_positions} if self.template.words else {}
        return {**words, "members": self.member_positions, "last": (len(self.frame) - 1,)}

    def draw_words(self, seed: int, draw: int) -> tuple[str, ...]:
        """Distinct words; seed and number of the draw alone decide, so that tasks share them."""
        if not self.template.words:
            return ()
        rng = random.Random(f"words {seed} {self.template.name} {draw}")
        first = rng.choice(list(self.first_words))
        return (first, *rng.sample([word for word in self.words if word != first], self.n_words - 1))

    def draw_corrupted(self, seed: int, draw: int, start: int) -> tuple[int, ...]:
        """Distinct members, at random, in place of those from `start`.

        The end of the corrupted prompt follows no rule: its last two steps are not the rule's (December → January is
        +1, too) and not equal to each other. Its last member is neither the wrong answer, which the answer would
        follow, nor the answer, so that neither is favoured for being the newest.
        """
        rng = random.Random(f"corrupted {seed} {draw}")
        pool, n_total = list(self.members), len(self.rule.members)
        for _ in range(1000):
            drawn = rng.sample(pool, self.rule.n_shown)
            steps = [after - before for before, after in pairwise(drawn)][-2:]
            follows_rule = self.rule.step % n_total in [step % n_total for step in steps] or len({*steps}) < len(steps)
            newest_is_asked_for = drawn[-1] in (self.rule.wrong(start), self.rule.answer(start))
            if not (follows_rule or newest_is_asked_for) and drawn[0] in self.first_members:
                return tuple(drawn)
        listed = ", ".join(self.rule.members[member] for member in self.members)
        raise TaskError(f"task {self.task_name!r}: no corrupted prompt can be made of the members {listed}")

    def pair(
        self, words: Sequence[str], start: int, corrupted: Sequence[int]
    ) -> tuple[list[int], list[int], int, int, str, str]:
        """Clean ids, corrupted ids, answer id, wrong id, clean text, corrupted text of one prompt."""
        answer = self.rule.answer(start)
        clean_ids, clean_text = self._row(words, self.rule.shown(start), answer)
        corrupted_ids, corrupted_text = self._row(words, corrupted, answer)
        tokens = self.members[answer], self.members[self.rule.wrong(start)]
        return clean_ids, corrupted_ids, *tokens, clean_text, corrupted_text

    def _row(self, words: Sequence[str], members: Sequence[int], answer: int) -> tuple[list[int], str]:
        ids = list(self.frame)
        for i, position in enumerate(self.word_positions):
            ids[position] = (self.words if i else self.first_words)[words[i]]
        for i, position in enumerate(self.member_positions):
            ids[position] = (self.members if i or self.template.words else self.first_members)[members[i]]
        text = self.template.render(words, [self.rule.members[member] for member in members])
        if self.tokenizer.encode(f"{text} {self.rule.members[answer]}") != [*ids, self.members[answer]]:
            raise TaskError(
                f"task {self.task_name!r}: {self.tokenizer.name} splits {text!r} unlike other prompts; "
                f"expected {len(ids)} tokens, of which each word and member is one"
            )
        return ids, f"{text} " if self.spaced else text


def layouts_of(name: str, template: str, tokenizer: Tokenizer, members: int | None = None) -> list[Layout]:
    """The layouts to mix, all aligned with each other."""
    rule = rule_of(name, members)
    names = MIXED if template == "all" else tuple(dict.fromkeys(template.split("+")))
    if not set(names) <= set(TEMPLATES):
        raise TaskError(f"task {name!r}: unknown template {template!r}; expected all, {', '.join(TEMPLATES)}")
    found: list[Layout] = []
    reasons: list[str] = []
    for each in names:
        try:
            found.append(layout_of(name, TEMPLATES[each], tokenizer, rule))
        except DoesNotFit as reason:
            reasons.append(f"template {each!r} {reason}")
    if not found or (reasons and template != "all"):
        raise TaskError(f"task {name!r}: {reasons[0]}; {_what_fits(name, tokenizer, members)}")
    shapes = [(len(each.frame), each.word_positions, each.member_positions, each.starts) for each in found]
    most_common = Counter(shapes).most_common(1)[0][0]
    aligned = [each for each, shape in zip(found, shapes, strict=True) if shape == most_common]
    if len(aligned) < len(found) and template != "all":
        lengths = ", ".join(f"{each.template.name} {len(each.frame)}" for each in found)
        raise TaskError(
            f"task {name!r}: templates {template!r} do not line up for {tokenizer.name} "
            f"(tokens per prompt: {lengths}); expected one shape, such as {names_of(aligned)}"
        )
    return aligned


def names_of(layouts: Sequence[Layout]) -> str:
    return "+".join(layout.template.name for layout in layouts)


@dataclass(frozen=True)
class _Members:
    """The members that are one token after a space, and those at the start of the prompt; keys are indices."""

    spaced: bool
    anywhere: dict[int, int]
    first: dict[int, int]
    starts: tuple[int, ...]


def _members(rule: Rule, template: Template, tokenizer: Tokenizer, stem: str) -> _Members:
    """The members to use: with the space as a token of its own or without, whichever gives more start values."""
    sequence = rule.members
    at_start = {} if template.words else largest(single_tokens(tokenizer, "", sequence))
    found = []
    for spaced, tokens in single_tokens(tokenizer, stem, sequence).items():
        anywhere = {i: tokens[member] for i, member in enumerate(sequence) if member in tokens}
        first = anywhere if template.words else {i: at_start[sequence[i]] for i in anywhere if sequence[i] in at_start}
        starts = tuple(i for i in first if all(needed in anywhere for needed in rule.needs(i)))
        found.append(_Members(spaced, anywhere, first, starts))
    best = max(found, key=lambda members: (len(members.starts), len(members.anywhere)))
    if not best.starts:
        listed = ", ".join(sequence[i] for i in best.anywhere) or "none"
        raise DoesNotFit(
            f"needs {len(set(rule.needs(0)))} members {_in_steps(rule)} that are single tokens where they stand; "
            f"{tokenizer.name} has only: {listed}"
        )
    return best


def _in_steps(rule: Rule) -> str:
    return "in a row" if abs(rule.step) <= 1 else f"in steps of {rule.step}"


def layout_of(name: str, template: Template, tokenizer: Tokenizer, rule: Rule) -> Layout:
    sequence = rule.members
    stem = f"It is {template.verb} in" if template.words else sequence[0]
    members = _members(rule, template, tokenizer, stem)
    first_words = largest(single_tokens(tokenizer, "", template.words))
    sentence = f"{stem} {sequence[members.starts[0]]}."
    words = largest(single_tokens(tokenizer, sentence, template.words))
    n_words = rule.n_shown + 1
    if template.words and (not first_words or len(words) < n_words):
        fewer = words if len(words) < n_words else first_words
        where = "after a space" if fewer is words else "at the start of a text"
        raise DoesNotFit(
            f"needs {n_words} {template.words_are} that are single tokens {where}; "
            f"{tokenizer.name} has only: {', '.join(fewer) or 'none'}"
        )
    layout = Layout(
        task_name=name,
        template=template,
        tokenizer=tokenizer,
        rule=rule,
        spaced=members.spaced,
        members=members.anywhere,
        first_members=members.first,
        words=words,
        first_words=first_words,
        starts=members.starts,
        frame=(),
        word_positions=(),
        member_positions=(),
    )
    return _with_frame(layout)


def _with_frame(layout: Layout) -> Layout:
    """Measure one prompt: its tokens and, from its beginnings' lengths, where words and members stand."""
    start, tokenizer, template, rule = layout.starts[0], layout.tokenizer, layout.template, layout.rule
    words = layout.draw_words(0, 0)
    members = [rule.members[i] for i in rule.shown(start)]
    text = template.render(words, members)
    ends, at = [], 0
    for piece in _alternate(words, members):
        # The space keeps "one" from being found in "done".
        at = text.index(f" {piece}", at) + len(piece) + 1 if at else len(piece)
        ends.append(len(tokenizer.encode(text[:at])) - 1)
    if template.words:
        word_positions, member_positions = tuple(ends[::2]), tuple(ends[1::2])
    else:
        word_positions, member_positions = (), tuple(ends)
    frame = tuple(tokenizer.encode(f"{text} {rule.members[rule.answer(start)]}")[:-1])
    return replace(layout, frame=frame, word_positions=word_positions, member_positions=member_positions)


def with_starts(layout: Layout, starts: Sequence[int]) -> Layout:
    """The layout with only these start values, counted from 1."""
    missing = [start for start in starts if start - 1 not in layout.starts]
    if missing or not starts:
        what = f"start value {missing[0]} is not there" if missing else "no start values"
        available = ", ".join(str(start + 1) for start in layout.starts)
        raise TaskError(f"task {layout.task_name!r}: {what}; {layout.tokenizer.name} allows {available}")
    return replace(layout, starts=tuple(sorted({start - 1 for start in starts})))


def _alternate(words: Sequence[str], members: Sequence[str]) -> list[str]:
    if not words:
        return list(members)
    return [piece for pair in zip(words, members, strict=False) for piece in pair] + [words[-1]]


def _what_fits(name: str, tokenizer: Tokenizer, members: int | None) -> str:
    """The end of an error: templates of this task that fit, or else other tasks that do."""
    if fitting := _templates_that_fit(name, tokenizer, members):
        return f"templates of this task that fit: {', '.join(fitting)}"
    others = {other: _templates_that_fit(other, tokenizer, members) for other in SEQUENCES if other != name}
    listed = [f"{other} ({', '.join(templates)})" for other, templates in others.items() if templates]
    return f"no template of this task fits; tasks that do: {', '.join(listed) or 'none'}"


def _templates_that_fit(name: str, tokenizer: Tokenizer, members: int | None) -> list[str]:
    fitting = []
    for template in TEMPLATES.values():
        try:
            layout_of(name, template, tokenizer, rule_of(name, members))
        except DoesNotFit:
            continue
        fitting.append(template.name)
    return fitting
