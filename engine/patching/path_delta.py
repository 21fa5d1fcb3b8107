"""Path patching in delta form: a sender's source value makes its way to one receiver, and that receiver's value on.

Wang et al. 2022 (arXiv 2211.00593), Goldowsky-Dill et al. 2023 (arXiv 2304.05969). The senders travel up the residual
stream side by side, each as the change that its source value makes there while what is frozen stays as it was; a
receiver that is asked for takes the change of its senders as they pass, and runs on from there with everything
recomputed. So one journey per sender serves all receivers above it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.engine.errors import PatchError
from subcircuit.engine.patching.delta import Departures
from subcircuit.engine.patching.edge_delta import EdgeRun, Pairs, SenderKind, Unchanged
from subcircuit.engine.patching.graph import LOGITS, Edge, EdgeIndex
from subcircuit.engine.patching.sites import PatchSet

Freeze = Literal["heads", "heads+mlps", "none"]
Changes = Float[Tensor, "sender prompt pos d_model"]


def check_freeze(freeze: str) -> None:
    """Raises PatchError for what path patching cannot hold fixed."""
    if freeze not in get_args(Freeze):
        raise PatchError(f"freeze {freeze!r} is not known; expected one of {', '.join(get_args(Freeze))}")


class Paths(Unchanged):
    """Rows in each of which one receiver reads a given change beside the residual stream."""

    def __init__(
        self, receivers: Sequence[str], changes: Changes, departures: Float[Tensor, "set"] | None = None
    ) -> None:
        self.n_sets, self.departures = len(receivers), departures
        self._receivers, self._changes = receivers, changes

    def at(self, receivers: Sequence[str], n_read: int) -> tuple[Pairs, Changes] | None:  # type: ignore[override]
        pairs = [(row, name) for name in receivers for row, mine in enumerate(self._receivers) if mine == name]
        return (pairs, self._changes[[row for row, _ in pairs], :, -n_read:]) if pairs else None


class Travellers:
    """Senders on their way up, each with the change that it has made so far."""

    def __init__(self, changes: Changes, max_rows: int) -> None:
        self._at: dict[str, int] = {}
        self._changes, self._max_rows = changes, max_rows
        self._shrinkage = changes.new_zeros(len(changes))

    def board(self, names: Sequence[str], changes: Changes) -> None:
        self._at |= {name: len(self._at) + i for i, name in enumerate(names)}
        self._changes = torch.cat((self._changes[:, :, -changes.shape[2] :], changes))
        self._shrinkage = torch.cat((self._shrinkage, self._shrinkage.new_zeros(len(names))))

    def of(self, names: Iterable[str]) -> Changes:
        return self._changes[[self._at[name] for name in names]]

    def shrinkage(self, names: Iterable[str]) -> Float[Tensor, "sender"]:
        """How many times smaller each sender has left a residual stream on its way, at the position it left least."""
        return self._shrinkage[[self._at[name] for name in names]]

    def move(self, step: Callable[[Changes], Changes], stream: Float[Tensor, "#sender prompt pos d_model"]) -> None:
        """Let every change become what `step` makes of it in a residual stream."""
        if self._at:
            parts = self._changes.split(self._max_rows)
            shrinkage = torch.cat([_shrinkage(stream[:, :, -part.shape[2] :], part) for part in parts])
            self._shrinkage = torch.maximum(self._shrinkage, shrinkage)
            self._changes = torch.cat([step(part) for part in parts])


def run_paths(
    run: EdgeRun,
    edges: Sequence[Edge],
    freeze: Freeze,
    base: PatchSet,
    first: int,
    max_rows: int,
    departures: Departures,
) -> Float[Tensor, "edge prompt"]:
    """Effects of each sender's source value reaching its receiver alone, on top of the patches of `base`.

    `departures` takes the size of each row's (of the receiver's input, and where the rows leave its layer), and by how
    much the sender's change shrinks the stream on its way there."""
    index = EdgeIndex(run.config)
    wanted = {name for name, _ in edges}
    effects = run.final.new_zeros(len(edges), run.n_prompts)
    travellers = Travellers(run.sender_changes([], base, first), max_rows)

    def board(layer: int, kind: SenderKind) -> None:
        names = [name for name in index.senders_in(layer, kind) if name in wanted]
        n_written = run.n_written(layer, kind, first)
        travellers.board(names, run.sender_changes(names, base, first, n_written))

    def arrive(layer: int, receivers: Sequence[str]) -> None:
        asked = [i for i, (_, receiver) in enumerate(edges) if receiver in receivers]
        for start in range(0, len(asked), max_rows):
            indices = asked[start : start + max_rows]
            names = [edges[i][0] for i in indices]
            found = departures.size.new_zeros(len(indices))
            rows = Paths([edges[i][1] for i in indices], travellers.of(names), found)
            effects[indices] = run.climb(rows, [base], base, layer, first)
            departures.size[indices], departures.shrinkage[indices] = found, travellers.shrinkage(names)

    board(0, "resid")
    for layer in range(run.config.n_layers):
        *of_heads, mlp = index.receivers_in(layer)
        arrive(layer, of_heads)
        if freeze == "none":
            travellers.move(partial(_past_heads, run, layer, base, first), _stream(run, layer, "pre", base, first))
        board(layer, "z")
        arrive(layer, [mlp])
        if freeze != "heads+mlps":
            travellers.move(partial(_past_mlp, run, layer, base, first), _stream(run, layer, "mid", base, first))
        board(layer, "mlp")
    arrive(run.config.n_layers, [LOGITS])
    return effects


def _past_heads(run: EdgeRun, layer: int, base: PatchSet, first: int, changes: Changes) -> Changes:
    """Changes between a layer's halves, its heads recomputed."""
    before = run.base_layers(base, first)[layer]
    after = run.through_heads(layer, _plus(changes, before.resid_pre), base, first)
    return after if before.resid_mid is None else after - before.resid_mid


def _past_mlp(run: EdgeRun, layer: int, base: PatchSet, first: int, changes: Changes) -> Changes:
    """Changes leaving a layer, its MLP recomputed."""
    before = run.base_layers(base, first)[layer]
    out = run.through_mlp(layer, _plus(changes, before.resid_mid), base, first)
    after = changes if out is None else changes + out
    return after if before.mlp_out is None else after - before.mlp_out


def _stream(
    run: EdgeRun, layer: int, where: Literal["pre", "mid"], base: PatchSet, first: int
) -> Float[Tensor, "one prompt pos d_model"]:
    """The residual stream entering a layer or between its halves in a run with `base` alone."""
    clean, before = run.clean[layer], run.base_layers(base, first)[layer]
    stream, delta = (clean.resid_pre, before.resid_pre) if where == "pre" else (clean.resid_mid, before.resid_mid)
    return stream[None] if delta is None else stream[None, :, -delta.shape[2] :] + delta


def _shrinkage(stream: Float[Tensor, "#sender prompt pos d_model"], changes: Changes) -> Float[Tensor, "sender"]:
    """|x| / |x + δ|, the largest over prompts and positions."""
    before, after = (torch.linalg.vector_norm(x, dim=-1) for x in (stream, stream + changes))
    return cast(Tensor, (before / after).amax((1, 2)))


def _plus(changes: Changes, delta: Tensor | None) -> Changes:
    return changes if delta is None else changes + delta
