"""Slow references for gradient scores: finite differences of hooked forwards in float64."""

from __future__ import annotations

import torch

EPSILON = 1e-5


def metric_of(logits, task):
    rows = torch.arange(len(logits))
    return logits[rows, -1, task.answer] - logits[rows, -1, task.wrong]


def replacing(site, config, new):
    """A hook that puts `new`'s part at a site in place of a value's."""
    component = site.component
    indices = list(component.indices(config))

    def hook(value, name):
        positions = site.resolve(value.shape[1])
        value = value.clone()
        for position in range(value.shape[1]) if positions is None else positions:
            if component.kind in ("mlp", "resid"):
                value[:, position] = new[:, position]
            else:
                value[:, position, indices] = new[:, position, indices]
        return value

    return hook


def source_values(model, task, source, names):
    """What a source puts at hook points, from whole runs."""
    clean = model.run_with_cache(task.clean, names)[1]
    if source == "zero":
        return {name: torch.zeros_like(clean[name]) for name in names}
    corrupted = model.run_with_cache(task.corrupted, names)[1]
    if source == "mean":
        return {name: corrupted[name].mean(0, keepdim=True).expand_as(clean[name]) for name in names}
    return {name: corrupted[name] for name in names}


def slope(model, task, hooks_at):
    """Central difference of the metric, per prompt; `hooks_at(ε)` are the hooks of a run a step ε along."""
    up, down = (metric_of(model.run_with_hooks(task.clean, hooks_at(e)), task) for e in (EPSILON, -EPSILON))
    return (up - down) / (2 * EPSILON)


def site_slope(model, task, site, source, entry=None, frozen_layer=None):
    """What moving a site from its clean value towards its source does to the metric, per unit of the way.

    entry: embedded prompts to run instead of the clean ones. frozen_layer: a layer whose outputs stay as they are.
    """
    name = site.component.hook_name
    clean = model.run_with_cache(task.clean, [name])[1][name]
    delta = source_values(model, task, source, [name])[name] - clean

    def hooks_at(epsilon):
        move = (name, lambda value, _: replacing(site, model.config, value + epsilon * delta)(value, _))
        return [*_entering(entry), *_frozen(model, task, frozen_layer), move]

    return slope(model, task, hooks_at)


def attention_slope(model, task, site, source, frozen_layer=None):
    """The same for a query or key: the layer's z moves towards what it is when the site has its source's value."""
    name, z_name = site.component.hook_name, f"blocks.{site.component.layer}.attn.hook_z"
    kept = {}
    new = source_values(model, task, source, [name])[name]
    hooks = [(name, replacing(site, model.config, new)), (z_name, lambda value, _: kept.update(z=value.clone()))]
    model.run_with_hooks(task.clean, hooks)
    delta = kept["z"] - model.run_with_cache(task.clean, [z_name])[1][z_name]

    def hooks_at(epsilon):
        return [*_frozen(model, task, frozen_layer), (z_name, lambda value, _: value + epsilon * delta)]

    return slope(model, task, hooks_at)


def _entering(entry):
    return [] if entry is None else [("blocks.0.hook_resid_pre", lambda value, _: entry)]


def _frozen(model, task, layer):
    if layer is None:
        return []
    names = [f"blocks.{layer}.hook_attn_out", f"blocks.{layer}.hook_mlp_out"]
    clean = model.run_with_cache(task.clean, names)[1]
    return [(name, lambda value, at: clean[at]) for name in names]
