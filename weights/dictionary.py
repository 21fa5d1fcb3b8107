"""Sparse dictionaries in files: SAELens' directories, read and written, and the tensors of `dictionary_learning`.

| ours    | SAELens             | dictionary_learning            |
| ------- | ------------------- | ------------------------------ |
| `W_enc` | `W_enc`             | `encoder.weight`, transposed   |
| `W_dec` | `W_dec`             | `decoder.weight`, transposed   |
| `b_enc` | `b_enc`             | `encoder.bias`                 |
| `b_dec` | `b_dec`             | `bias`, of its top-k ones `b_dec` |
| `k`     | `k` in cfg.json     | `k`, a tensor                  |

SAELens' cfg.json changed over its versions; what is read is there from version 3 (flat) to 6 (the hook point under
`metadata`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from subcircuit.engine.dictionary import Activation, SparseDictionary
from subcircuit.engine.errors import ConfigError, WeightsError
from subcircuit.weights.checkpoint import ConfigValues, StoredTensor, check_finite, parse_dtype
from subcircuit.weights.huggingface import open_safetensors, read_json

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"

ARCHITECTURES: Mapping[str, Activation] = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk"}

_OURS = ("W_enc", "W_dec", "b_enc", "b_dec")
_LEARNING = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "encoder.bias"}
_UNREAD = {"threshold", "k", "scaling_factor"}
"""Tensors that may stand beside those that every dictionary has."""


@dataclass(frozen=True)
class _Layout:
    """What a file's configuration says of its tensors."""

    hook_name: str
    activation: Activation
    k: int | None
    subtract_b_dec: bool
    by_decoder_norm: bool = False
    """Whether activations are scaled by the norm of their decoder row before the k largest are chosen."""


def load_dictionary(
    path: str | os.PathLike[str],
    *,
    hook: str | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
) -> SparseDictionary:
    """Read a sparse dictionary: a directory of SAELens (cfg.json and sae_weights.safetensors), or a directory or a
    safetensors file with the tensor names of `dictionary_learning`.

    `hook` is the hook point it sits at, for files that do not say, and to overrule those that do. What is said to sit
    at a layer's `hook_resid_post` sits at the next one's `hook_resid_pre`, which is the same value.

    Raises WeightsError for a file that is missing or not readable, a tensor that is missing, extra, wrongly shaped or
    not finite, or a kind of dictionary that is not supported: gated ones, transcoders, and those that normalise what
    they read.
    """
    where = Path(path)
    file = where if where.is_file() else _weights_file(where)
    stored = open_safetensors(file)
    if _LEARNING["W_enc"] in stored:
        layout = _learning_layout(file, stored, hook)
        tensors = _learning_tensors(file, stored, dtype)
    else:
        layout = _saelens_layout(file.parent / CONFIG_FILE, hook)
        names = (*_OURS, "threshold") if layout.activation == "jumprelu" else _OURS
        _check_known(file, stored, names)
        tensors = {name: _read(file, stored, name, dtype) for name in names}
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    try:
        dictionary = SparseDictionary(
            layout.hook_name,
            **tensors,
            activation=layout.activation,
            k=layout.k,
            subtract_b_dec=layout.subtract_b_dec,
        )
    except ConfigError as error:
        raise WeightsError(f"{file}: {error}") from error
    return _scaled(dictionary) if layout.by_decoder_norm else dictionary


