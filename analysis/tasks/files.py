"""A user's own task: prompts, answers and wrong answers from a CSV or JSON file."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from subcircuit.analysis.plural import counted
from subcircuit.analysis.tasks.fitting import text_of, tokenizer_and_model
from subcircuit.analysis.tasks.values import About, Model, Task, padded
from subcircuit.engine.errors import TaskError
from subcircuit.engine.tokenizer import Tokenizer

SUFFIXES = (".csv", ".json")
SEPARATOR = "|"
"""Between several answers in one cell of a CSV file."""


@dataclass(frozen=True)
class _Row:
    """A row of the file as text."""

    where: str
    """File and row, for errors."""
    clean: str
    corrupted: str | None
    answers: tuple[str, ...]
    wrongs: tuple[str, ...]
    gap: str


@dataclass(frozen=True)
class _Encoded:
    clean: list[int]
    corrupted: list[int] | None
    answers: list[int]
    wrongs: list[int]
    space: str
    """The gap where it is a token of its own and so the prompt's last one."""


def task_from_file(path: str | Path, model_or_tokenizer: Model | Tokenizer, name: str | None = None) -> Task:
    """A task from a file with the columns `clean`, `corrupted`, `answer` and `wrong` (or `answers`, `wrongs`).

    path: `.csv` with a header, several answers in a cell joined by `|`; or `.json`, a list of objects with these keys,
        several answers as a list. `corrupted` may be left out everywhere; sources other than `corrupted` still work.
    name: the task's name; the file's without its ending, if not given.

    Between prompt and answer stands one space, or what an optional column `gap` says, unless the prompt ends in
    whitespace or the answer begins with it. Where the space is a token of its own it becomes the prompt's last token.

    Raises TaskError, naming file, row and token, for a missing column, an answer that is not one token, an answer that
    is also wrong, or prompts of different lengths in tokens.
    """
    tokenizer, _ = tokenizer_and_model(model_or_tokenizer)
    file = Path(path)
    rows = _read(file)
    encoded = [_encode(row, tokenizer) for row in rows]
    _check_aligned(rows, encoded, tokenizer)
    answers, wrongs = padded([row.answers for row in encoded]), padded([row.wrongs for row in encoded])
    has_sets = answers.shape[1] > 1 or wrongs.shape[1] > 1
    has_corrupted = rows[0].corrupted is not None
    return Task(
        name=file.stem if name is None else name,
        clean=torch.tensor([row.clean for row in encoded]),
        corrupted=torch.tensor([row.corrupted for row in encoded]) if has_corrupted else None,
        answer=answers[:, 0],
        wrong=wrongs[:, 0],
        prompts=tuple(row.clean + ids.space for row, ids in zip(rows, encoded, strict=True)),
        corrupted_prompts=tuple(f"{row.corrupted}{ids.space}" for row, ids in zip(rows, encoded, strict=True))
        if has_corrupted
        else (),
        template="file",
        positions={"last": (len(encoded[0].clean) - 1,)},
        answers=answers if has_sets else None,
        wrongs=wrongs if has_sets else None,
    )


def is_file_name(name: str | Path) -> bool:
    """Whether what stands for a task is the path of a file, not a name."""
    return Path(name).suffix in SUFFIXES


def file_fingerprint(path: str | Path) -> str:
    """Sixteen hexadecimal digits that change when what a task file says does; how it is laid out does not count.

    Raises TaskError as `task_from_file` does for what is wrong with the file itself.
    """
    rows = [(row.clean, row.corrupted, row.answers, row.wrongs, row.gap) for row in _read(Path(path))]
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def file_about(path: str | Path) -> About:
    """What a card says of a file's task. Raises TaskError as `file_fingerprint`."""
    rows = _read(Path(path))
    corrupted = "none, so only the sources mean and zero." if rows[0].corrupted is None else "those of the file."
    return About(f"A task of your own, {counted(len(rows), 'prompt')} in a file.", corrupted, str(path))


