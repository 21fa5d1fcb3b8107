"""Edges in delta form: receivers that read something else than the residual stream that travels on.

The residual stream is the sum of what its senders write, so a receiver from which edges are removed reads

    x + δ + Σ_{s removed} change_s,     change_s = (source_s − clean_s) − δ_s

instead of x + δ. δ_s is the difference of the sender's own output in that row; the biases of output projections belong
to no sender and cancel. Only such receivers get a norm and a projection of their own; all else is the δ of `delta`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, Protocol, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.engine.blocks import Block
from subcircuit.engine.patching.compile import MaskArray, patched
from subcircuit.engine.patching.delta import Delta, DeltaRun, LayerWeights, Patches, Rows, first_difference
from subcircuit.engine.patching.graph import INPUT, LOGITS, Edge, EdgeIndex
from subcircuit.engine.patching.sites import Component, PatchSet
from subcircuit.kernels.linear import linear

SenderKind = Literal["resid", "z", "mlp"]
"""`resid` is the residual stream entering layer 0: the embeddings, known as `input`."""

Pairs = list[tuple[int, str]]
"""Rows by index, each with a receiver that reads something of its own there."""


@dataclass(frozen=True)
class EdgeSet:
    """What one row takes away: edges, and patches of nodes beside them."""

    removed: tuple[Edge, ...] = ()
    patches: PatchSet = ()


@dataclass(frozen=True)
class LayerDelta:
    """δ along one layer; None stands for no difference. In the last layer only `resid_pre` covers more than the one
    position that is read."""

    resid_pre: Delta | None
    z: Float[Tensor, "#set prompt pos head d_head"] | None
    resid_mid: Delta | None
    mlp_out: Delta | None

    @property
    def resid_post(self) -> Delta | None:
        return added(self.resid_mid, self.mlp_out)

    def of(self, kind: SenderKind) -> Tensor | None:
        return {"resid": self.resid_pre, "z": self.z, "mlp": self.mlp_out}[kind]


class InputChanges(Protocol):
    """What receivers of some rows read beside the residual stream."""

    n_sets: int
    departures: Float[Tensor, "set"] | None
    """|δ| / |x| of what each row reads of its own and of the stream that leaves its first layer, the largest of all
    positions and prompts; None where nobody asks."""

    def at(
        self, receivers: Sequence[str], n_read: int
    ) -> tuple[Pairs, Float[Tensor, "pair prompt pos d_model"]] | None:
        """Rows and receivers that read something more, and what, at the last `n_read` positions; None for no such."""

    def passed(self, layer: int, kind: SenderKind, delta: Tensor | None) -> None:
        """Take note of the rows' δ at the outputs of a layer's senders, once the rows have passed them."""


class Unchanged:
    """A single row whose receivers all read the residual stream."""

    n_sets = 1
    departures: Float[Tensor, "set"] | None = None

    def at(self, receivers: Sequence[str], n_read: int) -> None:
        return None

    def passed(self, layer: int, kind: SenderKind, delta: Tensor | None) -> None:
        pass


class EdgeRun(DeltaRun):
    """A `DeltaRun` whose receivers may read something of their own; it knows the clean values of all senders."""

    _base_layers: tuple[PatchSet, int, list[LayerDelta]] | None = None

    def with_weights(self, weights: Callable[[int], LayerWeights], product_dtype: torch.dtype) -> EdgeRun:
        """The same clean run with the products in another precision, and no base."""
        other = cast(EdgeRun, super().with_weights(weights, product_dtype))
        other._base_layers = None
        return other

    def base_layers(self, base: PatchSet, first: int) -> list[LayerDelta]:
        """δ from position `first` on that a patch set alone causes, layer by layer; kept until another is asked for."""
        known, n_layers = self._base_layers, self.config.n_layers
        if known is not None and known[1] == first and first_difference(known[0], base, n_layers) == n_layers:
            return known[2]
        patches = self._patches([base], first, 0)
        layers: list[LayerDelta] = []
        for layer in range(n_layers):
            entering = layers[-1].resid_post if layers else None
            layers.append(self._layer(layer, entering, patches, first, Unchanged()))
        self._base_layers = base, first, layers
        return layers

    def entering(self, layer: int, base: PatchSet, first: int) -> Delta | None:
        """δ that a patch set alone causes in the residual stream entering a layer; above the last one, leaving it."""
        layers = self.base_layers(base, first)
        return layers[layer].resid_pre if layer < self.config.n_layers else layers[-1].resid_post

    def climb(
        self, changes: InputChanges, patch_sets: Sequence[PatchSet], base: PatchSet, start: int, first: int
    ) -> Float[Tensor, "set prompt"]:
        """Effects of rows that are like `base` below layer `start`. `patch_sets` are the rows' patches with those of
        `base`, one set where all rows have the same."""
        patches, resid = self._patches(patch_sets, first, start), self.entering(start, base, first)
        for layer in range(start, self.config.n_layers):
            resid = self._layer(layer, resid, patches, first, changes).resid_post
            if layer == start and resid is not None:
                _note(changes, range(changes.n_sets), resid, self._clean_entering(layer + 1, first, (resid, None)))
        final = None if resid is None else resid[:, :, -1:]
        final = _with_own(final, LOGITS, 1, self.final[:, None], changes)
        return self.leave(Rows([()] * changes.n_sets, Patches({}, {}), (final, None), self.config.n_layers, first))

    def sender_changes(
        self, names: Iterable[str], base: PatchSet, first: int, n_read: int | None = None
    ) -> Float[Tensor, "sender prompt pos d_model"]:
        """What each sender's source value would change in a row that is like `base`, at the last `n_read` positions
        (all from `first` on if None)."""
        layers, n_read = self.base_layers(base, first), n_read or self.n_pos - first
        changes = [self.tokens.new_empty(0, self.n_prompts, n_read, self.config.d_model, dtype=self.model.dtype)]
        for (layer, kind), group in groupby(map(sender, names), key=lambda part: (part.layer, part.kind)):
            indices = [part.index for part in group]
            kind = cast(SenderKind, kind)
            of_kind = self.changes_of(layer, kind, indices, layers[layer].of(kind), first)
            changes.append(of_kind[0, :, :, -n_read:])
        return torch.cat(changes)

    def changes_of(
        self, layer: int, kind: SenderKind, indices: Sequence[int], delta: Tensor | None, first: int
    ) -> Float[Tensor, "#set sender prompt pos d_model"]:
        """(source − clean) − δ of some of a layer's senders, as they write it to the residual stream."""
        name = Component(layer, kind).hook_name
        source = self.sources.value(self.sources.key(None), name, self.chunk)
        change = (source - self.patched_clean[name])[None, :, -self.n_written(layer, kind, first) :]
        change = change if delta is None else change - delta
        if kind != "z":
            return change[:, None]
        weight = cast(Block, self.model.blocks[layer]).attn.w_o.weight.unflatten(1, (self.config.n_heads, -1))
        per_head = weight[:, list(indices)].to(self.product_dtype)
        chosen = change[..., list(indices), :].to(self.product_dtype)
        return torch.einsum("sptnh,dnh->snptd", chosen, per_head).to(self.model.dtype)

    def through_heads(
        self, layer: int, resid: Delta, base: PatchSet, first: int
    ) -> Float[Tensor, "set prompt pos d_model"]:
        """δ between a layer's halves, from δ entering it, with the patches of `base`."""
        _, _, resid_mid = self._first_half(layer, resid, self._patches([base], first, layer), first, Unchanged())
        return cast(Tensor, resid_mid)

    def through_mlp(
        self, layer: int, resid: Delta, base: PatchSet, first: int
    ) -> Float[Tensor, "#set prompt pos d_model"] | None:
        """δ of a layer's MLP output, from δ between its halves, with the patches of `base`."""
        patches = self._patches([base], first, layer)
        return self._mlp(layer, (resid, None), patches, self.n_written(layer, "mlp", first))[1]

    def n_written(self, layer: int, kind: SenderKind, first: int) -> int:
        """At how many positions a sender's output is read: in the last layer only at the last."""
        return 1 if layer == self.config.n_layers - 1 and kind != "resid" else self.n_pos - first

    def _layer(
        self, layer: int, resid_pre: Delta | None, patches: Patches, first: int, changes: InputChanges
    ) -> LayerDelta:
        """δ along a layer, from δ entering it."""
        n_read = self.n_written(layer, "mlp", first)
        resid_pre, delta_z, resid_mid = self._first_half(layer, resid_pre, patches, first, changes)
        mlp_in = _with_own(resid_mid, f"m{layer}", n_read, self.clean[layer].resid_mid, changes)
        _, mlp_out = self._mlp(layer, (mlp_in, None), patches, n_read)
        changes.passed(layer, "mlp", mlp_out)
        return LayerDelta(resid_pre, delta_z, resid_mid, mlp_out)

    def _first_half(
        self, layer: int, resid_pre: Delta | None, patches: Patches, first: int, changes: InputChanges
    ) -> tuple[Delta | None, Float[Tensor, "#set prompt pos head d_head"] | None, Delta | None]:
        """δ entering a layer, after patches there; δz; δ between the layer's halves."""
        n_read = self.n_written(layer, "z", first)
        resid_pre, _ = self._patched_resid(layer, (resid_pre, None), patches, first)
        if layer == 0:
            changes.passed(0, "resid", resid_pre)
        delta_qkv = self._own_qkv(layer, resid_pre, first, n_read, changes)
        name = f"blocks.{layer}.attn.hook_z"
        at_z, features = patches.at(name), patches.feature_at(name)
        delta_z = self._attend(layer, delta_qkv, patches, at_z, n_read)
        if delta_z is None:
            delta_z = self._heads(patched(None, at_z, n_read))
        if features is not None:
            delta_z = self._heads(features.patched(None if delta_z is None else delta_z.flatten(3), n_read))
        changes.passed(layer, "z", delta_z)
        attn_out = None if delta_z is None else linear(delta_z.flatten(3), self.weights(layer).o)
        resid = None if resid_pre is None else resid_pre[:, :, -n_read:]
        resid_mid, _ = self._patched_mid(layer, (added(resid, attn_out), None), patches, n_read)
        return resid_pre, delta_z, resid_mid

    def _own_qkv(
        self, layer: int, resid: Delta | None, first: int, n_read: int, changes: InputChanges
    ) -> tuple[Delta | None, Delta | None, Delta | None]:
        """δq, δk and δv, with those of the heads that read something of their own."""
        _, (delta_q, delta_k, delta_v) = self._delta_qkv(layer, (resid, None), first, n_read)
        attn = cast(Block, self.model.blocks[layer]).attn
        n_new = self.n_pos - first
        return (
            self._own_heads(f"a{layer}.q", delta_q, attn.w_q.weight, resid, n_read, changes),
            self._own_heads(f"a{layer}.k", delta_k, attn.w_k.weight, resid, n_new, changes),
            self._own_heads(f"a{layer}.v", delta_v, attn.w_v.weight, resid, n_new, changes),
        )

    def _own_heads(
        self, name: str, delta: Delta | None, weight: Tensor, resid: Delta | None, n_read: int, changes: InputChanges
    ) -> Delta | None:
        """δ of a layer's queries, keys or values (`a3.q`), at the last `n_read` positions."""
        per_head = weight.unflatten(0, (-1, self.config.d_head))
        found = changes.at([f"{name}{head}" for head in range(len(per_head))], n_read)
        if found is None:
            return delta
        layer = Component.parse(f"{name}0").layer
        clean, norm = self.clean[layer], cast(Block, self.model.blocks[layer]).ln1
        own = _own_inputs(resid, *found)
        _note(changes, [row for row, _ in found[0]], own, clean.resid_pre)
        _, normed = self._norm_delta(clean.resid_pre[:, -n_read:], clean.normed1[:, -n_read:], (own, None), norm)
        whole = _writable(delta, changes.n_sets, normed, len(weight)).unflatten(-1, (-1, self.config.d_head))
        for receiver, pairs in groupby(enumerate(found[0]), key=lambda pair: pair[1][1]):
            at, rows = zip(*((i, row) for i, (row, _) in pairs), strict=True)
            head = Component.parse(receiver).index
            own_weight = per_head[head].to(self.product_dtype)
            whole[list(rows), :, :, head] = linear(normed[at[0] : at[-1] + 1], own_weight)
        return cast(Tensor, whole.flatten(-2))


