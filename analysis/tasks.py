"""Tasks: token-aligned pairs of clean and corrupted prompts, with the token to predict and a wrong one.

A prompt shows four members of a sequence and asks for the next. Templates, as in Lan et al. (arXiv 2311.04131):

    done   Ring done in May. Van done in June. Box done in July. Card done in August. Key done in
    lost   the same with `lost in`
    born   the same with `born in` and first names
    bare   May June July August

The answer is the next member, the wrong answer the last one seen. The corrupted prompt has the same words and
four other members, at random, so that no rule leads from them to the clean answer.

Everything is fitted to a tokenizer: members and words are used only where they are one token in the place where
they stand, so all prompts of a task have the same length and member i stands at the same position in each. Where
a space is a token of its own before a member (SmolLM2, Llama: before digits), the prompt ends in that space token;
numbers of two digits drop out where they are two tokens. The tokenizer's own rule decides about a BOS token, which
only shifts the positions. Every row is checked against the tokenizer's encoding of prompt and answer together.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from jaxtyping import Int
from torch import Tensor

from subcircuit.analysis.metrics import logit_difference
from subcircuit.analysis.words import FIRST_NAMES, NOUNS
from subcircuit.engine.errors import TaskError
from subcircuit.engine.tokenizer import Tokenizer

N_MEMBERS = 4
"""Members a prompt shows before it asks for the next."""

SEQUENCES: dict[str, tuple[str, ...]] = {
    "numerals": tuple(str(number) for number in range(1, 13)),
    "number_words": tuple("one two three four five six seven eight nine ten eleven twelve".split()),
    "months": tuple("January February March April May June July August September October November December".split()),
    "weekdays": tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()),
    "letters": tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}

FILTERED_TOGETHER = {"number_words": "months", "months": "number_words"}
"""Tasks whose filter wants the words to pass with the other task's members put in as well, as in the paper."""


@dataclass(frozen=True)
class Template:
    """How members become a prompt: `W1 {verb} in s. … W5 {verb} in`, or the bare sequence where there are no words."""

    name: str
    verb: str = ""
    words: tuple[str, ...] = ()
    words_are: str = ""

    @property
    def n_words(self) -> int:
        return N_MEMBERS + 1 if self.words else 0

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
WORD_SETS_TRIED = 16
"""How many word sets the filter tries for each one it needs before it gives up."""
MIXED = ("done", "lost", "born")
"""What `template="all"` stands for."""


