"""The torch executor: rows as differences δ to one shared clean run, from the patched layer up.

For a block with clean residual x and row residual x + δ:

    δn   = norm(x + δ) − norm(x)
    δqkv = W_qkv δn                                   biases cancel; RoPE is linear, so it turns δq and δk
    δz   = attn(q + δq, k + δk, v + δv) − z
    δmid = δ + W_O δz
    δu   = W_in (norm(mid + δmid) − norm(mid))
    δout = δmid + W_out (act(u + δu) − act(u))

A patch replaces δ at its hook point by source − clean; one of a feature adds a multiple of its decoder row. Positions
before the first one that can differ are never computed, nor those after the last one before attention has carried δ
there, and in the last layer only the position that the metric reads is.

Shapes: δ is `[set, prompt, pos, d]`, the clean side `[prompt, pos, d]` and broadcast over sets. A δ with one set
stands for all of them until a patch tells them apart; None stands for no difference at all. On leaving the layer that
was patched, δ may end before the prompt does: it is 0 from there on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn import Linear

from subcircuit.engine.blocks import Block, Norm
from subcircuit.engine.dictionary import ACTS
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.answers import token_sets
from subcircuit.engine.patching.compile import HookPatch, compile_masks, hook_patches, patched
from subcircuit.engine.patching.features import FeaturePatch, feature_patches
from subcircuit.engine.patching.flops import projects_no_keys, reads_heads
from subcircuit.engine.patching.metric import MetricReadout, Metrics
from subcircuit.engine.patching.plan import Start, last_changed
from subcircuit.engine.patching.sites import PatchSet
from subcircuit.engine.patching.sources import AlignedPrompts, PromptChunk, Sources, activations
from subcircuit.engine.rope import rope_frequencies, rope_tables
from subcircuit.kernels.activation_delta import activation_delta
from subcircuit.kernels.attention_delta import attention_delta, replace_heads
from subcircuit.kernels.backend import Backend
from subcircuit.kernels.head_fanout import head_fanout
from subcircuit.kernels.head_pre import head_directions, head_pre, norm_change
from subcircuit.kernels.linear import laid_out, linear
from subcircuit.kernels.norm_delta import norm_delta
from subcircuit.kernels.query_delta import query_delta

Delta = Float[Tensor, "#set prompt pos d"]

Split = tuple[Delta | None, Delta | None]
"""A residual stream's δ as what it was before a product was added to it, and that product, still in the precision of
the products: the next norm adds them while it reads them."""

NOTHING: Split = (None, None)


@dataclass(frozen=True)
class Patches:
    """What the sets of a chunk patch, by hook point: values, and features of the dictionary there."""

    values: dict[str, list[HookPatch]]
    features: dict[str, FeaturePatch]

    def at(self, name: str) -> list[HookPatch]:
        return self.values.get(name, [])

    def feature_at(self, name: str) -> FeaturePatch | None:
        return self.features.get(name)

    def applied(self, name: str, delta: Delta | None, n_read: int | None = None) -> Delta | None:
        """δ at a hook point after the patches there, values first; with `n_read`, at the last positions only."""
        delta = patched(delta, self.at(name), n_read)
        return delta if name not in self.features else self.features[name].patched(delta, n_read)


@dataclass(frozen=True)
class LayerWeights:
    """A block's linear weights, [out, in], as the δ products take them."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    gate: Tensor | None
    inner: Tensor
    out: Tensor

    @classmethod
    def of(cls, block: Block, dtype: torch.dtype) -> LayerWeights:
        """Copies, laid out for the products, where the block has another dtype."""

        def weight(module: Linear) -> Tensor:
            return module.weight if module.weight.dtype == dtype else laid_out(module.weight.to(dtype))

        attn, mlp = block.attn, block.mlp
        return cls(
            q=weight(attn.w_q),
            k=weight(attn.w_k),
            v=weight(attn.w_v),
            o=weight(attn.w_o),
            gate=None if mlp.w_gate is None else weight(mlp.w_gate),
            inner=weight(mlp.w_in),
            out=weight(mlp.w_out),
        )


