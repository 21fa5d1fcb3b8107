"""Where heads attend: on repeated random tokens, and from class to class of a task's positions.

Everything is read from attention patterns; those of a batch are summed up layer by layer and not kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subcircuit.analysis.measures import LEAST_SHARE, Measure, chance_threshold
from subcircuit.analysis.tasks import Task
from subcircuit.engine.errors import PromptError
from subcircuit.engine.model import HookedTransformer

ROWS_AT_ONCE = 8
"""Prompts run together, whose patterns of one layer are in memory."""
N_RANDOM_PROMPTS = 16
"""Prompts of random tokens that a baseline is the mean over."""
N_DRAWS = 200
"""Random classes of positions that a threshold is taken from."""

Pattern = Float[Tensor, "layer head query key"]
"""Attention averaged over prompts."""


@torch.no_grad()
def mean_attention(
    model: HookedTransformer,
    tokens: Int[Tensor, "prompt pos"],
    weights: Float[Tensor, "measure prompt query key"] | None = None,
) -> tuple[Pattern, Float[Tensor, "measure layer head"]]:
    """Attention averaged over prompts, and sums of it that are weighted cell by cell in each prompt.

    weights: what every cell of every prompt's pattern counts in each sum.
    """
    config, (n, n_pos) = model.config, tokens.shape
    mean = torch.zeros(config.n_layers, config.n_heads, n_pos, n_pos, dtype=torch.float64)
    n_measures = 0 if weights is None else len(weights)
    sums = torch.zeros(n_measures, config.n_layers, config.n_heads, dtype=torch.float64)
    for first in range(0, n, ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)

        def add(pattern: Tensor, name: str, rows: slice = rows) -> None:
            layer = int(name.split(".")[1])
            pattern = pattern.detach().to("cpu", torch.float64)
            mean[layer] += pattern.sum(0) / n
            if weights is not None:
                sums[:, layer] += torch.einsum("bhqk,mbqk->mh", pattern, weights[:, rows].double())

        model.run_with_hooks(tokens[rows], [("blocks.*.attn.hook_pattern", add)], stop_at_layer=config.n_layers)
    return mean, sums


def random_tokens(model: HookedTransformer, n: int, n_pos: int, seed: int, bos: int | None = None) -> Tensor:
    """Ids `[n, n_pos]` drawn evenly from the vocabulary, after `bos` if one is given."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.d_vocab, (n, n_pos), generator=generator)
    if bos is not None:
        tokens[:, 0] = bos
    return tokens


