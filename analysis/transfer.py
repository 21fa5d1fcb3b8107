"""Does a model still count, add and list months without a circuit's heads? Ablate them, continue freely, compare.

Lan et al. (arXiv 2311.04131), section on transfer: heads are ablated at all positions, those that the model generates
included, it decodes greedily, and a prompt counts if the whole model continues it rightly. Beside each circuit stand
random sets of as many heads outside of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.statistics import bootstrap_mean
from subcircuit.analysis.tasks import (
    TransferPrompt,
    is_file_name,
    task,
    task_names,
    transfer_kinds,
    transfer_prompts,
)
from subcircuit.engine.ablation import RowAblations
from subcircuit.engine.errors import PatchError, PromptError, TaskError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Component

ROWS_AT_ONCE = 128
"""Prompts that are continued side by side, each with an ablation of its own."""
SLACK = 2
"""Tokens generated beyond those expected: one ends a number, and text may be cut into tokens in another way."""

AblationValue = Literal["zero", "mean"]
Head = tuple[int, int]
Progress = Callable[[str, int, int], None]
"""Called with (kind of prompt, continuations made, continuations in all)."""


@dataclass(frozen=True, eq=False)
class KindTransfer:
    """What becomes of one kind of prompts without each circuit's heads."""

    kind: str
    n_asked: int
    prompts: tuple[TransferPrompt, ...]
    """Those that the whole model continues rightly; all others are left out."""
    completions: Mapping[str, tuple[str, ...]]
    """Per circuit, what the model makes of each prompt without its heads."""
    correct: Mapping[str, Bool[Tensor, " prompt"]]
    random: Mapping[str, Bool[Tensor, "set prompt"]]
    """The same without the heads of each random set; no sets where a circuit leaves too few heads to draw from."""


@dataclass(frozen=True, eq=False)
class Transfer:
    """Kinds of prompts, and the heads that were ablated."""

    kinds: tuple[KindTransfer, ...]
    heads: Mapping[str, list[Head]]
    random_heads: Mapping[str, list[list[Head]]]
    ablation: AblationValue
    seed: int

    def table(self, confidence: float = 0.95) -> list[dict[str, Any]]:
        """A row per kind and circuit: exact-match shares of the prompts that the whole model continues rightly.

        `full` is their share of all prompts asked. `share` is what is still right without the circuit's heads, `random`
        the mean over random sets, both with bootstrap intervals over prompts; `random_least` is the worst set's share,
        and `p` how often a random set does as badly as the circuit: (1 + sets with at most its share) / (1 + sets).
        None where there is no prompt, or no random set.
        """
        return [self._row(kind, name, confidence) for kind in self.kinds for name in self.heads]

    def _row(self, kind: KindTransfer, name: str, confidence: float) -> dict[str, Any]:
        n = len(kind.prompts)
        row: dict[str, Any] = {"kind": kind.kind, "circuit": name, "n_heads": len(self.heads[name])}
        row |= {"n_asked": kind.n_asked, "n_answered": n, "full": n / kind.n_asked}
        row |= {"n_random": len(self.random_heads[name]), "random_least": None, "p": None}
        drawn = kind.random[name].double()
        both = {"share": kind.correct[name].double()} | ({"random": drawn.mean(0)} if len(drawn) else {})
        for which in ("share", "random"):
            row |= {which: None, f"{which}_low": None, f"{which}_high": None}
            if n and which in both:
                found = bootstrap_mean(both[which], confidence=confidence, seed=self.seed)
                row |= {which: float(found.mean), f"{which}_low": float(found.low), f"{which}_high": float(found.high)}
        if n and len(drawn):
            shares = drawn.mean(1)
            as_bad = int((shares <= row["share"] + 1e-9).sum())
            row |= {"random_least": float(shares.min()), "p": (1 + as_bad) / (1 + len(drawn))}
        return row


