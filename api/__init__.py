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
    from subcircuit.analysis.acdc import acdc
    from subcircuit.analysis.attribution import Attribution, attribution
    from subcircuit.analysis.baselines import Baseline, cell_q_values, random_baseline
    from subcircuit.analysis.check import Check, check_effects
    from subcircuit.analysis.circuit import Circuit, TraceStep, intersection, union
    from subcircuit.analysis.circuit_formats import load_mib, save_mib
    from subcircuit.analysis.compare import Comparison, compare_circuits, cross_task_scores, jaccard_matrix
    from subcircuit.analysis.curves import Curve, ablation_curve, faithfulness_curve, node_ranking
    from subcircuit.analysis.depth import DepthAlignment, align_depths
    from subcircuit.analysis.dictionary_training import TrainingSettings, dictionary_quality, train_dictionary
    from subcircuit.analysis.discover import discover
    from subcircuit.analysis.durable import durable_sweep
    from subcircuit.analysis.eap import EdgeScores, edge_scores
    from subcircuit.analysis.edge_ablation import EdgeAblation, edge_score
    from subcircuit.analysis.edges import edges_between, edges_kept, prune_edges
    from subcircuit.analysis.evaluation import Evaluation, circuits_scored, evaluate_circuit
    from subcircuit.analysis.faithfulness import Ablation, node_drops, score
    from subcircuit.analysis.features import feature_scores, firing_tokens
    from subcircuit.analysis.gradients import gradient_scores
    from subcircuit.analysis.heads import HeadRoles, head_roles, shared_roles
    from subcircuit.analysis.lengths import by_length
    from subcircuit.analysis.lens import Lens, lens
    from subcircuit.analysis.masks import learn_masks, mask_circuit
    from subcircuit.analysis.nodes import candidate_nodes, candidates_of
    from subcircuit.analysis.overlap import Overlap, overlap
    from subcircuit.analysis.paths import EdgeEffects, paths_between, trace_paths, verify_edges
    from subcircuit.analysis.plan import plan
    from subcircuit.analysis.pruning import prune_nodes
    from subcircuit.analysis.screen import Screening, screen
    from subcircuit.analysis.sensitivity import Sensitivity, sensitivity
    from subcircuit.analysis.study import StudySettings, study
    from subcircuit.analysis.sweep import Scores, sweep
    from subcircuit.analysis.tasks import Task, task, task_from_file, task_from_tokens, task_names
    from subcircuit.analysis.tasks.transfer import transfer_kinds
    from subcircuit.analysis.transfer import Transfer, transfer
    from subcircuit.analysis.truth import Truth, truth, truth_names, truth_report, truth_table
    from subcircuit.engine.ablation import RowAblations
    from subcircuit.engine.cache import ActivationCache
    from subcircuit.engine.config import ModelConfig, RopeScaling
    from subcircuit.engine.dictionary import SparseDictionary
    from subcircuit.engine.errors import SubcircuitError
    from subcircuit.engine.model import HookedTransformer
    from subcircuit.engine.patching import Component, DeltaSession, Effects, Patch, Site, patch_effects
    from subcircuit.engine.patching.edge_delta import EdgeSet
    from subcircuit.engine.patching.edge_session import EdgeSession
    from subcircuit.engine.patching.edges import edge_effects, path_effects
    from subcircuit.engine.patching.planner import Plan
    from subcircuit.engine.steering import Steering, mean_difference, steered_source
    from subcircuit.weights.dictionary import load_dictionary, save_dictionary
    from subcircuit.weights.names import known_models, load

