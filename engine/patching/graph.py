"""A model as a graph: what writes to the residual stream, what reads it, and the edges between.

Senders are `input` (the embeddings), heads (`a4.h4`) and MLPs (`m3`); receivers are the queries of a head (`a7.q11`),
the keys and values of a KV head (`a7.k2`, `a7.v2`), MLPs (`m9`) and `logits` (the final norm). GPT-2 Small has 158
nodes and 32,491 edges, as in Hanna et al. 2024 (arXiv 2403.17806).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import PatchError
from subcircuit.engine.patching.sites import Component

INPUT, LOGITS = "input", "logits"

Edge = tuple[str, str]
"""Sender and receiver by name, such as `("a4.h4", "a7.q11")`."""


def senders(config: ModelConfig) -> list[str]:
    """Everything that writes to the residual stream, in forward order."""
    names = [INPUT]
    for layer in range(config.n_layers):
        names += [str(Component(layer, "z", head)) for head in range(config.n_heads)]
        names.append(str(Component(layer, "mlp")))
    return names


def receivers(config: ModelConfig) -> list[str]:
    """Everything that reads the residual stream, in forward order."""
    names = []
    for layer in range(config.n_layers):
        names += [str(Component(layer, "q", head)) for head in range(config.n_heads)]
        names += [str(Component(layer, kind, head)) for kind in ("k", "v") for head in range(config.kv_heads)]
        names.append(str(Component(layer, "mlp")))
    return [*names, LOGITS]


def senders_to(receiver: str, config: ModelConfig) -> list[str]:
    """What can write to a receiver's input, in forward order. Raises PatchError for what is no receiver."""
    everything = senders(config)
    return everything[: n_senders_to(receiver, config)]


def n_senders_to(receiver: str, config: ModelConfig) -> int:
    """How many of `senders`, from the first, a receiver can read. Raises PatchError for what is no receiver."""
    per_layer = config.n_heads + 1
    if receiver == LOGITS:
        return 1 + config.n_layers * per_layer
    component = parse_receiver(receiver, ("q", "k", "v", "mlp"), f"a7.q1, a7.k1, a7.v1, m7 or {LOGITS}")
    component.check(config)
    heads_below = config.n_heads if component.kind == "mlp" else 0
    return 1 + component.layer * per_layer + heads_below


def parse_receiver(name: str, kinds: Sequence[str], expected: str) -> Component:
    """The component of some kinds that has this name. Raises PatchError, which lists what is expected, for another."""
    try:
        component = Component.parse(name)
    except PatchError:
        component = None  # its message lists every kind of component
    if component is None or component.kind not in kinds:
        raise PatchError(f"'{name}' reads nothing; expected {expected}")
    return component


def edges(config: ModelConfig) -> list[Edge]:
    """Every edge of the model, receiver by receiver in forward order."""
    everything = senders(config)
    return [
        (sender, receiver) for receiver in receivers(config) for sender in everything[: n_senders_to(receiver, config)]
    ]


def edges_among(nodes: Iterable[str], config: ModelConfig) -> list[Edge]:
    """Every edge whose ends are among some heads and MLPs, the input and the logits, receiver by receiver."""
    names = {*nodes, INPUT, LOGITS}
    return [
        (sender, receiver)
        for receiver in receivers(config)
        if not names.isdisjoint(readers(receiver, config))
        for sender in senders_to(receiver, config)
        if sender in names
    ]


def readers(receiver: str, config: ModelConfig) -> list[str]:
    """The nodes that an edge into a receiver enters: a head, all heads that read a KV head, an MLP, or `logits`."""
    if receiver == LOGITS:
        return [LOGITS]
    component = Component.parse(receiver)
    heads = range(component.index, component.index + 1)
    if component.kind in ("k", "v"):
        heads = Component(component.layer, "group", component.index).indices(config)
    return [receiver] if component.kind == "mlp" else [str(Component(component.layer, "z", head)) for head in heads]


def check_edge(edge: Edge, config: ModelConfig) -> None:
    """Raises PatchError for an edge that the model does not have."""
    sender, receiver = edge
    if sender not in senders_to(receiver, config):
        raise PatchError(f"edge '{sender}' -> '{receiver}' does not exist: no such sender below '{receiver}'")


class EdgeIndex:
    """A model's senders and receivers by place in forward order, for sets of edges as boolean matrices."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.senders, self.receivers = senders(config), receivers(config)
        self.sender_at = {name: i for i, name in enumerate(self.senders)}
        self.receiver_at = {name: i for i, name in enumerate(self.receivers)}
        self._n_senders_to = [n_senders_to(name, config) for name in self.receivers]
        self.sender_layers = [layer_of(name, config) for name in self.senders]
        self.receiver_layers = [layer_of(name, config) for name in self.receivers]

    def places(self, edges: Sequence[Edge]) -> tuple[list[int], list[int]]:
        """Receivers and senders of edges, by place. Raises PatchError for an edge that the model does not have."""
        rows = [self.receiver_at.get(receiver, -1) for _, receiver in edges]
        columns = [self.sender_at.get(name, -1) for name, _ in edges]
        for edge, row, column in zip(edges, rows, columns, strict=True):
            if row < 0 or not 0 <= column < self._n_senders_to[row]:
                check_edge(edge, self.config)
        return rows, columns

    def senders_in(self, layer: int, kind: Literal["resid", "z", "mlp"]) -> list[str]:
        """A layer's heads (`z`) or MLP, or (`resid`) the embeddings."""
        if kind == "resid":
            return [INPUT]
        indices = range(self.config.n_heads) if kind == "z" else [0]
        return [str(Component(layer, kind, index)) for index in indices]

    def receivers_in(self, layer: int) -> list[str]:
        """A layer's queries, keys, values, and its MLP."""
        return [name for name, at in zip(self.receivers, self.receiver_layers, strict=True) if at == layer]

    def start(self, edge: Edge) -> int:
        """The layer whose receivers an edge can change; the number of layers for the logits."""
        return self.receiver_layers[self.places([edge])[0][0]]


def layer_of(name: str, config: ModelConfig) -> int:
    """The layer of a sender or receiver: 0 for `input`, the number of layers for `logits`."""
    if name in (INPUT, LOGITS):
        return 0 if name == INPUT else config.n_layers
    return Component.parse(name).layer
