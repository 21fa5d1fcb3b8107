"""Edges of circuits of nodes: which there may be, and which of them matter (path patching)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

from subcircuit.analysis.ablation import full_metric
from subcircuit.analysis.circuit import Circuit, check_no_features
from subcircuit.analysis.nodes import all_nodes
from subcircuit.analysis.tasks import Task
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import PatchError, TaskError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Effects, Patch, PatchSet, Site, Source
from subcircuit.engine.patching.edge_delta import EdgeSet
from subcircuit.engine.patching.edges import edge_effects, patched_activations, path_effects
from subcircuit.engine.patching.graph import INPUT, Edge, edges_among, layer_of
from subcircuit.engine.patching.options import Executor, Precision
from subcircuit.engine.patching.path_delta import Freeze, check_freeze
from subcircuit.engine.patching.sites import source_name

Progress = Callable[[int, int], None]


def edges_between(
    circuit: Circuit, config: ModelConfig, *, from_input: bool = False, same_layer: bool = False
) -> list[Edge]:
    """Edges that a circuit of nodes may have, receiver by receiver from the first layer up.

    Receivers are the queries of its heads, the keys and values that they read, its MLPs and the logits; senders are its
    nodes of earlier layers, with `from_input` the embeddings too, with `same_layer` the heads beside an MLP too.

    Raises PatchError for a node that the model lacks, and for a circuit with features.
    """
    check_no_features(circuit, "a search of edges")
    for node in circuit.nodes:
        node.check(config)

    def taken(sender: str, receiver: str) -> bool:
        if sender == INPUT:
            return from_input
        return same_layer or layer_of(sender, config) < layer_of(receiver, config)

    return [edge for edge in edges_among(map(str, circuit.nodes), config) if taken(*edge)]


def edges_kept(circuit: Circuit, config: ModelConfig) -> list[Edge]:
    """The edges that are left when all but a circuit's are removed: its own, and those between its nodes that its
    search did not judge, as `settings["edges"]` says of `prune_edges`.

    Raises PatchError for a node that the model lacks, and for a circuit with features.
    """
    how = circuit.settings.get("edges")
    if how is None:
        return list(circuit.edges)
    judged = edges_between(circuit, config, from_input=how["from_input"], same_layer=how["same_layer"])
    gone = set(judged).difference(circuit.edges)
    return [edge for edge in edges_among(map(str, circuit.nodes), config) if edge not in gone]


def prune_edges(
    model: HookedTransformer,
    task: Task,
    circuit: Circuit,
    threshold: float = 0.8,
    *,
    source: Source = "mean",
    freeze: Freeze = "heads",
    relative_to: Literal["full", "circuit"] = "full",
    both_sides: bool = False,
    from_input: bool = False,
    same_layer: bool = False,
    executor: Executor = "torch",
    precision: Precision = "fp32",
    budget_bytes: int | None = None,
    progress: Progress | None = None,
) -> Circuit:
    """The edges that matter within a circuit of nodes, by path patching (Lan et al., arXiv 2311.04131).

    With every node outside the circuit ablated (`source`), each edge of `edges_between` is path-patched alone: the
    sender's value in the corrupted run, under the same ablation, reaches that receiver only, with `freeze` held fixed
    on the way. The edge is kept if LD / LD(full) falls below `threshold`; with `relative_to="circuit"`, if LD / LD of
    the circuit alone does; with `both_sides` also if it exceeds 2 − `threshold`. Receivers into which no edge leads are
    dropped with that.

    The circuit comes back with its edges, and for each the points of score that its patch costs (`edge_scores`);
    `settings["edges"]` says how they were found, how many more there are that were not judged, the score of the
    circuit's nodes on these prompts, and that of the circuit when all other candidates are removed together. Only with
    `from_input` and `same_layer` are the candidates all edges of the circuit; what is no candidate stays when others
    are removed (`edges_kept`). The corrupted values of all prompts are held in memory meanwhile, 8 · n_layers · d_model
    bytes per token.

    Raises PatchError for an unknown option, a circuit with features or a node that the model lacks, or a task without
    corrupted prompts, TaskError when the full model (or the circuit) does not prefer the answers.
    """
    if relative_to not in ("full", "circuit"):
        raise PatchError(f"relative_to {relative_to!r} is not known; expected 'full' or 'circuit'")
    check_freeze(freeze)
    candidates = edges_between(circuit, model.config, from_input=from_input, same_layer=same_layer)
    base: PatchSet = tuple(
        Patch(Site(node), source) for node in all_nodes(model.config) if node not in set(circuit.nodes)
    )
    corrupted = patched_activations(model, task, base, precision=precision, budget_bytes=budget_bytes)
    options: dict[str, Any] = {"executor": executor, "precision": precision, "budget_bytes": budget_bytes}
    result = path_effects(
        model, task, candidates, source=corrupted, freeze=freeze, base=base, progress=progress, **options
    )
    full = full_metric(result.clean_metric, task, "logit_difference")
    metrics = dict(zip(candidates, _metrics(result), strict=True))

    def score_without(removed: Iterable[Edge]) -> float:
        rows = edge_effects(model, task, [()], source=source, base=EdgeSet(tuple(removed), base), **options)
        return 100 * _metrics(rows)[0] / full

    alone = score_without(())
    if relative_to == "circuit" and alone <= 0:
        raise TaskError(f"task '{task.name}': the circuit does not prefer the answers, so no edge is relative to it")
    whole = 100.0 if relative_to == "full" else alone
    scores = {edge: 100 * metric / full for edge, metric in metrics.items()}
    most = 2 - threshold if both_sides else float("inf")
    kept = tuple(edge for edge in candidates if not threshold <= scores[edge] / whole <= most)
    how = {
        "method": "path patching",
        "threshold": threshold,
        "relative_to": relative_to,
        "both_sides": both_sides,
        "freeze": freeze,
        "from_input": from_input,
        "same_layer": same_layer,
        "source": source_name(source),
        "n_candidates": len(candidates),
        "score_of_nodes": alone,
        "score": score_without(edge for edge in candidates if edge not in set(kept)),
    }
    costs = {edge: alone - scores[edge] for edge in kept}
    found = replace(circuit, edges=kept, edge_scores=costs, settings={**circuit.settings, "edges": how})
    how["n_unjudged"] = len(edges_kept(found, model.config)) - len(kept)
    return found


def _metrics(result: Effects) -> list[float]:
    """Mean logit difference of each set."""
    means: list[float] = (result.effects.double().mean(1) + result.clean_metric.double().mean()).tolist()
    return means
