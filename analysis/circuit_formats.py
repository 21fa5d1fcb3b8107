"""Circuits as files: our JSON, diagrams, and the formats of other tools.

MIB's circuit track (Mueller et al. 2025, arXiv 2504.13151) takes the JSON that EAP-IG's `Graph.to_json` writes
(github.com/hannamw/EAP-IG, src/eap/graph.py):

    {"cfg": {"n_layers": 12, "n_heads": 12, "parallel_attn_mlp": false, "d_model": 768},
     "nodes": {"input": {"in_graph": true}, "a0.h0": {"in_graph": false}, …, "m0": …, "logits": {"in_graph": true}},
     "edges": {"input->a0.h0<q>": {"score": 0.1, "in_graph": true}, "a0.h0->m0": …, "m11->logits": …}}

Every node and edge of the model is listed, those of the circuit with `in_graph`. Its models have a key and a value for
every query head. Where heads of ours share one, the edge into it is written as one edge per head of the group, each
with an equal part of the score; read back, the parts are added up, and the edge is in the circuit if any of them is.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from subcircuit.analysis.circuit import Circuit, check_no_features
from subcircuit.analysis.circuit_figure import circuit_figure
from subcircuit.analysis.drawing import words
from subcircuit.analysis.eap import EdgeScores
from subcircuit.analysis.edges import edges_kept
from subcircuit.analysis.store import write_whole
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import PatchError, StoreError
from subcircuit.engine.patching import Component
from subcircuit.engine.patching.graph import INPUT, LOGITS, Edge, edges, readers, receivers, senders

SUFFIXES = (".json", ".dot", ".svg")
MIB_SUFFIX = ".mib.json"


def circuit_text(circuit: Circuit, file_name: str, config: ModelConfig) -> str:
    """A circuit as a file of this name holds it: JSON, MIB's (`.mib.json`), Graphviz (`.dot`) or a diagram (`.svg`).

    Raises StoreError for another name, and PatchError for what MIB's format cannot hold.
    """
    if file_name.endswith(MIB_SUFFIX):
        return json.dumps(to_mib(circuit, config))
    match Path(file_name).suffix:
        case ".json":
            return circuit.to_json() + "\n"
        case ".dot":
            return circuit.to_dot(config.group_size)
        case ".svg":
            return circuit_figure(circuit, f"{words(circuit.task)} in {circuit.model}", config.group_size)
        case suffix:
            raise StoreError(f"a circuit's file cannot end in {suffix!r}; expected one of {', '.join(SUFFIXES)}")


def is_mib(values: Any) -> bool:
    """Whether JSON holds a circuit in MIB's format."""
    return isinstance(values, Mapping) and {"cfg", "nodes", "edges"} <= values.keys()


def to_mib(circuit: Circuit, config: ModelConfig, scores: EdgeScores | None = None) -> dict[str, Any]:
    """A circuit of edges, with the scores of all edges where they are given, for MIB; else its own `edge_scores` or 1
    inside, and 0 outside. Edges that its search did not judge are in it (`edges.edges_kept`).

    Raises PatchError for a circuit without edges or with features, or an edge that the model does not have.
    """
    check_no_features(circuit, "MIB's format")
    if not circuit.edges and circuit.nodes:
        raise PatchError("the circuit has nodes but no edges, and MIB's format is one of edges")
    everything, chosen = edges(config), set(edges_kept(circuit, config))
    unknown = sorted(chosen.difference(everything))
    if unknown:
        raise PatchError(f"edge '{unknown[0][0]}' -> '{unknown[0][1]}' of the circuit does not exist in this model")
    own = {edge: circuit.edge_scores.get(edge, 1.0) if edge in chosen else 0.0 for edge in everything}
    values = own if scores is None else _by_edge(scores)
    written: dict[str, dict[str, float | bool]] = {}
    for edge in everything:
        names = _mib_names(edge, config)
        for name in names:
            written[name] = {"score": values[edge] / len(names), "in_graph": edge in chosen}
    nodes = {INPUT, LOGITS, *map(str, circuit.nodes)}
    return {
        "cfg": _cfg(config),
        "nodes": {name: {"in_graph": name in nodes} for name in (*senders(config), LOGITS)},
        "edges": written,
    }


