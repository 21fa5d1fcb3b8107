"""What the unpatched model makes of a task: how right it is, and the first prompts as a person reads them."""

from __future__ import annotations

from typing import Any

from subcircuit.analysis.metrics import final_logits, is_top, logit_difference
from subcircuit.analysis.statistics import ends_of
from subcircuit.analysis.tasks import Task
from subcircuit.engine.errors import TaskError
from subcircuit.engine.model import HookedTransformer

N_EXAMPLES = 4
N_TOP = 3
"""Tokens that an example shows of what the model expects."""


def clean_run(model: HookedTransformer, task: Task, seed: int) -> dict[str, Any]:
    """Top-1 share and mean logit difference with intervals, and examples, as plain values for JSON.

    Raises TaskError when the model does not prefer the answers.
    """
    rows = final_logits(model, task.clean)
    differences = logit_difference(rows, *task.answer_sets).double()
    full = float(differences.mean())
    if full <= 0:
        raise TaskError(f"task {task.name!r}: the model does not prefer the answers (mean logit difference {full:.3f})")
    correct = is_top(rows, task.answer_sets[0])
    top = rows[:N_EXAMPLES].softmax(-1).topk(min(N_TOP, rows.shape[-1]))

    def text(token: int) -> str:
        return model.tokenizer.decode([token]) if model.tokenizer is not None else str(token)

    examples = [
        {
            "prompt": task.prompts[i],
            "corrupted": task.corrupted_prompts[i] if task.corrupted_prompts else None,
            "answer": text(int(task.answer[i])),
            "wrong": text(int(task.wrong[i])),
            "model_top": text(int(top.indices[i, 0])),
            "top": [[text(int(id)), float(p)] for id, p in zip(top.indices[i], top.values[i], strict=True)],
            "correct": bool(correct[i]),
        }
        for i in range(min(N_EXAMPLES, task.n))
    ]
    return {
        "examples": examples,
        "accuracy": float(correct.double().mean()),
        "full_logit_difference": full,
        "intervals": {
            "accuracy": ends_of(correct.double(), seed),
            "full_logit_difference": ends_of(differences, seed),
        },
    }