class RemovedEdges:
    """The changes that removed edges bring to their receivers, in rows that are like a base below their start."""

    def __init__(
        self,
        run: EdgeRun,
        removed: MaskArray,
        index: EdgeIndex,
        base: PatchSet,
        start: int,
        first: int,
        departures: Float[Tensor, "set"] | None = None,
    ) -> None:
        """`removed` says which edges each row lacks, [set, receiver, sender]."""
        self.n_sets, self.departures = len(removed), departures
        self._run, self._first, self._index = run, first, index
        used = np.flatnonzero(removed.any((0, 1)))
        self._removed = removed[:, :, used]
        self._senders = [index.senders[i] for i in used]
        self._n_below = sum(index.sender_layers[i] < start for i in used)
        n_pos = 1 if start == run.config.n_layers else run.n_pos - first
        self._below = run.sender_changes(self._senders[: self._n_below], base, first, n_pos)
        self._above = self._below.new_zeros(self.n_sets, len(used) - self._n_below, *self._below.shape[1:])

    def passed(self, layer: int, kind: SenderKind, delta: Tensor | None) -> None:
        above = self._senders[self._n_below :]
        chosen = [i for i, name in enumerate(above) if (sender(name).layer, sender(name).kind) == (layer, kind)]
        if chosen:
            indices = [sender(above[i]).index for i in chosen]
            changes = self._run.changes_of(layer, kind, indices, delta, self._first)
            self._above[:, chosen[0] : chosen[-1] + 1, :, -changes.shape[3] :] = changes

    def at(
        self, receivers: Sequence[str], n_read: int
    ) -> tuple[Pairs, Float[Tensor, "pair prompt pos d_model"]] | None:
        places = [self._index.receiver_at[name] for name in receivers]
        at, rows = np.nonzero(self._removed[:, places].any(2).T)
        if not len(rows):
            return None
        removed = torch.from_numpy(self._removed[rows, np.array(places)[at]]).to(self._below)
        below, above = removed.split([self._n_below, removed.shape[1] - self._n_below], dim=1)
        changes = below @ self._below[:, :, -n_read:].flatten(1)
        for row in np.unique(rows):
            if self._removed[row][places, self._n_below :].any():
                mine = torch.from_numpy(np.flatnonzero(rows == row))
                changes[mine] += above[mine] @ self._above[row, :, :, -n_read:].flatten(1)
        pairs = [(int(row), receivers[int(i)]) for i, row in zip(at, rows, strict=True)]
        return pairs, changes.unflatten(1, (self._below.shape[1], n_read, -1))


