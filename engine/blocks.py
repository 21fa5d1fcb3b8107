"""Norm, attention, MLP and the block that joins them, each firing its hook points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import HookError
from subcircuit.engine.hooks import HookTable
from subcircuit.engine.inputs import KVCache
from subcircuit.engine.rope import rotate
from subcircuit.kernels.linear import linear

Residual = Float[Tensor, "batch pos d_model"]
FireHook = Callable[[str, Tensor], Tensor]


@dataclass
class Pass:
    """What the blocks of one forward pass share."""

    hooks: HookTable
    rope: tuple[Tensor, Tensor] | None
    mask: Bool[Tensor, "batch 1 q_pos k_pos"] | None
    """Which keys a query may read; None means plain causal over the same positions."""
    kv_cache: KVCache | None


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
}


def activation(name: str, x: Tensor) -> Tensor:
    """The MLP's nonlinearity. `gelu_new` is the tanh approximation that GPT-2 was trained with."""
    return _ACTIVATIONS[name](x)


class Norm(nn.Module):
    """LayerNorm (with bias) or RMSNorm (without), over d_model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.centred = config.norm == "layernorm"
        self.weight = nn.Parameter(torch.empty(config.d_model))
        self.bias = nn.Parameter(torch.empty(config.d_model)) if self.centred else None

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def hooked(self, x: Tensor, name: str, hooks: HookTable, fire: FireHook | None = None) -> Tensor:
        """forward, with `hook_scale` and `hook_normalized` where somebody set them.

        `hook_normalized` is the value before weight and bias, in LayerNorm too. Both are float32 in a model of lower
        precision.
        """
        if not hooks.wants(f"{name}.hook_scale", f"{name}.hook_normalized"):
            return cast(Tensor, self(x))
        fire = hooks if fire is None else fire
        dtype = x.dtype
        x = x if dtype == torch.float64 else x.float()
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        scale = fire(f"{name}.hook_scale", (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        out = fire(f"{name}.hook_normalized", x / scale).to(dtype) * self.weight
        return out if self.bias is None else out + self.bias


class Linear(nn.Linear):
    """`nn.Linear`, by the fastest product there is where nobody asks for gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.is_grad_enabled() else linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Causal self-attention; grouped-query where there are fewer KV heads than query heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        d_q, d_kv = config.n_heads * config.d_head, config.kv_heads * config.d_head
        self.w_q = Linear(config.d_model, d_q, bias=config.qkv_bias)
        self.w_k = Linear(config.d_model, d_kv, bias=config.qkv_bias)
        self.w_v = Linear(config.d_model, d_kv, bias=config.qkv_bias)
        self.w_o = Linear(d_q, config.d_model, bias=config.attn_out_bias)

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        return self._per_head(self.w_q.weight)

    @property
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        return self._per_head(self.w_k.weight)

    @property
    def W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        return self._per_head(self.w_v.weight)

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        return self.w_o.weight.T.reshape(self.config.n_heads, self.config.d_head, self.config.d_model)

    def _per_head(self, weight: Tensor) -> Tensor:
        return weight.reshape(-1, self.config.d_head, self.config.d_model).transpose(1, 2)

    def project(self, x: Tensor, linear: nn.Linear) -> Float[Tensor, "batch pos head d_head"]:
        """Queries, keys or values of x, which is `[batch pos d_model]` or already split per head."""
        d_head = self.config.d_head
        if x.ndim == 3:
            return cast(Tensor, linear(x)).reshape(*x.shape[:2], -1, d_head)
        out = torch.einsum("bphd,hdk->bphk", x, self._per_head(linear.weight))
        return out if linear.bias is None else out + linear.bias.reshape(-1, d_head)

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor], layer: int, run: Pass) -> Residual:
        """Output of the layer's heads for normed inputs of q, k and v."""
        hooks, name = run.hooks, f"blocks.{layer}.attn"
        q = hooks(f"{name}.hook_q", self.project(inputs[0], self.w_q))
        k = hooks(f"{name}.hook_k", self.project(inputs[1], self.w_k))
        v = hooks(f"{name}.hook_v", self.project(inputs[2], self.w_v))
        if run.rope is not None:
            q = hooks(f"{name}.hook_rot_q", rotate(q, *run.rope))
            k = hooks(f"{name}.hook_rot_k", rotate(k, *run.rope))
        if run.kv_cache is not None:
            k, v = run.kv_cache.extend(layer, k, v)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if hooks.wants(f"{name}.hook_attn_scores", f"{name}.hook_pattern"):
            z = self._explicit(q, k, v, name, run)
        else:
            gqa = self.config.group_size > 1
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=run.mask, is_causal=run.mask is None, enable_gqa=gqa)
        z = hooks(f"{name}.hook_z", z.transpose(1, 2))
        if not hooks.wants(f"{name}.hook_result"):
            return cast(Tensor, self.w_o(z.flatten(2)))
        out = hooks(f"{name}.hook_result", torch.einsum("bphk,hkd->bphd", z, self.W_O)).sum(2)
        return out if self.w_o.bias is None else out + self.w_o.bias

    def _explicit(self, q: Tensor, k: Tensor, v: Tensor, name: str, run: Pass) -> Tensor:
        k, v = (x.repeat_interleave(self.config.group_size, dim=1) for x in (k, v))
        mask = run.mask
        if mask is None:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        scores = (q @ k.transpose(-1, -2)) * self.config.d_head**-0.5
        scores = run.hooks(f"{name}.hook_attn_scores", scores.masked_fill(~mask, float("-inf")))
        pattern = run.hooks(f"{name}.hook_pattern", scores.softmax(-1))
        return pattern @ v


