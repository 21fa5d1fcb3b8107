"""Exact activation patching in delta form, circuits, and the hooked GPT-2/Llama engine under them.

    import subcircuit as sc

    model = sc.load("tiny-gpt2")
    task = sc.task("months", model, n=32, seed=0)
    scores = sc.sweep(model, task, components="heads")
    circuit = sc.discover(model, task)
    print(circuit, circuit.faithfulness(model, task))

Names are imported when they are first used, so that `subcircuit --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

from subcircuit.engine import errors

if TYPE_CHECKING:
    from subcircuit.analysis.circuit import Circuit, TraceStep, intersection, union
    from subcircuit.analysis.compare import cross_task_scores, jaccard_matrix
    from subcircuit.analysis.discover import discover
    from subcircuit.analysis.eap import EdgeScores, edge_scores
    from subcircuit.analysis.edges import (
        EdgeAblation,
        EdgeEffects,
        edge_score,
        edges_between,
        prune_edges,
        verify_edges,
    )
    from subcircuit.analysis.faithfulness import Ablation, node_drops, random_circuits, score
    from subcircuit.analysis.gradients import gradient_scores
    from subcircuit.analysis.plan import plan
    from subcircuit.analysis.screen import Screening, screen
    from subcircuit.analysis.study import StudySettings, study
    from subcircuit.analysis.sweep import Scores, sweep
    from subcircuit.analysis.tasks import Task, task, task_from_file, task_from_tokens, task_names
    from subcircuit.analysis.transfer import Transfer, transfer
    from subcircuit.analysis.truth import Truth, truth, truth_names, truth_report, truth_table
    from subcircuit.engine.ablation import RowAblations
    from subcircuit.engine.cache import ActivationCache
    from subcircuit.engine.config import ModelConfig, RopeScaling
    from subcircuit.engine.errors import SubcircuitError
    from subcircuit.engine.model import HookedTransformer
    from subcircuit.engine.patching import Component, DeltaSession, Effects, Patch, Site, patch_effects
    from subcircuit.engine.patching.edge_delta import EdgeSet
    from subcircuit.engine.patching.edges import EdgeSession, edge_effects, path_effects
    from subcircuit.engine.patching.planner import Plan
    from subcircuit.engine.steering import Steering, mean_difference, steered_source
    from subcircuit.weights.names import known_models, load

_HOMES = {
    "analysis.circuit": ("Circuit", "TraceStep", "intersection", "union"),
    "analysis.compare": ("cross_task_scores", "jaccard_matrix"),
    "analysis.discover": ("discover",),
    "analysis.eap": ("EdgeScores", "edge_scores"),
    "analysis.edges": (
        "EdgeAblation",
        "EdgeEffects",
        "edge_score",
        "edges_between",
        "prune_edges",
        "verify_edges",
    ),
    "analysis.faithfulness": ("Ablation", "node_drops", "random_circuits", "score"),
    "analysis.plan": ("plan",),
    "analysis.gradients": ("gradient_scores",),
    "analysis.screen": ("Screening", "screen"),
    "analysis.study": ("StudySettings", "study"),
    "analysis.sweep": ("Scores", "sweep"),
    "analysis.tasks": ("Task", "task", "task_from_file", "task_from_tokens", "task_names"),
    "analysis.transfer": ("Transfer", "transfer"),
    "engine.ablation": ("RowAblations",),
    "analysis.truth": ("Truth", "truth", "truth_names", "truth_report", "truth_table"),
    "engine.cache": ("ActivationCache",),
    "engine.config": ("ModelConfig", "RopeScaling"),
    "engine.errors": ("SubcircuitError",),
    "engine.model": ("HookedTransformer",),
    "engine.patching": ("Component", "DeltaSession", "Effects", "Patch", "Site", "patch_effects"),
    "engine.patching.planner": ("Plan",),
    "engine.steering": ("Steering", "mean_difference", "steered_source"),
    "engine.patching.edge_delta": ("EdgeSet",),
    "engine.patching.edges": ("EdgeSession", "edge_effects", "path_effects"),
    "weights.names": ("known_models", "load"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__version__ = metadata.version("subcircuit")

__all__ = [
    "Ablation",
    "ActivationCache",
    "Circuit",
    "Component",
    "DeltaSession",
    "EdgeAblation",
    "EdgeEffects",
    "EdgeScores",
    "EdgeSession",
    "EdgeSet",
    "Effects",
    "HookedTransformer",
    "ModelConfig",
    "Patch",
    "Plan",
    "RopeScaling",
    "RowAblations",
    "Scores",
    "Screening",
    "Site",
    "Steering",
    "StudySettings",
    "SubcircuitError",
    "Task",
    "TraceStep",
    "Transfer",
    "Truth",
    "__version__",
    "cross_task_scores",
    "discover",
    "edge_effects",
    "edge_score",
    "edge_scores",
    "edges_between",
    "errors",
    "gradient_scores",
    "intersection",
    "jaccard_matrix",
    "known_models",
    "load",
    "mean_difference",
    "node_drops",
    "patch_effects",
    "path_effects",
    "plan",
    "prune_edges",
    "random_circuits",
    "score",
    "screen",
    "steered_source",
    "study",
    "sweep",
    "task",
    "task_from_file",
    "task_from_tokens",
    "task_names",
    "transfer",
    "truth",
    "truth_names",
    "truth_report",
    "truth_table",
    "union",
    "verify_edges",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'subcircuit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"subcircuit.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