def sender(name: str) -> Component:
    """A sender as a component."""
    return Component(0, "resid") if name == INPUT else Component.parse(name)


def added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, in the precision of the clean run; None stands for nothing."""
    if a is None or b is None:
        one = a if b is None else b
        return one if one is None else one.to(torch.promote_types(one.dtype, torch.float32))
    return a + b


def _own_inputs(
    delta: Delta | None, pairs: Pairs, changes: Float[Tensor, "pair prompt pos d_model"]
) -> Float[Tensor, "pair prompt pos d_model"]:
    """δ + change, for every pair of row and receiver."""
    if delta is None:
        return changes
    delta = delta[:, :, -changes.shape[2] :]
    return changes + (delta if len(delta) == 1 else delta[[row for row, _ in pairs]])


def _with_own(
    delta: Delta | None, receiver: str, n_read: int, clean: Float[Tensor, "prompt pos d_model"], changes: InputChanges
) -> Delta | None:
    """δ as a single receiver reads it, where some rows read something of their own, beside the clean stream there."""
    found = changes.at([receiver], n_read)
    if found is None:
        return delta
    pairs, more = found
    rows = [row for row, _ in pairs]
    own = _own_inputs(delta, pairs, more)
    _note(changes, rows, own, clean)
    if len(pairs) == changes.n_sets:
        return own
    whole = _writable(delta, changes.n_sets, own, own.shape[-1])
    whole[rows] = own
    return whole


def _departure(
    delta: Float[Tensor, "row prompt pos d_model"], clean: Float[Tensor, "prompt pos d_model"]
) -> Float[Tensor, "row"]:
    """|δ| / |x|, the largest over prompts and positions."""
    moved, before = (torch.linalg.vector_norm(x, dim=-1) for x in (delta, clean[:, -delta.shape[2] :]))
    return cast(Tensor, (moved / before).amax((1, 2)))


def _note(changes: InputChanges, rows: Sequence[int], delta: Delta, clean: Float[Tensor, "prompt pos d_model"]) -> None:
    """Take down how far some rows depart; a row may be among them more than once."""
    if changes.departures is not None:
        at = torch.tensor(list(rows), device=delta.device)
        changes.departures.scatter_reduce_(0, at, _departure(delta, clean).expand(len(at)), "amax")


def _writable(delta: Tensor | None, n_sets: int, like: Tensor, width: int) -> Float[Tensor, "set prompt pos width"]:
    """δ of every row by itself, in memory of its own."""
    if delta is None:
        return like.new_zeros(n_sets, *like.shape[1:3], width)
    return delta.expand(n_sets, *delta.shape[1:]).clone()
