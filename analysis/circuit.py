"""The `Circuit` value: which heads, MLPs and features (and edges) do a task, and how they were found."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from subcircuit.analysis.plural import counted
from subcircuit.analysis.store import write_whole
from subcircuit.engine.errors import PatchError, StoreError
from subcircuit.engine.patching import Component
from subcircuit.engine.patching.graph import Edge

if TYPE_CHECKING:
    from subcircuit.analysis.tasks import Task
    from subcircuit.engine.model import HookedTransformer

SCHEMA_VERSIONS = (1, 2)
"""Of files: 1, and 2 of circuits with features, which readers of 1 would lose without a word."""


@dataclass(frozen=True)
class TraceStep:
    """One decision of a discovery: what the score would be without a node, and whether the node went.

    Of a discovery of edges, `node` is an edge, written `sender->receiver`.
    """

    sweep: int
    direction: Literal["backward", "forward"]
    node: str
    score_without: float
    removed: bool


@dataclass(frozen=True)
class Circuit:
    """A set of nodes, sorted and without repetition, and edges between them.

    Nodes are heads `(layer, head)`, MLPs `layer`, and features of sparse dictionaries, components or their names
    (`m3.f17`). The dictionaries are not in the circuit: `settings` has where they sat, and their fingerprints.
    `score` is 100 · LD(circuit) / LD(full) on the task it was found on, or what is left by another `settings["metric"]`
    (`ItemAblation`). `settings` and `trace` say how it was found; `edge_scores`, where the method gives them, how much
    each edge matters.
    Two circuits are equal when their nodes and edges and their provenance are; compare `nodes` for the nodes alone.

    Raises PatchError for heads that are not pairs, or MLPs that are not numbers, of layers from 0 up, and for features
    that are none.
    """

    heads: list[tuple[int, int]]
    mlps: list[int]
    edges: tuple[Edge, ...] = ()
    model: str = ""
    task: str = ""
    method: str = ""
    score: float | None = None
    trace: tuple[TraceStep, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    edge_scores: dict[Edge, float] = field(default_factory=dict)
    features: list[Component] = field(default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", sorted({_head(pair) for pair in self.heads}))
        object.__setattr__(self, "mlps", sorted({_index(layer, "MLP") for layer in self.mlps}))
        object.__setattr__(self, "features", sorted({_feature(part) for part in self.features}, key=in_order))

    @classmethod
    def of_nodes(cls, nodes: Iterable[Component | str], **provenance: Any) -> Circuit:
        """A circuit of components or their names (`a5.h1`, `m3`, `m3.f17`). Raises PatchError for other kinds."""
        parts = [Component.parse(node) if isinstance(node, str) else node for node in nodes]
        for part in parts:
            check_kind(part)
        heads = [(part.layer, part.index) for part in parts if part.kind == "z"]
        mlps = [part.layer for part in parts if part.kind == "mlp"]
        return cls(heads, mlps, features=[part for part in parts if part.is_feature], **provenance)

    @property
    def nodes(self) -> list[Component]:
        """Its components in the order in which the model computes them."""
        heads = [Component(layer, "z", head) for layer, head in self.heads]
        return sorted([*heads, *(Component(layer, "mlp") for layer in self.mlps), *self.features], key=in_order)

    def strongest_edges(self) -> list[Edge]:
        """Its edges, those with the largest scores by size first."""
        return sorted(self.edges, key=lambda edge: -abs(self.edge_scores.get(edge, 0.0)))

    def __len__(self) -> int:
        return len(self.heads) + len(self.mlps) + len(self.features)

    def __and__(self, other: Circuit) -> Circuit:
        """Nodes and edges that both have."""
        edges = [edge for edge in self.edges if edge in other.edges]
        return self._combined("&", other, set(self.nodes) & set(other.nodes), edges)

    def __or__(self, other: Circuit) -> Circuit:
        """Nodes and edges that either has."""
        return self._combined("|", other, set(self.nodes) | set(other.nodes), {*self.edges, *other.edges})

    def __sub__(self, other: Circuit) -> Circuit:
        """Nodes that only this circuit has, and its edges between them."""
        left = set(self.nodes) - set(other.nodes)
        return self._combined("-", other, left, [edge for edge in self.edges if edge not in other.edges])

    def _combined(self, sign: str, other: Circuit, nodes: set[Component], edges: Iterable[Edge]) -> Circuit:
        task = f"{self.task} {sign} {other.task}" if self.task and other.task else self.task or other.task
        return Circuit.of_nodes(
            nodes,
            edges=tuple(sorted(edges)),
            model=self.model if self.model == other.model else "",
            task=task,
            method="set operation",
            settings=_unjudged([self, other]),
        )

    def jaccard(self, other: Circuit, nodes: Literal["all", "heads", "features"] = "all") -> float:
        """Size of the intersection over size of the union, of all nodes or of one kind; 1 for two empty sets."""

        def chosen(circuit: Circuit) -> set[object]:
            kinds: dict[str, Sequence[object]] = {"all": circuit.nodes, "heads": circuit.heads}
            return set((kinds | {"features": circuit.features})[nodes])

        mine, theirs = chosen(self), chosen(other)
        return len(mine & theirs) / len(mine | theirs) if mine | theirs else 1.0

    def costs(self) -> dict[str, float]:
        """What each candidate of the trace cost, in points of score, when it was last evaluated: the score of what was
        left then, less the score without it. Negative where the score rises; empty without a trace."""
        costs, score = {}, 100.0
        for step in self.trace:
            costs[step.node] = score - step.score_without
            if step.removed:
                score = step.score_without
        return costs

    def faithfulness(self, model: HookedTransformer, task: Task, **options: Any) -> float:
        """What the circuit alone recovers of a task: with edges, by these (`edge_ablation.edge_score`), else by its
        nodes (`faithfulness.score`)."""
        from subcircuit.analysis.edge_ablation import edge_score
        from subcircuit.analysis.faithfulness import score

        return (edge_score if self.edges else score)(model, task, self, **options)

    def __str__(self) -> str:
        heads = " ".join(f"{layer}.{head}" for layer, head in self.heads) or "none"
        mlps = " ".join(map(str, self.mlps)) or "none"
        metric = self.settings.get("metric", "logit_difference")
        by = "" if metric == "logit_difference" else f" by {metric.replace('_', ' ')}"
        found = f", score {self.score:.1f}{by}" if self.score is not None else ""
        n_unjudged = self.settings.get("edges", {}).get("n_unjudged", 0)
        unjudged = f" (and {n_unjudged} that were not judged)" if n_unjudged else ""
        edges = f", {counted(len(self.edges), 'edge')}{unjudged}" if self.edges else ""
        names = " ".join(map(str, self.features))
        features = f", {counted(len(self.features), 'feature')} ({names})" if self.features else ""
        nodes = f"{counted(len(self.heads), 'head')} ({heads}), {counted(len(self.mlps), 'MLP')} ({mlps})"
        return f"{nodes}{features}{edges}{found}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "schema": 2 if self.features else 1,
            "model": self.model,
            "task": self.task,
            "method": self.method,
            "score": self.score,
            "heads": [list(head) for head in self.heads],
            "mlps": self.mlps,
            "features": [str(part) for part in self.features],
            "edges": [list(edge) for edge in self.edges],
            "edge_scores": [[*edge, score] for edge, score in self.edge_scores.items()],
            "settings": self.settings,
            "trace": [vars(step) for step in self.trace],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Circuit:
        """Raises StoreError for values that are not a circuit's, or of a later schema."""
        schemas = " or ".join(map(str, SCHEMA_VERSIONS))
        if not isinstance(values, dict) or "schema" not in values:
            found = "it has no field 'schema'" if isinstance(values, dict) else f"it is a {type(values).__name__}"
            raise StoreError(f"not a circuit: {found}; expected an object with schema {schemas}")
        if values["schema"] not in SCHEMA_VERSIONS:
            raise StoreError(f"circuit is of schema {values['schema']!r}; expected {schemas}")
        try:
            return cls(
                heads=[(layer, head) for layer, head in values["heads"]],
                mlps=values["mlps"],
                features=values.get("features", ()),
                edges=tuple((sender, receiver) for sender, receiver in values["edges"]),
                trace=tuple(TraceStep(**step) for step in values["trace"]),
                edge_scores={(sender, receiver): score for sender, receiver, score in values.get("edge_scores", ())},
                **{name: values[name] for name in ("model", "task", "method", "score", "settings")},
            )
        except (KeyError, TypeError, ValueError, PatchError) as error:
            raise StoreError(f"circuit has a missing or malformed field: {error}") from error

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Circuit:
        """Raises StoreError for text that is not a circuit's JSON."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise StoreError(f"circuit is not JSON: {error}") from error
        return cls.from_dict(values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the circuit as JSON, whole or not at all."""
        write_whole(Path(path), (self.to_json() + "\n").encode("utf-8"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Circuit:
        """Raises StoreError that names the file when it cannot be read as a circuit."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise StoreError(f"{os.fspath(path)}: {error.strerror}") from error
        except (UnicodeDecodeError, StoreError) as error:
            raise StoreError(f"{os.fspath(path)}: {error}") from error

    def to_dot(self, group_size: int = 1) -> str:
        """The circuit as a Graphviz graph: nodes by layer; edges where it has them, as wide as their scores.

        Edges lead to the queries, keys and values of heads, and dotted lines from there to the heads that read them;
        `group_size` is the number of heads that share a key.
        """
        lines = ["digraph circuit {", "  rankdir=BT;", "  node [shape=box, style=rounded];"]
        for layer in sorted({node.layer for node in self.nodes}):
            names = " ".join(f'"{node}";' for node in self.nodes if node.layer == layer)
            lines.append(f"  {{ rank=same; {names} }}")
        for receiver in sorted({receiver for _, receiver in self.edges if receiver.startswith("a")}):
            lines.append(f'  "{receiver}" [shape=plaintext, label="{Component.parse(receiver).kind}"];')
            for head in self.readers(receiver, group_size):
                lines.append(f'  "{receiver}" -> "{head}" [style=dotted, arrowhead=none];')
        most = max(map(abs, self.edge_scores.values()), default=0.0)
        for edge in self.edges:
            width = (
                f" [penwidth={0.5 + 3.5 * abs(self.edge_scores[edge]) / most:.2f}]" if edge in self.edge_scores else ""
            )
            lines.append(f'  "{edge[0]}" -> "{edge[1]}"{width};')
        return "\n".join([*lines, "}"]) + "\n"

    def readers(self, receiver: str, group_size: int = 1) -> list[Component]:
        """The circuit's heads that read a query, key or value (`a7.k2`), `group_size` of the model's per key."""
        part = Component.parse(receiver)
        size = group_size if part.kind in ("k", "v") else 1
        return [
            node
            for node in self.nodes
            if node.kind == "z" and node.layer == part.layer and node.index // size == part.index
        ]


def intersection(circuits: Sequence[Circuit]) -> Circuit:
    """What all circuits share. The task names them all. Raises PatchError for no circuits."""
    return _reduced(circuits, set.intersection, " & ")


def union(circuits: Sequence[Circuit]) -> Circuit:
    """What any of the circuits has. Raises PatchError for no circuits."""
    return _reduced(circuits, set.union, " | ")


def _reduced(circuits: Sequence[Circuit], operation: Any, sign: str) -> Circuit:
    if not circuits:
        raise PatchError("no circuits to combine; expected at least one")
    nodes = operation(*(set(circuit.nodes) for circuit in circuits))
    edges = operation(*(set(circuit.edges) for circuit in circuits))
    about = _unjudged(circuits)
    combined = Circuit.of_nodes(nodes, edges=tuple(sorted(edges)), method="set operation", settings=about)
    models = {circuit.model for circuit in circuits}
    return replace(combined, model=models.pop() if len(models) == 1 else "", task=sign.join(c.task for c in circuits))


def _unjudged(circuits: Sequence[Circuit]) -> dict[str, Any]:
    """What the searches of edges left out, if all of the circuits say the same: then it holds of a combination too."""
    said = [circuit.settings.get("edges") for circuit in circuits]
    scopes = [how and {name: how[name] for name in ("from_input", "same_layer")} for how in said]
    return {"edges": scopes[0]} if scopes[0] and all(scope == scopes[0] for scope in scopes) else {}


def in_order(node: Component) -> tuple[int, int, int]:
    """Sorts nodes in the order in which the model computes them."""
    return node.layer, node.stage, node.index


def check_kind(part: Component) -> None:
    """Raises PatchError for a component that is no head, MLP or feature."""
    if part.kind not in ("z", "mlp") and not part.is_feature:
        raise PatchError(
            f"'{part}' cannot be a circuit's node; expected heads (a5.h1), MLPs (m3) and features (m3.f17)"
        )


def check_no_features(circuit: Circuit, what: str) -> None:
    """Raises PatchError for a circuit with features, when `what` knows heads and MLPs alone."""
    if circuit.features:
        raise PatchError(f"the circuit has features (such as {circuit.features[0]}); {what} takes heads and MLPs alone")


def _feature(part: Any) -> Component:
    part = Component.parse(part) if isinstance(part, str) else part
    if not isinstance(part, Component) or not part.is_feature:
        raise PatchError(f"feature {part!r} is not understood; expected components such as m3.f17, or their names")
    return part


def _head(pair: Any) -> tuple[int, int]:
    try:
        layer, head = pair
    except (TypeError, ValueError):
        raise PatchError(f"head {pair!r} is not understood; expected (layer, head)") from None
    return _index(layer, "head"), _index(head, "head")


def _index(value: Any, what: str) -> int:
    try:
        index = operator.index(value)
    except TypeError:
        raise PatchError(f"{what} {value!r} is not understood; expected whole numbers from 0 up") from None
    if index < 0:
        raise PatchError(f"{what} {index} is negative; expected whole numbers from 0 up")
    return index
