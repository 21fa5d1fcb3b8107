"""Sparse dictionaries: an encoder and a decoder that write an activation as a sum of few features and an error."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import ConfigError, HookError

Activation = Literal["relu", "jumprelu", "topk"]

ACTS = "hook_sae_acts_post"
"""Last part of the hook point that holds a dictionary's feature activations, by SAELens' name."""

PLACES = ("hook_resid_pre", "attn.hook_z", "hook_resid_mid", "hook_mlp_out")
"""Hook points of a layer at which a dictionary can sit, in the order in which the layer computes them."""


def acts_name(hook_name: str) -> str:
    """The hook point of the features of a dictionary that sits at `hook_name`."""
    return f"{hook_name}.{ACTS}"


@dataclass(frozen=True, eq=False)
class SparseDictionary:
    """A sparse autoencoder at a hook point (Bricken et al. 2023, "Towards Monosemanticity"; Cunningham et al. 2023,
    arXiv 2309.08600):

        pre  = (x − b_dec) W_enc + b_enc               without b_dec where `subtract_b_dec` is False
        f    = act(pre)
        x    = f W_dec + b_dec + error

    `relu` is max(pre, 0). `jumprelu` keeps pre where it is above both 0 and its feature's `threshold`, and is 0
    elsewhere (Rajamanoharan et al. 2024, arXiv 2407.14435). `topk` keeps the k largest of each position, if positive
    (Gao et al. 2024, arXiv 2406.04093). Heads' outputs (`attn.hook_z`) are read side by side as one vector. What is
    said to sit at a layer's `hook_resid_post` sits at the next one's `hook_resid_pre`, which is the same value.

    Raises ConfigError for a tensor of another shape, or a `k` or `threshold` that the activation lacks or cannot take.
    """

    hook_name: str
    W_enc: Float[Tensor, "d_in d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_in"]
    activation: Activation = "relu"
    k: int | None = None
    threshold: Float[Tensor, " d_sae"] | None = None
    subtract_b_dec: bool = True

    def __post_init__(self) -> None:
        left = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", self.hook_name)
        if left:
            object.__setattr__(self, "hook_name", f"blocks.{int(left[1]) + 1}.hook_resid_pre")
        if self.activation not in get_args(Activation):
            raise ConfigError(
                f"activation {self.activation!r} is not known; expected one of {', '.join(get_args(Activation))}"
            )
        if self.W_enc.ndim != 2:
            raise ConfigError(f"tensor 'W_enc' has shape {tuple(self.W_enc.shape)}; expected [d_in, d_sae]")
        d_in, d_sae = self.W_enc.shape
        for name, shape in {"W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,), "threshold": (d_sae,)}.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ConfigError(f"tensor {name!r} has shape {tuple(tensor.shape)}; expected {shape}")
        if (self.threshold is None) == (self.activation == "jumprelu"):
            raise ConfigError(f"activation {self.activation!r} with threshold {self.threshold}; 'jumprelu' has one")
        if self.activation == "topk" and not 0 < (self.k or 0) <= d_sae:
            raise ConfigError(f"k is {self.k}; expected 1 to the {d_sae} features of the dictionary")

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Feature activations."""
        return self._act(self._centred(x) @ self.W_enc + self.b_enc)

    def encode_chosen(
        self, x: Float[Tensor, "#set prompt pos d_in"], features: Int[Tensor, "set chosen"]
    ) -> Float[Tensor, "set prompt pos chosen"]:
        """Activations of each set's chosen features only; no others are computed unless they compete (`topk`)."""
        x = x.expand(len(features), -1, -1, -1)
        if self.activation == "topk":
            where = features[:, None, None].expand(-1, *x.shape[1:3], -1)
            return self.encode(x).gather(-1, where)
        pre = torch.einsum("spqd,dsc->spqc", self._centred(x), self.W_enc[:, features])
        threshold = None if self.threshold is None else self.threshold[features][:, None, None]
        return _rectified(pre + self.b_enc[features][:, None, None], threshold)

    def decode(self, acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """The activation that features add up to, without the error."""
        return acts @ self.W_dec + self.b_dec

    def error(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """What the features leave out: x − decode(encode(x))."""
        return x - self.decode(self.encode(x))

    def spliced(
        self, value: Float[Tensor, "batch pos ..."], change: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "batch pos ..."]:
        """The hook point's value where `change` has had its way with the feature activations; the error is kept.

        f' W_dec + b_dec + error is x + (f' − f) W_dec, which leaves x exactly as it is where nothing changes.
        """
        acts = self.encode(value.flatten(2))
        return value + ((change(acts.clone()) - acts) @ self.W_dec).view_as(value)

    def map(self, function: Callable[[Tensor], Tensor]) -> SparseDictionary:
        """With every tensor replaced, such as by one of another dtype or device."""
        W_enc, W_dec, b_enc, b_dec = map(function, (self.W_enc, self.W_dec, self.b_enc, self.b_dec))
        threshold = None if self.threshold is None else function(self.threshold)
        return replace(self, W_enc=W_enc, W_dec=W_dec, b_enc=b_enc, b_dec=b_dec, threshold=threshold)

    def fingerprint(self) -> str:
        """A short hash of a sample of its numbers, to tell one dictionary from another at the same place.

        It is taken of their first digits, which they keep in whatever dtype a model holds them.
        """
        digest = hashlib.sha256(f"{self.hook_name} {self.activation} {self.k} {self.subtract_b_dec}".encode())
        for tensor in (self.W_enc, self.W_dec, self.b_enc, self.b_dec, self.threshold):
            if tensor is not None:
                sample = tensor.flatten()[:: max(1, tensor.numel() // 1024)].to("cpu", torch.bfloat16)
                digest.update(sample.contiguous().view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]

    def check(self, config: ModelConfig) -> None:
        """Raises HookError when a model has no such hook point, or one of another width."""
        at = self.hook_name.split(".", 2)
        if len(at) != 3 or at[0] != "blocks" or not at[1].isdigit() or at[2] not in PLACES:
            places = ", ".join(f"blocks.0.{place}" for place in PLACES)
            raise HookError(f"a dictionary cannot sit at {self.hook_name!r}; expected one of {places}, of any layer")
        if int(at[1]) >= config.n_layers:
            raise HookError(
                f"dictionary at {self.hook_name!r}: the model has layers 0 to {config.n_layers - 1}, "
                "and what leaves the last one is no site"
            )
        width = config.n_heads * config.d_head if at[2] == "attn.hook_z" else config.d_model
        if self.d_in != width:
            raise HookError(f"dictionary at {self.hook_name!r} reads {self.d_in} entries; the model has {width} there")

    def _centred(self, x: Tensor) -> Tensor:
        return x - self.b_dec if self.subtract_b_dec else x

    def _act(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        if self.activation != "topk":
            return _rectified(pre, self.threshold)
        assert self.k is not None
        top = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())


def _rectified(pre: Tensor, threshold: Tensor | None) -> Tensor:
    """ReLU, or with a threshold JumpReLU."""
    return pre.relu() if threshold is None else pre.relu() * (pre > threshold)
