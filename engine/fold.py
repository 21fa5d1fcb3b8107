"""Rewriting a model's weights so that they are easier to read, without changing what it computes.

Nothing of this happens on its own. Each function returns a new model whose logits equal the given one's up to rounding;
weights that need no change are shared by the two.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import ConfigError
from subcircuit.engine.model import HookedTransformer

_READERS = (("ln1", "attn", ("w_q", "w_k", "w_v")), ("ln2", "mlp", ("w_in", "w_gate")))
"""Each norm of a block, and the linear maps that read it."""


@torch.no_grad()
def fold_norms(model: HookedTransformer) -> HookedTransformer:
    """The same model with every norm's weight and bias moved into the linear maps that read it.

    W(w · x̂ + b) = (W diag(w)) x̂ + W b, so a row of the new W says what a direction of the normed residual stream does.
    Norm weights are 1 afterwards and biases 0; a LayerNorm model gains biases where it had none, and a tied unembedding
    is untied. The unembedding has no bias, so the final norm keeps one: b / w.

    Raises ConfigError where the final norm's weight is 0 and its bias is not.
    """
    config = model.config
    is_layernorm = config.norm == "layernorm"
    folded = replace(
        config,
        tied_unembed=False,
        qkv_bias=config.qkv_bias or is_layernorm,
        mlp_bias=config.mlp_bias or is_layernorm,
    )
    tensors = dict(model.state_dict())
    for layer in range(config.n_layers):
        for norm, part, readers in _READERS:
            name = f"blocks.{layer}.{norm}"
            for reader in readers:
                linear = f"blocks.{layer}.{part}.{reader}"
                if f"{linear}.weight" in tensors:
                    _fold_into(tensors, name, linear)
            _reset(tensors, name)
    final_weight = tensors["ln_final.weight"]
    tensors["unembed.weight"] = model.unembed_weight * final_weight
    if is_layernorm:
        bias = tensors["ln_final.bias"]
        if bool(((final_weight == 0) & (bias != 0)).any()):
            raise ConfigError("ln_final cannot be folded: its weight is 0 where its bias is not")
        _reset(tensors, "ln_final")
        tensors["ln_final.bias"] = torch.where(bias == 0, 0, bias / final_weight)
    else:
        _reset(tensors, "ln_final")
    return _rebuilt(model, folded, tensors)


@torch.no_grad()
def centre_residual(model: HookedTransformer) -> HookedTransformer:
    """The same model with the mean over d_model taken out of everything that writes to the residual stream.

    A LayerNorm takes that mean out of all it reads, so it carries nothing. A tied unembedding is untied: only the
    embedding is centred.

    Raises ConfigError for a model with RMSNorm, which does read the mean.
    """
    if model.config.norm != "layernorm":
        raise ConfigError(
            f"the residual stream of a model with {model.config.norm} cannot be centred: the mean is read"
        )
    tensors = dict(model.state_dict())
    tensors["unembed.weight"] = model.unembed_weight
    for name, tensor in tensors.items():
        if name in ("embed.weight", "pos_embed.weight"):
            tensors[name] = tensor - tensor.mean(1, keepdim=True)
        elif ".attn.w_o." in name or ".mlp.w_out." in name:
            tensors[name] = tensor - tensor.mean(0, keepdim=True)
    return _rebuilt(model, replace(model.config, tied_unembed=False), tensors)


def _fold_into(tensors: dict[str, Tensor], norm: str, linear: str) -> None:
    weight = tensors[f"{linear}.weight"]
    if f"{norm}.bias" in tensors:
        gained = weight @ tensors[f"{norm}.bias"]
        tensors[f"{linear}.bias"] = tensors[f"{linear}.bias"] + gained if f"{linear}.bias" in tensors else gained
    tensors[f"{linear}.weight"] = weight * tensors[f"{norm}.weight"]


def _reset(tensors: dict[str, Tensor], norm: str) -> None:
    tensors[f"{norm}.weight"] = torch.ones_like(tensors[f"{norm}.weight"])
    if f"{norm}.bias" in tensors:
        tensors[f"{norm}.bias"] = torch.zeros_like(tensors[f"{norm}.bias"])


def _rebuilt(model: HookedTransformer, config: ModelConfig, tensors: dict[str, Tensor]) -> HookedTransformer:
    """A new model; biases that the configuration asks for and nothing was folded into are 0."""
    for name, shape in HookedTransformer.parameter_shapes(config).items():
        if name not in tensors:
            tensors[name] = torch.zeros(shape, dtype=model.dtype, device=model.device)
    return HookedTransformer(config, tensors, model.tokenizer)
