"""How sure a model is of the next member of a sequence, by how many members it has been shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float

from subcircuit.analysis.metrics import is_top, logits_at, sum_at
from subcircuit.analysis.statistics import interval_columns
from subcircuit.analysis.tasks import Task, task
from subcircuit.engine.errors import TaskError
from subcircuit.engine.model import HookedTransformer

LONGEST = 10


@dataclass(frozen=True, eq=False)
class ByLength:
    """What a model expects after the first, the second, … member of the same prompts."""

    task: Task
    answer: Float[torch.Tensor, "length prompt"]
    """Probability of the member that comes next; row i is read when i + 1 members have been shown."""
    is_top: Bool[torch.Tensor, "length prompt"]
    """Whether that member is the likeliest token."""
    too_long: str
    """Why no more members are shown than these; empty where so many were asked for."""

    def table(self) -> list[dict[str, Any]]:
        """A row per number of members: mean probability (`answer`) and share of prompts whose likeliest token is the
        next member (`top1`), with the ends of their 95 % bootstrap intervals (None of one prompt)."""
        measured = {"answer": self.answer.double(), "top1": self.is_top.double()}
        ends = [interval_columns(values, f"{name}_", self.task.seed or 0) for name, values in measured.items()]
        return [
            {
                "task": self.task.name,
                "members": i + 1,
                "n_prompts": self.task.n,
                **{name: float(values[i].mean()) for name, values in measured.items()},
                **{name: end for column in ends for name, end in column[i].items()},
            }
            for i in range(len(self.answer))
        ]


def by_length(
    model: HookedTransformer,
    name: str,
    longest: int = LONGEST,
    *,
    n: int = 32,
    seed: int = 0,
    template: str = "all",
    filter: bool = False,
) -> ByLength:
    """Read the next member's probability after each member of n prompts, in one pass (Lan et al., arXiv 2311.04131,
    against sequence length).

    A prompt of fewer members is the beginning of one of more, and a model sees no further than where it is read. Shown
    are `longest` members, or as many as the sequence, the tokenizer and the model's context allow. With `filter` only
    prompts that the model answers when all of these are shown.

    Raises TaskError for a task that is no sequence, or of which no prompt can be made or too few pass the filter.
    """
    made, too_long = _longest(model, name, longest, n, seed, template)
    if filter:
        members = len(made.member_positions)
        made = task(name, model, n=n, seed=seed, template=template, members=members, filter=True)
    following = made.member_positions[1:]
    logits = logits_at(model, made.clean, [*(position - 1 for position in following), made.pos - 1])
    expected = torch.cat((made.clean[:, list(following)], made.answer[:, None]), 1)
    pairs = [(logits[:, i], expected[:, i]) for i in range(len(following) + 1)]
    answer = torch.stack([sum_at(rows.softmax(-1), tokens) for rows, tokens in pairs])
    return ByLength(made, answer, torch.stack([is_top(rows, tokens) for rows, tokens in pairs]), too_long)


def _longest(model: HookedTransformer, name: str, longest: int, n: int, seed: int, template: str) -> tuple[Task, str]:
    """The task with as many members as fit, and why no more do."""
    too_long = ""
    for members in range(longest, 0, -1):
        try:
            made = task(name, model, n=n, seed=seed, template=template, members=members)
        except TaskError as error:
            if members == 1:
                raise
            too_long = str(error)
            continue
        if made.pos <= model.config.n_ctx:
            return made, too_long
        too_long = f"task {name!r}: {members} members are {made.pos} tokens, and the context is {model.config.n_ctx}"
    raise TaskError(too_long or f"task {name!r}: {longest} members; expected at least one to be shown")