@dataclass(frozen=True)
class CleanLayer:
    """A block's activations in the clean run of a chunk of prompts; q and k after rotary embedding."""

    resid_pre: Float[Tensor, "prompt pos d_model"]
    normed1: Float[Tensor, "prompt pos d_model"]
    q: Float[Tensor, "prompt pos head d_head"]
    k: Float[Tensor, "prompt pos kv_head d_head"]
    v: Float[Tensor, "prompt pos kv_head d_head"]
    z: Float[Tensor, "prompt pos head d_head"]
    resid_mid: Float[Tensor, "prompt pos d_model"]
    normed2: Float[Tensor, "prompt pos d_model"]
    pre: Float[Tensor, "prompt pos d_mlp"]
    pre_linear: Float[Tensor, "prompt pos d_mlp"] | None
    post: Float[Tensor, "prompt pos d_mlp"]

    def until(self, n_pos: int) -> CleanLayer:
        """The first `n_pos` positions."""
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        return replace(self, **{name: part[:, :n_pos] for name, part in parts.items() if part is not None})


@dataclass(frozen=True)
class Departures:
    """How much each set changes the residual stream that enters (if patched) or leaves the first layer it touches."""

    size: Float[Tensor, "set"]
    """|δ| / |x|, the largest over prompts and positions."""
    shrinkage: Float[Tensor, "set"]
    """|x| / |x + δ|, the largest over prompts and positions."""

    @classmethod
    def none(cls, n_sets: int, like: Tensor) -> Departures:
        return cls(*like.new_zeros(2, n_sets))

    def include(self, delta: Split, clean: Float[Tensor, "prompt pos d_model"]) -> None:
        """Take in a δ to the clean residual stream at its positions; of several, the largest counts."""
        joined = _joined(delta)
        if joined is None:
            return
        before, moved, after = (torch.linalg.vector_norm(x, dim=-1) for x in (clean, joined, clean + joined))
        torch.maximum(self.size, (moved / before).amax((1, 2)), out=self.size)
        torch.maximum(self.shrinkage, (before / after).amax((1, 2)), out=self.shrinkage)


@dataclass(frozen=True)
class Rows:
    """Patch sets on their way up, each with every prompt: their δ at `layer`'s entrance, from position `first` on."""

    patch_sets: Sequence[PatchSet]
    patches: Patches
    delta: Split
    layer: int
    first: int

    @property
    def is_nothing(self) -> bool:
        """Whether they are the clean run, as sets that patch nothing are."""
        return _is_nothing(self.delta) and not self.patches.values and not self.patches.features


