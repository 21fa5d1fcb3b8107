"""What heads attend to on a task's prompts: members to members, the last token to members, to mentions of the answer.

Each measure is attention from some positions (queries) to others (keys), averaged over queries and prompts. Two things
could feign it, and both are measured:

* position: a head that always attends four tokens back finds a member there in these templates. The baseline is the
  same cells of the pattern on random tokens.
* attending to anything: the threshold is the excess over that baseline for classes of as many positions that are drawn
  at random among those without a part in the role (position 0 aside, where idle heads attend): what one head of the
  model would be expected to reach.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from subcircuit.analysis.attention import (
    N_DRAWS,
    N_RANDOM_PROMPTS,
    Pattern,
    mean_attention,
    random_tokens,
    same_token_cells,
)
from subcircuit.analysis.measures import LEAST_SHARE, Measure, chance_threshold
from subcircuit.analysis.tasks import Task
from subcircuit.engine.model import HookedTransformer

Cells = Float[Tensor, "query key"]
"""What every cell of a pattern counts; weights of a mean over queries."""


def similar_cells(members: Sequence[int], n_pos: int) -> Cells:
    """From each member but the first to the members before it."""
    cells = torch.zeros(n_pos, n_pos, dtype=torch.float64)
    for i, query in enumerate(members[1:], 1):
        cells[query, list(members[:i])] = 1 / (len(members) - 1)
    return cells


def from_last_cells(keys: Sequence[int], n_pos: int) -> Cells:
    """From the last position to some positions."""
    cells = torch.zeros(n_pos, n_pos, dtype=torch.float64)
    cells[n_pos - 1, list(keys)] = 1
    return cells


def newest_cells(members: Sequence[int], n_pos: int) -> Cells:
    """From the last position to the newest member."""
    return from_last_cells(members[-1:], n_pos)


_SEQUENCE: dict[str, tuple[str, Callable[[Sequence[int], int], Cells]]] = {
    "similar member": ("from a member to the members before it", similar_cells),
    "sequence detection": ("from the last token to the members", from_last_cells),
    "newest member": ("from the last token to the newest member", newest_cells),
}


def task_attention_measures(
    model: HookedTransformer, task: Task, *, seed: int = 0
) -> tuple[dict[str, Measure], Pattern]:
    """Measures of attention on a task's clean prompts, by name, and the prompts' mean pattern.

    Of a task with members: `similar member`, `sequence detection`, `newest member` (Lan et al., arXiv 2311.04131,
    section 4, for the first two). Of one whose prompts mention the answer before: `answer mention`, from the last token
    to it (the name movers of Wang et al. 2022, arXiv 2211.00593, section 3.1). Of one with a class of positions S2:
    `S2`, from the last token to it (their S-inhibition heads). Of prompts in which tokens repeat: `duplicate token in
    prompt` and `induction in prompt`.

    A measure is left out where a task has nothing it could look at, or no other positions to compare with.
    """
    of_tokens = _cells_of_tokens(task)
    pattern, sums = mean_attention(model, task.clean, torch.stack([*of_tokens.values()]) if of_tokens else None)
    random = random_tokens(model, N_RANDOM_PROMPTS, task.pos, seed, _bos_of(model, task))
    by_position, _ = mean_attention(model, random)
    generator = torch.Generator().manual_seed(seed)
    measures = {}

    def add(name: str, what: str, score: Float[Tensor, "layer head"], cells: Cells, null: list[Cells]) -> None:
        if null:
            threshold = chance_threshold(_weighed(torch.stack(null), pattern - by_position), LEAST_SHARE)
            measures[name] = Measure(name, score, _weighed(cells, by_position), threshold, what)

    for name, (what, cells_of, keys) in _sequence_roles(task).items():
        cells = cells_of(keys, task.pos)
        classes = _random_classes(len(keys), task.member_positions or keys, task.pos, generator)
        add(name, what, _weighed(cells, pattern), cells, [cells_of(drawn, task.pos) for drawn in classes])
    for (name, per_prompt), score in zip(of_tokens.items(), sums, strict=True):
        cells = per_prompt.sum(0)
        add(name, _OF_TOKENS[name], score, cells, [_other_keys(cells, generator) for _ in range(N_DRAWS)])
    return measures, pattern


def _bos_of(model: HookedTransformer, task: Task) -> int | None:
    """The token that begins every prompt and means nothing; without a tokenizer, any that begins them all."""
    first = int(task.clean[0, 0])
    if bool((task.clean[:, 0] != first).any()):
        return None
    return first if model.tokenizer is None or model.tokenizer.bos_id == first else None


_OF_TOKENS = {
    "answer mention": "from the last token to where the answer stood",
    "duplicate token in prompt": "to the same token before, in the task's prompts",
    "induction in prompt": "to what came after the same token, in the task's prompts",
}


def _sequence_roles(task: Task) -> dict[str, tuple[str, Callable[[Sequence[int], int], Cells], tuple[int, ...]]]:
    members = task.member_positions
    roles = {name: (*role, members) for name, role in _SEQUENCE.items()} if len(members) > 1 else {}
    if "S2" in task.positions:
        roles["S2"] = ("from the last token to the repeated name", from_last_cells, task.positions["S2"])
    return roles


def _cells_of_tokens(task: Task) -> dict[str, Float[Tensor, "prompt query key"]]:
    """Measures whose cells differ from prompt to prompt."""
    found = {f"{name} in prompt": cells for name, cells in same_token_cells(task.clean).items()}
    mentions = _mentions(task)
    if bool(mentions.any(1).all()):
        found["answer mention"] = torch.zeros(task.n, task.pos, task.pos, dtype=torch.float64)
        found["answer mention"][:, -1] = mentions.double() / task.n
    return found


def _mentions(task: Task) -> Bool[Tensor, "prompt pos"]:
    """Where a prompt holds one of its answers."""
    answers = task.answer_sets[0]
    return (task.clean[:, :, None] == answers[:, None, :]).any(-1)


def _weighed(cells: Float[Tensor, "*draw query key"], pattern: Pattern) -> Float[Tensor, "*draw layer head"]:
    return torch.einsum("...qk,lhqk->...lh", cells, pattern)


def _random_classes(size: int, taken: Sequence[int], n_pos: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    """Classes of so many positions that are neither taken nor the first or last; none where there are too few."""
    free = torch.tensor([position for position in range(1, n_pos - 1) if position not in taken])
    if len(free) < size:
        return []
    draws = (free[torch.randperm(len(free), generator=generator)[:size]].tolist() for _ in range(N_DRAWS))
    return [tuple(sorted(drawn)) for drawn in draws]


def _other_keys(cells: Cells, generator: torch.Generator) -> Cells:
    """The same weights of each query on other keys before it, drawn at random; position 0 keeps its own."""
    drawn = cells.clone()
    for query in range(3, len(cells)):
        drawn[query, 1:query] = cells[query, 1 + torch.randperm(query - 1, generator=generator)]
    return drawn
