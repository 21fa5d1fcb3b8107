"""What heads write for a token they attend to (OV), and which tokens they match (QK), from the weights.

Both read the token as the model has it after block 0, in its prompt: there the embedding has been through the first
attention and MLP, as in the paper (Lan et al., arXiv 2311.04131, section 4, after Wang et al. 2022, arXiv 2211.00593,
section 3.1). The matrices are W_V W_O and W_Q W_K; with grouped queries several heads share a W_V and W_K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from subcircuit.analysis.measures import LEAST_SHARE, Measure, chance_threshold
from subcircuit.analysis.tasks import Task
from subcircuit.engine.blocks import Block
from subcircuit.engine.errors import TaskError
from subcircuit.engine.model import HookedTransformer

LOGITS_AT_ONCE = 2**25
"""Logits in memory together (128 MB in float32): a product with enough rows to run at full speed."""
COMPARED_AT_ONCE = 2**20
"""Logits compared together, few enough to stay in a processor's cache from one wanted token to the next."""


@dataclass(frozen=True, eq=False)
class OVScores:
    """Ranks of tokens among the logits that heads write for the tokens of a task.

    Of every prompt a chain of tokens is read: those at `positions` (the members) and, in a sequence, the answer.
    `ranks[…, i, j]` is how many tokens of the vocabulary a head that attends to token i of the chain promotes more than
    token j. So j = i says whether it copies, and j = i + k whether it writes the k-th next of the sequence.
    """

    ranks: Int[Tensor, "layer head prompt source target"]
    chain: Int[Tensor, "prompt target"]
    positions: tuple[int, ...]
    is_sequence: bool
    d_vocab: int

    def hits(self, shift: int, top: int = 5, *, suppressed: bool = False) -> Float[Tensor, "layer head"]:
        """Share of source tokens for which the token `shift` places on in the chain is among the top ones.

        0 is the paper's copy score, 1 its next-member score. With `suppressed`, among the bottom ones: the copy score
        of the head's negative (Wang et al. 2022, section 3.4). Raises TaskError when no chain is long enough.
        """
        return _share(self._hit(top, suppressed), self._pairs(shift))

    def hits_by_prompt(self, shift: int, top: int = 5) -> Float[Tensor, "layer head prompt"]:
        """`hits` of each prompt, whose mean is theirs: all prompts have as many tokens in their chains."""
        pairs = self._pairs(shift)
        return (self._hit(top, False) & pairs).sum((-1, -2)).double() / pairs[0].sum()

    def _hit(self, top: int, suppressed: bool) -> Bool[Tensor, "layer head prompt source target"]:
        return self.ranks >= self.d_vocab - top if suppressed else self.ranks < top

    def measure(self, shift: int, top: int = 5, *, suppressed: bool = False) -> Measure:
        """`hits` against the hits of the chain's other tokens.

        A head that writes any member for any member is no successor head: the baseline is the head's share of hits over
        all other pairs, save copies, and the threshold comes from these pairs, shift by shift.
        """
        hit = self._hit(top, suppressed)
        shifts = [other for other in self.shifts if other not in (0, 1, shift)]
        others = [self._pairs(other) & ~self._same(shift) & ~self._same(0) for other in shifts]
        others = [pairs for pairs in others if pairs.any()]
        if not others:
            raise TaskError("OV scores need other members to compare with; expected prompts of at least two")
        baseline = _share(hit, torch.stack(others).any(0))
        null = torch.stack([_share(hit, pairs) - baseline for pairs in others])
        named = {0: "copy", 1: "next", -1: "previous"}
        name = f"OV {'anti-' if suppressed else ''}{named.get(shift, f'{shift:+d}')}"
        side = "bottom" if suppressed else "top"
        what = f"what the head writes for a token has {_meant(shift)} among its {side} {top}"
        score = self.hits(shift, top, suppressed=suppressed)
        return Measure(name, score, baseline, chance_threshold(null, LEAST_SHARE), what)

    @property
    def shifts(self) -> range:
        """Every shift that the chain has a pair for."""
        n_sources, n_targets = self.ranks.shape[-2:]
        return range(1 - n_sources, n_targets)

    def _pairs(self, shift: int) -> Bool[Tensor, "prompt source target"]:
        n_prompts, n_sources, n_targets = self.ranks.shape[2:]
        if shift not in self.shifts:
            raise TaskError(f"OV shift {shift:+d} is outside the chain of {n_targets} tokens")
        source, target = torch.arange(n_sources)[:, None], torch.arange(n_targets)
        return (target - source == shift).expand(n_prompts, -1, -1)

    def _same(self, shift: int) -> Bool[Tensor, "prompt source target"]:
        """Where the target is the same token as the one `shift` on from the source, wherever it stands."""
        n_sources, n_targets = self.ranks.shape[-2:]
        at = torch.arange(n_sources) + shift
        meant = self.chain[:, at.clamp(0, n_targets - 1)].masked_fill((at < 0) | (at >= n_targets), -1)
        return meant[:, :, None] == self.chain[:, None, :]


