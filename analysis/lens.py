"""The logit lens: what the model would say if it stopped after each layer, and when the successor takes over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subcircuit.analysis.metrics import sum_at
from subcircuit.analysis.statistics import interval_columns
from subcircuit.analysis.tasks import Task
from subcircuit.engine.errors import TaskError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.answers import mean_at
from subcircuit.engine.tokenizer import Tokenizer

ROWS_AT_ONCE = 8
LOGITS_AT_ONCE = 2**24
"""Logits in memory together (64 MB in float32, and as much again for their exponentials)."""

Positions = Literal["last", "each"] | Sequence[int]


@dataclass(frozen=True, eq=False)
class Lens:
    """What the residual stream says at each stage, read through the final norm and the unembedding.

    nostalgebraist 2020, "interpreting GPT: the logit lens". Stages are `0_pre`, then per layer `l_mid` (after its
    attention) and `l_post` (after its MLP); the last one's probabilities are the model's own. Probabilities of
    sets of answers are sums over the set.
    """

    stages: tuple[str, ...]
    positions: tuple[int, ...]
    top_tokens: Int[Tensor, "stage prompt pos top"]
    top_probabilities: Float[Tensor, "stage prompt pos top"]
    answer: Float[Tensor, "stage prompt pos"]
    """Probability of the prompt's answer (or answers)."""
    wrong: Float[Tensor, "stage prompt pos"]
    """Probability of its wrong answer (or answers)."""
    newest: Float[Tensor, "stage prompt pos"] | None
    """Probability of the last member that the prompt shows; None in a task without members."""
    answer_rank: Int[Tensor, "stage prompt pos"]
    """Tokens that are likelier than the answer (than the best of its answers): 0 where it is the likeliest."""
    rival_rank: Int[Tensor, "stage prompt pos"]
    """The same for what the answer has to overtake, as `rival`."""
    lead: Float[Tensor, "stage prompt pos"]
    """Logit of the answer minus that of its rival, the newest member or else the wrong answer (means of sets)."""
    task: Task
    tokenizer: Tokenizer | None

    @property
    def rival(self) -> Float[Tensor, "stage prompt pos"]:
        """Probability of what the answer has to overtake: the newest member, or else the wrong answer."""
        return self.wrong if self.newest is None else self.newest

    def takeover(self) -> Int[Tensor, " prompt"]:
        """Per prompt, the index of the first stage from which the answer stays ahead of its rival to the end.

        Read at the last of the positions; the number of stages where the answer is not ahead in the end, and 0 where it
        never was behind.
        """
        behind = (self.lead <= 0)[..., -1]
        after_last = torch.arange(1, len(self.stages) + 1)[:, None] * behind
        return after_last.max(0).values

    def handovers(self) -> Float[Tensor, " layer"]:
        """Share of prompts in which a layer turns an earlier member into the answer, read as the likeliest token.

        Before the layer the likeliest token is a member that the prompt shows, after it the answer (Lan et al., arXiv
        2311.04131, section 4: blocks 8 and 9 of GPT-2). Raises TaskError for a task without members.
        """
        members = self.task.clean[:, list(self.task.member_positions)]
        if not members.shape[1]:
            raise TaskError(f"task '{self.task.name}' shows no members, so no layer hands over from one to the answer")
        top = self.top_tokens[::2, :, -1, 0, None]
        is_member = (top == members).any(-1)
        is_answer = (top == self.task.answer_sets[0]).any(-1)
        return (is_member[:-1] & is_answer[1:]).double().mean(1)

    def best_handover(self) -> tuple[int, float]:
        """The layer that turns an earlier member into the answer in most prompts, and in which share of them.

        Raises TaskError for a task without members.
        """
        share, layer = self.handovers().max(0)
        return int(layer), float(share)

    def table(self) -> list[dict[str, Any]]:
        """A row per stage at the last of the positions, averaged over prompts.

        The share of prompts whose likeliest token is the answer, mean probabilities and median ranks (1 for the
        likeliest) of the answer and its rival, mean lead in logits, the share of prompts with a lead, and the commonest
        likeliest token (its text where the model has a tokenizer) with its share. Shares and means over prompts have
        the ends of their 95 % bootstrap intervals beside them (`answer_low`, `answer_high`; None of one prompt).
        """
        is_answer = (self.top_tokens[:, :, -1, 0, None] == self.task.answer_sets[0]).any(-1)
        averaged = {
            "top1": is_answer.double(),
            "answer": self.answer[..., -1],
            "rival": self.rival[..., -1],
            "lead": self.lead[..., -1],
            "ahead": (self.lead[..., -1] > 0).double(),
        }
        ends = [interval_columns(values.double(), f"{name}_") for name, values in averaged.items()]
        rows = []
        for i, stage in enumerate(self.stages):
            (token, count), *_ = Counter(self.top_tokens[i, :, -1, 0].tolist()).most_common(1)
            rows.append(
                {
                    "stage": stage,
                    **{name: float(values[i].mean()) for name, values in averaged.items()},
                    "answer_rank": 1 + float(self.answer_rank[i, :, -1].double().median()),
                    "rival_rank": 1 + float(self.rival_rank[i, :, -1].double().median()),
                    "commonest": self.text(token),
                    "commonest_share": count / self.task.n,
                    **{name: end for column in ends for name, end in column[i].items()},
                }
            )
        return rows

    def text(self, token: int) -> str:
        """A token as text, or its id where there is no tokenizer."""
        return str(token) if self.tokenizer is None else self.tokenizer.decode([token])


