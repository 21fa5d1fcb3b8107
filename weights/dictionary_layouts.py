"""The layouts in which sparse dictionaries come: which tensor is what, and where a dictionary says that it sits.

| ours    | SAELens         | dictionary_learning               | sparsify         | Gemma Scope |
| ------- | --------------- | --------------------------------- | ---------------- | ----------- |
| `W_enc` | `W_enc`         | `encoder.weight`ᵀ                 | `encoder.weight`ᵀ | `W_enc`     |
| `W_dec` | `W_dec`         | `decoder.weight`ᵀ                 | `W_dec`          | `W_dec`     |
| `b_enc` | `b_enc`         | `encoder.bias`                    | `encoder.bias`   | `b_enc`     |
| `b_dec` | `b_dec`         | `bias`, of its top-k ones `b_dec` | `b_dec`          | `b_dec`     |
| `k`     | `k` in cfg.json | `k`, a tensor                     | `k` in cfg.json  |             |

Gated ones have `r_mag` and two biases in place of `b_enc`: SAELens' `b_gate` and `b_mag`, dictionary_learning's
`gate_bias` and `mag_bias`, with `decoder_bias` for `b_dec`.

SAELens' cfg.json changed over its versions; what is read is there from version 3 (flat) to 6 (the hook point under
`metadata`). Folders of sparsify are named for the module whose output is read, `layers.4` or `layers.4.mlp`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from subcircuit.engine.dictionary import Activation
from subcircuit.engine.errors import WeightsError
from subcircuit.weights.checkpoint import ConfigValues, StoredTensor
from subcircuit.weights.huggingface import read_json

CONFIG_FILE = "cfg.json"

ARCHITECTURES: Mapping[str, Activation] = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk"}
"""SAELens' names of ours; it has `gated` ones besides, which are read as `jumprelu`."""

OURS = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
_GATED = {name: name for name in ("W_enc", "W_dec", "b_gate", "b_mag", "r_mag", "b_dec")}
_LEARNING = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "encoder.bias"}
_LEARNING_GATED = {
    "W_enc": "encoder.weight",
    "W_dec": "decoder.weight",
    "b_gate": "gate_bias",
    "b_mag": "mag_bias",
    "r_mag": "r_mag",
    "b_dec": "decoder_bias",
}
_SPARSIFY = {"W_enc": "encoder.weight", "W_dec": "W_dec", "b_enc": "encoder.bias", "b_dec": "b_dec"}


@dataclass(frozen=True)
class Layout:
    """What a file holds, and what is to be made of it."""

    hook_name: str
    names: Mapping[str, str]
    """The file's tensors by our names."""
    activation: Activation
    k: int | None = None
    transposed: tuple[str, ...] = ()
    """Which of them, by our names, are stored the other way round."""
    subtract_b_dec: bool = True
    by_decoder_norm: bool = False
    """Whether activations are scaled by the norm of their decoder row before the k largest are chosen."""


def layout_of(file: Path, stored: Mapping[str, StoredTensor], hook: str | None) -> Layout:
    """The layout of a file, by its kind and its tensors' names; `hook` overrules where it says that it sits.

    Raises WeightsError for a kind of dictionary that is not supported, and where neither says where it sits.
    """
    if file.suffix == ".npz":
        return _gemma_scope(file, hook)
    if "encoder.weight" not in stored:
        return _saelens(file.parent / CONFIG_FILE, hook)
    return _sparsify(file.parent, hook) if "W_dec" in stored else _dictionary_learning(file, stored, hook)


def _saelens(file: Path, hook: str | None) -> Layout:
    values = ConfigValues(read_json(file), file)
    metadata = values.values.get("metadata")
    inner = ConfigValues(metadata if isinstance(metadata, dict) else {}, file)
    at = inner if inner.has("hook_name") else values
    architecture = values.text("architecture", "standard")
    legacy = values.values.get("activation_fn_kwargs", values.values.get("activation_fn_k"))
    if architecture == "standard" and values.text("activation_fn_str", values.text("activation_fn", "relu")) == "topk":
        architecture = "topk"  # before version 6 a setting of the standard architecture
    known = (*ARCHITECTURES, "gated")
    if architecture not in known:
        values.fail(f"architecture {architecture!r} is not supported; expected one of {', '.join(known)}")
    normalised = values.values.get("normalize_activations", "none")
    if normalised != "none":
        values.fail(f"'normalize_activations' is {normalised!r}; only 'none' is supported")
    if at.has("hook_head_index"):
        values.fail("'hook_head_index' is set; dictionaries of a single head are not supported")
    if values.flag("finetuning_scaling_factor"):
        values.fail("'finetuning_scaling_factor' is true; fold it into the weights and save it again")
    k = None
    if architecture == "topk":
        k = ConfigValues(legacy, file).integer("k") if isinstance(legacy, dict) and legacy else values.integer("k")
    names: Mapping[str, str] = _GATED if architecture == "gated" else OURS
    if architecture == "jumprelu":
        names = {**OURS, "threshold": "threshold"}
    return Layout(
        hook or at.text("hook_name"),
        names,
        ARCHITECTURES.get(architecture, "jumprelu"),
        k,
        subtract_b_dec=values.flag("apply_b_dec_to_input", True),
        by_decoder_norm=values.flag("rescale_acts_by_decoder_norm"),
    )


def _dictionary_learning(file: Path, stored: Mapping[str, StoredTensor], hook: str | None) -> Layout:
    transposed = ("W_enc", "W_dec")
    if "r_mag" in stored:
        return Layout(_given(hook, file), _LEARNING_GATED, "jumprelu", transposed=transposed)
    k = int(stored["k"].read(torch.float64)) if "k" in stored else None
    names = {**_LEARNING, "b_dec": "b_dec" if "b_dec" in stored else "bias"}
    return Layout(_given(hook, file), names, "relu" if k is None else "topk", k, transposed)


def _sparsify(directory: Path, hook: str | None) -> Layout:
    values = ConfigValues(read_json(directory / CONFIG_FILE), directory / CONFIG_FILE)
    if values.text("activation", "topk") != "topk":
        values.fail(f"activation {values.text('activation')!r} is not supported; expected 'topk'")
    for other in ("transcode", "skip_connection", "embed_skip", "gram_lookup", "signed"):
        if values.flag(other):
            values.fail(f"{other!r} is true; only autoencoders of the k largest, if positive, are supported")
    return Layout(hook or _module_output(directory), _SPARSIFY, "topk", values.integer("k"), ("W_enc",))


def _module_output(directory: Path) -> str:
    """The hook point of a module's output, by the module's name in transformers."""
    name = directory.resolve().name
    match = re.fullmatch(r"(?:.+\.)?(?:layers|h)\.(\d+)(\.mlp)?", name)
    if match is None:
        raise WeightsError(
            f"{directory}: {name!r} names no place of a dictionary; expected a folder layers.4 or layers.4.mlp, "
            "or hook='blocks.4.hook_mlp_out'"
        )
    return f"blocks.{match[1]}.{'hook_mlp_out' if match[2] else 'hook_resid_post'}"


def _gemma_scope(file: Path, hook: str | None) -> Layout:
    return Layout(_given(hook, file), {**OURS, "threshold": "threshold"}, "jumprelu", subtract_b_dec=False)


def _given(hook: str | None, file: Path) -> str:
    if hook is None:
        raise WeightsError(f"{file}: does not say where the dictionary sits; expected hook='blocks.4.hook_resid_pre'")
    return hook
