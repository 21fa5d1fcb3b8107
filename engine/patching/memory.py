"""What a session may hold in memory: bytes of its parts, how it cuts its work to a budget, and what it does when memory
runs out in spite of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Int
from torch import Tensor

from subcircuit.engine.config import ModelConfig
from subcircuit.engine.dictionary import SparseDictionary
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.metric import Metrics, clean_readout_bytes
from subcircuit.engine.patching.plan import TOKENS_PER_CHUNK, prompt_chunks
from subcircuit.engine.patching.sources import PromptChunk, SourceKey, tail_shape

# Of the budget, for what is not counted one by one: freed blocks that the allocator keeps, buffers of the products.
SLACK = 0.05

# At most this part of a budget goes to rows; the rest holds clean activations.
ROW_SHARE = 0.25


@dataclass(frozen=True)
class Sizes:
    """Bytes of what a session holds, for one model, length of prompts and precision."""

    config: ModelConfig
    n_pos: int
    element_size: int
    """Of the clean side and of the residual δ."""
    product_size: int
    """Of the operands of the δ products."""
    fused: bool
    """Whether the elementwise steps are C or Triton kernels, which write nothing but their results."""
    metric: Metrics = "logit_difference"
    dictionaries: Mapping[str, SparseDictionary] = field(default_factory=dict)

    def clean_layer(self) -> int:
        """One prompt's clean activations in one layer."""
        config = self.config
        attention = 2 * (config.n_heads + config.kv_heads) * config.d_head
        mlp = (3 if config.gated_mlp else 2) * config.d_mlp
        return self.n_pos * (4 * config.d_model + attention + mlp) * self.element_size

    def at_hooks(self, names: Iterable[str]) -> int:
        """One prompt's values at hook points."""
        widths = sum(math.prod(tail_shape(self.config, name, self.dictionaries)) for name in names)
        return self.n_pos * widths * self.element_size

    def prompt(self, names: Mapping[SourceKey, Iterable[str]]) -> int:
        """One prompt's clean run, and what its patches read, given the hook points patched from each source."""
        clean = clean_bytes(self.config, self.n_pos, self.element_size)
        patched = {name for of_source in names.values() for name in of_source}
        apart = [name for name in patched if not name.endswith(_KEPT_ANYWAY)]
        clean += clean_readout_bytes(self.config, self.metric, self.element_size)
        return clean + self.at_hooks(apart) + self.at_hooks(names.get("corrupted", ()))

    def row_token(self) -> int:
        """One token of one row where a block is widest."""
        config, b, e = self.config, self.product_size, self.element_size
        stream = (b + e) * config.d_model  # a residual δ and the product to be added to it
        n_q, n_kv = config.n_heads * config.d_head, config.kv_heads * config.d_head
        attention = 2 * stream + b * (2 * n_q + 2 * n_kv)
        mlp = 3 * stream + b * (config.d_model + (3 if config.gated_mlp else 2) * config.d_mlp)
        if not self.fused:
            attention += e * (2 * n_q + 2 * n_kv + 2 * config.n_heads * self.n_pos)
            mlp += e * (2 if config.gated_mlp else 1) * config.d_mlp + e * config.d_model
        return max(attention, mlp)


def clean_bytes(config: ModelConfig, n_pos: int, element_size: int) -> int:
    """Bytes of one prompt's clean activations in all layers."""
    return config.n_layers * Sizes(config, n_pos, element_size, element_size, fused=False).clean_layer()


def copied_bytes(model: HookedTransformer, product_dtype: torch.dtype, compute_dtype: torch.dtype) -> int:
    """Bytes of the copies of weights that a session makes where products or all else have another precision."""
    n_bytes = 0
    if model.dtype != compute_dtype:
        n_bytes += sum(weight.numel() for weight in model.parameters()) * torch.finfo(compute_dtype).bits // 8
    if product_dtype != compute_dtype:
        config = model.config
        linear = 2 * (config.n_heads + config.kv_heads) * config.d_head + (3 if config.gated_mlp else 2) * config.d_mlp
        n_bytes += config.n_layers * config.d_model * linear * torch.finfo(product_dtype).bits // 8
    return n_bytes


_KEPT_ANYWAY = ("attn.hook_z", "attn.hook_v", "hook_resid_pre", "mlp.hook_post")
"""Hook points that the clean run keeps, patched or not."""


@dataclass(frozen=True)
class Layout:
    """How a session cuts its work: prompts that are run together, and how much is held at once."""

    prompt_chunks: tuple[PromptChunk, ...]
    prompts_kept: int
    """Clean activations are held for at most so many prompts."""
    max_tokens: int
    """Of the rows that are run at once."""

    @classmethod
    def fitting(
        cls,
        budget_bytes: int,
        sizes: Sizes,
        names: Mapping[SourceKey, Iterable[str]],
        firsts: Int[Tensor, "prompt"],
        parts: Sequence[PromptChunk],
        on_cpu: bool,
    ) -> Layout:
        """Rows get up to a quarter of the budget, what cores do well with at most; clean activations the rest.

        One prompt and one row are held, whatever the budget. A chunk has prompts of one of the `parts` only, and no
        more of them than one patch set's rows of all may have tokens, so that every patch set fits.
        """
        budget_bytes = int(budget_bytes * (1 - SLACK))
        max_tokens = max(1, int(budget_bytes * ROW_SHARE) // sizes.row_token())
        max_tokens = min(TOKENS_PER_CHUNK, max_tokens) if on_cpu else max_tokens
        patched = {name for of_source in names.values() for name in of_source}
        each = sizes.prompt(names) + sizes.at_hooks(patched)  # rows hold the difference of source and clean
        left = budget_bytes - max_tokens * sizes.row_token()
        kept = min(max(1, left // each), len(firsts))
        at_most = max(1, min(kept, max_tokens // sizes.n_pos))
        chunks = [part[chunk] for part in parts for chunk in prompt_chunks(firsts[part], sizes.n_pos, at_most)]
        return cls(tuple(chunks), kept, max_tokens)

    def halved(self, prompts: PromptChunk) -> Layout:
        """With one chunk of prompts cut in two, and half as many row tokens: memory holds less than was thought."""
        chunks = [
            half for chunk in self.prompt_chunks for half in (chunk.tensor_split(2) if chunk is prompts else [chunk])
        ]
        kept, max_tokens = max(1, self.prompts_kept // 2), max(1, self.max_tokens // 2)
        return replace(self, prompt_chunks=tuple(chunks), prompts_kept=kept, max_tokens=max_tokens)

    def most_prompts_held(self) -> int:
        """Prompts whose clean activations are in memory together, chunk after chunk as a session keeps them."""
        most = held = 0
        for chunk in self.prompt_chunks:
            held = len(chunk) + (held if held + len(chunk) <= self.prompts_kept else 0)
            most = max(most, held)
        return most


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def fits(run: Callable[[], None]) -> bool:
    """Run something; False where memory ran out, by when all that it held is free again."""
    try:
        run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        return True
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


def halves(items: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """The first and the second half of several items."""
    return items[: len(items) // 2], items[len(items) // 2 :]


def keep_freed_memory() -> None:
    """Let the C allocator keep what chunks free for the next chunk, instead of paging it in anew each time.

    glibc raises the size below which it does so to the largest block it has seen freed, up to 32 MiB. Without this a
    bfloat16 sweep of GPT-2 Small spent a seventh of its processor time on page faults.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)
