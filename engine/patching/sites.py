"""Where a patch lands: components by name, sites, patches."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Self

from torch import Tensor

from subcircuit.engine.config import ModelConfig
from subcircuit.engine.dictionary import ACTS, SparseDictionary
from subcircuit.engine.errors import PatchError

FeatureKind = Literal["resid_feature", "z_feature", "mid_feature", "mlp_feature"]
Kind = Literal["resid", "q", "k", "v", "z", "group", "neuron", "mlp", FeatureKind]

# The order in which a block computes them: what a patch can change inside its own layer is what comes after it.
STAGES: dict[str, int] = {"resid": 0, "q": 1, "k": 1, "v": 1, "z": 2, "group": 2, "neuron": 4, "mlp": 5}
STAGES |= {"resid_feature": 0, "z_feature": 2, "mid_feature": 3, "mlp_feature": 5}

_HOOKS: dict[str, str] = {
    "resid": "hook_resid_pre",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "z": "attn.hook_z",
    "group": "attn.hook_z",
    "neuron": "mlp.hook_post",
    "mlp": "hook_mlp_out",
    "resid_feature": f"hook_resid_pre.{ACTS}",
    "z_feature": f"attn.hook_z.{ACTS}",
    "mid_feature": f"hook_resid_mid.{ACTS}",
    "mlp_feature": f"hook_mlp_out.{ACTS}",
}
_LETTERS = {"h": "z", "q": "q", "k": "k", "v": "v", "g": "group", "f": "z_feature"}
_STREAMS: dict[str, FeatureKind] = {"r": "resid_feature", "mid": "mid_feature", "m": "mlp_feature"}
_PATTERN = re.compile(
    r"a(?P<attn>\d+)\.(?P<letter>[hqkvgf])(?P<head>\d+)"
    r"|(?P<stream>mid|m|r)(?P<layer>\d+)\.f(?P<feature>\d+)"
    r"|m(?P<mlp>\d+)(\.n(?P<neuron>\d+))?|r(?P<resid>\d+)"
)

FORMS = (
    "a5.h1 (head), m3 (MLP), a5.q1 / a5.k0 / a5.v0 (a head's query, a KV head's key or value), "
    "a5.g0 (all heads of a KV group), m3.n17 (neuron), r4 (residual stream entering layer 4), "
    "r4.f17 / m3.f17 / a5.f17 (feature of a dictionary there), mid4.f17 (of one between layer 4's attention and MLP)"
)


@dataclass(frozen=True, order=True)
class Component:
    """A part of one layer that a patch can replace; `str(component)` is its name, `Component.parse` reads it back.

    kinds: `z` a query head's output (`a5.h1`), `q`, `k`, `v` a head's query or a KV head's key or value before rotary
    embedding (`a5.q1`, `a5.k0`), `group` the outputs of all query heads that read one KV head (`a5.g0`), `mlp` an
    MLP's output (`m3`), `neuron` one of its post-activations (`m3.n17`), `resid` the residual stream entering a layer
    (`r4`); `resid_feature`, `mlp_feature`, `z_feature` a feature of the sparse dictionary that sits at the residual
    stream, the MLP's output or the heads' outputs (`r4.f17`, `m3.f17`, `a5.f17`), `mid_feature` one of the dictionary
    at the residual stream between a layer's attention and its MLP (`mid4.f17`).
    """

    layer: int
    kind: Kind
    index: int = 0

    @classmethod
    def parse(cls, name: str) -> Self:
        """Raises PatchError for a name of no known form."""
        match = _PATTERN.fullmatch(name)
        if match is None:
            raise PatchError(f"component {name!r} is not understood; expected one of {FORMS}")
        part = match.groupdict()
        if part["attn"] is not None:
            return cls(int(part["attn"]), _LETTERS[part["letter"]], int(part["head"]))  # type: ignore[arg-type]
        if part["feature"] is not None:
            return cls(int(part["layer"]), _STREAMS[part["stream"]], int(part["feature"]))
        if part["resid"] is not None:
            return cls(int(part["resid"]), "resid")
        if part["neuron"] is not None:
            return cls(int(part["mlp"]), "neuron", int(part["neuron"]))
        return cls(int(part["mlp"]), "mlp")

    def __str__(self) -> str:
        if self.kind == "mlp":
            return f"m{self.layer}"
        if self.kind == "neuron":
            return f"m{self.layer}.n{self.index}"
        if self.kind == "resid":
            return f"r{self.layer}"
        stream = next((stream for stream, kind in _STREAMS.items() if kind == self.kind), None)
        if stream is not None:
            return f"{stream}{self.layer}.f{self.index}"
        letter = next(letter for letter, kind in _LETTERS.items() if kind == self.kind)
        return f"a{self.layer}.{letter}{self.index}"

    @property
    def hook_name(self) -> str:
        """The hook point whose value holds this component."""
        return f"blocks.{self.layer}.{_HOOKS[self.kind]}"

    @property
    def is_feature(self) -> bool:
        """Whether it is a feature of a sparse dictionary."""
        return self.kind.endswith("_feature")

    @property
    def stage(self) -> int:
        return STAGES[self.kind]

    def indices(self, config: ModelConfig) -> range:
        """What it takes of its hook point's head or neuron axis; a single entry where the hook point has none."""
        if self.kind == "group":
            return range(self.index * config.group_size, (self.index + 1) * config.group_size)
        return range(self.index, self.index + 1)

    def axis_size(self, config: ModelConfig) -> int:
        """Size of its hook point's head or neuron axis; 1 where the hook point has none.

        That of features is not the model's but their dictionary's; there is none here.
        """
        assert not self.is_feature
        sizes = {"neuron": config.d_mlp, "mlp": 1, "resid": 1, "k": config.kv_heads, "v": config.kv_heads}
        return sizes.get(self.kind, config.n_heads)

    def check(self, config: ModelConfig, dictionaries: Mapping[str, SparseDictionary] | None = None) -> None:
        """Raises PatchError when the model has no such component; `dictionaries` are those at its hook points."""
        if self.is_feature:
            self._check_feature(dictionaries or {})
            return
        size = config.kv_heads if self.kind == "group" else self.axis_size(config)
        if self.layer >= config.n_layers:
            raise PatchError(f"component '{self}' does not exist: the model has layers 0 to {config.n_layers - 1}")
        if self.index >= size:
            what = {"z": "heads", "q": "heads", "neuron": "neurons"}.get(self.kind, "KV heads")
            raise PatchError(f"component '{self}' does not exist: layer {self.layer} has {what} 0 to {size - 1}")

    def _check_feature(self, dictionaries: Mapping[str, SparseDictionary]) -> None:
        where = self.hook_name.removesuffix(f".{ACTS}")
        if where not in dictionaries:
            raise PatchError(f"component '{self}' does not exist: no dictionary is known at {where!r}")
        n_features = dictionaries[where].d_sae
        if self.index >= n_features:
            raise PatchError(f"component '{self}' does not exist: the dictionary has features 0 to {n_features - 1}")