def _read(file: Path) -> list[_Row]:
    if file.suffix not in SUFFIXES:
        raise TaskError(f"task file {file}: ending {file.suffix!r} is not known; expected {' or '.join(SUFFIXES)}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"task file {file} cannot be read: {error}") from None
    cells = _csv_cells(text) if file.suffix == ".csv" else _json_cells(file, text)
    if not cells:
        raise TaskError(f"task file {file} has no rows; expected at least one prompt")
    rows = [_row(f"{file.name}, row {i}", row) for i, row in enumerate(cells, start=1)]
    for row in rows:
        if (row.corrupted is None) != (rows[0].corrupted is None):
            missing = row if row.corrupted is None else rows[0]
            raise TaskError(f"{missing.where}: no corrupted prompt; expected one in every row or in none")
    return rows


def _csv_cells(text: str) -> list[dict[str, Any]]:
    """Rows by column; several answers in a cell become a list."""
    rows: list[dict[str, Any]] = []
    for read in csv.DictReader(text.splitlines(keepends=True)):
        cells: dict[str, Any] = {key.strip(): cell for key, cell in read.items() if key and cell is not None}
        for key in ("answer", "answers", "wrong", "wrongs"):
            if key in cells:
                cells[key] = [part for part in cells[key].split(SEPARATOR) if part.strip()]
        rows.append({key: cell for key, cell in cells.items() if key == "gap" or cell})
    return rows


def _json_cells(file: Path, text: str) -> list[dict[str, Any]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise TaskError(f"task file {file} is not JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TaskError(f"task file {file}: expected a list of objects with the keys clean, corrupted, answer, wrong")
    return rows


def _row(where: str, cells: dict[str, Any]) -> _Row:
    clean = cells.get("clean")
    if not isinstance(clean, str) or not clean.strip():
        raise TaskError(f"{where}: no clean prompt; expected text in the column clean")
    corrupted, gap = cells.get("corrupted"), cells.get("gap", " ")
    if not isinstance(corrupted, str | None) or not isinstance(gap, str):
        raise TaskError(f"{where}: corrupted and gap must be text")
    answers, wrongs = (_words(where, cells, key) for key in ("answer", "wrong"))
    return _Row(where, clean, corrupted, answers, wrongs, gap)


def _words(where: str, cells: dict[str, Any], key: str) -> tuple[str, ...]:
    given = cells.get(key, cells.get(f"{key}s"))
    words = [given] if isinstance(given, str) else given
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise TaskError(f"{where}: no {key}; expected text in the column {key}, or several in {key}s")
    return tuple(words)


def _encode(row: _Row, tokenizer: Tokenizer) -> _Encoded:
    texts = [row.clean] if row.corrupted is None else [row.clean, row.corrupted]
    # All answers of a row stand after one and the same prompt: the space is a token before all of them or before none.
    endings = [_after(row, text, word, tokenizer) for text in texts for word in (*row.answers, *row.wrongs)]
    spaces = {space for space, _ in endings}
    if len(spaces) > 1:
        listed = ", ".join((*row.answers, *row.wrongs))
        raise TaskError(
            f"{row.where}: {tokenizer.name} has a space token before some of {listed} and not before others"
        )
    space = spaces.pop()
    prompts = [[*tokenizer.encode(text), *space] for text in texts]
    tokens = [token for _, token in endings][: len(row.answers) + len(row.wrongs)]
    answers, wrongs = tokens[: len(row.answers)], tokens[len(row.answers) :]
    for token in answers:
        if token in wrongs:
            raise TaskError(f"{row.where}: {tokenizer.decode([token])!r} is an answer and a wrong answer")
    corrupted = None if row.corrupted is None else prompts[1]
    return _Encoded(prompts[0], corrupted, answers, wrongs, row.gap if space else "")


def _after(row: _Row, prompt: str, word: str, tokenizer: Tokenizer) -> tuple[tuple[int, ...], int]:
    """What the space before the word is in tokens, () where it is none of its own, and the word's token."""
    gap = "" if prompt[-1].isspace() or word[0].isspace() else row.gap
    before, joined = tokenizer.encode(prompt), tokenizer.encode(f"{prompt}{gap}{word}")
    rest = joined[len(before) :]
    if joined[: len(before)] != before:
        raise TaskError(
            f"{row.where}: {tokenizer.name} joins the end of the prompt {prompt[-20:]!r} with {word!r}; "
            "expected a token's border between them, such as a prompt without a space at its end"
        )
    if len(rest) == 2 and text_of(tokenizer, rest[0]) == "":
        return (rest[0],), rest[1]
    if len(rest) != 1:
        pieces = ", ".join(repr(tokenizer.decode([token])) for token in rest)
        raise TaskError(f"{row.where}: {word!r} is {len(rest)} tokens for {tokenizer.name} ({pieces}); expected one")
    return (), rest[0]


def _check_aligned(rows: Sequence[_Row], encoded: Sequence[_Encoded], tokenizer: Tokenizer) -> None:
    n_pos = len(encoded[0].clean)
    for row, ids in zip(rows, encoded, strict=True):
        for side, tokens in (("clean", ids.clean), ("corrupted", ids.corrupted)):
            if tokens is not None and len(tokens) != n_pos:
                pieces = " ".join(repr(tokenizer.decode([token])) for token in tokens)
                raise TaskError(
                    f"{row.where}: the {side} prompt has {len(tokens)} tokens, the first row's clean one {n_pos}; "
                    f"expected one length, since prompts are compared position by position; its tokens: {pieces}"
                )
        if ids.clean == ids.corrupted:
            raise TaskError(f"{row.where}: clean and corrupted prompt are the same; expected two")
