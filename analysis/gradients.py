"""Gradient scores: what patching every component would do, to first order, from two forwards and one backward.

    effect ≈ Σ over positions of (source − clean) · ∂metric/∂value at the clean run

* `atp`, attribution patching: Nanda 2023, "Attribution Patching: Activation Patching At Industrial Scale".
* `ig`, integrated gradients: the gradient is the mean over `steps` runs whose embedded prompts lie on the straight line
  from the source's (excluded) to the clean ones (included), as in EAP-IG (Hanna et al. 2024, arXiv 2403.17806). One
  step is `atp`.
* `atp*`: Kramár et al. 2024 (arXiv 2403.00745), section 3. QK fix: the attention under a patched query or key is
  recomputed exactly, and its change takes the difference's place, so that a saturated softmax hides nothing. GradDrop:
  the mean over layers of |effect| with the gradient through that layer's output dropped, so that two paths that cancel
  hide nothing either. Ours keeps the sign of the estimate with all paths; the paper's contribution is
  `effects.abs().mean(1)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from subcircuit.analysis.sweep import Components, Scores, sites_of
from subcircuit.analysis.tasks import Task
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import PatchError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Site, Source
from subcircuit.engine.patching.gradients import ENTRY, Gradients, MetricPass
from subcircuit.engine.patching.memory import clean_bytes
from subcircuit.engine.patching.options import check_prompts, default_budget, in_dtype
from subcircuit.engine.patching.sites import Patch, source_name
from subcircuit.engine.patching.sources import PromptChunk, Sources, tail_shape
from subcircuit.engine.rope import rope_frequencies, rope_tables, rotate

Method = Literal["atp", "ig", "atp*"]
GradientPrecision = Literal["fp32", "fp64"]

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}

GRAPH_COPIES = 3
"""Bytes that a differentiable forward keeps, in those of its activations: values, what backward needs, gradients."""


def gradient_scores(
    model: HookedTransformer,
    task: Task,
    components: Components = "heads+mlps+neurons+residual",
    *,
    source: Source = "corrupted",
    method: Method = "atp",
    steps: int = 5,
    positions: str | Iterable[int] | None = None,
    precision: GradientPrecision = "fp32",
    budget_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """First-order effects of patching every component on every prompt, as `sweep` would measure them exactly.

    `components`, `source` and `positions` are those of `sweep`; `method` is one of this module's. Features of a model's
    dictionaries are components too, except for `atp*`. Cost per prompt: a forward for a corrupted source, and a forward
    and a backward (`ig`: `steps` of each; `atp*`: one backward more per layer). Prompts are run in chunks that fit
    `budget_bytes` beside the weights. `progress` is called with (prompts done, prompts in all).

    Raises PatchError for what does not exist or is not aligned.
    """
    check_method(method, get_args(Method), steps, precision)
    check_prompts(model, task)
    sites = sites_of(model.config, components, positions, task.clean.shape[1], model.dictionaries)
    if method == "atp*" and any(site.component.is_feature for site in sites):
        raise PatchError("gradient method 'atp*' knows no features of dictionaries; expected 'atp' or 'ig'")
    run = _Run(in_dtype(model, DTYPES[precision]), task, sites, source, method, steps)
    budget = default_budget(model.device) if budget_bytes is None else budget_bytes
    effects, clean_metric = run.effects(max(1, budget // run.bytes_per_prompt()), progress)
    settings = {
        "method": method,
        **({"steps": steps} if method == "ig" else {}),
        "source": source_name(source),
        "precision": precision,
        "task": task.name,
        "model": model.config.name,
        "n_prompts": len(task.clean),
    }
    return Scores(sites, effects.cpu(), clean_metric.cpu(), model.config, settings)


def check_method(method: str, methods: Sequence[str], steps: int, precision: str) -> None:
    """Raises PatchError for a method, number of steps or precision that gradients do not have."""
    if method not in methods:
        raise PatchError(f"gradient method {method!r} is not known; expected one of {', '.join(methods)}")
    if steps < 1:
        raise PatchError(f"steps {steps} must be at least 1: runs between the source's prompts and the clean ones")
    if precision not in DTYPES:
        raise PatchError(f"precision {precision!r} of gradients is not known; expected one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class _Reader:
    """Sites that sum a probe's products over the same positions, each over its own heads or neurons."""

    positions: tuple[int, ...] | None
    rows: Int[Tensor, "site"]
    """Their places among the effects."""
    index: Int[Tensor, "site width"]
    """What they take of the probe's head or neuron axis."""


