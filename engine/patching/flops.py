"""How many FLOPs a chunk of rows costs, layer by layer: a mirror of what `delta.DeltaRun` multiplies, a product of
[m, k] and [k, n] counted as 2 m k n. Elementwise work is not counted."""

from __future__ import annotations

from dataclasses import dataclass

from subcircuit.engine.config import ModelConfig
from subcircuit.engine.patching.compile import MaskArray, Masks, one_head_each, replaces_all
from subcircuit.engine.patching.metric import Metrics, needs_vocabulary
from subcircuit.kernels.backend import Backend
from subcircuit.kernels.head_pre import is_head_pre_cheaper
from subcircuit.kernels.query_delta import is_query_delta_cheaper


@dataclass(frozen=True)
class Flops:
    """Of δ times weights, and of queries times keys and scores times values."""

    products: int = 0
    attention: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.products + other.products, self.attention + other.attention)

    def __mul__(self, n: int) -> Flops:
        return Flops(self.products * n, self.attention * n)

    @property
    def all(self) -> int:
        return self.products + self.attention


def chunk_flops(
    config: ModelConfig,
    backend: Backend,
    masks: Masks,
    n_sets: int,
    n_prompts: int,
    n_pos: int,
    from_layer: int,
    first: int,
    entering: bool = False,
    n_moved: int | None = None,
) -> dict[int, Flops]:
    """FLOPs by layer of rows that are computed from a layer and a position on; `entering` says whether a δ enters that
    layer already, `n_moved` at how many positions, if not at all."""
    layers: dict[int, Flops] = {}
    for layer in range(from_layer, config.n_layers):
        block = _Block(config, backend, layer, masks, n_sets, n_prompts, n_pos, first, n_moved)
        layers[layer], entering = block.flops(entering)
        n_moved = None
    return layers


def clean_flops(config: ModelConfig, n_pos: int, n_layers: int) -> Flops:
    """FLOPs of one prompt's forward pass through the first layers."""
    n_q, n_kv = config.n_heads * config.d_head, config.kv_heads * config.d_head
    n_weights = config.d_model * (2 * n_q + 2 * n_kv + (3 if config.gated_mlp else 2) * config.d_mlp)
    return Flops(2 * n_weights * n_pos, 4 * n_q * n_pos**2) * n_layers


def readout_flops(config: ModelConfig, metric: Metrics) -> int:
    """FLOPs of one final residual stream times W_U, where a metric needs the whole vocabulary."""
    return 2 * config.d_model * config.d_vocab if needs_vocabulary(metric) else 0


def projects_no_keys(config: ModelConfig, n_new: int, backend: Backend) -> bool:
    """Whether the last layer's keys and values are left out where a δ enters at `n_new` positions. On a GPU the small
    products of single heads would take longer than the large ones that they replace."""
    shape = config.n_heads, config.kv_heads, config.d_head, config.d_model
    return backend == "native" and is_query_delta_cheaper(n_new, *shape)


def reads_heads(config: ModelConfig, n_tokens: int, backend: Backend) -> bool:
    """Whether the MLP of a layer in which single heads are patched reads their outputs, and not the stream, where a
    head has so many tokens. On a GPU, as above."""
    return backend == "native" and is_head_pre_cheaper(n_tokens, config.d_head, config.d_model)


