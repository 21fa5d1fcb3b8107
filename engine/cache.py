"""The activations of one forward pass, and the decompositions of the residual stream that people read off them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subcircuit.engine.errors import HookError

if TYPE_CHECKING:
    from subcircuit.engine.model import HookedTransformer

_SUBMODULE = {
    **dict.fromkeys(("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result"), "attn."),
    **dict.fromkeys(("pre", "pre_linear", "post"), "mlp."),
}


class ActivationCache(Mapping[str, Tensor]):
    """Activations by hook name: `cache["blocks.3.attn.hook_z"]`, or in short `cache["z", 3]`.

    Raises HookError for a name that was not kept.
    """

    def __init__(self, values: Mapping[str, Tensor], model: HookedTransformer) -> None:
        self._values = dict(values)
        self._model = model

    def __getitem__(self, key: str | tuple[str, int]) -> Tensor:
        name = key if isinstance(key, str) else f"blocks.{key[1]}.{_SUBMODULE.get(key[0], '')}hook_{key[0]}"
        if name not in self._values:
            raise HookError(f"{name!r} is not in this cache of {len(self._values)} activations; name it in run_with_cache")
        return self._values[name]

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
        attn = self._model.blocks[layer].attn
        return torch.einsum("bphk,hkd->bphd", self["z", layer], attn.W_O)

    def residual_stack(self) -> tuple[Float[Tensor, "stage batch pos d_model"], list[str]]:
        """The residual stream as it grows: entering each layer, and after the last; with a label per stage."""
        n_layers = self._model.config.n_layers
        stages = [self["resid_pre", layer] for layer in range(n_layers)] + [self["resid_post", n_layers - 1]]
        return torch.stack(stages), [f"{layer}_pre" for layer in range(n_layers)] + ["final"]

    def decompose_residual(self, by_head: bool = False) -> tuple[Float[Tensor, "part batch pos d_model"], list[str]]:
        """The terms whose sum is the final residual stream, with a label per term.

        Embeddings, then per layer the attention output and the MLP output; with `by_head` every head is a term (`a5.h1`)
        and the output bias of a layer's attention another (`a5.bias`).
        """
        config = self._model.config
        parts = {"embed": self["hook_embed"]}
        if config.positions == "learned":
            parts["pos_embed"] = self["hook_pos_embed"]
        for layer in range(config.n_layers):
            if by_head:
                results = self.head_results(layer).unbind(2)
                parts |= {f"a{layer}.h{head}": result for head, result in enumerate(results)}
                bias = self._model.blocks[layer].attn.w_o.bias
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
        """Direct logit attribution: what each term of the residual stream adds to the answer's logit, or to its lead over
        `wrong`, with the final norm's scale held at its value in this pass.

        The terms add up to that logit (difference) exactly, the final norm's bias being a term of its own (`bias`).
        """
        model = self._model
        parts, labels = self.decompose_residual(by_head)
        parts = parts[:, :, position]
        direction = model.unembed_weight[answer]
        if wrong is not None:
            direction = direction - model.unembed_weight[wrong]
        final, norm = parts.sum(0), model.ln_final
        if norm.centred:
            parts, final = parts - parts.mean(-1, keepdim=True), final - final.mean(-1, keepdim=True)
        scale = (final.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
        shares = (parts / scale * norm.weight * direction).sum(-1)
        if norm.bias is not None:
            shares = torch.cat((shares, (norm.bias * direction).sum(-1)[None]))
            labels = [*labels, "bias"]
        return shares, labels