def transfer(
    model: HookedTransformer,
    circuits: Mapping[str, Circuit],
    kinds: Iterable[str] | Mapping[str, Sequence[TransferPrompt]] = (),
    *,
    n: int = 32,
    seed: int = 0,
    ablation: AblationValue = "zero",
    n_random: int = 20,
    progress: Progress | None = None,
) -> Transfer:
    """Continue every kind of prompts with the whole model, and those that it continues rightly without some heads.

    circuits: by name; their heads are ablated together, MLPs are left alone.
    kinds: names as `prompts_of_kind` knows them (all of `transfer_kinds` if none are given), or prompts by kind.
    n: prompts per kind. n_random: random sets of heads per circuit, drawn outside of it.
    ablation: what stands in for a head's output: 0, or its mean over all tokens of the kind's prompts.

    Raises TaskError for a kind that is not known, PatchError for a circuit that has no heads or one the model lacks,
    or an ablation that is not known, PromptError for a model without tokenizer.
    """
    if ablation not in get_args(AblationValue):
        raise PatchError(f"ablation {ablation!r} is not known; expected one of {', '.join(get_args(AblationValue))}")
    if not circuits or n_random < 0:
        raise PatchError(f"got {len(circuits)} circuits and {n_random} random sets; expected 1 or more, 0 or more")
    heads = {name: _heads(model, name, circuit) for name, circuit in circuits.items()}
    drawn = {name: random_head_sets(model, each, n_random, seed) for name, each in heads.items()}
    if not isinstance(kinds, Mapping):
        kinds = {kind: prompts_of_kind(model, kind, n, seed) for kind in tuple(kinds) or transfer_kinds()}
    found = [_of_kind(model, kind, prompts, heads, drawn, ablation, progress) for kind, prompts in kinds.items()]
    return Transfer(tuple(found), heads, drawn, ablation, seed)


def prompts_of_kind(model: HookedTransformer, kind: str, n: int, seed: int) -> tuple[TransferPrompt, ...]:
    """Prompts of a transfer kind, or the clean prompts of a task or task file with their answers. Raises TaskError for
    none of these."""
    if kind in transfer_kinds():
        return transfer_prompts(kind, n, seed)
    if kind not in task_names() and not is_file_name(kind):
        known = ", ".join(transfer_kinds())
        raise TaskError(f"kind {kind!r} is not known; expected a task, a .csv or .json file, or one of {known}")
    made = task(kind, model, n=n, seed=seed)
    if model.tokenizer is None or not made.prompts:
        raise PromptError(f"task {kind!r} has no text to be continued; expected a model with a tokenizer")
    answers = [model.tokenizer.decode([token]).strip() for token in made.answer.tolist()]
    return tuple(TransferPrompt(kind, prompt, answer) for prompt, answer in zip(made.prompts, answers, strict=True))


def random_head_sets(model: HookedTransformer, heads: Sequence[Head], n: int, seed: int) -> list[list[Head]]:
    """n sets of as many heads, drawn evenly from all others of the model; none where there are too few others."""
    config = model.config
    every = [(layer, head) for layer in range(config.n_layers) for head in range(config.n_heads)]
    others = [head for head in every if head not in heads]
    if len(others) < len(heads):
        return []
    generator = random.Random(f"{seed} {sorted(heads)}")
    return [sorted(generator.sample(others, len(heads))) for _ in range(n)]


def _heads(model: HookedTransformer, name: str, circuit: Circuit) -> list[Head]:
    if not circuit.heads:
        raise PatchError(f"circuit '{name}' has no heads to ablate")
    for head in circuit.heads:
        _component(head).check(model.config)
    return circuit.heads


def _component(head: Head) -> Component:
    return Component(head[0], "z", head[1])