def _share(hit: Tensor, pairs: Bool[Tensor, "prompt source target"]) -> Float[Tensor, "layer head"]:
    return (hit & pairs).sum((-1, -2, -3)).double() / pairs.sum()


def _meant(shift: int) -> str:
    return {0: "that token", 1: "the next member"}.get(shift, f"the member {shift:+d} on")


@torch.no_grad()
def ov_scores(
    model: HookedTransformer,
    task: Task,
    *,
    positions: Sequence[int] | None = None,
    own_norm: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> OVScores:
    """What every head writes for a task's members: ranks among the logits unembed(norm_f(x W_V W_O)), without biases.

    x is block 1's norm of the residual stream after block 0 at the member's position in the clean prompt, for heads of
    all layers, as in the paper; with `own_norm` each layer's own norm, which differs where norms have learned to weigh
    dimensions differently. A model of one block has that block's norm.

    positions: where the tokens stand; the members, or in a task without members every class of positions but `last`,
    where only copying is asked.

    Raises TaskError when there is no position to read.
    """
    positions = tuple(positions) if positions is not None else _token_positions(task)
    if not positions:
        raise TaskError(f"task '{task.name}' has no positions of tokens to read; expected members, or positions")
    is_sequence = positions == task.member_positions
    chain = task.clean[:, list(positions)]
    if is_sequence:
        chain = torch.cat((chain, task.answer[:, None]), 1)
    resid = _after_block_0(model, task.clean)[:, list(positions)]
    config = model.config
    ranks = torch.empty(config.n_layers, config.n_heads, *resid.shape[:2], chain.shape[1], dtype=torch.int32)
    rows_per_layer = config.n_heads * resid.shape[0] * resid.shape[1]
    together = max(1, LOGITS_AT_ONCE // config.d_vocab // rows_per_layer)
    for first in range(0, config.n_layers, together):
        layers = range(first, min(first + together, config.n_layers))
        norms = [_block(model, layer if own_norm else min(1, config.n_layers - 1)).ln1 for layer in layers]
        written = [_written(_block(model, layer), norm(resid)) for layer, norm in zip(layers, norms, strict=True)]
        ranks[layers.start : layers.stop] = _ranks(model, torch.stack(written), chain)
        if progress is not None:
            progress(layers.stop, config.n_layers)
    return OVScores(ranks, chain, positions, is_sequence, config.d_vocab)


def _written(block: Block, x: Float[Tensor, "prompt source d_model"]) -> Float[Tensor, "head prompt source d_model"]:
    """x W_V W_O of every head of a block."""
    values = torch.einsum("psd,kdh->kpsh", x, block.attn.W_V)
    values = values.repeat_interleave(block.attn.W_O.shape[0] // len(values), 0)
    return torch.einsum("apsh,ahd->apsd", values, block.attn.W_O)


def _ranks(
    model: HookedTransformer,
    written: Float[Tensor, "layer head prompt source d_model"],
    chain: Int[Tensor, "prompt target"],
) -> Int[Tensor, "layer head prompt source target"]:
    """How many tokens get a higher logit from each vector written than each token of its prompt's chain.

    One product per tile of rows, into the same memory: it is nearly all of the work.
    """
    rows, d_vocab = written.flatten(0, 3), model.config.d_vocab
    targets = chain.to(rows.device)[:, None].expand(*written.shape[:-1], -1).flatten(0, 3)
    step = min(len(rows), max(1, LOGITS_AT_ONCE // d_vocab))
    tile = rows.new_empty(step, d_vocab)
    found = []
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        normed = model.ln_final(rows[part])
        logits = torch.mm(normed, model.unembed_weight.T, out=tile[: len(normed)])
        found.append(_n_higher(logits, targets[part]))
    return torch.cat(found).reshape(*written.shape[:-1], -1).int().cpu()


def _n_higher(logits: Float[Tensor, "row d_vocab"], tokens: Int[Tensor, "row target"]) -> Float[Tensor, "row target"]:
    """How many logits of a row are higher than that of each of its tokens."""
    step = max(1, COMPARED_AT_ONCE // logits.shape[1])
    counts = []
    for some, wanted in zip(logits.split(step), logits.gather(1, tokens).split(step), strict=True):
        # Counted in float32, which is exact below 2²⁴ and five times as fast as a sum of booleans.
        higher = torch.empty(some.shape, dtype=torch.float32, device=some.device)
        counts.append(torch.stack([torch.gt(some, one[:, None], out=higher).sum(1) for one in wanted.unbind(1)], 1))
    return torch.cat(counts)


@dataclass(frozen=True, eq=False)
class QKScores:
    """How well heads tell members from other tokens by content: the chance that a member's key scores higher.

    0.5 is no preference, 1 a perfect one (the area under the ROC curve). `similar` is for queries at members (keys: the
    other members), `last` for the query at the last position.
    """

    similar: Float[Tensor, "layer head"]
    last: Float[Tensor, "layer head"]


@torch.no_grad()
def qk_scores(model: HookedTransformer, task: Task) -> QKScores:
    """How every head's W_Q and W_K match a task's members, position aside.

    Queries and keys are those of each layer's own norm of the residual stream after block 0, with biases and without
    rotation; position 0 and the query itself are no keys, and a key may stand behind its query: what is asked is what
    the matrices match. In a model with learned positions x holds those, too.

    Raises TaskError for a task without two members, or with nothing but members.
    """
    members = task.member_positions
    others = [position for position in range(1, task.pos) if position not in members]
    if len(members) < 2 or not others:
        raise TaskError(
            f"task '{task.name}': QK scores compare members with other tokens; expected both in the prompts"
        )
    resid, config = _after_block_0(model, task.clean), model.config
    shape = config.n_layers, config.n_heads
    similar, last = torch.empty(shape, dtype=torch.float64), torch.empty(shape, dtype=torch.float64)
    for layer in range(config.n_layers):
        block = _block(model, layer)
        x = block.ln1(resid)
        q, k = block.attn.project(x, block.attn.w_q), block.attn.project(x, block.attn.w_k)
        scores = torch.einsum("pqah,pkah->apqk", q, k.repeat_interleave(config.group_size, 2)).cpu()
        pairs = [_higher(scores, query, [m for m in members if m != query], others) for query in members]
        similar[layer] = torch.stack(pairs).mean(0)
        query = task.pos - 1
        last[layer] = _higher(
            scores, query, [m for m in members if m != query], [other for other in others if other != query]
        )
    return QKScores(similar, last)


def _higher(
    scores: Float[Tensor, "head prompt query key"], query: int, keys: Sequence[int], others: Sequence[int]
) -> Float[Tensor, " head"]:
    """Share of pairs of a key and another key in which the first scores higher; ties count half."""
    ours, theirs = scores[:, :, query, list(keys), None], scores[:, :, query, None, list(others)]
    return ((ours > theirs).double() + (ours == theirs).double() / 2).mean((1, 2, 3))


def _token_positions(task: Task) -> tuple[int, ...]:
    if task.member_positions:
        return task.member_positions
    named = {at for name, positions in task.positions.items() if name != "last" for at in positions}
    return tuple(sorted(named))


def _after_block_0(model: HookedTransformer, tokens: Tensor) -> Float[Tensor, "prompt pos d_model"]:
    return cast(Tensor, model(tokens, stop_at_layer=1))


def _block(model: HookedTransformer, layer: int) -> Block:
    return cast(Block, model.blocks[layer])
