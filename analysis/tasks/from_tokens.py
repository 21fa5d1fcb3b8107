"""A task from token ids: no tokenizer is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from subcircuit.analysis.tasks.values import Task
from subcircuit.engine.errors import TaskError


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