@torch.no_grad()
def lens(model: HookedTransformer, task: Task, *, positions: Positions = "last", top: int = 5) -> Lens:
    """Read every stage of the residual stream on a task's clean prompts.

    positions: the last, each, or a list of positions (negative ones count from the end), which are read in order.
    top: how many of the likeliest tokens are kept.

    Raises TaskError for a position outside the prompts.
    """
    where = _positions(task, positions)
    n_layers = model.config.n_layers
    stages = ("0_pre", *(f"{layer}_{part}" for layer in range(n_layers) for part in ("mid", "post")))
    names = [_hook_name(stage) for stage in stages]
    top = min(top, model.config.d_vocab)
    tracked = {"answer": task.answer_sets[0], "wrong": task.answer_sets[1]}
    if task.member_positions:
        tracked["newest"] = task.clean[:, task.member_positions[-1], None]
    batches = []
    for first in range(0, task.n, ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        resid: dict[str, Tensor] = {}

        def keep(value: Tensor, name: str, resid: dict[str, Tensor] = resid) -> None:
            resid[name] = value[:, where]

        model.run_with_hooks(task.clean[rows], [(name, keep) for name in names], stop_at_layer=n_layers)
        sets = {name: tokens[rows] for name, tokens in tracked.items()}
        batches.append(_read(model, torch.stack([resid[name] for name in names]), sets, top))
    values = {name: torch.cat([batch[name] for batch in batches], 1) for name in batches[0]}
    newest = values.pop("newest", None)
    return Lens(stages, tuple(where), newest=newest, task=task, tokenizer=model.tokenizer, **values)


def _hook_name(stage: str) -> str:
    layer, part = stage.split("_")
    return f"blocks.{layer}.hook_resid_{part}"


def _read(
    model: HookedTransformer, resid: Float[Tensor, "stage prompt pos d_model"], sets: dict[str, Tensor], top: int
) -> dict[str, Tensor]:
    """Likeliest tokens with their probabilities, the probability of each set of tokens, and the answer's lead."""
    shape, rows = resid.shape[:3], resid.flatten(0, 2)
    by_row = {
        name: tokens.to(rows.device)[None, :, None].expand(shape[0], -1, shape[2], -1).flatten(0, 2)
        for name, tokens in sets.items()
    }
    step = max(1, LOGITS_AT_ONCE // model.config.d_vocab)
    found: dict[str, list[Tensor]] = {}
    for first in range(0, len(rows), step):
        logits = model.unembed_normed(rows[first : first + step])
        logits = logits if logits.dtype == torch.float64 else logits.float()
        probabilities = logits.softmax(-1)
        likeliest = probabilities.topk(top)
        found.setdefault("top_probabilities", []).append(likeliest.values)
        found.setdefault("top_tokens", []).append(likeliest.indices)
        wanted = {name: tokens[first : first + step] for name, tokens in by_row.items()}
        for name, tokens in wanted.items():
            found.setdefault(name, []).append(sum_at(probabilities, tokens))
        rival = wanted.get("newest", wanted["wrong"])
        found.setdefault("answer_rank", []).append(_rank(logits, wanted["answer"]))
        found.setdefault("rival_rank", []).append(_rank(logits, rival))
        found.setdefault("lead", []).append(mean_at(logits, wanted["answer"]) - mean_at(logits, rival))
    return {name: torch.cat(parts).unflatten(0, shape).cpu() for name, parts in found.items()}


def _rank(logits: Float[Tensor, "row d_vocab"], tokens: Int[Tensor, "row token"]) -> Int[Tensor, " row"]:
    """How many tokens have a higher logit than the best of some, rows of which are filled up with −1."""
    best = logits.gather(1, tokens.clamp(min=0)).masked_fill(tokens < 0, -torch.inf).amax(1)
    return (logits > best[:, None]).sum(1)


def _positions(task: Task, positions: Positions) -> list[int]:
    if isinstance(positions, str):
        if positions not in ("last", "each"):
            raise TaskError(f"positions {positions!r} is not understood; expected 'last', 'each' or a list of them")
        return [task.pos - 1] if positions == "last" else list(range(task.pos))
    outside = [position for position in positions if not -task.pos <= position < task.pos]
    if outside or not positions:
        what = f"position {outside[0]} is not there" if outside else "no positions"
        raise TaskError(f"task '{task.name}': {what}; its prompts have {task.pos} tokens")
    return sorted({position % task.pos for position in positions})


def stage_in_words(stage: str) -> str:
    """A stage of the stream as it is read: after what of which layer."""
    if stage == "0_pre":
        return "the embedding"
    layer, part = stage.split("_")
    return f"layer {layer}, {'attention' if part == 'mid' else 'MLP'}"