def save_dictionary(
    path: str | os.PathLike[str], dictionary: SparseDictionary, about: Mapping[str, object] | None = None
) -> None:
    """Write a dictionary as a directory of SAELens, which `load_dictionary` and SAELens read back.

    about: what else to say under `metadata` in cfg.json, such as the model's name.

    Raises WeightsError for a directory that cannot be written.
    """
    directory = Path(path)
    names = {activation: architecture for architecture, activation in ARCHITECTURES.items()}
    values: dict[str, object] = {
        "architecture": names[dictionary.activation],
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_sae,
        "dtype": str(dictionary.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": dictionary.subtract_b_dec,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if dictionary.hook_name.endswith("hook_z") else "none",
        "metadata": {"hook_name": dictionary.hook_name, **(about or {})},
    }
    if dictionary.k is not None:
        values["k"] = dictionary.k
    tensors = {name: getattr(dictionary, name) for name in (*_OURS, "threshold")}
    contiguous = {name: each.detach().cpu().contiguous() for name, each in tensors.items() if each is not None}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        save_file(contiguous, directory / WEIGHTS_FILE)
    except OSError as error:
        raise WeightsError(f"{directory}: the dictionary cannot be written ({error.strerror})") from error


def _weights_file(directory: Path) -> Path:
    """The one safetensors file of a directory, or SAELens' where there are several."""
    if (directory / WEIGHTS_FILE).is_file():
        return directory / WEIGHTS_FILE
    found = sorted(directory.glob("*.safetensors"))
    if len(found) != 1:
        raise WeightsError(f"{directory}: holds {len(found)} safetensors files; expected {WEIGHTS_FILE} or only one")
    return found[0]


def _saelens_layout(file: Path, hook: str | None) -> _Layout:
    values = ConfigValues(read_json(file), file)
    metadata = values.values.get("metadata")
    inner = ConfigValues(metadata if isinstance(metadata, dict) else {}, file)
    at = inner if inner.has("hook_name") else values
    architecture = values.text("architecture", "standard")
    legacy = values.values.get("activation_fn_kwargs", values.values.get("activation_fn_k"))
    if architecture == "standard" and values.text("activation_fn_str", values.text("activation_fn", "relu")) == "topk":
        architecture = "topk"  # before version 6 a setting of the standard architecture
    if architecture not in ARCHITECTURES:
        values.fail(f"architecture {architecture!r} is not supported; expected one of {', '.join(ARCHITECTURES)}")
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
    return _Layout(
        hook or at.text("hook_name"),
        ARCHITECTURES[architecture],
        k,
        values.flag("apply_b_dec_to_input", True),
        values.flag("rescale_acts_by_decoder_norm"),
    )


def _learning_layout(file: Path, stored: Mapping[str, StoredTensor], hook: str | None) -> _Layout:
    if hook is None:
        raise WeightsError(f"{file}: does not say where the dictionary sits; expected hook='blocks.4.hook_resid_pre'")
    k = int(stored["k"].read(torch.float64)) if "k" in stored else None
    return _Layout(hook, "relu" if k is None else "topk", k, subtract_b_dec=True)


def _learning_tensors(file: Path, stored: Mapping[str, StoredTensor], dtype: str | torch.dtype) -> dict[str, Tensor]:
    names = {**_LEARNING, "b_dec": "b_dec" if "b_dec" in stored else "bias"}
    _check_known(file, stored, names.values())
    tensors = {ours: _read(file, stored, theirs, dtype) for ours, theirs in names.items()}
    return {name: tensor.T if name.startswith("W_") else tensor for name, tensor in tensors.items()}


def _check_known(file: Path, stored: Mapping[str, StoredTensor], names: Iterable[str]) -> None:
    extra = sorted(set(stored) - set(names) - _UNREAD)
    if extra:
        raise WeightsError(f"{file}: tensor {extra[0]!r} is not one of a dictionary of a supported kind")


def _read(file: Path, stored: Mapping[str, StoredTensor], name: str, dtype: str | torch.dtype) -> Tensor:
    if name not in stored:
        raise WeightsError(f"{file}: tensor {name!r} is missing; the file holds {', '.join(sorted(stored)) or 'none'}")
    dtype = parse_dtype(dtype)
    value = stored[name].read(dtype)
    check_finite(value, name, stored[name], dtype)
    return value


def _scaled(dictionary: SparseDictionary) -> SparseDictionary:
    """The same dictionary with decoder rows of norm 1, by which activations are then scaled already."""
    norm = dictionary.W_dec.norm(dim=1)
    return SparseDictionary(
        dictionary.hook_name,
        dictionary.W_enc * norm,
        dictionary.W_dec / norm[:, None],
        dictionary.b_enc * norm,
        dictionary.b_dec,
        dictionary.activation,
        dictionary.k,
        dictionary.threshold,
        dictionary.subtract_b_dec,
    )
