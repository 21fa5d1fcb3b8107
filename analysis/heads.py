"""What the heads of a model do in a task: roles, each with the numbers that speak for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from subcircuit.analysis.attention import AttentionLookups, lookups_of, repeated_token_measures
from subcircuit.analysis.attention_roles import task_attention_measures
from subcircuit.analysis.attribution import Attribution, attribution
from subcircuit.analysis.measures import Measure
from subcircuit.analysis.ov import OVScores, QKScores, ov_scores, qk_scores
from subcircuit.analysis.tasks import Task
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import PatchError, PromptError, TaskError
from subcircuit.engine.model import HookedTransformer

OV_PROMPTS = 16
"""Of so many prompts, at most, are OV scores taken: they cost an unembedding per head and token."""

Sign = Literal["+", "-", "0"]


@dataclass(frozen=True)
class Role:
    """A thing that heads do, by the measures that have to show it.

    `needs` are measures with the sign they must have beyond their threshold: +, − for the opposite, 0 for neither.
    """

    name: str
    needs: tuple[tuple[str, Sign], ...]
    means: str
    of_task: bool = True
    """Whether it is a role in a task; False for one that is seen on random tokens, the same for every task."""


ROLES = (
    Role("duplicate token", (("duplicate token", "+"),), "attends from a token to its earlier mention", of_task=False),
    Role("previous token", (("previous token", "+"),), "attends to the token before", of_task=False),
    Role("induction", (("induction", "+"),), "attends to what followed the token's earlier mention", of_task=False),
    Role("similar member", (("similar member", "+"),), "attends from a member to those before it"),
    Role("sequence detection", (("sequence detection", "+"),), "attends from the last token to the members"),
    Role(
        "next member",
        (("newest member", "+"), ("OV next", "+")),
        "attends from the last token to the newest member and writes the one after it",
    ),
    Role(
        "member copying",
        (("sequence detection", "+"), ("OV copy", "+")),
        "attends from the last token to members and writes them",
    ),
    Role(
        "newest-member suppression",
        (("newest member", "+"), ("OV anti-copy", "+")),
        "attends from the last token to the newest member and writes against it",
    ),
    Role(
        "answer mover",
        (("answer mention", "+"), ("direct effect", "+")),
        "attends from the last token to the answer's mention and raises it (a name mover, in IOI)",
    ),
    Role(
        "negative answer mover",
        (("answer mention", "+"), ("direct effect", "-")),
        "attends from the last token to the answer's mention and lowers it",
    ),
    Role(
        "S-inhibition-like",
        (("S2", "+"), ("direct effect", "0")),
        "attends from the last token to the repeated name and hardly writes to the logits itself",
    ),
)
"""Duplicate, similar member, sequence detection and next member are the paper's (Lan et al., arXiv 2311.04131, section
4); previous token and induction are of Olsson et al. 2022 (arXiv 2209.11895), the last three of Wang et al. 2022 (arXiv
2211.00593); suppression is that of McDougall et al. 2023 (arXiv 2310.04625)."""


@dataclass(frozen=True, eq=False)
class HeadRoles:
    """What every head of a model does in a task, with all that it was read from.

    A head has a role where each measure that the role needs exceeds its baseline by more than its threshold
    (`Measure`); most have none. A role that needs a measure which the task does not allow is in `untested`.
    """

    task: str
    config: ModelConfig
    measures: Mapping[str, Measure]
    lookups: AttentionLookups
    attribution: Attribution
    ov: OVScores | None
    """None where the prompts show nothing that could be copied."""
    qk: QKScores | None
    """None in a task without members."""

    @property
    def untested(self) -> tuple[str, ...]:
        """Roles that this task cannot show."""
        return tuple(role.name for role in ROLES if any(name not in self.measures for name, _ in role.needs))

    def holders(self, role: str) -> list[tuple[int, int]]:
        """The heads (layer, head) that have a role, the clearest first. Raises PatchError for an unknown role."""
        found = _role(role)
        if role in self.untested:
            return []
        heads = [(layer, head) for layer, head in self._holds(found).nonzero().tolist()]
        return sorted(heads, key=lambda head: -self._clarity(found, head))

    def of(self, head: tuple[int, int]) -> tuple[str, ...]:
        """The roles of one head, the clearest first; () for none. Raises PatchError for a head that is not there."""
        layer, index = head
        if not (0 <= layer < self.config.n_layers and 0 <= index < self.config.n_heads):
            raise PatchError(f"head a{layer}.h{index} does not exist in {self.config.name or 'this model'}")
        tested = [role for role in ROLES if role.name not in self.untested]
        held = [role for role in tested if bool(self._holds(role)[head])]
        return tuple(role.name for role in sorted(held, key=lambda role: -self._clarity(role, head)))

    def evidence(self, head: tuple[int, int], role: str) -> str:
        """The measures of a role for one head, each with what it has to exceed."""
        return "; ".join(
            f"{name} {float(self.measures[name].score[head]):.2f} (needs {self._needed(name, head, sign)})"
            for name, sign in _role(role).needs
            if sign != "0"
        )

    def table(self, heads: Sequence[tuple[int, int]] | None = None) -> list[dict[str, Any]]:
        """A row per head (all, if none are given): its roles, their evidence, and every measure."""
        if heads is None:
            heads = [(layer, head) for layer in range(self.config.n_layers) for head in range(self.config.n_heads)]
        rows = []
        for head in heads:
            roles = self.of(head)
            place = {"head": f"a{head[0]}.h{head[1]}", "layer": head[0], "index": head[1]}
            said = {"roles": list(roles), "evidence": {role: self.evidence(head, role) for role in roles}}
            rows.append({**place, **said, **{name: float(each.score[head]) for name, each in self.measures.items()}})
        return rows

    def with_roles(self) -> list[tuple[int, int]]:
        """The heads that have any role, those with one in the task before others, the clearest first."""
        clearest: dict[tuple[int, int], tuple[bool, float]] = {}
        for role in ROLES:
            for head in self.holders(role.name):
                key = role.of_task, self._clarity(role, head)
                clearest[head] = max(clearest.get(head, key), key)
        return sorted(clearest, key=lambda head: clearest[head], reverse=True)

    def _holds(self, role: Role) -> Bool[Tensor, "layer head"]:
        return torch.stack([_shows(self.measures[name], sign) for name, sign in role.needs]).all(0)

    def _clarity(self, role: Role, head: tuple[int, int]) -> float:
        """By how many thresholds the weakest of a role's measures exceeds its baseline."""
        ratios = [
            abs(float(self.measures[name].excess[head])) / max(self.measures[name].threshold, 1e-9)
            for name, sign in role.needs
            if sign != "0"
        ]
        return min(ratios)

    def _needed(self, name: str, head: tuple[int, int], sign: Sign) -> str:
        measure = self.measures[name]
        baseline = float(measure.baseline[head])
        return f"> {baseline + measure.threshold:.2f}" if sign == "+" else f"< {baseline - measure.threshold:.2f}"


