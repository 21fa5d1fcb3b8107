"""Continuing prompts token by token, with a KV cache and with hooks."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict, Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from subcircuit.engine.errors import PromptError
from subcircuit.engine.hooks import Hook
from subcircuit.engine.inputs import KVCache, Prompts

if TYPE_CHECKING:
    from subcircuit.engine.model import HookedTransformer
    from subcircuit.engine.steering import Steering


class GenerateOptions(TypedDict, total=False):
    """How to continue.

    temperature: 0 takes the likeliest token (greedy, the default); above 0 samples.
    top_k, top_p: sample only among the k likeliest tokens, or the likeliest ones that together reach probability p.
    seed: of the sampling; the global random state is neither read nor changed.
    stop_at_eos: a prompt ends at the tokenizer's end-of-sequence token (default True).
    stop_tokens: further ids at which a prompt ends.
    hooks: set during every step; a hook sees the whole prompt first, then one position at a time.
    steering: vectors to add; those for all positions at generated tokens too, others in the prompts alone.
    bos: override of the tokenizer's own rule for text prompts.
    attention_mask: which token ids of the prompts are real, `[batch, pos]`; padding must be on the left.
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    stop_at_eos: bool
    stop_tokens: tuple[int, ...]
    hooks: Iterable[Hook]
    steering: Sequence[Steering]
    bos: bool | None
    attention_mask: Bool[Tensor, "batch pos"] | None


@dataclass(frozen=True)
class Generation:
    """What was generated: per prompt the new token ids (without the stop token) and, given a tokenizer, their text."""

    tokens: list[list[int]]
    texts: list[str] | None


@torch.no_grad()
def generate(
    model: HookedTransformer, prompts: Prompts, max_new_tokens: int = 20, **options: Unpack[GenerateOptions]
) -> Generation:
    """Continue one or several prompts (padded on the left where lengths differ) by up to `max_new_tokens` tokens each.

    Raises PromptError when the prompt and the new tokens do not fit in the context, or an option is out of range.
    """
    temperature, top_k, top_p = _sampling(options)
    batch = model.prompt_batch(prompts, bos=options.get("bos"), attention_mask=options.get("attention_mask"))
    if batch.mask is not None and not batch.mask[:, -1].all():
        raise PromptError("prompts to continue must be padded on the left; the attention_mask hides a last token")
    room = model.config.n_ctx - batch.tokens.shape[1]
    if max_new_tokens < 1:
        raise PromptError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if max_new_tokens > room + 1:
        raise PromptError(
            f"max_new_tokens {max_new_tokens} does not fit: the prompt has {batch.tokens.shape[1]} tokens and the "
            f"context {model.config.n_ctx}"
        )
    stop = set(options.get("stop_tokens", ()))
    if options.get("stop_at_eos", True) and model.tokenizer is not None and model.tokenizer.eos_id is not None:
        stop.add(model.tokenizer.eos_id)
    generator = torch.Generator(device=model.device).manual_seed(options.get("seed", 0))

    kv_cache = KVCache()
    new: list[list[int]] = [[] for _ in batch.tokens]
    going = [True] * len(new)
    tokens, mask = batch.tokens, batch.mask
    steering = options.get("steering", ())
    with model.hooks(options.get("hooks", ())):
        for step in range(max_new_tokens):
            acting = steering if step == 0 else [each for each in steering if each.positions is None]
            with model.hooks([hook for each in acting for hook in each.hooks(model.config, mask)]):
                logits = model(tokens, attention_mask=mask, kv_cache=kv_cache)[:, -1]
            next_ids = _choose(logits, temperature, top_k, top_p, generator)
            for i, token in enumerate(next_ids.tolist()):
                going[i] = going[i] and token not in stop
                if going[i]:
                    new[i].append(token)
            if not any(going):
                break
            tokens, mask = next_ids[:, None], None
    texts = None if model.tokenizer is None else [model.tokenizer.decode(ids) for ids in new]
    return Generation(new, texts)


def _sampling(options: GenerateOptions) -> tuple[float, int | None, float | None]:
    for name in options:
        if name not in GenerateOptions.__annotations__:
            closest = difflib.get_close_matches(name, GenerateOptions.__annotations__, n=1)
            hint = f"; did you mean {closest[0]!r}?" if closest else ""
            raise PromptError(f"option {name!r} is not known{hint}")
    temperature, top_k, top_p = options.get("temperature", 0.0), options.get("top_k"), options.get("top_p")
    if not 0 <= temperature < math.inf:
        raise PromptError(f"temperature must be 0 (greedy) or positive and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise PromptError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise PromptError(f"top_p must lie in (0, 1], got {top_p}")
    return temperature, top_k, top_p


def _choose(
    logits: Float[Tensor, "batch d_vocab"],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Int[Tensor, "batch"]:
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    probabilities = logits.softmax(-1)
    if top_p is not None:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # A token stays when those before it have not reached p yet, so the likeliest always stays.
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
