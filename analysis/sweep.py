"""Sweeps: the effect of every component of a model on every prompt of a task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.analysis.check import check_effects
from subcircuit.analysis.statistics import interval_columns
from subcircuit.analysis.tasks import Task
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.dictionary import SparseDictionary
from subcircuit.engine.errors import PatchError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Component, Effects, Site, Source, patch_effects
from subcircuit.engine.patching.metric import Metric
from subcircuit.engine.patching.options import Executor, Precision
from subcircuit.engine.patching.sites import Kind, source_name

FAMILIES: dict[str, Kind] = {
    "heads": "z",
    "mlps": "mlp",
    "queries": "q",
    "keys": "k",
    "values": "v",
    "groups": "group",
    "neurons": "neuron",
    "residual": "resid",
}
"""What `components` may name: all of a kind, several joined by `+`."""

Components = str | Sequence[str | Component | Site]


@dataclass(frozen=True)
class Scores:
    """Effects of a sweep, per site and prompt, never only their mean.

    `effects` is the change that patching a site makes to a prompt's metric, and `clean_metric` the metric without a
    patch: logit(answer) − logit(wrong) at the last position, or what `settings` names (`engine.patching.metric` defines
    them; of `kl`, the effect is the divergence itself). `settings` also says by which method, source, executor and
    precision they were obtained.
    """

    sites: tuple[Site, ...]
    effects: Float[Tensor, "site prompt"]
    clean_metric: Float[Tensor, "prompt"]
    config: ModelConfig
    settings: dict[str, Any]

    @property
    def mean(self) -> Float[Tensor, "site"]:
        """Mean effect of each site over prompts."""
        return self.effects.mean(1)

    @property
    def share(self) -> Float[Tensor, "site"]:
        """Mean effect of each site as a share of the mean clean metric; −1 takes all of it away.

        NaN for `log_probability` and `kl`, of which there is no whole to have a share of.
        """
        if self.metric in ("log_probability", "kl"):
            return torch.full_like(self.mean, float("nan"))
        return self.mean / self.clean_metric.mean()

    @property
    def metric(self) -> Metric:
        """What the effects are effects on."""
        return cast(Metric, self.settings.get("metric", "logit_difference"))

    def heads(self) -> Float[Tensor, "layer head"]:
        """Mean effect of each head; NaN where the sweep did not patch it at all positions."""
        return self.grid("z", self.config.n_heads)

    def mlps(self) -> Float[Tensor, "layer"]:
        """Mean effect of each MLP; NaN where the sweep did not patch it at all positions."""
        return self.grid("mlp", 1)[:, 0]

    def grid(self, kind: Kind, width: int) -> Float[Tensor, "layer index"]:
        """Mean effect of a kind of component by layer and index, over the sites without position."""
        grid = torch.full((self.config.n_layers, width), float("nan"), dtype=self.effects.dtype)
        for site, effect in zip(self.sites, self.mean.tolist(), strict=True):
            if site.component.kind == kind and site.positions is None:
                grid[site.component.layer, site.component.index] = effect
        return grid

    def of(self, site: str | Component | Site) -> Float[Tensor, "prompt"]:
        """Effects of one site. Raises PatchError when the sweep has no such site."""
        wanted = Site.of(site)
        if wanted not in self.sites:
            raise PatchError(f"site '{wanted}' is not in this sweep of {len(self.sites)} sites")
        return self.effects[self.sites.index(wanted)]

    def top(self, k: int = 10) -> list[tuple[Site, float]]:
        """The k sites with the largest mean effects by size, each with its mean effect."""
        order = self.mean.abs().argsort(descending=True)[:k]
        return [(self.sites[int(i)], float(self.mean[i])) for i in order]

    def table(self) -> list[dict[str, Any]]:
        """A row per site: name, layer, index, mean effect with the ends of its 95 % bootstrap interval over prompts
        (None of one prompt), share of the clean metric (None where it has none)."""
        ends = interval_columns(self.effects)
        return [
            {
                "site": str(site),
                "layer": site.component.layer,
                "kind": site.component.kind,
                "index": site.component.index,
                "effect": float(effect),
                **interval,
                "share": None if share.isnan() else float(share),
            }
            for site, effect, interval, share in zip(self.sites, self.mean, ends, self.share, strict=True)
        ]


def sites_of(
    config: ModelConfig,
    components: Components,
    positions: str | Iterable[int] | None = None,
    n_pos: int = 0,
    dictionaries: Mapping[str, SparseDictionary] | None = None,
) -> tuple[Site, ...]:
    """Sites of a sweep: named families of components (`heads+mlps`) or single ones, at all positions (None), at given
    ones together, or (`"each"`) at each of the prompts' `n_pos` positions separately. `dictionaries` are those whose
    features are components.

    Raises PatchError for a family or component that does not exist.
    """
    sites = _family_sites(config, components) if isinstance(components, str) else [Site.of(part) for part in components]
    for site in sites:
        site.component.check(config, dictionaries)
    if positions is None:
        return tuple(sites)
    if isinstance(positions, str):
        if positions != "each":
            raise PatchError(f"positions {positions!r} is not understood; expected 'each', a list of positions or None")
        return tuple(Site(site.component, (position,)) for site in sites for position in range(n_pos))
    chosen = tuple(positions)
    return tuple(Site(site.component, chosen) for site in sites)


def _family_sites(config: ModelConfig, families: str) -> list[Site]:
    sites = []
    for family in families.split("+"):
        if family not in FAMILIES:
            if not any(letter.isdigit() for letter in family):
                raise PatchError(
                    f"components {family!r} is not known; expected one of {', '.join(FAMILIES)}, joined by '+'"
                )
            sites.append(Site.of(family))
            continue
        kind = FAMILIES[family]
        n = config.kv_heads if kind == "group" else Component(0, kind).axis_size(config)
        sites += [Site(Component(layer, kind, i)) for layer in range(config.n_layers) for i in range(n)]
    return sites


def sweep(
    model: HookedTransformer,
    task: Task,
    components: Components = "heads",
    *,
    source: Source = "corrupted",
    positions: str | Iterable[int] | None = None,
    executor: Executor = "torch",
    precision: Precision = "fp32",
    metric: Metric = "logit_difference",
    budget_bytes: int | None = None,
    check: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Patch every component in turn, each on every prompt of the task, and measure what it changes.

    `components` is a family (`heads`, `mlps`, `queries`, `keys`, `values`, `groups`, `neurons`, `residual`), several
    joined by `+`, or a list of names (`a5.h1`) and sites. `source` is what is put there: the corrupted prompt's
    value, the per-position mean over the corrupted prompts, zero, or tensors by hook name. `positions` as in
    `sites_of`. `metric` is `logit_difference`, `log_probability` (of the answers), `kl` (of the patched prediction from
    the clean one) or `accuracy`. `check` rows, drawn at random, are run once more as full forward passes in float64;
    how far they were off, and whether that is within the precision's tolerance, is in `settings["check"]` (see
    `analysis.check.Check`).

    Raises PatchError for what does not exist or is not aligned.
    """
    sites = sites_of(model.config, components, positions, task.clean.shape[1], model.dictionaries)
    result = patch_effects(
        model,
        task,
        sites,
        source=source,
        executor=executor,
        precision=precision,
        budget_bytes=budget_bytes,
        progress=progress,
        metric=metric,
    )
    return exact_scores(
        model,
        task,
        sites,
        result,
        source=source,
        executor=executor,
        precision=precision,
        metric=metric,
        check=check,
    )


def exact_scores(
    model: HookedTransformer,
    task: Task,
    sites: tuple[Site, ...],
    result: Effects,
    *,
    source: Source,
    executor: Executor,
    precision: Precision,
    metric: Metric,
    check: int,
) -> Scores:
    """Scores of measured effects, with the settings that they were measured with; `check` rows are run once more."""
    settings: dict[str, Any] = {
        "method": "exact patching",
        "metric": metric,
        "source": source_name(source),
        "executor": executor,
        "precision": precision,
        "task": task.name,
        "model": model.config.name,
        "n_prompts": len(task.clean),
        "n_precise_rows": result.n_precise,
        "n_full_rows": result.n_full,
        "n_halvings": result.n_halvings,
    }
    if check:
        checked = check_effects(
            model, task, sites, result.effects, k=check, source=source, precision=precision, metric=metric
        )
        settings["check"] = checked.as_dict()
    return Scores(sites, result.effects.cpu(), result.clean_metric.cpu(), model.config, settings)
