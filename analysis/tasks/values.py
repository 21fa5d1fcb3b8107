"""The `Task` value, and what a task asks of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from subcircuit.engine.errors import TaskError
from subcircuit.engine.patching.answers import token_sets
from subcircuit.engine.tokenizer import Tokenizer


class Model(Protocol):
    """What the filter asks of a model; a `HookedTransformer` is one."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    def __call__(self, tokens: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class About:
    """What a task's card says of it, in sentences."""

    measures: str
    corrupted: str
    """What a corrupted prompt differs in, and why it does not lead to the answer."""
    source: str


@dataclass(frozen=True, eq=False)
class Task:
    """Prompts to measure a model on: row i of every field belongs to prompt i, position j to position j."""

    name: str
    clean: Int[Tensor, "prompt pos"]
    corrupted: Int[Tensor, "prompt pos"] | None
    """None where a task from tokens came without: sources other than `corrupted` can still be used."""
    answer: Int[Tensor, " prompt"]
    """The token to predict; where several count as right (`answers`), one of them."""
    wrong: Int[Tensor, " prompt"]
    """The token to compare it with; where several do (`wrongs`), one of them."""
    prompts: tuple[str, ...] = ()
    """The clean prompts as text, with the space at the end where that is a token; () for a task from tokens."""
    corrupted_prompts: tuple[str, ...] = ()
    template: str = "custom"
    """The templates in use, joined by '+'; `all` if it is all three with words."""
    seed: int = 0
    starts: tuple[int, ...] = ()
    """Per prompt, which member of the sequence comes first, counted from 1."""
    positions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Classes of positions that are the same in every prompt, such as `members`, `words`, `S2`, `last`."""
    filtered: bool = False
    """Whether only prompts that the model answers were kept."""
    answers: Int[Tensor, "prompt answer"] | None = None
    """All tokens that count as right, rows filled up with −1; None where `answer` is the only one."""
    wrongs: Int[Tensor, "prompt wrong"] | None = None
    """All tokens that count as wrong, rows filled up with −1; None where `wrong` is the only one."""

    @property
    def n(self) -> int:
        """Number of prompts."""
        return self.clean.shape[0]

    @property
    def pos(self) -> int:
        """Tokens per prompt, with BOS if the tokenizer adds one."""
        return self.clean.shape[1]

    @property
    def member_positions(self) -> tuple[int, ...]:
        """Where the members of a sequence stand."""
        return self.positions.get("members", ())

    @property
    def answer_sets(self) -> tuple[Int[Tensor, "prompt answer"], Int[Tensor, "prompt wrong"]]:
        """Right and wrong tokens, as `metrics` takes them: one column where a prompt has one of each.

        The logit difference of sets is mean logit(answers) − mean logit(wrongs): linear in the logits, as that of two
        tokens is, along the mean of the answers' unembedding columns minus the mean of the wrong ones'.
        """
        return token_sets(self)

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
            answers=None if self.answers is None else self.answers[rows],
            wrongs=None if self.wrongs is None else self.wrongs[rows],
        )

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change when any token of the task changes."""
        digest = hashlib.sha256(self.name.encode())
        sets = [part for part in (self.answers, self.wrongs) if part is not None]
        for part in (self.clean, self.corrupted, self.answer, self.wrong, *sets):
            digest.update(b"none" if part is None else str(tuple(part.shape)).encode())
            digest.update(b"" if part is None else part.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def padded(sets: Sequence[Sequence[int]]) -> Int[Tensor, "set token"]:
    """The sets as rows of one length, filled up with −1."""
    width = max(map(len, sets))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in sets])
