"""Finding circuits: the methods by name. Each is a function of its own, with its own options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from subcircuit.analysis.acdc import acdc
from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.eap import EdgeMethod, edge_scores
from subcircuit.analysis.edge_ablation import EdgeAblation
from subcircuit.analysis.edge_masks import edge_mask_circuit
from subcircuit.analysis.gates import Learning
from subcircuit.analysis.masks import mask_circuit
from subcircuit.analysis.pruning import prune_nodes
from subcircuit.analysis.statistics import rank_correlation
from subcircuit.analysis.tasks import Task
from subcircuit.engine.errors import PatchError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Source
from subcircuit.engine.patching.options import Executor, Precision


def strongest_edges(
    method: EdgeMethod,
    model: HookedTransformer,
    task: Task,
    *,
    n_edges: int | None = None,
    threshold: float | None = None,
    source: Source = "corrupted",
    steps: int | None = None,
    verify: bool = False,
    executor: Executor = "torch",
    precision: Precision = "fp32",
    budget_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Circuit:
    """The circuit of the edges with the largest scores by EAP or EAP-IG: `n_edges` of them, or all from `threshold` on.

    `steps` are EAP-IG's, 5 if left out. The circuit's `score` is exact: what its edges alone keep (`EdgeAblation`).
    With `verify`, its `edge_scores` are too: the points that each edge's patch costs the full model, in place of what
    the gradients say (`verified`).

    Raises PatchError unless exactly one of `n_edges` and `threshold` is given, and for steps of EAP; TaskError when the
    model does not do the task.
    """
    if method == "eap" and steps is not None:
        raise PatchError(f"steps {steps} mean nothing to 'eap', which takes one gradient; expected them with 'eap-ig'")
    scores = edge_scores(
        model,
        task,
        method,
        source=source,
        steps=5 if steps is None else steps,
        precision=precision,  # type: ignore[arg-type]
        budget_bytes=budget_bytes,
        progress=progress,
    )
    circuit = scores.circuit(n_edges, threshold=threshold)
    exactly: dict[str, Any] = {"source": source, "executor": executor, "precision": precision}
    ablation = EdgeAblation(model, task, budget_bytes=budget_bytes, **exactly)
    circuit = replace(circuit, score=ablation.score_of(circuit.edges))
    return verified(circuit, ablation) if verify else circuit


def verified(circuit: Circuit, ablation: EdgeAblation) -> Circuit:
    """A circuit whose `edge_scores` are estimates, with the points that the patch of each edge alone costs the full
    model instead; `settings["verified"]` has the rank correlation of the two, and the share with the same sign."""
    full, *without = ablation.scores([(), *([edge] for edge in circuit.edges)])
    exact = torch.tensor([full - score for score in without], dtype=torch.float64)
    estimated = torch.tensor([circuit.edge_scores[edge] for edge in circuit.edges], dtype=torch.float64)
    agreement = {
        "rank_correlation": float(rank_correlation(estimated, exact)),
        "same_sign": float((estimated.sign() == exact.sign()).double().mean()),
    }
    points = dict(zip(circuit.edges, exact.tolist(), strict=True))
    return replace(circuit, edge_scores=points, settings={**circuit.settings, "verified": agreement})


METHODS: dict[str, Callable[..., Circuit]] = {
    "prune": prune_nodes,
    "acdc": acdc,
    "eap": partial(strongest_edges, "eap"),
    "eap-ig": partial(strongest_edges, "eap-ig"),
    "masks": mask_circuit,
    "edge-masks": edge_mask_circuit,
}


def discover(model: HookedTransformer, task: Task, method: str = "prune", **options: Any) -> Circuit:
    """The circuit with which a model does a task.

    Nodes are heads and MLPs; of a model with sparse dictionaries (`model.with_dictionaries(dictionary)`), their
    features in place of what they sit at (`nodes.candidate_nodes`). Methods that find edges take no such model.

    | method          | finds | by                                               | options of `analysis`'s        |
    | --------------- | ----- | ------------------------------------------------ | ------------------------------ |
    | `prune`         | nodes | iterative pruning (Lan et al., arXiv 2311.04131) | `pruning.prune_nodes`          |
    | `masks`         | nodes | learned gates, then exact scores                 | `masks.mask_circuit`           |
    | `acdc`          | edges | Conmy et al. 2023 (arXiv 2304.14997)             | `acdc.acdc`                    |
    | `eap`, `eap-ig` | edges | gradients (arXiv 2310.10348, 2403.17806)         | `discover.strongest_edges`     |
    | `edge-masks`    | edges | learned gates (arXiv 2406.16778), exact scores   | `edge_masks.edge_mask_circuit` |

    Raises PatchError for an unknown method, an option or a model with dictionaries that it does not take, and what the
    method raises.
    """
    if method not in METHODS:
        raise PatchError(f"method {method!r} is not known; expected one of {', '.join(METHODS)}")
    takes = options_of(method)
    if model.dictionaries and "nodes" not in takes:
        raise PatchError(
            f"method {method!r} finds edges between heads and MLPs; expected a model without dictionaries, or one of "
            f"{', '.join(name for name in METHODS if 'nodes' in options_of(name))}"
        )
    for name in options:
        if name not in takes:
            raise PatchError(f"method {method!r} has no option {name!r}; expected some of {', '.join(takes)}")
    return METHODS[method](model, task, **options)


def why_empty(circuit: Circuit) -> str:
    """What it means that a circuit has no nodes, and what to try: half a sentence for people."""
    if "n_taken" in circuit.settings:  # edges taken by size, which no score has decided on
        return "no edge that was taken leads through a node from input to logits; try more edges or a lower threshold"
    source, metric = (circuit.settings[name] for name in ("source", "metric"))
    return (
        f"no node is needed: with source {source} in place of every one the model scores {circuit.score:.0f} of 100 by "
        f"{metric.replace('_', ' ')}; try another source or metric, or more prompts"
    )


def options_of(method: str) -> list[str]:
    """Names of the options that a method takes; those that learn gates take the options of learning too."""
    parameters = inspect.signature(METHODS[method]).parameters.values()
    names = [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]
    learns = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
    return [*names, *Learning.__annotations__] if learns else names
