"""The nodes that circuits are made of: heads and MLPs, and features where the model has sparse dictionaries."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence

from subcircuit.analysis.circuit import Circuit, check_kind, in_order
from subcircuit.analysis.features import active_features, feature
from subcircuit.analysis.tasks import Task
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import PatchError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Component, Source
from subcircuit.engine.patching.sites import Kind

IN_PLACE_OF: dict[Kind, Kind] = {"mlp_feature": "mlp", "z_feature": "z"}
"""The nodes that features stand in place of, by the kind of feature."""


def all_nodes(config: ModelConfig) -> list[Component]:
    """Every head and MLP, layer by layer, heads before the MLP."""
    nodes = []
    for layer in range(config.n_layers):
        nodes += [Component(layer, "z", head) for head in range(config.n_heads)]
        nodes.append(Component(layer, "mlp"))
    return nodes


def candidate_nodes(
    model: HookedTransformer, task: Task, source: Source = "mean", positions: tuple[int, ...] | None = None
) -> list[Component]:
    """What a circuit of a model may consist of on a task, in the order in which the model computes it.

    Without dictionaries, every head and MLP. Where a dictionary sits at an MLP's output or at a layer's heads' outputs,
    its features stand in place of that MLP or those heads; those of a dictionary at the residual stream stand beside
    them. Features whose source differs from the clean activation nowhere (at the chosen positions) are no candidates:
    alone, patching them changes nothing, and like the dictionary's error they stay what each row makes of them.

    Raises PatchError for a source that does not exist.
    """
    features = [
        feature(dictionary, index)
        for dictionary in model.dictionaries.values()
        for index in active_features(model, task, dictionary, source, positions)
    ]
    first = [feature(dictionary, 0) for dictionary in model.dictionaries.values()]
    replaced = {(part.layer, IN_PLACE_OF.get(part.kind)) for part in first}
    whole = [node for node in all_nodes(model.config) if (node.layer, node.kind) not in replaced]
    return sorted([*whole, *features], key=in_order)


def candidates_of(model: HookedTransformer, tasks: Iterable[Task], sources: Sequence[Source]) -> list[Component]:
    """What circuits may consist of on any of the tasks, under any of the sources that a task has; of features, those
    that any of them changes."""
    found = {
        node
        for task, source in itertools.product(tasks, sources)
        if source != "corrupted" or task.corrupted is not None
        for node in candidate_nodes(model, task, source)
    }
    return sorted(found, key=in_order)


def check_nodes(nodes: Iterable[Component], model: HookedTransformer, beside: Iterable[Component] = ()) -> None:
    """Raises PatchError for nodes that the model lacks or that no circuit can have, and for an MLP or head among nodes
    (or those `beside` them) that its features stand in place of."""
    nodes = sorted(nodes, key=in_order)  # so that of several wrong ones always the same is named
    for node in nodes:
        node.check(model.config, model.dictionaries)
        check_kind(node)
    kinds = {(node.layer, node.kind) for node in (*nodes, *beside)}
    for layer, kind in sorted(kinds):
        if kind in IN_PLACE_OF and (layer, IN_PLACE_OF[kind]) in kinds:
            what = "the MLP" if kind == "mlp_feature" else "heads"
            raise PatchError(f"{what} of layer {layer} and features in place of it are nodes at once; expected either")


def random_nodes(nodes: Sequence[Component], circuit: Circuit, rng: random.Random, match: str) -> set[Component]:
    """Nodes of one random circuit, drawn from `nodes`: as many of each kind as the circuit has among them, and with
    `match="layers"` as many of each kind in each layer."""
    mine, groups = set(circuit.nodes), dict[tuple[Kind, int], list[Component]]()
    for node in nodes:
        groups.setdefault((node.kind, node.layer if match == "layers" else 0), []).append(node)
    drawn: set[Component] = set()
    for group in groups.values():
        n = sum(node in mine for node in group)
        drawn.update(rng.sample(group, n) if len(group) > 1 else group[:n])
    return drawn