@dataclass(frozen=True)
class Site:
    """A component at all positions (None) or at some; negative positions count from the end of the prompt."""

    component: Component
    positions: tuple[int, ...] | None = None

    @classmethod
    def of(cls, where: Site | Component | str) -> Site:
        """A site from a site, a component, or a component's name."""
        if isinstance(where, Site):
            return where
        return cls(Component.parse(where) if isinstance(where, str) else where)

    def resolve(self, n_pos: int) -> tuple[int, ...] | None:
        """Positions as non-negative indices. Raises PatchError for none at all, or one outside the prompt."""
        if self.positions is None:
            return None
        if not self.positions:
            raise PatchError(f"'{self.component}' is to be patched at no position; expected at least one")
        for position in self.positions:
            if not -n_pos <= position < n_pos:
                raise PatchError(f"position {position} of '{self.component}' is outside prompts of {n_pos} tokens")
        return tuple(sorted({position % n_pos for position in self.positions}))

    def __str__(self) -> str:
        if self.positions is None:
            return str(self.component)
        return f"{self.component}@{','.join(map(str, self.positions))}"


Source = str | Mapping[str, Tensor]
"""`"corrupted"`, `"mean"`, `"zero"`, or values by hook name (an ActivationCache is one), each shaped like the hook
point's value with a prompt axis of the data set's size or 1."""


def source_name(source: Source) -> str:
    """What a result's settings call a source."""
    return source if isinstance(source, str) else "tensors"


@dataclass(frozen=True)
class Patch:
    """A site and what is put there; source None means the sweep's own source."""

    site: Site
    source: Source | None = None

    @classmethod
    def of(cls, what: Patch | Site | Component | str) -> Patch:
        return what if isinstance(what, Patch) else cls(Site.of(what))


PatchSet = tuple[Patch, ...]
"""What one row patches; where two patches of a set overlap, the later one holds."""


def as_patch_set(what: Patch | Site | Component | str | Iterable[Patch | Site | Component | str]) -> PatchSet:
    """One patch, or several in one row, from whatever names them."""
    if isinstance(what, Patch | Site | Component | str):
        return (Patch.of(what),)
    return tuple(Patch.of(part) for part in what)