@dataclass(frozen=True)
class _Block:
    """One layer of a chunk. What it asks of the masks, `DeltaRun` asks of the patches made from them."""

    config: ModelConfig
    backend: Backend
    layer: int
    masks: Masks
    n_sets: int
    n_prompts: int
    n_pos: int
    first: int
    n_moved: int | None

    def flops(self, entering: bool) -> tuple[Flops, bool]:
        """FLOPs, and whether anything leaves the layer, given whether anything enters it."""
        entering = entering or bool(self._at("hook_resid_pre"))
        attention, from_heads = self._attention(entering)
        mlp, from_mlp = self._mlp(entering or from_heads, narrow=not entering and self._reads_heads)
        return attention + mlp, entering or from_heads or from_mlp

    @property
    def _n_rows(self) -> int:
        return self.n_sets * self.n_prompts

    @property
    def _n_new(self) -> int:
        return self.n_pos - self.first

    @property
    def _n_read(self) -> int:
        return 1 if self.layer == self.config.n_layers - 1 else self._n_new

    def _at(self, hook: str) -> list[MaskArray]:
        return list(self.masks.get(f"blocks.{self.layer}.{hook}", {}).values())

    @property
    def _projects_no_keys(self) -> bool:
        replaced = self._at("attn.hook_k") or self._at("attn.hook_v")
        return self._n_read == 1 and not replaced and projects_no_keys(self.config, self._n_new, self.backend)

    @property
    def _reads_heads(self) -> bool:
        """Whether, with no δ entering, the MLP reads single heads."""
        at_z, others = self._at("attn.hook_z"), any(self._at(f"attn.hook_{x}") for x in "qkv")
        alone = len(at_z) == 1 and one_head_each(at_z[0]) and not others
        return alone and reads_heads(self.config, self.n_prompts * self._n_read, self.backend)

    def _product(self, n_tokens: int, n_in: int, n_out: int) -> Flops:
        return Flops(products=2 * self._n_rows * n_tokens * n_in * n_out)

    def _attention(self, entering: bool) -> tuple[Flops, bool]:
        config, at_z, n_read = self.config, self._at("attn.hook_z"), self._n_read
        n_q, n_kv = config.n_heads * config.d_head, config.kv_heads * config.d_head
        flops, delta_z = Flops(), False
        if not (len(at_z) == 1 and replaces_all(at_z[0])):
            if entering:
                moved = self._n_new if self.n_moved is None or self._at("hook_resid_pre") else self.n_moved
                n_queries = moved if n_read == self._n_new else n_read if moved == self._n_new else 0
                flops += self._product(n_queries, config.d_model, n_q)
                if moved == self._n_new and self._projects_no_keys:
                    flops += self._in_place_of_keys_and_values()
                else:
                    flops += self._product(moved, config.d_model, 2 * n_kv)
            delta_z = entering or any(self._at(f"attn.hook_{x}") for x in "qkv")
        if delta_z:
            flops += Flops(attention=4 * self._n_rows * n_read * self.n_pos * n_q)
        elif len(at_z) == 1 and one_head_each(at_z[0]):
            return flops + self._product(n_read, config.d_head, config.d_model), True
        leaving = delta_z or bool(at_z)
        return flops + self._product(n_read, n_q, config.d_model) if leaving else flops, leaving

    def _in_place_of_keys_and_values(self) -> Flops:
        """What `query_delta` multiplies with δn: a vector of each head, made with a weight, or turned keys."""
        config, n_new = self.config, self._n_new
        n_q, n_kv = config.n_heads * config.d_head, config.kv_heads * config.d_head
        values = Flops(attention=2 * self._n_rows * config.d_model * (n_q + config.n_heads * n_new))
        if config.positions == "rope":
            keys = self._product(n_new, config.d_model, n_kv) + Flops(attention=2 * self._n_rows * n_q * n_new)
            return keys + values
        return values * 2

    def _mlp(self, entering: bool, narrow: bool) -> tuple[Flops, bool]:
        config, at_out, n_read = self.config, self._at("hook_mlp_out"), self._n_read
        if len(at_out) == 1 and replaces_all(at_out[0]):
            return Flops(), True
        flops = Flops()
        if entering:
            n_inner = (2 if config.gated_mlp else 1) * config.d_mlp
            flops += self._product(n_read, config.d_head if narrow else config.d_model, n_inner)
            if narrow:
                n_vectors = self.n_sets * config.d_head + (config.norm == "layernorm")  # the norm's bias beside them
                flops += Flops(products=2 * n_vectors * config.d_model * n_inner)
        delta_post = entering or bool(self._at("mlp.hook_post"))
        if delta_post:
            flops += self._product(n_read, config.d_mlp, config.d_model)
        return flops, delta_post or bool(at_out)