def _shows(measure: Measure, sign: Sign) -> Bool[Tensor, "layer head"]:
    if sign == "0":
        return ~(measure.passes | measure.fails_opposite)
    return measure.passes if sign == "+" else measure.fails_opposite


def _role(name: str) -> Role:
    found = next((role for role in ROLES if role.name == name), None)
    if found is None:
        raise PatchError(f"role {name!r} is not known; expected one of {', '.join(role.name for role in ROLES)}")
    return found


def head_roles(
    model: HookedTransformer,
    task: Task,
    *,
    seed: int = 0,
    repeated: Mapping[str, Measure] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> HeadRoles:
    """Find out what every head of a model does in a task: from its attention, its weights and its direct effect.

    seed: of the random tokens, classes and dealt answers that baselines and thresholds are taken from.
    repeated: `repeated_measures(model, seed)`, which do not depend on the task, if they are at hand.

    OV scores are of the first `OV_PROMPTS` prompts.
    """
    measures = dict(repeated if repeated is not None else repeated_measures(model, seed))
    on_task, pattern = task_attention_measures(model, task, seed=seed)
    terms = attribution(model, task, seed=seed)
    ov = _ov(model, task, progress)
    measures |= {**on_task, "direct effect": terms.measure(), **(_ov_measures(ov) if ov is not None else {})}
    try:
        qk = qk_scores(model, task)
    except TaskError:
        qk = None
    return HeadRoles(task.name, model.config, measures, lookups_of(task, pattern), terms, ov, qk)


def repeated_measures(model: HookedTransformer, seed: int = 0) -> dict[str, Measure]:
    """`repeated_token_measures(model)`, or none where the context is too short for them."""
    try:
        return repeated_token_measures(model, seed=seed)
    except PromptError:
        return {}


def _ov(model: HookedTransformer, task: Task, progress: Callable[[int, int], None] | None) -> OVScores | None:
    try:
        return ov_scores(model, task.subset(range(min(task.n, OV_PROMPTS))), progress=progress)
    except TaskError:
        return None


def _ov_measures(ov: OVScores) -> dict[str, Measure]:
    asked = [(0, False), (0, True), *([(1, False)] if ov.is_sequence else [])]
    try:
        found = [ov.measure(shift, suppressed=suppressed) for shift, suppressed in asked]
    except TaskError:
        return {}
    return {measure.name: measure for measure in found}


def shared_roles(found: Mapping[str, HeadRoles]) -> list[dict[str, Any]]:
    """Heads that have the same role in several tasks: a row per head and role with the tasks, most tasks first.

    found: what `head_roles` gave for each task, by the task's name. Roles that no task decides are left out.
    """
    rows = []
    for role in [role for role in ROLES if role.of_task]:
        held = {task: set(each.holders(role.name)) for task, each in found.items()}
        for layer, head in sorted(set().union(*held.values())):
            tasks = [task for task, heads in held.items() if (layer, head) in heads]
            if len(tasks) > 1:
                place = {"head": f"a{layer}.h{head}", "layer": layer, "index": head}
                rows.append({**place, "role": role.name, "tasks": tasks})
    return sorted(rows, key=lambda row: -len(row["tasks"]))
