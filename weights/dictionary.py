"""Sparse dictionaries in files: read in the layouts of `dictionary_layouts`, written in SAELens'."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from subcircuit.engine.dictionary import SparseDictionary
from subcircuit.engine.errors import ConfigError, WeightsError
from subcircuit.weights.checkpoint import StoredTensor, check_finite, one_line, parse_dtype
from subcircuit.weights.dictionary_layouts import ARCHITECTURES, CONFIG_FILE, OURS, layout_of
from subcircuit.weights.huggingface import open_safetensors

WEIGHTS_FILE = "sae_weights.safetensors"

_UNREAD = {"threshold", "k", "scaling_factor"}
"""Tensors that may stand beside those that every dictionary has."""


def load_dictionary(
    path: str | os.PathLike[str],
    *,
    hook: str | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
) -> SparseDictionary:
    """Read a sparse dictionary: a directory of SAELens (cfg.json and sae_weights.safetensors) or of sparsify (cfg.json
    and sae.safetensors), a directory or a safetensors file with the tensor names of `dictionary_learning`, or Gemma
    Scope's params.npz.

    `hook` is the hook point it sits at, for files that do not say, and to overrule those that do. What is said to sit
    at a layer's `hook_resid_post` sits at the next one's `hook_resid_pre`, which is the same value. Gated dictionaries
    are read as the `jumprelu` ones that they are equal to.

    Raises WeightsError for a file that is missing or not readable, a tensor that is missing, extra, wrongly shaped or
    not finite, or a kind of dictionary that is not supported: transcoders, and those that normalise what they read.
    """
    where = Path(path)
    file = where if where.is_file() else _weights_file(where)
    stored = _open_npz(file) if file.suffix == ".npz" else open_safetensors(file)
    layout = layout_of(file, stored, hook)
    _check_known(file, stored, layout.names.values())
    tensors = {ours: _read(file, stored, theirs, dtype) for ours, theirs in layout.names.items()}
    tensors |= {name: tensors[name].T for name in layout.transposed}
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    try:
        dictionary = SparseDictionary(
            layout.hook_name,
            **(_as_jumprelu(**tensors) if "r_mag" in tensors else tensors),
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
    tensors = {name: getattr(dictionary, name) for name in (*OURS, "threshold")}
    contiguous = {name: each.detach().cpu().contiguous() for name, each in tensors.items() if each is not None}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        save_file(contiguous, directory / WEIGHTS_FILE)
    except OSError as error:
        raise WeightsError(f"{directory}: the dictionary cannot be written ({error.strerror})") from error


def _weights_file(directory: Path) -> Path:
    """The one safetensors file of a directory, SAELens' where there are several, Gemma Scope's where there is none."""
    if (directory / WEIGHTS_FILE).is_file():
        return directory / WEIGHTS_FILE
    found = sorted(directory.glob("*.safetensors"))
    if not found and (directory / "params.npz").is_file():
        return directory / "params.npz"
    if len(found) != 1:
        raise WeightsError(f"{directory}: holds {len(found)} safetensors files; expected {WEIGHTS_FILE} or only one")
    return found[0]


def _open_npz(file: Path) -> dict[str, StoredTensor]:
    """The arrays of one file by name.  Raises WeightsError for a file that is none."""

    def stored(value: Tensor) -> StoredTensor:
        return StoredTensor(file, tuple(value.shape), value.dtype, value.to)

    try:
        if not zipfile.is_zipfile(file):
            raise ValueError("not a zip archive")
        with np.load(file, allow_pickle=False) as arrays:
            return {name: stored(torch.from_numpy(arrays[name])) for name in arrays.files}
    except (OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise WeightsError(f"{file}: not a readable npz file ({one_line(error)})") from error


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


def _as_jumprelu(
    W_enc: Tensor, W_dec: Tensor, b_gate: Tensor, b_mag: Tensor, r_mag: Tensor, b_dec: Tensor
) -> dict[str, Tensor]:
    """A gated dictionary (Rajamanoharan et al. 2024, arXiv 2404.16014) as the JumpReLU that it is equal to.

    With p = (x − b_dec) W_enc, a feature is ReLU(e^r p + b_mag) where p + b_gate > 0: where e^r p + b_mag is above
    b_mag − e^r b_gate.
    """
    for name, vector in {"b_gate": b_gate, "b_mag": b_mag, "r_mag": r_mag}.items():
        if vector.shape != W_enc.shape[1:]:
            expected = tuple(W_enc.shape[1:])
            raise ConfigError(f"tensor {name!r} has shape {tuple(vector.shape)}; expected {expected}")
    gain = r_mag.exp()
    return {
        "W_enc": W_enc * gain,
        "W_dec": W_dec,
        "b_enc": b_mag,
        "b_dec": b_dec,
        "threshold": b_mag - gain * b_gate,
    }


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
