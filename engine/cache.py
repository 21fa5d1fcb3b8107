"""The activations of one forward pass, and the decompositions of the residual stream that people read off them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subcircuit.engine.errors import NotCachedError

if TYPE_CHECKING:
    from subcircuit.engine.blocks import Attention
    from subcircuit.engine.model import HookedTransformer

CacheKey = str | tuple[str, int] | tuple[str, int, str]

_SUBMODULE = {
    **dict.fromkeys(("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result"), "attn."),
    **dict.fromkeys(("pre", "pre_linear", "post"), "mlp."),
}


class ActivationCache(Mapping[str, Tensor]):
    """Activations by hook name: `cache["blocks.3.attn.hook_z"]`.

    In short `cache["embed"]`, `cache["z", 3]`, and where a block has several of the name, `cache["scale", 3, "ln1"]`;
    layer -1 is the last.

    Raises NotCachedError (a HookError and a KeyError) for a name that was not kept.
    """

    def __init__(self, values: Mapping[str, Tensor], model: HookedTransformer) -> None:
        self._values = dict(values)
        self._model = model

    def __getitem__(self, key: CacheKey) -> Tensor:
        name = self._hook_name(key)
        if name not in self._values:
            raise NotCachedError(f"{name!r} is not among the {len(self)} activations kept; name it in run_with_cache")
        return self._values[name]

    def _hook_name(self, key: CacheKey) -> str:
        if isinstance(key, str):
            return f"hook_{key}" if f"hook_{key}" in self._values else key
        layer = key[1] + self._model.config.n_layers if key[1] < 0 else key[1]
        submodule = f"{key[2]}." if len(key) == 3 else _SUBMODULE.get(key[0], "")
        return f"blocks.{layer}.{submodule}hook_{key[0]}"

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"ActivationCache({len(self._values)} activations of {self._model.config.name or 'a model'})"

    def to(self, device: torch.device | str) -> ActivationCache:
        """The same cache with every activation on another device."""
        return ActivationCache({name: value.to(device) for name, value in self._values.items()}, self._model)

    def head_results(self, layer: int) -> Float[Tensor, "batch pos head d_model"]:
        """What each head of a layer adds to the residual stream: z W_O, per head, without the output bias."""
        return torch.einsum("bphk,hkd->bphd", self["z", layer], self._attention(layer).W_O)

    def _attention(self, layer: int) -> Attention:
        return cast("Attention", self._model.blocks[layer].attn)

    def residual_stack(self) -> tuple[Float[Tensor, "stage batch pos d_model"], list[str]]:
        """The residual stream as it grows: entering each layer, and after the last; with a label per stage."""
        n_layers = self._model.config.n_layers
        stages = [self["resid_pre", layer] for layer in range(n_layers)] + [self["resid_post", n_layers - 1]]
        return torch.stack(stages), [f"{layer}_pre" for layer in range(n_layers)] + ["final"]

    def decompose_residual(self, by_head: bool = False) -> tuple[Float[Tensor, "part batch pos d_model"], list[str]]:
        """The terms whose sum is the final residual stream, with a label per term.

        Embeddings, then per layer the attention output and the MLP output; with `by_head` every head is a term
        (`a5.h1`) and the output bias of a layer's attention another (`a5.bias`).
        """
        config = self._model.config
        parts = {"embed": self["hook_embed"]}
        if config.positions == "learned":
            parts["pos_embed"] = self["hook_pos_embed"]
        for layer in range(config.n_layers):
            if by_head:
                results = self.head_results(layer).unbind(2)
                parts |= {f"a{layer}.h{head}": result for head, result in enumerate(results)}
                bias = self._attention(layer).w_o.bias
                if bias is not None:
                    parts[f"a{layer}.bias"] = bias.expand_as(parts["embed"])
            else:
                parts[f"a{layer}"] = self["attn_out", layer]
            parts[f"m{layer}"] = self["mlp_out", layer]
        return torch.stack(list(parts.values())), list(parts)

    def logit_lens(self, position: int = -1) -> Float[Tensor, "stage batch d_vocab"]:
        """Logits read from every stage of `residual_stack` at one position, through the final norm."""
        return self._model.unembed_normed(self.residual_stack()[0][:, :, position])

    def logit_attribution(
        self,
        answer: Int[Tensor, "batch"],
        wrong: Int[Tensor, "batch"] | None = None,
        *,
        by_head: bool = False,
        position: int = -1,
    ) -> tuple[Float[Tensor, "part batch"], list[str]]:
        """Direct logit attribution: what each term of `decompose_residual` adds to the answer's logit.

        With `wrong`, to the answer's lead over it. The final norm's scale is held at its value in this pass, and its
        bias is a term of its own (`bias`), so that the terms add up to the logit (difference) exactly.
        """
        model = self._model
        parts, labels = self.decompose_residual(by_head)
        parts = parts[:, :, position]
        direction = model.unembed_weight[answer]
        if wrong is not None:
            direction = direction - model.unembed_weight[wrong]
        final, norm = self["resid_post", model.config.n_layers - 1][:, position], model.ln_final
        if norm.centred:
            parts, final = parts - parts.mean(-1, keepdim=True), final - final.mean(-1, keepdim=True)
        scale = (final.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
        shares = (parts / scale * norm.weight * direction).sum(-1)
        if norm.bias is not None:
            shares = torch.cat((shares, (norm.bias * direction).sum(-1)[None]))
            labels = [*labels, "bias"]
        return shares, labels
