"""Removing edges and patching paths: one call for many, by any executor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.engine.errors import PatchError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.data_session import Effects
from subcircuit.engine.patching.edge_delta import EdgeSet, sender
from subcircuit.engine.patching.edge_reference import EdgeReference
from subcircuit.engine.patching.edge_session import NOTHING, EdgeSession, as_edge_set, every_sender
from subcircuit.engine.patching.graph import Edge, EdgeIndex
from subcircuit.engine.patching.memory import clean_bytes
from subcircuit.engine.patching.metric import Metric, check_metric
from subcircuit.engine.patching.options import (
    Executor,
    Precision,
    check_prompts,
    default_budget,
    delta_executor,
    dtype_of,
    in_dtype,
)
from subcircuit.engine.patching.path_delta import Freeze, check_freeze
from subcircuit.engine.patching.reference import Progress, patch_hooks
from subcircuit.engine.patching.sites import PatchSet, Source
from subcircuit.engine.patching.sources import AlignedPrompts, Sources


def edge_effects(
    model: HookedTransformer,
    prompts: AlignedPrompts,
    edge_sets: Sequence[EdgeSet | Edge | Iterable[Edge]],
    *,
    source: Source = "corrupted",
    base: EdgeSet = NOTHING,
    executor: Executor = "torch",
    precision: Precision = "fp32",
    metric: Metric = "logit_difference",
    budget_bytes: int | None = None,
    progress: Progress | None = None,
) -> Effects:
    """Effects of removing sets of edges on every prompt: `[set, prompt]`, metric(row) − metric(clean run).

    In a row, each removed edge's sender contributes its source value (`corrupted`, `mean`, `zero` or tensors) to that
    receiver's input in place of its current value; everything else is computed as always, so that changes travel on.
    Edges are named as in `graph`, ("a4.h4", "a7.q11"). `base` is what every row lacks besides: edges, and patches of
    nodes. Executors are those of `patch_effects`.

    Raises PatchError for an edge, node, source, executor precision or metric that does not exist.
    """
    options: dict[str, Any] = {"source": source, "precision": precision, "metric": metric}
    options["budget_bytes"] = budget_bytes
    if executor != "reference":
        session = EdgeSession(model, prompts, executor=delta_executor(executor), **options)
        return session.edge_effects(edge_sets, base, progress)
    sets = [as_edge_set(edge_set) for edge_set in edge_sets]
    index = EdgeIndex(model.config)
    index.places([edge for edge_set in (base, *sets) for edge in edge_set.removed])
    whole = [EdgeSet((*base.removed, *s.removed), (*base.patches, *s.patches)) for s in sets]
    rows = [lambda reference, s=s: reference.without_edges(s) for s in whole]
    return _reference(model, prompts, rows, [s.patches for s in whole], (), progress, **options)


def path_effects(
    model: HookedTransformer,
    prompts: AlignedPrompts,
    edges: Sequence[Edge],
    *,
    source: Source = "corrupted",
    freeze: Freeze = "heads",
    base: PatchSet = (),
    executor: Executor = "torch",
    precision: Precision = "fp32",
    metric: Metric = "logit_difference",
    budget_bytes: int | None = None,
    progress: Progress | None = None,
) -> Effects:
    """Effects of path patching on every prompt: `[edge, prompt]`, metric(row) − metric(clean run).

    The sender's source value travels to the one receiver's input, and the receiver's new value from there on, with
    everything recomputed (Wang et al. 2022, arXiv 2211.00593, section 3.1; Goldowsky-Dill et al. 2023, arXiv
    2304.05969). On the way to the receiver, `freeze` holds fixed, at its value in the run with `base` alone: `heads`,
    all other heads, while MLPs are recomputed, as in the papers; `heads+mlps`, the direct edge alone (the same as
    removing it); `none`, every path from sender to receiver.

    Raises PatchError for an edge, node, source, freeze, executor precision or metric that does not exist.
    """
    check_freeze(freeze)
    options: dict[str, Any] = {"source": source, "precision": precision, "metric": metric}
    options["budget_bytes"] = budget_bytes
    if executor != "reference":
        session = EdgeSession(model, prompts, executor=delta_executor(executor), **options)
        return session.path_effects(edges, freeze, base, progress)
    EdgeIndex(model.config).places(edges)
    rows = [lambda reference, edge=edge: reference.along_path(edge, freeze) for edge in edges]
    return _reference(model, prompts, rows, [base], base, progress, **options)


@torch.no_grad()
def patched_activations(
    model: HookedTransformer,
    prompts: AlignedPrompts,
    patch_set: PatchSet,
    *,
    precision: Precision = "fp32",
    budget_bytes: int | None = None,
) -> dict[str, Float[Tensor, "prompt pos ..."]]:
    """What every sender's hook point holds in runs on the corrupted prompts with nodes patched: a source of tensors.

    The patches name their own sources. Raises PatchError for prompts without corrupted twins.
    """
    check_prompts(model, prompts)
    if prompts.corrupted is None:
        raise PatchError("source 'corrupted' needs corrupted prompts, and this task has none")
    dtype = dtype_of(precision)
    model = in_dtype(model, dtype if dtype == torch.float64 else torch.float32)
    n_prompts, n_pos = prompts.clean.shape
    budget = default_budget(model.device) if budget_bytes is None else budget_bytes
    size = max(1, budget // 4 // clean_bytes(model.config, n_pos, 8))
    sources = Sources(model, prompts, [patch_set], "corrupted", size)
    names = sorted({sender(name).hook_name for name in EdgeIndex(model.config).senders})
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for chunk in torch.arange(n_prompts).split(size):
        with model.hooks(patch_hooks(model, patch_set, sources, chunk, n_pos)):
            cache = model.run_with_cache(prompts.corrupted[chunk], names, stop_at_layer=model.config.n_layers)[1]
        for name in names:
            parts[name].append(cache[name])
        sources.forget()
    return {name: torch.cat(values) for name, values in parts.items()}


def _reference(
    model: HookedTransformer,
    prompts: AlignedPrompts,
    rows: Sequence[Callable[[EdgeReference], Float[Tensor, "chunk"]]],
    patch_sets: Sequence[PatchSet],
    base: PatchSet,
    progress: Progress | None,
    *,
    source: Source,
    precision: Precision,
    metric: Metric,
    budget_bytes: int | None,
) -> Effects:
    """Rows as full forwards, in the model's own form and the given precision."""
    check_prompts(model, prompts)
    check_metric(metric)
    for patch in (patch for patch_set in patch_sets for patch in patch_set):
        patch.site.component.check(model.config)
    model = in_dtype(model, dtype_of(precision))
    n_prompts, n_pos = prompts.clean.shape
    budget = default_budget(model.device) if budget_bytes is None else budget_bytes
    size = max(1, budget // 4 // clean_bytes(model.config, n_pos, 8))
    sources = Sources(model, prompts, [*patch_sets, every_sender(EdgeIndex(model.config))], source, size)
    dtype = torch.promote_types(model.dtype, torch.float32)  # differences of rounded metrics are not rounded again
    effects = torch.empty(len(rows), n_prompts, dtype=dtype, device=model.device)
    clean_metric = torch.empty(n_prompts, dtype=dtype, device=model.device)
    n_done = 0
    for chunk in torch.arange(n_prompts).split(size):
        with torch.no_grad():
            reference = EdgeReference(model, prompts, chunk, sources, base, metric)
            clean_metric[chunk] = reference.clean().to(dtype)
            for i, row in enumerate(rows):
                effects[i, chunk] = row(reference) - clean_metric[chunk]
                n_done += len(chunk)
                if progress is not None:
                    progress(n_done, effects.numel())
        sources.forget()
    return Effects(effects, clean_metric)
