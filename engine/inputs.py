"""From texts or token ids to what a forward pass needs: aligned ids, positions, and who may attend to whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from subcircuit.engine.errors import PromptError
from subcircuit.engine.tokenizer import Tokenizer

PaddingSide = Literal["left", "right"]

Prompts = str | Sequence[str] | Int[Tensor, "*batch pos"]
"""A text, several texts, or token ids `[batch, pos]` or `[pos]`."""


@dataclass
class KVCache:
    """Keys (after rotary embedding) and values of the positions a batch has been through, per layer."""

    key_mask: Bool[Tensor, "batch k_pos"] | None = None
    """Which cached positions are real tokens; None while there are no positions."""
    keys: list[Float[Tensor, "batch k_pos kv_head d_head"]] = field(default_factory=list)
    values: list[Float[Tensor, "batch k_pos kv_head d_head"]] = field(default_factory=list)

    @property
    def n_pos(self) -> int:
        return 0 if self.key_mask is None else self.key_mask.shape[1]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values; returns all of them."""
        if layer == len(self.keys):
            self.keys.append(k)
            self.values.append(v)
        else:
            self.keys[layer] = torch.cat((self.keys[layer], k), dim=1)
            self.values[layer] = torch.cat((self.values[layer], v), dim=1)
        return self.keys[layer], self.values[layer]


@dataclass(frozen=True)
class PromptBatch:
    """Token ids of one length, and which of them are real (None: all)."""

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"] | None

    def positions_and_mask(
        self, kv_cache: KVCache | None, n_ctx: int
    ) -> tuple[Int[Tensor, "#batch pos"], Bool[Tensor, "batch 1 q_pos k_pos"] | None]:
        """Each token's position in its own prompt, and the keys it may read (None: plain causal).

        Appends the batch to the cache's key mask. Raises PromptError when a prompt outgrows the context.
        """
        n_past = kv_cache.n_pos if kv_cache is not None else 0
        n_batch, n_new = self.tokens.shape
        if kv_cache is not None and kv_cache.key_mask is not None and kv_cache.key_mask.shape[0] != n_batch:
            raise PromptError(f"{n_batch} prompts cannot continue a KV cache of {kv_cache.key_mask.shape[0]}")
        if n_past + n_new > n_ctx:
            raise PromptError(f"prompt of {n_past + n_new} tokens is longer than the model's context of {n_ctx}")
        if self.mask is None and n_past == 0 and kv_cache is None:
            return torch.arange(n_new, device=self.tokens.device)[None], None
        real = self.mask if self.mask is not None else torch.ones_like(self.tokens, dtype=torch.bool)
        if kv_cache is not None:
            if kv_cache.key_mask is not None:
                real = torch.cat((kv_cache.key_mask, real), dim=1)
            kv_cache.key_mask = real
        positions = (real.cumsum(1) - 1).clamp(min=0)[:, n_past:]
        index = torch.arange(n_past + n_new, device=self.tokens.device)
        causal = index[None, :] <= index[n_past:, None]
        # A padding position reads itself alone: a softmax over nothing would be NaN.
        itself = index[None, :] == index[n_past:, None]
        return positions, ((causal & real[:, None, :]) | itself)[:, None]


def batch_prompts(
    prompts: Prompts,
    tokenizer: Tokenizer | None,
    *,
    bos: bool | None,
    padding_side: PaddingSide,
    attention_mask: Tensor | None,
    d_vocab: int,
    device: torch.device,
) -> PromptBatch:
    """Tokenize and pad texts, or check token ids.

    Raises PromptError for empty prompts, ids outside the vocabulary, a mask that does not fit, text without tokenizer,
    `bos` for token ids, or an attention mask for text.
    """
    if isinstance(prompts, Tensor):
        if bos is not None:
            raise PromptError(f"bos={bos} applies to text; token ids are taken as they are")
        return _check_ids(prompts.to(device), attention_mask, d_vocab)
    if attention_mask is not None:
        raise PromptError("attention_mask applies to token ids; texts bring their own")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if tokenizer is None:
        raise PromptError("this model has no tokenizer: pass token ids [batch, pos] in place of text")
    if padding_side not in ("left", "right"):
        raise PromptError(f"padding_side {padding_side!r} is not known; expected 'left' or 'right'")
    if not texts:
        raise PromptError("no prompts: expected a text or a list of texts")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise PromptError(f"prompt {i} is {type(text).__name__}; expected str, or token ids as one LongTensor")
    ids = [tokenizer.encode(text, bos=bos) for text in texts]
    for i, row in enumerate(ids):
        if not row:
            raise PromptError(f"prompt {i} is empty: it has no tokens")
    tokens, mask = _pad(ids, padding_side)
    return _check_ids(tokens.to(device), mask, d_vocab)


def _pad(ids: list[list[int]], side: PaddingSide) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    n_pos = max(map(len, ids))
    tokens = torch.zeros(len(ids), n_pos, dtype=torch.long)
    real = torch.zeros(len(ids), n_pos, dtype=torch.bool)
    for i, row in enumerate(ids):
        where = slice(n_pos - len(row), None) if side == "left" else slice(0, len(row))
        tokens[i, where] = torch.tensor(row)
        real[i, where] = True
    return tokens, real


def _check_ids(tokens: Tensor, mask: Tensor | None, d_vocab: int) -> PromptBatch:
    if tokens.ndim == 1:
        tokens, mask = tokens[None], None if mask is None else mask[None]
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise PromptError(
            f"token ids are {tokens.dtype} of shape {tuple(tokens.shape)}; expected integers [batch, pos]"
        )
    if tokens.numel() == 0:
        raise PromptError(f"token ids of shape {tuple(tokens.shape)} are empty; expected at least one token")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= d_vocab:
        bad = low if low < 0 else high
        raise PromptError(f"token id {bad} is outside the vocabulary of {d_vocab}")
    if mask is not None:
        if mask.shape != tokens.shape:
            raise PromptError(f"attention_mask has shape {tuple(mask.shape)}; expected {tuple(tokens.shape)}")
        mask = mask.to(device=tokens.device, dtype=torch.bool)
        if not mask.any(1).all():
            raise PromptError("attention_mask hides every token of a prompt")
    return PromptBatch(tokens.long(), None if mask is None or bool(mask.all()) else mask)