class MLP(nn.Module):
    """w_out act(w_in x), or gated: w_out (act(w_gate x) · w_in x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        bias = config.mlp_bias
        self.w_in = Linear(config.d_model, config.d_mlp, bias=bias)
        self.w_gate = Linear(config.d_model, config.d_mlp, bias=bias) if config.gated_mlp else None
        self.w_out = Linear(config.d_mlp, config.d_model, bias=bias)

    def forward(self, x: Residual, layer: int, run: Pass) -> Residual:
        hooks, name = run.hooks, f"blocks.{layer}.mlp"
        if self.w_gate is None:
            post = activation(self.activation, hooks(f"{name}.hook_pre", self.w_in(x)))
        else:
            pre = hooks(f"{name}.hook_pre", self.w_gate(x))
            post = activation(self.activation, pre) * hooks(f"{name}.hook_pre_linear", self.w_in(x))
        return cast(Tensor, self.w_out(hooks(f"{name}.hook_post", post)))


class Block(nn.Module):
    """Attention, then the MLP, each adding to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.ln1 = Norm(config)
        self.attn = Attention(config)
        self.ln2 = Norm(config)
        self.mlp = MLP(config)

    def forward(self, resid: Residual, layer: int, run: Pass) -> Residual:
        hooks, name = run.hooks, f"blocks.{layer}"
        resid = hooks(f"{name}.hook_resid_pre", resid)
        resid_mid = resid + hooks(f"{name}.hook_attn_out", self.attn(self._attn_inputs(resid, layer, run), layer, run))
        resid_mid = hooks(f"{name}.hook_resid_mid", resid_mid)
        mlp_in = _own_copy(hooks, f"{name}.hook_mlp_in", resid_mid)
        mlp_out = self.mlp(self.ln2.hooked(mlp_in, f"{name}.ln2", hooks), layer, run)
        return hooks(f"{name}.hook_resid_post", resid_mid + hooks(f"{name}.hook_mlp_out", mlp_out))

    def _attn_inputs(self, resid: Residual, layer: int, run: Pass) -> tuple[Tensor, Tensor, Tensor]:
        """Normed inputs of q, k and v: one tensor thrice, unless a hook asks for the input of each head."""
        hooks, name = run.hooks, f"blocks.{layer}"
        split = [f"{name}.hook_{x}" for x in ("attn_in", "q_input", "k_input", "v_input")]
        if not hooks.wants(*split):
            normed = self.ln1.hooked(resid, f"{name}.ln1", hooks)
            return normed, normed, normed
        # Each head has a norm of its own now; the shared one can still be read.
        self.ln1.hooked(resid, f"{name}.ln1", hooks, fire=hooks.observe)
        per_head = _own_copy(hooks, split[0], resid.unsqueeze(2).expand(-1, -1, self.config.n_heads, -1))
        per_kv_head = self._one_per_group(per_head, split[0]) if self.config.group_size > 1 else per_head
        inputs = zip(split[1:], (per_head, per_kv_head, per_kv_head), strict=True)
        q, k, v = (self.ln1(_own_copy(hooks, split_name, value)) for split_name, value in inputs)
        return q, k, v

    def _one_per_group(
        self, per_head: Float[Tensor, "batch pos head d_model"], name: str
    ) -> Float[Tensor, "batch pos kv_head d_model"]:
        """What the heads of each group read. A key or value serves them all, so they must read the same."""
        groups = per_head.reshape(*per_head.shape[:2], self.config.kv_heads, self.config.group_size, -1)
        if not torch.equal(groups, groups[:, :, :, :1].expand_as(groups)):
            raise HookError(
                f"hook on {name!r} tells heads that share a key apart; set q_input, k_input and v_input instead"
            )
        return groups[:, :, :, 0]


def _own_copy(hooks: HookTable, name: str, value: Tensor) -> Tensor:
    """What a hook makes of its own copy of a value that others read too, so that it may write to it in place."""
    return hooks(name, value.clone()) if hooks.wants(name) else value