@torch.no_grad()
def repeated_token_measures(
    model: HookedTransformer, *, n: int = 8, length: int = 50, seed: int = 0
) -> dict[str, Measure]:
    """What heads do on random tokens that come twice: `previous token`, `duplicate token`, `induction`.

    In `length` random tokens followed by the same again (Olsson et al. 2022, arXiv 2209.11895, "prefix matching"), the
    mean attention from the second half's positions to the position 1 back (previous token), `length` back (the same
    token's first mention: duplicate token) and `length` − 1 back (the token after it: induction). The baseline of the
    previous token is the head's mean over all other offsets; that of the two others is the same offset where the first
    half is of other random tokens, since a head may attend so far back whatever stands there. Thresholds come from the
    other offsets. A tokenizer that adds BOS to texts has it here, too.

    length: shortened where the model's context is too short. Raises PromptError when not even 4 tokens fit twice.
    """
    bos = model.tokenizer.bos_id if model.tokenizer is not None and model.tokenizer.adds_bos else None
    n_before = int(bos is not None)
    length = min(length, (model.config.n_ctx - n_before) // 2)
    if length < 4:
        raise PromptError(f"a context of {model.config.n_ctx} tokens is too short for 4 random tokens that come twice")
    once, other = (random_tokens(model, n, length, seed + i) for i in range(2))
    start = [] if bos is None else [torch.full((n, 1), bos)]
    repeated, fresh = (_by_offset(model, torch.cat((*start, first, once), 1), length) for first in (once, other))
    others = slice(2, length - 1)
    mean = repeated[others].mean(0)
    # Leaving one offset out of its own baseline, as the previous token's is.
    rest = (mean * (length - 3) - repeated[others]) / max(1, length - 4)
    by_offset = chance_threshold(repeated[others] - rest, LEAST_SHARE)
    by_repetition = chance_threshold((repeated - fresh)[others], LEAST_SHARE)
    named = {
        "previous token": (1, "to the token before", mean, by_offset),
        "duplicate token": (length, "to the same token before", fresh[length], by_repetition),
        "induction": (length - 1, "to what came after the same token", fresh[length - 1], by_repetition),
    }
    return {
        name: Measure(name, repeated[offset], baseline, threshold, f"{what}, in random tokens that come twice")
        for name, (offset, what, baseline, threshold) in named.items()
    }


def _by_offset(
    model: HookedTransformer, tokens: Int[Tensor, "prompt pos"], n_last: int
) -> Float[Tensor, "offset layer head"]:
    """Mean attention from the last `n_last` positions to those 0, 1, …, `n_last` back."""
    mean, _ = mean_attention(model, tokens)
    queries = torch.arange(tokens.shape[1] - n_last, tokens.shape[1])
    return torch.stack([mean[:, :, queries, queries - offset].mean(-1) for offset in range(n_last + 1)])


def position_classes(task: Task) -> dict[str, tuple[int, ...]]:
    """A task's classes of positions, with `start` (position 0, where idle heads attend) and `rest`, in no other."""
    classes = {"start": (0,), **task.positions}
    taken = {position for positions in classes.values() for position in positions}
    rest = tuple(position for position in range(task.pos) if position not in taken)
    return {**classes, "rest": rest} if rest else classes


@dataclass(frozen=True, eq=False)
class AttentionLookups:
    """Attention from class to class of a task's positions, averaged over prompts.

    `mass[…, i, j]` is how much of its attention a position of class i gives to positions of class j other than itself,
    on average; the last column is what it gives to itself. A row adds up to 1 where classes do not overlap.
    """

    task: str
    classes: Mapping[str, tuple[int, ...]]
    mass: Float[Tensor, "layer head query_class key_class_or_itself"]
    pattern: Pattern

    @property
    def columns(self) -> tuple[str, ...]:
        return *self.classes, "itself"

    def of(self, head: tuple[int, int], query: str, key: str) -> float:
        """Mass of one head from one class to another (or to `itself`). KeyError for a class that is not there."""
        names = list(self.classes)
        if query not in names or key not in self.columns:
            raise KeyError(f"no attention from {query!r} to {key!r}; classes are {', '.join(names)}")
        return float(self.mass[(*head, names.index(query), self.columns.index(key))])

    def between_members(self) -> Float[Tensor, "layer head pair"]:
        """Attention from each member of a sequence to the member just before it, averaged over prompts.

        pair: the second member to the first, the third to the second, …; none in a task of fewer than two members. Lan
        et al. (arXiv 2311.04131) report 0.34 from " 3" to " 2" for head 4.4 of GPT-2 Small.
        """
        members = list(self.classes.get("members", ()))
        return self.pattern[:, :, members[1:], members[:-1]]


def attention_lookups(model: HookedTransformer, task: Task) -> AttentionLookups:
    """Where the heads attend on a task's clean prompts, by classes of positions."""
    return lookups_of(task, mean_attention(model, task.clean)[0])


def lookups_of(task: Task, pattern: Pattern) -> AttentionLookups:
    """The look-ups of a task in the mean pattern of its prompts."""
    classes = position_classes(task)
    return AttentionLookups(task.name, classes, class_mass(pattern, classes), pattern)


def class_mass(
    pattern: Float[Tensor, "*any query key"], classes: Mapping[str, tuple[int, ...]]
) -> Float[Tensor, "*any query_class key_class_or_itself"]:
    """How much attention a position of each class gives to all others of each class, and to itself, on average."""
    member_of = torch.zeros(len(classes), pattern.shape[-1], dtype=torch.float64)
    for row, positions in enumerate(classes.values()):
        member_of[row, list(positions)] = 1
    itself = pattern.diagonal(dim1=-2, dim2=-1)
    others = (pattern - torch.diag_embed(itself)) @ member_of.T
    whole = torch.cat((others, itself[..., None]), -1)
    return member_of / member_of.sum(1, keepdim=True) @ whole


def same_token_cells(tokens: Int[Tensor, "prompt pos"]) -> dict[str, Float[Tensor, "prompt query key"]]:
    """Weights of a task's own repeated tokens: `duplicate token` and `induction`, where a prompt has any.

    Each is a mean over the positions whose token stood there before; all of its earlier mentions (or the positions
    after these) count as one class of keys.
    """
    n_pos = tokens.shape[1]
    earlier = torch.ones(n_pos, n_pos, dtype=torch.bool).tril(-1)
    same = (tokens[:, :, None] == tokens[:, None, :]) & earlier
    after = torch.zeros_like(same)
    after[:, :, 1:] = same[:, :, :-1]
    found = {}
    for name, cells in (("duplicate token", same), ("induction", after)):
        n_queries = int(cells.any(2).sum())
        if n_queries:
            found[name] = cells.double() / n_queries
    return found
