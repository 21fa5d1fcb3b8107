"""Which words are one token for a tokenizer, in the place where they stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from subcircuit.analysis.tasks.values import Model
from subcircuit.engine.errors import TaskError
from subcircuit.engine.tokenizer import Tokenizer


class DoesNotFit(Exception):
    """Why a template cannot be built for a tokenizer."""


def single_tokens(
    tokenizer: Tokenizer, stem: str, candidates: Sequence[str], gap: str = " "
) -> dict[bool, dict[str, int]]:
    """The candidates that are one token after stem and gap, with it; by whether the gap is another token."""
    before = tokenizer.encode(stem) if stem else [cast(int, tokenizer.bos_id)] if tokenizer.adds_bos else []
    found: dict[bool, dict[str, int]] = {False: {}, True: {}}
    for candidate in candidates:
        *head, last = tokenizer.encode(f"{stem}{gap}{candidate}" if stem else candidate)
        spaced = len(head) == len(before) + 1 and text_of(tokenizer, head[-1]) == ""
        # An unknown-word token stands for many words: the token must spell the candidate.
        if (head[:-1] if spaced else head) == before and text_of(tokenizer, last) == candidate:
            found[spaced][candidate] = last
    return found


def text_of(tokenizer: Tokenizer, token: int) -> str:
    """A token's text without the space it may carry (written '▁' by sentencepiece)."""
    return tokenizer.token_bytes(token).decode("utf-8", errors="replace").replace("▁", " ").strip(" ")


def largest(by_space: dict[bool, dict[str, int]]) -> dict[str, int]:
    return max(by_space.values(), key=len)


def tokenizer_and_model(given: Model | Tokenizer) -> tuple[Tokenizer, Model | None]:
    if hasattr(given, "encode"):
        return cast(Tokenizer, given), None
    if not hasattr(given, "tokenizer"):
        raise TaskError(f"a task needs a model or a tokenizer; got {type(given).__name__}")
    if given.tokenizer is None:
        raise TaskError(
            "a task needs a tokenizer and this model has none; expected one, or ids given to task_from_tokens"
        )
    return given.tokenizer, given