@dataclass(frozen=True)
class _Probe:
    """Sites that are read from the same product of a difference and a gradient."""

    patched: str
    """The hook point that the sites patch."""
    observed: str
    """The hook point of the difference and the gradient: the same, or under the QK fix the layer's z."""
    axis_size: int
    moved: tuple[int, ...] | None
    """Positions whose keys are replaced under the QK fix, which are not independent of each other; None for all."""
    readers: list[_Reader]


def _probes(sites: Sequence[Site], model: HookedTransformer, n_pos: int, qk_fix: bool) -> list[_Probe]:
    config = model.config
    groups: dict[tuple[str, str, int, tuple[int, ...] | None], dict[object, list[int]]] = {}
    for row, site in enumerate(sites):
        component, positions = site.component, site.resolve(n_pos)
        fixed = qk_fix and component.kind in ("q", "k")
        observed = f"blocks.{component.layer}.attn.hook_z" if fixed else component.hook_name
        if component.is_feature:
            (axis_size,) = tail_shape(config, component.hook_name, model.dictionaries)
        else:
            axis_size = config.n_heads if fixed else component.axis_size(config)
        moved, read = (positions, None) if fixed and component.kind == "k" else (None, positions)
        readers = groups.setdefault((component.hook_name, observed, axis_size, moved), {})
        readers.setdefault((read, component.kind), []).append(row)
    return [
        _Probe(*key, [_reader(sites, rows, config, n_pos, key[0] != key[1]) for rows in readers.values()])
        for key, readers in groups.items()
    ]


def _reader(sites: Sequence[Site], rows: list[int], config: ModelConfig, n_pos: int, fixed: bool) -> _Reader:
    """The reader of sites of one kind at the same positions."""
    components = [sites[row].component for row in rows]
    of_keys = fixed and components[0].kind == "k"
    size = config.group_size  # a patched key changes what every query head of its group reads
    taken = [range(c.index * size, (c.index + 1) * size) if of_keys else c.indices(config) for c in components]
    positions = None if of_keys else sites[rows[0]].resolve(n_pos)
    return _Reader(positions, torch.tensor(rows), torch.tensor([list(part) for part in taken]))