_HOMES = {
    "analysis.acdc": ("acdc",),
    "analysis.attribution": (
        "Attribution",
        "attribution",
    ),
    "analysis.baselines": (
        "Baseline",
        "cell_q_values",
        "random_baseline",
    ),
    "analysis.check": (
        "Check",
        "check_effects",
    ),
    "analysis.circuit": (
        "Circuit",
        "TraceStep",
        "intersection",
        "union",
    ),
    "analysis.circuit_formats": ("load_mib", "save_mib"),
    "analysis.compare": (
        "Comparison",
        "compare_circuits",
        "cross_task_scores",
        "jaccard_matrix",
    ),
    "analysis.curves": (
        "Curve",
        "faithfulness_curve",
        "ablation_curve",
        "node_ranking",
    ),
    "analysis.depth": (
        "DepthAlignment",
        "align_depths",
    ),
    "analysis.dictionary_training": (
        "TrainingSettings",
        "dictionary_quality",
        "train_dictionary",
    ),
    "analysis.discover": ("discover",),
    "analysis.durable": ("durable_sweep",),
    "analysis.eap": (
        "EdgeScores",
        "edge_scores",
    ),
    "analysis.edge_ablation": ("EdgeAblation", "edge_score"),
    "analysis.edges": (
        "edges_between",
        "edges_kept",
        "prune_edges",
    ),
    "analysis.evaluation": (
        "Evaluation",
        "circuits_scored",
        "evaluate_circuit",
    ),
    "analysis.faithfulness": (
        "Ablation",
        "node_drops",
        "score",
    ),
    "analysis.features": (
        "feature_scores",
        "firing_tokens",
    ),
    "analysis.gradients": ("gradient_scores",),
    "analysis.heads": (
        "HeadRoles",
        "head_roles",
        "shared_roles",
    ),
    "analysis.lengths": ("by_length",),
    "analysis.lens": (
        "Lens",
        "lens",
    ),
    "analysis.masks": (
        "learn_masks",
        "mask_circuit",
    ),
    "analysis.nodes": ("candidate_nodes", "candidates_of"),
    "analysis.overlap": (
        "Overlap",
        "overlap",
    ),
    "analysis.paths": ("EdgeEffects", "paths_between", "trace_paths", "verify_edges"),
    "analysis.plan": ("plan",),
    "analysis.pruning": ("prune_nodes",),
    "analysis.screen": (
        "Screening",
        "screen",
    ),
    "analysis.sensitivity": (
        "Sensitivity",
        "sensitivity",
    ),
    "analysis.study": (
        "StudySettings",
        "study",
    ),
    "analysis.sweep": (
        "Scores",
        "sweep",
    ),
    "analysis.tasks": (
        "Task",
        "task",
        "task_from_file",
        "task_from_tokens",
        "task_names",
    ),
    "analysis.tasks.transfer": ("transfer_kinds",),
    "analysis.transfer": (
        "Transfer",
        "transfer",
    ),
    "analysis.truth": (
        "Truth",
        "truth",
        "truth_names",
        "truth_report",
        "truth_table",
    ),
    "engine.ablation": ("RowAblations",),
    "engine.cache": ("ActivationCache",),
    "engine.config": (
        "ModelConfig",
        "RopeScaling",
    ),
    "engine.dictionary": ("SparseDictionary",),
    "engine.errors": ("SubcircuitError",),
    "engine.model": ("HookedTransformer",),
    "engine.patching": (
        "Component",
        "DeltaSession",
        "Effects",
        "Patch",
        "Site",
        "patch_effects",
    ),
    "engine.patching.edge_delta": ("EdgeSet",),
    "engine.patching.edge_session": ("EdgeSession",),
    "engine.patching.edges": (
        "edge_effects",
        "path_effects",
    ),
    "engine.patching.planner": ("Plan",),
    "engine.steering": (
        "Steering",
        "mean_difference",
        "steered_source",
    ),
    "weights.dictionary": (
        "load_dictionary",
        "save_dictionary",
    ),
    "weights.names": (
        "known_models",
        "load",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__version__ = metadata.version("subcircuit")

__all__ = [
    "Ablation",
    "ActivationCache",
    "Attribution",
    "Baseline",
    "Check",
    "Circuit",
    "Comparison",
    "Component",
    "Curve",
    "DeltaSession",
    "DepthAlignment",
    "EdgeAblation",
    "EdgeEffects",
    "EdgeScores",
    "EdgeSession",
    "EdgeSet",
    "Effects",
    "Evaluation",
    "HeadRoles",
    "HookedTransformer",
    "Lens",
    "ModelConfig",
    "Overlap",
    "Patch",
    "Plan",
    "RopeScaling",
    "RowAblations",
    "Scores",
    "Screening",
    "Sensitivity",
    "Site",
    "SparseDictionary",
    "Steering",
    "StudySettings",
    "SubcircuitError",
    "Task",
    "TraceStep",
    "TrainingSettings",
    "Transfer",
    "Truth",
    "__version__",
    "ablation_curve",
    "acdc",
    "align_depths",
    "attribution",
    "by_length",
    "candidate_nodes",
    "candidates_of",
    "cell_q_values",
    "check_effects",
    "circuits_scored",
    "compare_circuits",
    "cross_task_scores",
    "dictionary_quality",
    "discover",
    "durable_sweep",
    "edge_effects",
    "edge_score",
    "edge_scores",
    "edges_between",
    "edges_kept",
    "errors",
    "evaluate_circuit",
    "faithfulness_curve",
    "feature_scores",
    "firing_tokens",
    "gradient_scores",
    "head_roles",
    "intersection",
    "jaccard_matrix",
    "known_models",
    "learn_masks",
    "lens",
    "load",
    "load_dictionary",
    "load_mib",
    "mask_circuit",
    "mean_difference",
    "node_drops",
    "node_ranking",
    "overlap",
    "patch_effects",
    "path_effects",
    "paths_between",
    "plan",
    "prune_edges",
    "prune_nodes",
    "random_baseline",
    "save_dictionary",
    "save_mib",
    "score",
    "screen",
    "sensitivity",
    "shared_roles",
    "steered_source",
    "study",
    "sweep",
    "task",
    "task_from_file",
    "task_from_tokens",
    "task_names",
    "trace_paths",
    "train_dictionary",
    "transfer",
    "transfer_kinds",
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