def from_mib(
    values: Mapping[str, Any], config: ModelConfig, *, task: str = "", method: str = "MIB"
) -> tuple[Circuit, EdgeScores]:
    """The circuit and the edge scores of MIB's format, for the model that it was made with.

    An edge that is not listed has the score 0 and is not in the circuit, as EAP-IG reads it.

    Raises StoreError for values that are not in this format, or of a model of another shape.
    """
    expected = _cfg(config)
    try:
        found = {key: values["cfg"].get(key) for key in expected}
        read = {name: (float(info["score"]), bool(info["in_graph"])) for name, info in values["edges"].items()}
        nodes = {name for name, info in values["nodes"].items() if info["in_graph"]} - {INPUT, LOGITS}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"not a circuit in MIB's format: missing or malformed {error}") from error
    if found != expected:
        raise StoreError(f"circuit is of a model with {found}; this one has {expected}")
    everything = edges(config)
    names = {edge: _mib_names(edge, config) for edge in everything}
    known = {*(name for part in names.values() for name in part), *senders(config)}
    unknown = sorted({*read, *nodes} - known)
    if unknown:
        raise StoreError(f"circuit has {unknown[0]!r}, which this model does not")
    if not all(math.isfinite(score) for score, _ in read.values()):
        raise StoreError("circuit has an edge whose score is not a finite number")
    read = dict.fromkeys(known, (0.0, False)) | read
    chosen = [edge for edge in everything if any(read[name][1] for name in names[edge])]
    circuit = Circuit.of_nodes(
        nodes,
        edges=tuple(chosen),
        model=config.name,
        task=task,
        method=method,
    )
    totals = {edge: sum(read[name][0] for name in names[edge]) for edge in everything}
    return circuit, _as_scores(totals, config, {"method": method, "task": task, "model": config.name})


def save_mib(
    path: str | os.PathLike[str], circuit: Circuit, config: ModelConfig, scores: EdgeScores | None = None
) -> None:
    """Write `to_mib`'s JSON to a file, whole or not at all."""
    write_whole(Path(path), json.dumps(to_mib(circuit, config, scores)).encode("utf-8"))


def load_mib(
    path: str | os.PathLike[str], config: ModelConfig, *, task: str = "", method: str = "MIB"
) -> tuple[Circuit, EdgeScores]:
    """`from_mib` of a file. Raises StoreError that names the file when it cannot be read."""
    try:
        return from_mib(json.loads(Path(path).read_text(encoding="utf-8")), config, task=task, method=method)
    except (OSError, ValueError, StoreError) as error:
        raise StoreError(f"{os.fspath(path)}: {error}") from error


def _cfg(config: ModelConfig) -> dict[str, int | bool]:
    return {
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "parallel_attn_mlp": False,
        "d_model": config.d_model,
    }


def _mib_names(edge: Edge, config: ModelConfig) -> list[str]:
    """What MIB calls an edge: one name, or one per query head that reads a shared key or value."""
    sender, receiver = edge
    if receiver == LOGITS or Component.parse(receiver).kind == "mlp":
        return [f"{sender}->{receiver}"]
    letter = Component.parse(receiver).kind
    return [f"{sender}->{head}<{letter}>" for head in readers(receiver, config)]


def _by_edge(scores: EdgeScores) -> dict[Edge, float]:
    return dict(scores.top(scores.n_edges))


def _as_scores(values: Mapping[Edge, float], config: ModelConfig, settings: dict[str, Any]) -> EdgeScores:
    rows, columns = ({name: i for i, name in enumerate(part)} for part in (senders(config), receivers(config)))
    effects = torch.full((len(rows), len(columns)), float("nan"), dtype=torch.float64)
    for (sender, receiver), value in values.items():
        effects[rows[sender], columns[receiver]] = value
    return EdgeScores(tuple(rows), tuple(columns), effects, torch.empty(0), config, settings)