def _of_kind(
    model: HookedTransformer,
    kind: str,
    asked: Sequence[TransferPrompt],
    heads: Mapping[str, list[Head]],
    drawn: Mapping[str, list[list[Head]]],
    ablation: AblationValue,
    progress: Progress | None,
) -> KindTransfer:
    whole = list(_continued(model, [(prompt, []) for prompt in asked], None))
    answered = [prompt for prompt, text in zip(asked, whole, strict=True) if prompt.is_continued_by(text)]
    sets = [each for name in heads for each in (heads[name], *drawn[name])]
    rows = [(prompt, each) for each in sets for prompt in answered]
    values = _mean_outputs(model, answered, sets) if ablation == "mean" and answered else None
    texts = []
    for text in _continued(model, rows, values):
        texts.append(text)
        if progress is not None:
            progress(kind, len(texts), len(rows))
    right = [prompt.is_continued_by(text) for (prompt, _), text in zip(rows, texts, strict=True)]
    correct = torch.tensor(right, dtype=torch.bool).reshape(len(sets), len(answered))
    completions, of_circuit, of_random, at = {}, {}, {}, 0
    for name in heads:
        completions[name] = tuple(texts[at * len(answered) : (at + 1) * len(answered)])
        of_circuit[name], of_random[name] = correct[at], correct[at + 1 : at + 1 + len(drawn[name])]
        at += 1 + len(drawn[name])
    return KindTransfer(kind, len(asked), tuple(answered), completions, of_circuit, of_random)


def _continued(
    model: HookedTransformer, rows: Sequence[tuple[TransferPrompt, list[Head]]], values: Mapping[str, Tensor] | None
) -> Iterator[str]:
    """Greedy continuations of prompts, each without its heads; '' for a prompt that leaves no room in the context."""
    if model.tokenizer is None:
        raise PromptError("transfer continues text; expected a model with a tokenizer")
    tokenizer, n_ctx = model.tokenizer, model.config.n_ctx
    n_new = max((len(tokenizer.encode(f" {prompt.expected}", bos=False)) for prompt, _ in rows), default=0) + SLACK
    for first in range(0, len(rows), ROWS_AT_ONCE):
        batch = rows[first : first + ROWS_AT_ONCE]
        fits = [len(tokenizer.encode(prompt.prompt)) + n_new <= n_ctx for prompt, _ in batch]
        fitting = [row for row, fit in zip(batch, fits, strict=True) if fit]
        made: Iterator[str] = iter(())
        if fitting:
            ablations = RowAblations([[_component(head) for head in heads] for _, heads in fitting], values)
            hooks = ablations.hooks(model.config)
            made = iter(model.generate([prompt.prompt for prompt, _ in fitting], n_new, hooks=hooks).texts or ())
        yield from (next(made) if fit else "" for fit in fits)


@torch.no_grad()
def _mean_outputs(
    model: HookedTransformer, prompts: Sequence[TransferPrompt], sets: Sequence[Sequence[Head]]
) -> dict[str, Float[Tensor, "1 1 head d_head"]]:
    """Mean z of every head over all tokens of the prompts, by hook name, in the layers of the sets."""
    layers = sorted({layer for heads in sets for layer, _ in heads})
    sums: dict[str, Tensor] = {}
    n_tokens = 0
    for first in range(0, len(prompts), ROWS_AT_ONCE):
        batch = model.prompt_batch([prompt.prompt for prompt in prompts[first : first + ROWS_AT_ONCE]])
        real = batch.mask if batch.mask is not None else torch.ones_like(batch.tokens, dtype=torch.bool)
        n_tokens += int(real.sum())

        def add(value: Tensor, name: str, real: Tensor = real) -> None:
            sums[name] = sums.get(name, torch.zeros_like(value[0, 0])) + value[real].sum(0)

        hooks = [(f"blocks.{layer}.attn.hook_z", add) for layer in layers]
        with model.hooks(hooks):
            model(batch.tokens, attention_mask=batch.mask, stop_at_layer=layers[-1] + 1)
    return {name: (total / n_tokens)[None, None] for name, total in sums.items()}
