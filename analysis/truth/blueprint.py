"""What a known model does, said in named features: which head matches what with what, and what it moves where.

A blueprint knows no weights and no sizes of a model; `build` turns it into a GPT-2 or a Llama. The residual stream is a
set of orthonormal features, several under one name (`token` has one per content token), as in tracr's compiled
transformers (Lindner et al. 2023, arXiv 2301.05062).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from subcircuit.engine.errors import TaskError
from subcircuit.engine.patching.graph import INPUT, LOGITS

Feature = tuple[str, int]
"""One feature of the residual stream: its family's name and its index there."""

ONE, POSITION, OUT = "one", "position", "out"
"""Features that every model has: the constant, one per position (learned positions only), one per token to predict."""


@dataclass(frozen=True)
class Match:
    """A term of a head's attention score: `strength` where query and key hold the same feature of two families.

    `query` may be ONE, which every position holds, for keys that every query looks for. Strengths are in units of the
    model's sharpness.
    """

    query: str
    key: str
    strength: float


@dataclass(frozen=True)
class Head:
    """An attention head: its score is the sum of its matches and of `offset(query position − key position)`, both in
    units of the model's sharpness; it adds each `moves` family of the attended position, times a weight, to another
    family."""

    matches: tuple[Match, ...]
    moves: tuple[tuple[str, str, float], ...]
    offset: Callable[[int], float] | None = None


@dataclass(frozen=True)
class Conjunctions:
    """An MLP of neurons that fire where two features are there together, and then write a third."""

    neurons: tuple[tuple[Feature, Feature, Feature], ...]


@dataclass(frozen=True)
class Prompt:
    """A clean and a corrupted prompt; each one's prediction is the other's wrong answer."""

    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    answer: int
    wrong: int


@dataclass(frozen=True)
class Blueprint:
    """A circuit to build.

    `sizes` is the number of features per family, `embedding` the features of each token id (besides ONE), `predicts`
    the token that each OUT feature stands for. `stages` are the circuit's parts by role, those of a stage in one layer
    and each stage in a later layer than the one before. `edges` go from a role (or `input`) to a head's input
    (`induction.k`), to an MLP's role, or to `logits`: those along which clean and corrupted prompts differ and the
    answer depends on it. `draw` makes prompts of `n_pos` tokens, and `positions` names classes of their positions, as
    `Task.positions` does.

    Raises TaskError for a family, role, edge or position that does not exist.
    """

    name: str
    description: str
    sizes: Mapping[str, int]
    embedding: tuple[tuple[Feature, ...], ...]
    predicts: tuple[int, ...]
    stages: tuple[Mapping[str, Head | Conjunctions], ...]
    edges: tuple[tuple[str, str], ...]
    n_pos: int
    positions: Mapping[str, tuple[int, ...]]
    draw: Callable[[random.Random], Prompt]

    def __post_init__(self) -> None:
        known = {ONE, *self.sizes}
        for family in {family for part in self.parts.values() for family in _families(part)} - known:
            raise TaskError(f"known model '{self.name}': family {family!r} is not one of {', '.join(sorted(known))}")
        for sender, receiver in self.edges:
            role, _, way = receiver.partition(".")
            ways = ("q", "k", "v") if isinstance(self.parts.get(role), Head) else ("",)
            if sender not in (INPUT, *self.parts) or role not in (LOGITS, *self.parts) or way not in ways:
                raise TaskError(f"known model '{self.name}': no such edge {sender!r} -> {receiver!r}")
        for where, positions in self.positions.items():
            if not all(0 <= position < self.n_pos for position in positions):
                raise TaskError(
                    f"known model '{self.name}': {where} at {positions}; expected positions in 0..{self.n_pos - 1}"
                )

    @property
    def parts(self) -> dict[str, Head | Conjunctions]:
        """Every part of the circuit by role, in the order of the stages."""
        return {role: part for stage in self.stages for role, part in stage.items()}


def _families(part: Head | Conjunctions) -> set[str]:
    if isinstance(part, Conjunctions):
        return {family for neuron in part.neurons for family, _ in neuron}
    matched = {family for match in part.matches for family in (match.query, match.key)}
    return matched | {family for source, target, _ in part.moves for family in (source, target)}