class DeltaRun:
    """The clean run of one chunk of prompts, and the propagation of rows' differences above it.

    `base` is a patch set that all rows share: its δ is kept per layer, so that a row costs only the layers from its own
    first patch on. Setting another base keeps the layers below the first patch in which the two differ.
    """

    def __init__(
        self,
        model: HookedTransformer,
        weights: Callable[[int], LayerWeights],
        product_dtype: torch.dtype,
        prompts: AlignedPrompts,
        chunk: PromptChunk,
        sources: Sources,
        backend: Backend = "torch",
        metric: Metrics = "logit_difference",
    ) -> None:
        self.model, self.weights, self.chunk, self.sources = model, weights, chunk, sources
        self.config = model.config
        self.tokens = prompts.clean[chunk].to(model.device)
        self.n_prompts, self.n_pos = self.tokens.shape
        self.product_dtype, self.backend = product_dtype, backend
        self._rotation = None
        if self.config.positions == "rope":
            positions = torch.arange(self.n_pos, device=model.device)
            self._rotation = rope_tables(rope_frequencies(self.config), positions, model.dtype)
        self._run_clean()
        answers, wrongs = (tokens[chunk] for tokens in token_sets(prompts))
        self.readout = MetricReadout(model, self.final, answers, wrongs, metric, backend)
        self._base: PatchSet = ()
        self._base_first = 0
        self._base_deltas: list[Split] = []

    def _run_clean(self) -> None:
        rotary = self.config.positions == "rope"
        q, k = ("attn.hook_rot_q", "attn.hook_rot_k") if rotary else ("attn.hook_q", "attn.hook_k")
        kept = ["hook_resid_pre", q, k, "attn.hook_v", "attn.hook_z", "hook_resid_mid", "mlp.hook_pre", "mlp.hook_post"]
        kept += ["mlp.hook_pre_linear"] if self.config.gated_mlp else []
        n_layers = self.config.n_layers
        names = [f"blocks.{layer}.{name}" for layer in range(n_layers) for name in kept]
        patched_names = {name for names in self.sources.names.values() for name in names}
        last = f"blocks.{n_layers - 1}.hook_resid_post"
        patched_names |= {name.removesuffix(f".{ACTS}") for name in patched_names}
        cache = activations(self.model, self.tokens, [*names, *patched_names, last])
        self.patched_clean = {name: cache[name] for name in patched_names}
        self.clean = [self._clean_layer(cache, layer, q, k) for layer in range(n_layers)]
        self.final = cache[last][:, -1]

    def _clean_layer(self, cache: Mapping[str, Tensor], layer: int, q: str, k: str) -> CleanLayer:
        block = cast(Block, self.model.blocks[layer])

        def at(name: str) -> Tensor:
            return cache[f"blocks.{layer}.{name}"]

        return CleanLayer(
            resid_pre=at("hook_resid_pre"),
            normed1=block.ln1(at("hook_resid_pre")),
            q=at(q),
            k=at(k),
            v=at("attn.hook_v"),
            z=at("attn.hook_z"),
            resid_mid=at("hook_resid_mid"),
            normed2=block.ln2(at("hook_resid_mid")),
            pre=at("mlp.hook_pre"),
            pre_linear=at("mlp.hook_pre_linear") if self.config.gated_mlp else None,
            post=at("mlp.hook_post"),
        )

    @property
    def clean_metric(self) -> Float[Tensor, "prompt *metric"]:
        return self.readout.clean

    def covers(self, names: Sequence[str]) -> bool:
        """Whether the clean values of these hook points were kept."""
        return set(names) <= self.patched_clean.keys()

    def set_base(self, base: PatchSet, first: int) -> None:
        """Let all rows share the patches of `base`, whose difference starts at position `first`."""
        n_kept = first_difference(self._base, base, self.config.n_layers) + 1
        if first != self._base_first:
            n_kept = 0
        self._base, self._base_first = base, first
        del self._base_deltas[n_kept:]

    def _base_delta(self, layer: int) -> Split:
        """δ that the base set alone causes in the residual stream entering a layer."""
        if not self._base:
            return NOTHING
        if not self._base_deltas:
            self._base_deltas.append(NOTHING)
        if len(self._base_deltas) <= layer:
            from_layer = len(self._base_deltas) - 1
            patches = self._patches([self._base], self._base_first, from_layer)
            for below in range(from_layer, layer):
                self._base_deltas.append(self._block(below, self._base_deltas[below], patches, self._base_first))
        return self._base_deltas[layer]

    @property
    def has_base(self) -> bool:
        return bool(self._base)

    def base_size(self) -> float:
        """|δ| / |x| of the base alone on leaving the first layer that it patches, the largest over prompts and
        positions."""
        if not self._base:
            return 0.0
        layer = min(patch.site.component.layer for patch in self._base) + 1
        delta, departures = self._base_delta(layer), Departures.none(1, self.final)
        departures.include(delta, self._clean_entering(layer, self._base_first, delta))
        return float(departures.size)

    def enter(self, patch_sets: Sequence[PatchSet], start: Start, departures: Departures | None = None) -> Rows:
        """Patch sets (on top of the base) that all start at `start`, run through their first layer; `departures` takes
        how much they depart there, if given."""
        first = min(start.first, self._base_first) if self._base else start.first
        last = self.n_pos - 1 if self._base else last_changed(patch_sets, start, self.config.n_layers, self.n_pos)
        is_short = last < self.n_pos - 1
        patches = self._patches(patch_sets, first, start.layer + is_short, self._base)
        delta = self._padded(self._base_delta(start.layer), first)
        if departures is not None:
            entering = self._patched_resid(start.layer, delta, patches, first)
            departures.include(entering, self._clean_entering(start.layer, first, entering))
        if start.layer == self.config.n_layers:
            return Rows(patch_sets, patches, delta, start.layer, first)
        if is_short:
            short = self._until(last + 1, start.layer)
            delta = short._block(start.layer, NOTHING, short._patches(patch_sets, first, start.layer), first)
        else:
            delta = self._block(start.layer, delta, patches, first)
        if departures is not None:
            departures.include(delta, self._clean_entering(start.layer + 1, first, delta))
        return Rows(patch_sets, patches, delta, start.layer + 1, first)

    def _until(self, n_pos: int, layer: int) -> DeltaRun:
        """The same run of shorter prompts, in one layer: later positions change nothing at earlier ones."""
        other = copy.copy(self)
        other.n_pos = n_pos
        other.clean = [*self.clean]
        other.clean[layer] = self.clean[layer].until(n_pos)
        other.patched_clean = {name: value[:, :n_pos] for name, value in self.patched_clean.items()}
        return other

    def _padded(self, delta: Split, first: int) -> Split:
        """The base's δ from position `first` on: 0 before the base's own first position."""
        n_before = self._base_first - first
        resid, product = (part if part is None else F.pad(part, (0, 0, n_before, 0)) for part in delta)
        return (resid, product) if n_before else delta

    def select(self, rows: Rows, chosen: Sequence[int]) -> Rows:
        """Some of the patch sets, by index."""
        if len(chosen) == len(rows.patch_sets):
            return rows
        sets = [rows.patch_sets[i] for i in chosen]
        patches = self._patches(sets, rows.first, rows.layer, self._base)
        at = torch.tensor(chosen, dtype=torch.int64, device=self.model.device)
        resid, product = (part if part is None or part.shape[0] == 1 else part[at] for part in rows.delta)
        return Rows(sets, patches, (resid, product), rows.layer, rows.first)

    def raised(self, rows: Rows, layer: int) -> Rows:
        """Run patch sets on until they enter a layer above."""
        delta = rows.delta
        for below in range(rows.layer, layer):
            delta = self._block(below, delta, rows.patches, rows.first)
        return replace(rows, delta=delta, layer=layer)

    def joined(self, rows: Rows, others: Rows) -> Rows:
        """Patch sets on a base that enter the same layer, from the same position on, as one."""
        sets = [*rows.patch_sets, *others.patch_sets]
        delta = torch.cat([self._whole(each) for each in (rows, others)])
        patches = self._patches(sets, rows.first, rows.layer, self._base)
        return Rows(sets, patches, (delta, None), rows.layer, rows.first)

    def _whole(self, rows: Rows) -> Float[Tensor, "set prompt pos d_model"]:
        """δ of every set at every position that is computed: above the last layer, at the last one."""
        n_pos = 1 if rows.layer == self.config.n_layers else self.n_pos - rows.first
        shape = len(rows.patch_sets), self.n_prompts, n_pos, self.config.d_model
        delta = _joined(rows.delta)
        return self.final.new_zeros(shape) if delta is None else delta[:, :, -n_pos:].expand(shape)

    def leave(self, rows: Rows) -> Float[Tensor, "set prompt *metric"]:
        """Run patch sets through the layers above and read their effects."""
        return self.readout.effects(self.rise(rows))

    def rise(self, rows: Rows) -> Float[Tensor, "set prompt d_model"]:
        """Run patch sets through the layers above: δ of the final residual stream, where the metric is read."""
        return self._whole(self.raised(rows, self.config.n_layers))[:, :, -1]

    def with_weights(self, weights: Callable[[int], LayerWeights], product_dtype: torch.dtype) -> DeltaRun:
        """The same clean run with the products in another precision, and no base."""
        other = copy.copy(self)
        other.weights, other.product_dtype = weights, product_dtype
        other._base, other._base_deltas = (), []
        return other

    def _clean_entering(self, layer: int, first: int, delta: Split) -> Float[Tensor, "prompt pos d_model"]:
        """The clean residual stream entering a layer, at δ's positions from `first` on; above the last one, where it is
        read."""
        if layer == self.config.n_layers:
            return self.final[:, None]
        n_pos = next((part.shape[2] for part in delta if part is not None), 0)
        return self.clean[layer].resid_pre[:, first : first + n_pos]

    def _patches(self, patch_sets: Sequence[PatchSet], first: int, from_layer: int, base: PatchSet = ()) -> Patches:
        masks = compile_masks(patch_sets, self.config, self.n_pos, first, self.sources, from_layer, base)
        values = hook_patches(masks, self.patched_clean, self.sources, self.chunk, first)
        features = {}
        if self.model.dictionaries:
            sets, dictionaries = [(*base, *patch_set) for patch_set in patch_sets], self.model.dictionaries
            clean, sources = self.patched_clean, self.sources
            features = feature_patches(sets, dictionaries, clean, sources, self.chunk, first, from_layer)
        return Patches(values, features)

    def _block(self, layer: int, delta: Split, patches: Patches, first: int) -> Split:
        """δ leaving a layer, from δ entering it."""
        delta = self._patched_resid(layer, delta, patches, first)
        n_read = 1 if layer == self.config.n_layers - 1 else self.n_pos - first
        resid, delta_attn = self._attention(layer, delta, patches, first, n_read)
        resid = None if resid is None else resid[:, :, -n_read:]
        return self._mlp(layer, self._patched_mid(layer, (resid, delta_attn), patches, n_read), patches, n_read)

    def _patched_resid(self, layer: int, delta: Split, patches: Patches, first: int) -> Split:
        name = f"blocks.{layer}.hook_resid_pre"
        touched = name in patches.values or name in patches.features
        return (patches.applied(name, _at_least(_joined(delta), self.n_pos - first)), None) if touched else delta

    def _patched_mid(self, layer: int, delta: Split, patches: Patches, n_read: int) -> Split:
        features = patches.feature_at(f"blocks.{layer}.hook_resid_mid")
        return delta if features is None else (features.patched(_joined(delta), n_read), None)

    def _attention(self, layer: int, delta: Split, patches: Patches, first: int, n_read: int) -> Split:
        """δ entering a layer, and what the layer's heads add to it at the last `n_read` positions."""
        weights, name = self.weights(layer), f"blocks.{layer}.attn.hook_z"
        at_z, features = patches.at(name), patches.feature_at(name)
        if len(at_z) == 1 and at_z[0].complete:
            resid, delta_z = _at_least(_joined(delta), self.n_pos - first), None
        else:
            resid, delta_z = self._delta_z(layer, delta, patches, at_z, first, n_read)
        if delta_z is None and features is None and len(at_z) == 1 and at_z[0].single_heads is not None:
            w_o = cast(Block, self.model.blocks[layer]).attn.w_o.weight
            source = at_z[0].delta[:, -n_read:]
            return resid, head_fanout(source, at_z[0].single_heads, w_o, w_o.dtype, backend=self.backend)
        delta_z = patched(None, at_z, n_read) if delta_z is None else delta_z.flatten(3)
        if features is not None:
            delta_z = features.patched(delta_z, n_read)
        return resid, None if delta_z is None else linear(delta_z, weights.o)

    def _delta_z(
        self, layer: int, delta: Split, patches: Patches, at_z: Sequence[HookPatch], first: int, n_read: int
    ) -> tuple[Delta | None, Float[Tensor, "set prompt pos head d_head"] | None]:
        """δ entering a layer, in one piece, and δz with the patches there; None where only these make a difference."""
        if n_read == 1 and self._projects_no_keys(layer, delta, patches, first):
            return self._delta_z_of_last_query(layer, delta, patches, at_z, first)
        resid, delta_qkv = self._delta_qkv(layer, delta, first, n_read)
        return resid, self._attend(layer, delta_qkv, patches, at_z, n_read)

    def _projects_no_keys(self, layer: int, delta: Split, patches: Patches, first: int) -> bool:
        """Whether δz of one query is best computed without keys and values of all positions; no patch asks for them."""
        n_moved, n_new = next((part.shape[2] for part in delta if part is not None), 0), self.n_pos - first
        replaced = any(patches.at(f"blocks.{layer}.attn.hook_{x}") for x in "kv")
        return n_moved == n_new and not replaced and projects_no_keys(self.config, n_new, self.backend)

    def _delta_z_of_last_query(
        self, layer: int, delta: Split, patches: Patches, at_z: Sequence[HookPatch], first: int
    ) -> tuple[Delta | None, Float[Tensor, "set prompt one head d_head"]]:
        clean, weights, block = self.clean[layer], self.weights(layer), cast(Block, self.model.blocks[layer])
        resid, normed = self._norm_delta(clean.resid_pre[:, first:], clean.normed1[:, first:], delta, block.ln1)
        delta_q = patched(linear(normed[:, :, -1:], weights.q), patches.at(f"blocks.{layer}.attn.hook_q"), 1)
        delta_z = query_delta(
            clean.q[:, -1:],
            clean.k,
            clean.v,
            clean.z[:, -1:],
            cast(Tensor, self._heads(delta_q)),
            None if self._rotation is None else self._heads(linear(normed, weights.k)),
            normed,
            block.attn.w_k.weight,
            block.attn.w_v.weight,
            self.product_dtype,
            rotation=self._rotation,
        )
        for at in at_z:
            delta_z = replace_heads(delta_z, (at.mask[:, -1:], at.delta[:, -1:]))
        return resid, delta_z

    def _delta_qkv(
        self, layer: int, delta: Split, first: int, n_read: int
    ) -> tuple[Delta | None, tuple[Delta | None, Delta | None, Delta | None]]:
        """δ entering a layer, in one piece, and what it makes of queries (at the last `n_read` positions), keys and
        values."""
        if _is_nothing(delta):
            return None, (None, None, None)
        clean, weights, norm = self.clean[layer], self.weights(layer), cast(Block, self.model.blocks[layer]).ln1
        n_moved, n_new = next(part.shape[2] for part in delta if part is not None), self.n_pos - first
        moved = slice(first, first + n_moved)
        resid, normed = self._norm_delta(clean.resid_pre[:, moved], clean.normed1[:, moved], delta, norm)
        delta_k, delta_v = (_at_least(linear(normed, weight), n_new) for weight in (weights.k, weights.v))
        if n_read == n_new:
            delta_q = _at_least(linear(normed, weights.q), n_new)
        else:
            delta_q = linear(normed[:, :, -n_read:], weights.q) if n_moved == n_new else None
        return _at_least(resid, n_new), (delta_q, delta_k, delta_v)

    def _attend(
        self,
        layer: int,
        delta_qkv: tuple[Delta | None, Delta | None, Delta | None],
        patches: Patches,
        at_z: Sequence[HookPatch],
        n_read: int,
    ) -> Float[Tensor, "set prompt pos head d_head"] | None:
        """δz from δq, δk and δv, with the patches at all of them; None where only those at z make a difference."""
        clean, name = self.clean[layer], f"blocks.{layer}.attn"
        delta_q, delta_k, delta_v = delta_qkv
        delta_q = self._heads(patched(delta_q, patches.at(f"{name}.hook_q"), n_read))
        delta_k = self._heads(patched(delta_k, patches.at(f"{name}.hook_k")))
        delta_v = self._heads(patched(delta_v, patches.at(f"{name}.hook_v")))
        if delta_q is None and delta_k is None and delta_v is None:
            return None
        fused = [(at.mask[:, -n_read:], at.delta[:, -n_read:]) for at in at_z]
        delta_z = attention_delta(
            clean.q[:, -n_read:],
            clean.k,
            clean.v,
            clean.z[:, -n_read:],
            delta_q,
            delta_k,
            delta_v,
            self.product_dtype,
            rotation=self._rotation,
            patch=fused[0] if fused else None,
            backend=self.backend,
        )
        for patch in fused[1:]:
            delta_z = replace_heads(delta_z, patch)
        return delta_z

    def _mlp(self, layer: int, delta_mid: Split, patches: Patches, n_read: int) -> Split:
        """δ leaving a layer, from δ between its halves: what it was, and what the MLP adds."""
        clean, weights, name = self.clean[layer], self.weights(layer), f"blocks.{layer}"
        at_out = patches.at(f"{name}.hook_mlp_out")
        if len(at_out) == 1 and at_out[0].complete:
            return _joined(delta_mid), patches.applied(f"{name}.hook_mlp_out", None, n_read)
        resid = delta_post = None
        if not _is_nothing(delta_mid):
            if self._is_narrow(layer, delta_mid, patches, n_read):
                resid, delta_pre, delta_linear = self._pre_of_heads(layer, delta_mid, patches, n_read)
            else:
                resid, delta_pre, delta_linear = self._pre(layer, delta_mid, n_read)
            delta_post = activation_delta(
                clean.pre[:, -n_read:],
                clean.post[:, -n_read:],
                delta_pre,
                self.config.activation,
                self.product_dtype,
                clean.pre_linear[:, -n_read:] if clean.pre_linear is not None else None,
                delta_linear,
                backend=self.backend,
            )
        delta_post = patched(delta_post, patches.at(f"{name}.mlp.hook_post"), n_read)
        delta_out = None if delta_post is None else linear(delta_post, weights.out)
        return resid, patches.applied(f"{name}.hook_mlp_out", delta_out, n_read)

    def _pre(self, layer: int, delta_mid: Split, n_read: int) -> tuple[Delta, Delta, Delta | None]:
        """δ between a layer's halves, in one piece, and what it makes of the MLP's pre-activations and, where it is
        gated, of their linear part."""
        clean, weights, norm = self.clean[layer], self.weights(layer), cast(Block, self.model.blocks[layer]).ln2
        resid, normed = self._norm_delta(clean.resid_mid[:, -n_read:], clean.normed2[:, -n_read:], delta_mid, norm)
        delta_inner = linear(normed, weights.inner)
        return (
            (resid, delta_inner, None) if weights.gate is None else (resid, linear(normed, weights.gate), delta_inner)
        )

    def _is_narrow(self, layer: int, delta_mid: Split, patches: Patches, n_read: int) -> bool:
        """Whether nothing but one head of each set makes a difference yet, and the MLP had better read it as such."""
        name = f"blocks.{layer}.attn.hook"
        at_z, others = patches.at(f"{name}_z"), any(patches.at(f"{name}_{x}") for x in "qkv")
        alone = delta_mid[0] is None and not others and patches.feature_at(f"{name}_z") is None
        one_each = len(at_z) == 1 and at_z[0].single_heads is not None
        return alone and one_each and reads_heads(self.config, self.n_prompts * n_read, self.backend)

    def _pre_of_heads(
        self, layer: int, delta_mid: Split, patches: Patches, n_read: int
    ) -> tuple[Delta, Delta, Delta | None]:
        """`_pre` where a single head of each set is all that differs."""
        clean, weights, block = self.clean[layer], self.weights(layer), cast(Block, self.model.blocks[layer])
        (patch,), norm, mlp = patches.at(f"blocks.{layer}.attn.hook_z"), block.ln2, block.mlp
        heads, resid = cast(Tensor, patch.single_heads), cast(Tensor, _joined(delta_mid))
        centred = norm.bias is not None
        change = norm_change(clean.resid_mid[:, -n_read:], resid, norm.eps, centred)
        directions = head_directions(block.attn.w_o.weight, heads, self.config.d_head, norm.weight, centred)

        def pre(module: Linear, weight: Tensor, clean_pre: Tensor) -> Delta:
            constant = module.bias if norm.bias is None else module(norm.bias)
            return head_pre(
                patch.delta[:, -n_read:], heads, directions, change, weight, clean_pre[:, -n_read:], constant
            )

        if mlp.w_gate is None or weights.gate is None or clean.pre_linear is None:
            return resid, pre(mlp.w_in, weights.inner, clean.pre), None
        return resid, pre(mlp.w_gate, weights.gate, clean.pre), pre(mlp.w_in, weights.inner, clean.pre_linear)

    def _norm_delta(self, clean: Tensor, clean_normed: Tensor, delta: Split, norm: Norm) -> tuple[Delta, Delta]:
        """δ in one piece, and the norm's change under it, in the precision of the products."""
        resid, product = delta
        if resid is None:
            resid, product = _joined(delta), None
        assert resid is not None
        return norm_delta(
            clean,
            clean_normed,
            resid,
            norm.weight,
            norm.bias,
            norm.eps,
            self.product_dtype,
            product=product,
            backend=self.backend,
        )

    def _heads(self, delta: Tensor | None) -> Float[Tensor, "#set prompt pos head d_head"] | None:
        return None if delta is None else delta.unflatten(-1, (-1, self.config.d_head))


def _is_nothing(delta: Split) -> bool:
    return delta[0] is None and delta[1] is None


def _at_least(delta: Delta | None, n_pos: int) -> Delta | None:
    """δ at `n_pos` positions, 0 at those that it lacks at the end."""
    missing = 0 if delta is None else n_pos - delta.shape[2]
    return delta if delta is None or not missing else F.pad(delta, (0, 0, 0, missing))


def _joined(delta: Split) -> Delta | None:
    """A residual δ in one piece, in the precision of the clean run."""
    resid, product = delta
    if product is None:
        return resid
    if resid is None:
        return product.to(torch.promote_types(product.dtype, torch.float32))
    return resid + product


def first_difference(a: PatchSet, b: PatchSet, n_layers: int) -> int:
    """The lowest layer in which two patch sets differ; n_layers if in none."""

    def in_layer(patch_set: PatchSet, layer: int) -> list[tuple[object, object]]:
        chosen = [patch for patch in patch_set if patch.site.component.layer == layer]
        return [(patch.site, patch.source if isinstance(patch.source, str) else id(patch.source)) for patch in chosen]

    return next((layer for layer in range(n_layers) if in_layer(a, layer) != in_layer(b, layer)), n_layers)
