"""Scores for the features of a sparse dictionary, exact or by gradient, and the tokens they fire on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subcircuit.analysis.sweep import Scores, sites_of, sweep
from subcircuit.analysis.tasks import Task
from subcircuit.engine.dictionary import PLACES, SparseDictionary, acts_name
from subcircuit.engine.errors import PatchError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Component, Site, Source
from subcircuit.engine.patching.answers import token_sets
from subcircuit.engine.patching.metric import Metric, measure
from subcircuit.engine.patching.options import Executor, Precision
from subcircuit.engine.patching.reference import last_logits
from subcircuit.engine.patching.sites import FeatureKind, Patch, source_name
from subcircuit.engine.patching.sources import Sources, activations

Method = Literal["exact", "attribution"]

PROMPTS_AT_ONCE = 16

_KINDS: dict[str, FeatureKind] = dict(zip(PLACES, get_args(FeatureKind), strict=True))


def feature(dictionary: SparseDictionary, index: int) -> Component:
    """A feature as a component; its name is `r4.f17` in the residual stream that enters a layer, `mid4.f17` in the one
    between attention and MLP, `m3.f17` in an MLP's output, `a5.f17` in heads' outputs."""
    _, layer, place = dictionary.hook_name.split(".", 2)
    return Component(int(layer), _KINDS[place], index)


def feature_scores(
    model: HookedTransformer,
    task: Task,
    dictionary: SparseDictionary,
    features: Literal["active"] | Iterable[int] = "active",
    *,
    source: Source = "corrupted",
    method: Method = "exact",
    positions: str | Iterable[int] | None = None,
    metric: Metric = "logit_difference",
    executor: Executor = "torch",
    precision: Precision = "fp32",
    budget_bytes: int | None = None,
    check: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """What each feature of a dictionary does to the metric of each prompt, the dictionary's error kept as it is.

    Patching feature f puts x + (f_source − f) W_dec[f] in place of x. `exact` runs that, in delta form. `attribution`
    is its first-order estimate (f_source − f) (W_dec[f] · ∂metric/∂x), summed over positions, for all features from one
    forward and one backward pass (Nanda 2023, "Attribution patching"; of features, Marks et al. 2024, arXiv
    2403.19647); it is computed in the model's own dtype and has no use for executor, precision, budget and check.

    `features` are indices; `active` means all whose source differs from the clean activation at a chosen position,
    which are all that can have an effect. `positions` is as in `sweep`. The other arguments are those of `sweep`.

    Raises PatchError for a feature, source, position, metric or method that does not exist, and for attribution to a
    metric whose gradient says nothing (`kl`, `accuracy`); HookError for a dictionary that does not fit the model.
    """
    if method not in ("exact", "attribution"):
        raise PatchError(f"method {method!r} is not known; expected 'exact' or 'attribution'")
    spliced = model.with_dictionaries(dictionary)
    where = positions if positions is None or isinstance(positions, str) else tuple(positions)
    chosen = list(features) if features != "active" else active_features(spliced, task, dictionary, source, where)
    components = [feature(dictionary, int(index)) for index in chosen]
    about: dict[str, Any] = {"dictionary": dictionary.hook_name, "d_sae": dictionary.d_sae}
    if method == "attribution":
        return _attribution(spliced, task, dictionary, components, source, where, metric, about)
    scores = sweep(
        spliced,
        task,
        components,
        source=source,
        positions=where,
        executor=executor,
        precision=precision,
        budget_bytes=budget_bytes,
        check=check,
        progress=progress,
        metric=metric,
    )
    scores.settings.update(about)
    return scores


def active_features(
    model: HookedTransformer,
    task: Task,
    dictionary: SparseDictionary,
    source: Source,
    positions: str | tuple[int, ...] | None,
) -> list[int]:
    """Features of a dictionary of the model whose source differs from the clean activation at a chosen position.

    No other feature has an effect when it is patched alone. Raises PatchError for a source that does not exist.
    """
    at = slice(None) if positions is None or isinstance(positions, str) else list(positions)
    changed = torch.zeros(dictionary.d_sae, dtype=torch.bool)
    for _, change in _changes(model, task, dictionary, source):
        changed |= (change[:, at] != 0).any(1).any(0).cpu()
    return [int(index) for index in changed.nonzero()[:, 0]]


@torch.no_grad()
def _changes(
    model: HookedTransformer, task: Task, dictionary: SparseDictionary, source: Source
) -> Iterable[tuple[Int[Tensor, " chunk"], Float[Tensor, "chunk pos d_sae"]]]:
    """f_source − f of all features, by chunks of prompts."""
    name = acts_name(dictionary.hook_name)
    sources = Sources(model, task, [(Patch(Site(feature(dictionary, 0))),)], source, PROMPTS_AT_ONCE)
    for chunk in torch.arange(task.n).split(PROMPTS_AT_ONCE):
        clean = activations(model, task.clean[chunk], [name])[name]
        yield chunk, sources.value(sources.key(None), name, chunk) - clean
        sources.forget()


def _attribution(
    model: HookedTransformer,
    task: Task,
    dictionary: SparseDictionary,
    components: Sequence[Component],
    source: Source,
    positions: str | tuple[int, ...] | None,
    metric: Metric,
    about: dict[str, Any],
) -> Scores:
    if metric not in ("logit_difference", "log_probability"):
        raise PatchError(f"metric {metric!r} has no attribution; expected 'logit_difference' or 'log_probability'")
    sites = sites_of(model.config, components, positions, task.pos, model.dictionaries)
    indices = torch.tensor([site.component.index for site in sites], dtype=torch.int64)
    held = torch.zeros(len(sites), task.pos, dtype=model.dtype, device=model.device)
    for row, site in zip(held, sites, strict=True):
        where = site.resolve(task.pos)
        row[slice(None) if where is None else list(where)] = 1
    decoder = model.dictionaries[dictionary.hook_name].W_dec
    effects, clean = [], []
    for chunk, change in _changes(model, task, dictionary, source):
        measured, gradient = _gradient(model, task, chunk, dictionary.hook_name, metric)
        by_position = ((gradient @ decoder.T) * change)[..., indices]
        effects.append(torch.einsum("nps,sp->sn", by_position, held).cpu())
        clean.append(measured.cpu())
    settings = {
        "method": "attribution",
        "metric": metric,
        "source": source_name(source),
        "task": task.name,
        "model": model.config.name,
        "n_prompts": task.n,
        **about,
    }
    return Scores(sites, torch.cat(effects, 1), torch.cat(clean), model.config, settings)


def _gradient(
    model: HookedTransformer, task: Task, chunk: Int[Tensor, " chunk"], hook_name: str, metric: Metric
) -> tuple[Float[Tensor, " chunk"], Float[Tensor, "chunk pos d_in"]]:
    """The metric of a chunk of prompts, and its gradient with respect to the value at a hook point."""
    reached: list[Tensor] = []

    def keep(value: Tensor, name: str) -> Tensor:
        reached.append(value.detach().requires_grad_())
        return reached[0]

    with torch.enable_grad():
        logits = last_logits(model, task, chunk, [(hook_name, keep)])
        answers, wrongs = (tokens[chunk] for tokens in token_sets(task))
        measured = measure(logits, None, answers, wrongs, metric)
        (gradient,) = torch.autograd.grad(measured.sum(), reached)
    return measured.detach(), gradient.flatten(2)


@torch.no_grad()
def firing_tokens(
    model: HookedTransformer,
    dictionary: SparseDictionary,
    tokens: Int[Tensor, "row pos"],
    features: Sequence[int],
    top: int = 5,
) -> list[list[tuple[int, float]]]:
    """For each feature, the token ids at which it fires most over a text, and their shares of its summed activation.

    A feature that never fires has none.
    """
    name = acts_name(dictionary.hook_name)
    spliced = model.with_dictionaries(dictionary)
    totals = torch.zeros(model.config.d_vocab, len(features), dtype=torch.float64)
    for rows in tokens.split(PROMPTS_AT_ONCE):
        acts = activations(spliced, rows, [name])[name][..., list(features)]
        totals.index_add_(0, rows.flatten().cpu(), acts.flatten(0, 1).double().cpu())
    found = []
    for total in totals.T:
        shares = total / total.sum().clamp_min(torch.finfo(torch.float64).tiny)
        best = shares.topk(min(top, len(shares)))
        found.append([(int(i), float(share)) for share, i in zip(*best, strict=True) if share > 0])
    return found