class Model(Protocol):
    """What the filter asks of a model; a `HookedTransformer` is one."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    def __call__(self, tokens: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Task:
    """Prompts to measure a model on: row i of every field belongs to prompt i, position j to position j."""

    name: str
    clean: Int[Tensor, "prompt pos"]
    corrupted: Int[Tensor, "prompt pos"] | None
    """None where a task from tokens came without: sources other than `corrupted` can still be used."""
    answer: Int[Tensor, " prompt"]
    wrong: Int[Tensor, " prompt"]
    prompts: tuple[str, ...] = ()
    """The clean prompts as text, with the space at the end where that is a token; () for a task from tokens."""
    corrupted_prompts: tuple[str, ...] = ()
    template: str = "custom"
    """The templates in use, joined by '+'; `all` if it is all three with words."""
    seed: int = 0
    starts: tuple[int, ...] = ()
    """Per prompt, which member of the sequence comes first, counted from 1."""
    member_positions: tuple[int, ...] = ()
    """Where the four members stand, the same in every prompt."""
    filtered: bool = False
    """Whether only prompts that the model answers were kept."""

    @property
    def n(self) -> int:
        """Number of prompts."""
        return self.clean.shape[0]

    @property
    def pos(self) -> int:
        """Tokens per prompt, with BOS if the tokenizer adds one."""
        return self.clean.shape[1]

    @property
    def first_difference(self) -> int:
        """First position at which any corrupted prompt differs from its clean one; `pos` if none does."""
        if self.corrupted is None:
            return self.pos
        differs = (self.clean != self.corrupted).any(0).nonzero()
        return int(differs[0]) if len(differs) else self.pos

    def subset(self, indices: Sequence[int]) -> Task:
        """The task with only these prompts, in this order. Raises TaskError for an index that is not there."""
        rows = [int(index) for index in indices]
        outside = [row for row in rows if not 0 <= row < self.n]
        if outside or not rows:
            what = f"prompt {outside[0]} is not there" if outside else "a subset needs at least one prompt"
            raise TaskError(f"task {self.name!r}: {what}; expected indices in 0..{self.n - 1}")

        return replace(
            self,
            clean=self.clean[rows],
            corrupted=None if self.corrupted is None else self.corrupted[rows],
            answer=self.answer[rows],
            wrong=self.wrong[rows],
            prompts=tuple(self.prompts[row] for row in rows) if self.prompts else (),
            corrupted_prompts=tuple(self.corrupted_prompts[row] for row in rows) if self.corrupted_prompts else (),
            starts=tuple(self.starts[row] for row in rows) if self.starts else (),
        )

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change when any token of the task changes."""
        digest = hashlib.sha256(self.name.encode())
        for part in (self.clean, self.corrupted, self.answer, self.wrong):
            digest.update(b"none" if part is None else str(tuple(part.shape)).encode())
            digest.update(b"" if part is None else part.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def task_names() -> tuple[str, ...]:
    """The names that `task` knows."""
    return tuple(SEQUENCES)


def task(
    name: str,
    model_or_tokenizer: Model | Tokenizer,
    n: int = 32,
    seed: int = 0,
    template: str = "all",
    filter: bool = False,
    starts: Sequence[int] | None = None,
) -> Task:
    """Build n prompt pairs of a task for a model's tokenizer.

    name: one of `task_names()`.
    model_or_tokenizer: a HookedTransformer with a tokenizer, or the tokenizer alone.
    n: how many prompts; their start values and templates are balanced, each count differing by one at most. The bare
        sequence has one clean prompt per start value, so for larger n these repeat with other corrupted prompts.
    seed: decides words and corrupted members. The first rows do not depend on n (without filter), and tasks with the
        same start values get the same words.
    template: `done`, `lost`, `born`, `bare`, several joined by `+`, or `all` for the three with words. `all` leaves
        out a template that does not fit the tokenizer or does not line up with the others; `Task.template` tells.
    filter: the paper's: keep a prompt only if the model's top token is the answer and P(answer) > 2 P(wrong), and
        words only if that holds from all start values (number words and months: in both tasks, where the other can be
        built). For `bare`, keep the start values that pass.
    starts: start values to use, counted from 1; all that the tokenizer allows, if not given. A small model may never
        get some of them right, and then no words pass from all.

    Raises TaskError where the name, template or a start value is not known, the tokenizer has too few single-token
    members or words, or too few prompts pass the filter.
    """
    tokenizer, model = _tokenizer_and_model(model_or_tokenizer)
    if n < 1:
        raise TaskError(f"task {name!r}: n is {n}; expected at least one prompt")
    layouts = _layouts(name, template, tokenizer)
    if starts is not None:
        layouts = [_with_starts(layout, starts) for layout in layouts]
    first_members = layouts[0].starts
    words: dict[str, list[tuple[str, ...]]] = {}
    if filter:
        if model is None:
            raise TaskError(f"task {name!r}: filter=True asks a model what it predicts; got a tokenizer alone")
        if layouts[0].template.words:
            words = _words_that_pass(layouts, n, seed, model)
        else:
            first_members = _starts_that_pass(layouts[0], model)
    schedule = _schedule(n, first_members, layouts)
    rows = []
    for i, (start, layout, turn) in enumerate(schedule):
        chosen = words[layout.template.name][turn] if words else layout.draw_words(seed, i)
        rows.append(layout.pair(chosen, start, layout.draw_corrupted(seed, i, start)))
    clean, corrupted, answer, wrong, prompts, corrupted_prompts = zip(*rows, strict=True)
    used = _names(layouts)
    return Task(
        name=name,
        clean=torch.tensor(clean),
        corrupted=torch.tensor(corrupted),
        answer=torch.tensor(answer),
        wrong=torch.tensor(wrong),
        prompts=prompts,
        corrupted_prompts=corrupted_prompts,
        template="all" if used == "+".join(MIXED) else used,
        seed=seed,
        starts=tuple(start + 1 for start, _, _ in schedule),
        member_positions=layouts[0].member_positions,
        filtered=filter,
    )


def task_from_tokens(
    *,
    clean: Tensor | Sequence[Sequence[int]],
    answer: Tensor | Sequence[int],
    wrong: Tensor | Sequence[int],
    corrupted: Tensor | Sequence[Sequence[int]] | None = None,
    name: str = "custom",
    d_vocab: int | None = None,
) -> Task:
    """A task from token ids; it needs no tokenizer.

    clean, corrupted: ids `[prompt, pos]` of one length, row i paired with row i (corrupted may be left out).
    answer, wrong: ids `[prompt]`; the metric is logit(answer) − logit(wrong) after the last position.
    d_vocab: if given, ids must be below it.

    Raises TaskError for shapes that do not fit, values that are not ids, or an answer equal to the wrong one.
    """
    clean = _ids(name, "clean", clean, 2, d_vocab)
    n = clean.shape[0]
    answer, wrong = _ids(name, "answer", answer, 1, d_vocab), _ids(name, "wrong", wrong, 1, d_vocab)
    for field, ids in (("answer", answer), ("wrong", wrong)):
        if ids.shape != (n,):
            raise TaskError(f"task {name!r}: {len(ids)} tokens in {field} for {n} prompts; expected one per prompt")
    same = (answer == wrong).nonzero()
    if len(same):
        row = int(same[0])
        raise TaskError(
            f"task {name!r}: answer and wrong of prompt {row} are the same token {int(answer[row])}; expected two"
        )
    if corrupted is not None:
        corrupted = _ids(name, "corrupted", corrupted, 2, d_vocab)
        if corrupted.shape != clean.shape:
            raise TaskError(
                f"task {name!r}: corrupted has shape {list(corrupted.shape)}; expected {list(clean.shape)} as clean, "
                "since they are compared position by position"
            )
    return Task(name=name, clean=clean, corrupted=corrupted, answer=answer, wrong=wrong)


def _ids(name: str, field: str, values: object, n_dims: int, d_vocab: int | None) -> Tensor:
    where = f"task {name!r}: {field}"
    if not isinstance(values, Tensor):
        rows = list(cast(Sequence[object], values))
        if n_dims == 2 and all(isinstance(row, Sequence | Tensor) for row in rows):
            lengths = [len(cast(Sequence[int], row)) for row in rows]
            if len(set(lengths)) > 1:
                raise TaskError(
                    f"{where} prompts have {min(lengths)} to {max(lengths)} tokens; expected one length, "
                    "since prompts are compared position by position"
                )
            rows = [row.tolist() if isinstance(row, Tensor) else row for row in rows]
        try:
            values = torch.tensor(rows)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TaskError(f"{where} is not token ids ({error}); expected integers") from None
    shape = "[prompt, pos]" if n_dims == 2 else "[prompt]"
    if values.ndim != n_dims or values.numel() == 0:
        raise TaskError(f"{where} has shape {list(values.shape)}; expected {shape}, not empty")
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TaskError(f"{where} has dtype {values.dtype}; expected integer token ids")
    low, high = int(values.min()), int(values.max())
    if low < 0 or (d_vocab is not None and high >= d_vocab):
        bound = "0 or more" if d_vocab is None else f"0..{d_vocab - 1}"
        raise TaskError(f"{where} holds the token id {low if low < 0 else high}; expected {bound}")
    return values.long()


# How a task fits a tokenizer


@dataclass(frozen=True)
class _Layout:
    """A task's template for one tokenizer: which members and words are one token, and where they stand."""

    task_name: str
    template: Template
    tokenizer: Tokenizer
    sequence: tuple[str, ...]
    spaced: bool
    """Whether the space before a member is a token of its own, so that the prompt ends in it."""
    members: dict[int, int]
    """Index in the sequence → token, after a space."""
    first_members: dict[int, int]
    """The same where the prompt begins with the member (`bare`); else equal to `members`."""
    words: dict[str, int]
    first_words: dict[str, int]
    starts: tuple[int, ...]
    """Indices s for which members s … s + 4 are all there."""
    frame: tuple[int, ...]
    """Tokens of one prompt, to be overwritten at the positions below."""
    word_positions: tuple[int, ...]
    member_positions: tuple[int, ...]

    def draw_words(self, seed: int, draw: int) -> tuple[str, ...]:
        """Distinct words; seed and number of the draw alone decide, so that tasks share them."""
        if not self.template.words:
            return ()
        rng = random.Random(f"words {seed} {self.template.name} {draw}")
        first = rng.choice(list(self.first_words))
        return (first, *rng.sample([word for word in self.words if word != first], self.template.n_words - 1))

    def draw_corrupted(self, seed: int, draw: int, start: int) -> tuple[int, ...]:
        """Four distinct members, at random, in place of those from `start`.

        The end of the corrupted prompt follows no rule: its last two steps are not +1 (December → January is +1,
        too) and not equal to each other. Its last member is neither the wrong answer, which the answer would
        follow, nor the answer, so that neither is favoured for being the newest.
        """
        rng = random.Random(f"corrupted {seed} {draw}")
        pool, n_total = list(self.members), len(self.sequence)
        for _ in range(1000):
            drawn = rng.sample(pool, N_MEMBERS)
            step_before, step = drawn[-2] - drawn[-3], drawn[-1] - drawn[-2]
            follows_rule = step % n_total == 1 or step_before % n_total == 1 or step == step_before
            newest_is_asked_for = drawn[-1] in (start + N_MEMBERS - 1, start + N_MEMBERS)
            if not (follows_rule or newest_is_asked_for) and drawn[0] in self.first_members:
                return tuple(drawn)
        listed = ", ".join(self.sequence[member] for member in self.members)
        raise TaskError(f"task {self.task_name!r}: no corrupted prompt can be made of the members {listed}")

    def pair(
        self, words: Sequence[str], start: int, corrupted: Sequence[int]
    ) -> tuple[list[int], list[int], int, int, str, str]:
        """Clean ids, corrupted ids, answer id, wrong id, clean text, corrupted text of one prompt."""
        answer = start + N_MEMBERS
        clean_ids, clean_text = self._row(words, range(start, answer), answer)
        corrupted_ids, corrupted_text = self._row(words, corrupted, answer)
        tokens = self.members[answer], self.members[answer - 1]
        return clean_ids, corrupted_ids, *tokens, clean_text, corrupted_text

    def _row(self, words: Sequence[str], members: Sequence[int], answer: int) -> tuple[list[int], str]:
        ids = list(self.frame)
        for i, position in enumerate(self.word_positions):
            ids[position] = (self.words if i else self.first_words)[words[i]]
        for i, position in enumerate(self.member_positions):
            ids[position] = (self.members if i or self.template.words else self.first_members)[members[i]]
        text = self.template.render(words, [self.sequence[member] for member in members])
        if self.tokenizer.encode(f"{text} {self.sequence[answer]}") != [*ids, self.members[answer]]:
            raise TaskError(
                f"task {self.task_name!r}: {self.tokenizer.name} splits {text!r} unlike other prompts; "
                f"expected {len(ids)} tokens, of which each word and member is one"
            )
        return ids, f"{text} " if self.spaced else text


def _layouts(name: str, template: str, tokenizer: Tokenizer) -> list[_Layout]:
    """The layouts to mix, all aligned with each other."""
    if name not in SEQUENCES:
        raise TaskError(f"task {name!r} is not known; expected one of {', '.join(SEQUENCES)}")
    names = MIXED if template == "all" else tuple(dict.fromkeys(template.split("+")))
    if not set(names) <= set(TEMPLATES):
        raise TaskError(f"task {name!r}: unknown template {template!r}; expected all, {', '.join(TEMPLATES)}")
    found: list[_Layout] = []
    reasons: list[str] = []
    for each in names:
        try:
            found.append(_layout(name, TEMPLATES[each], tokenizer))
        except _DoesNotFit as reason:
            reasons.append(f"template {each!r} {reason}")
    if not found or (reasons and template != "all"):
        raise TaskError(f"task {name!r}: {reasons[0]}; {_what_fits(name, tokenizer)}")
    shapes = [(len(each.frame), each.word_positions, each.member_positions, each.starts) for each in found]
    most_common = Counter(shapes).most_common(1)[0][0]
    aligned = [each for each, shape in zip(found, shapes, strict=True) if shape == most_common]
    if len(aligned) < len(found) and template != "all":
        lengths = ", ".join(f"{each.template.name} {len(each.frame)}" for each in found)
        raise TaskError(
            f"task {name!r}: templates {template!r} do not line up for {tokenizer.name} "
            f"(tokens per prompt: {lengths}); expected one shape, such as {_names(aligned)}"
        )
    return aligned


def _names(layouts: Sequence[_Layout]) -> str:
    return "+".join(layout.template.name for layout in layouts)


class _DoesNotFit(Exception):
    """Why a template cannot be built for a tokenizer."""


@dataclass(frozen=True)
class _Members:
    """The members that are one token after a space, and those at the start of the prompt; keys are indices."""

    spaced: bool
    anywhere: dict[int, int]
    first: dict[int, int]
    starts: tuple[int, ...]


def _members(sequence: Sequence[str], template: Template, tokenizer: Tokenizer, stem: str) -> _Members:
    """The members to use: with the space as a token of its own or without, whichever gives more start values."""
    at_start = {} if template.words else _largest(_single_tokens(tokenizer, "", sequence))
    found = []
    for spaced, tokens in _single_tokens(tokenizer, stem, sequence).items():
        anywhere = {i: tokens[member] for i, member in enumerate(sequence) if member in tokens}
        first = anywhere if template.words else {i: at_start[sequence[i]] for i in anywhere if sequence[i] in at_start}
        starts = tuple(i for i in first if all(i + step in anywhere for step in range(N_MEMBERS + 1)))
        found.append(_Members(spaced, anywhere, first, starts))
    best = max(found, key=lambda members: (len(members.starts), len(members.anywhere)))
    if not best.starts:
        listed = ", ".join(sequence[i] for i in best.anywhere) or "none"
        raise _DoesNotFit(
            f"needs {N_MEMBERS + 1} members in a row that are single tokens where they stand; "
            f"{tokenizer.name} has only: {listed}"
        )
    return best


def _layout(name: str, template: Template, tokenizer: Tokenizer) -> _Layout:
    sequence = SEQUENCES[name]
    stem = f"It is {template.verb} in" if template.words else sequence[0]
    members = _members(sequence, template, tokenizer, stem)
    first_words = _largest(_single_tokens(tokenizer, "", template.words))
    sentence = f"{stem} {sequence[members.starts[0]]}."
    words = _largest(_single_tokens(tokenizer, sentence, template.words))
    if template.words and (not first_words or len(words) < template.n_words):
        fewer = words if len(words) < template.n_words else first_words
        where = "after a space" if fewer is words else "at the start of a text"
        raise _DoesNotFit(
            f"needs {template.n_words} {template.words_are} that are single tokens {where}; "
            f"{tokenizer.name} has only: {', '.join(fewer) or 'none'}"
        )
    layout = _Layout(
        task_name=name,
        template=template,
        tokenizer=tokenizer,
        sequence=sequence,
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


def _with_frame(layout: _Layout) -> _Layout:
    """Measure one prompt: its tokens and, from its beginnings' lengths, where words and members stand."""
    start, tokenizer, template = layout.starts[0], layout.tokenizer, layout.template
    words = layout.draw_words(0, 0)
    members = [layout.sequence[start + i] for i in range(N_MEMBERS)]
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
    frame = tuple(tokenizer.encode(f"{text} {layout.sequence[start + N_MEMBERS]}")[:-1])
    return replace(layout, frame=frame, word_positions=word_positions, member_positions=member_positions)


def _with_starts(layout: _Layout, starts: Sequence[int]) -> _Layout:
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


def _single_tokens(tokenizer: Tokenizer, stem: str, candidates: Sequence[str]) -> dict[bool, dict[str, int]]:
    """The candidates that are one token after the stem, with it; by whether the space is another token."""
    before = tokenizer.encode(stem) if stem else [cast(int, tokenizer.bos_id)] if tokenizer.adds_bos else []
    found: dict[bool, dict[str, int]] = {False: {}, True: {}}
    for candidate in candidates:
        *head, last = tokenizer.encode(f"{stem} {candidate}" if stem else candidate)
        spaced = len(head) == len(before) + 1 and _text_of(tokenizer, head[-1]) == ""
        # An unknown-word token stands for many words: the token must spell the candidate.
        if (head[:-1] if spaced else head) == before and _text_of(tokenizer, last) == candidate:
            found[spaced][candidate] = last
    return found


def _text_of(tokenizer: Tokenizer, token: int) -> str:
    """A token's text without the space it may carry (written '▁' by sentencepiece)."""
    return tokenizer.token_bytes(token).decode("utf-8", errors="replace").replace("▁", " ").strip(" ")


def _largest(by_space: dict[bool, dict[str, int]]) -> dict[str, int]:
    return max(by_space.values(), key=len)


def _what_fits(name: str, tokenizer: Tokenizer) -> str:
    """The end of an error: templates of this task that fit, or else other tasks that do."""
    if fitting := _templates_that_fit(name, tokenizer):
        return f"templates of this task that fit: {', '.join(fitting)}"
    others = {other: _templates_that_fit(other, tokenizer) for other in SEQUENCES if other != name}
    listed = [f"{other} ({', '.join(templates)})" for other, templates in others.items() if templates]
    return f"no template of this task fits; tasks that do: {', '.join(listed) or 'none'}"


def _templates_that_fit(name: str, tokenizer: Tokenizer) -> list[str]:
    fitting = []
    for template in TEMPLATES.values():
        try:
            _layout(name, template, tokenizer)
        except _DoesNotFit:
            continue
        fitting.append(template.name)
    return fitting


def _tokenizer_and_model(given: Model | Tokenizer) -> tuple[Tokenizer, Model | None]:
    if hasattr(given, "encode"):
        return cast(Tokenizer, given), None
    if not hasattr(given, "tokenizer"):
        raise TaskError(f"a task needs a model or a tokenizer; got {type(given).__name__}")
    if given.tokenizer is None:
        raise TaskError(
            "a task needs a tokenizer and this model has none; expected one, or ids given to task_from_tokens"
        )
    return given.tokenizer, given


# Which prompts


def _schedule(n: int, starts: Sequence[int], layouts: Sequence[_Layout]) -> list[tuple[int, _Layout, int]]:
    """Start, layout, and how often this combination came before, for each prompt.

    Each start and each layout comes up equally often (± 1) for any n, and so does each combination of them.
    """
    period = math.lcm(len(starts), len(layouts))
    before: Counter[tuple[int, str]] = Counter()
    schedule = []
    for i in range(n):
        # After a period the layouts move on by one: else a start would always meet the same layout.
        start, layout = starts[i % len(starts)], layouts[(i + i // period) % len(layouts)]
        key = (start, layout.template.name)
        schedule.append((start, layout, before[key]))
        before[key] += 1
    return schedule


def _words_that_pass(layouts: Sequence[_Layout], n: int, seed: int, model: Model) -> dict[str, list[tuple[str, ...]]]:
    """Per template, as many word sets as the schedule needs, each passing from every start value."""
    name = layouts[0].task_name
    needed: Counter[str] = Counter()
    for _, layout, turn in _schedule(n, layouts[0].starts, layouts):
        needed[layout.template.name] = max(needed[layout.template.name], turn + 1)
    found: dict[str, list[tuple[str, ...]]] = {}
    n_tried: Counter[str] = Counter()
    n_passes: Counter[int] = Counter()
    for layout in layouts:
        template = layout.template.name
        others = _filtered_together(layout)
        found[template] = []
        while len(found[template]) < needed[template] and n_tried[template] < WORD_SETS_TRIED * needed[template]:
            words = layout.draw_words(seed, n_tried[template])
            n_tried[template] += 1
            passes = _passes(model, layout, words)
            n_passes.update(start for start, passed in zip(layout.starts, passes, strict=True) if passed)
            if all(passes) and all(all(_passes(model, other, words)) for other in others):
                found[template].append(words)
    if any(len(found[template]) < count for template, count in needed.items()):
        told = ", ".join(
            f"{template} {len(found[template])} of {count} ({n_tried[template]} tried)"
            for template, count in needed.items()
        )
        hard = [str(start + 1) for start in layouts[0].starts if n_passes[start] < n_tried.total() / 2]
        raise TaskError(
            f"task {name!r}: too few word sets pass the filter from all {len(layouts[0].starts)} start values: "
            f"{told}; start values that mostly fail: {', '.join(hard) or 'none'}; "
            "expected a smaller n, another template, other starts, or filter=False"
        )
    return found


def _filtered_together(layout: _Layout) -> list[_Layout]:
    """The other task's layout where the two are filtered together, from the same start values."""
    name = FILTERED_TOGETHER.get(layout.task_name)
    if name is None:
        return []
    try:
        other = _layout(name, layout.template, layout.tokenizer)
    except _DoesNotFit:
        return []
    shared = tuple(start for start in other.starts if start in layout.starts)
    return [replace(other, starts=shared)] if shared else []


def _starts_that_pass(layout: _Layout, model: Model) -> tuple[int, ...]:
    passes = _passes(model, layout, ())
    starts = tuple(start for start, passed in zip(layout.starts, passes, strict=True) if passed)
    if not starts:
        raise TaskError(
            f"task {layout.task_name!r}, template 'bare': no start value of {len(layout.starts)} passes the filter; "
            "expected a model that continues the sequence, or filter=False"
        )
    return starts


def _passes(model: Model, layout: _Layout, words: Sequence[str]) -> list[bool]:
    """Whether the model's top token is the answer and P(answer) > 2 P(wrong), for each start value."""
    rows = [layout.pair(words, start, range(start, start + N_MEMBERS)) for start in layout.starts]
    with torch.no_grad():
        logits = model(torch.tensor([row[0] for row in rows]))[:, -1].float().cpu()
    answer, wrong = (torch.tensor([row[i] for row in rows]) for i in (2, 3))
    # A ratio of probabilities is a difference of logits.
    likely = logit_difference(logits, answer, wrong) > math.log(2)
    return cast(list[bool], (likely & (logits.argmax(-1) == answer)).tolist())