class _Run:
    """One call of `gradient_scores`."""

    def __init__(
        self,
        model: HookedTransformer,
        task: Task,
        sites: Sequence[Site],
        source: Source,
        method: Method,
        steps: int,
    ) -> None:
        self.model, self.task, self.config = model, task, model.config
        self.sites, self.source, self.method, self.steps = sites, source, method, steps
        self.n_pos = task.clean.shape[1]
        self.probes = _probes(sites, model, self.n_pos, method == "atp*")
        self._rotation = None
        if self.config.positions == "rope":
            at = torch.arange(self.n_pos, device=model.device)
            self._rotation = rope_tables(rope_frequencies(self.config), at, model.dtype)

    def bytes_per_prompt(self) -> int:
        """Bytes that one prompt takes: the differentiable run, and a difference and a product per probe."""
        element_size = torch.finfo(self.model.dtype).bits // 8
        run = GRAPH_COPIES * clean_bytes(self.config, self.n_pos, element_size)
        shapes = [tail_shape(self.config, probe.observed, self.model.dictionaries) for probe in self.probes]
        return run + 2 * sum(map(math.prod, shapes)) * self.n_pos * element_size

    def effects(
        self, at_once: int, progress: Callable[[int, int], None] | None
    ) -> tuple[Float[Tensor, "site prompt"], Float[Tensor, "prompt"]]:
        n_prompts = len(self.task.clean)
        # The start of integrated gradients' line is a source's value too.
        starts = [((Patch(Site.of("r0")),))] if self.method == "ig" else []
        sets = [(Patch(site),) for site in self.sites]
        sources = Sources(self.model, self.task, [*sets, *starts], self.source, at_once)
        effects = torch.empty(len(self.sites), n_prompts, dtype=self.model.dtype, device=self.model.device)
        metric = torch.empty(n_prompts, dtype=self.model.dtype, device=self.model.device)
        n_done = 0
        for chunk in torch.arange(n_prompts).split(at_once):
            effects[:, chunk], metric[chunk] = self._chunk(chunk, sources)
            sources.forget()
            n_done += len(chunk)
            if progress is not None:
                progress(n_done, n_prompts)
        return effects, metric

    def _chunk(
        self, chunk: PromptChunk, sources: Sources
    ) -> tuple[Float[Tensor, "site chunk"], Float[Tensor, "chunk"]]:
        names = sorted({ENTRY, *(name for probe in self.probes for name in self._names(probe))})
        clean = MetricPass(self.model, self.task, chunk, names, droppable=self.method == "atp*")
        values = clean.values
        differences = [self._difference(probe, values, chunk, sources) for probe in self.probes]
        effects = self._products(differences, clean.gradients())
        if self.method == "ig":
            for gradients in self._other_gradients(chunk, names, values[ENTRY], sources):
                effects += self._products(differences, gradients)
            effects /= self.steps
        if self.method == "atp*" and self.config.n_layers > 1:
            effects = effects.sign() * self._magnitudes(differences, clean)
        return effects, clean.metric

    def _names(self, probe: _Probe) -> list[str]:
        """Hook points whose clean values a probe needs."""
        if probe.patched == probe.observed:
            return [probe.patched]
        q, k = ("rot_q", "rot_k") if self._rotation is not None else ("q", "k")
        layer = probe.patched.rsplit(".", 1)[0]
        return [f"{layer}.hook_{name}" for name in (q, k, "v", "z")]

    def _difference(
        self, probe: _Probe, clean: Gradients, chunk: PromptChunk, sources: Sources
    ) -> Float[Tensor, "prompt pos index d"]:
        source = sources.value(sources.key(None), probe.patched, chunk)
        if probe.patched != probe.observed:
            return self._attention_difference(probe, clean, source)
        difference = source - clean[probe.patched]
        return difference.reshape(*difference.shape[:2], probe.axis_size, -1)

    def _attention_difference(
        self, probe: _Probe, clean: Gradients, source: Tensor
    ) -> Float[Tensor, "prompt pos head d_head"]:
        """The QK fix: what a layer's z becomes under the source's queries or keys, less what it is."""
        q, k, v, z = (clean[name] for name in self._names(probe))
        source = source.expand(len(q), self.n_pos, *source.shape[2:])
        source = source if self._rotation is None else rotate(source, *self._rotation)
        if probe.patched.endswith("hook_q"):
            q = source
        else:
            replaced = torch.zeros(self.n_pos, dtype=torch.bool, device=q.device)
            replaced[slice(None) if probe.moved is None else list(probe.moved)] = True
            k = source.where(replaced[:, None, None], k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        patched = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.config.group_size > 1)
        return patched.transpose(1, 2) - z

    def _products(self, differences: Sequence[Tensor], gradients: Gradients) -> Float[Tensor, "site chunk"]:
        effects = differences[0].new_empty(len(self.sites), differences[0].shape[0])
        for probe, difference in zip(self.probes, differences, strict=True):
            gradient = gradients[probe.observed].reshape(difference.shape)
            products = torch.einsum("ptid,ptid->pti", difference, gradient)
            for reader in probe.readers:
                here = products if reader.positions is None else products[:, list(reader.positions)]
                effects[reader.rows] = here.sum(1)[:, reader.index].sum(-1).T
        return effects

    def _other_gradients(
        self, chunk: PromptChunk, names: Sequence[str], clean: Tensor, sources: Sources
    ) -> Iterator[Gradients]:
        """Gradients of the runs strictly between the source's embedded prompts and the clean ones."""
        source = sources.value(sources.key(None), ENTRY, chunk).expand_as(clean)
        for step in range(1, self.steps):
            entry = torch.lerp(source, clean, step / self.steps)
            yield MetricPass(self.model, self.task, chunk, names, entry=entry).gradients()

    def _magnitudes(self, differences: Sequence[Tensor], clean: MetricPass) -> Float[Tensor, "site chunk"]:
        """GradDrop: mean |effect| over layers to drop. Without its own layer's output nothing is left of a component,
        so that layer does not count; of the residual stream entering a layer the skip path is left."""
        n_layers = self.config.n_layers
        dropped = (self._products(differences, clean.gradients(layer)).abs() for layer in range(n_layers))
        kinds = [site.component.kind for site in self.sites]
        n_counted = torch.tensor([n_layers - (kind != "resid") for kind in kinds])
        return sum(dropped, torch.zeros((), device=self.model.device)) / n_counted.to(self.model.device)[:, None]
