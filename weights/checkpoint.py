"""What every loader returns, and the one path by which a stored tensor becomes a parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import WeightsError
from subcircuit.engine.model import HookedTransformer
from subcircuit.weights.families import NameTable, Shape
from subcircuit.weights.text_tokenizer import TextTokenizer

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Checkpoint:
    """A model as read from disk: `HookedTransformer(config, tensors, tokenizer)` runs it."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    tokenizer: TextTokenizer | None
    source: str
    """The file or directory it came from."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet.

    `read(dtype)` gives it in that dtype: a view of the memory-mapped file where that is the stored `dtype`, and
    otherwise a new tensor. Quantised tensors are never views; their `dtype` is float32, what they dequantise to.
    """

    file: Path
    shape: Shape
    dtype: torch.dtype
    read: Callable[[torch.dtype], Tensor]


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype of a name such as "float32".

    Raises WeightsError for anything but float32, bfloat16, float16 and float64.
    """
    parsed = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if parsed is None or parsed not in DTYPES.values():
        raise WeightsError(f"dtype {str(dtype)!r} is not supported; expected one of {', '.join(DTYPES)}")
    return parsed


def one_line(error: BaseException, limit: int = 200) -> str:
    """The message of somebody else's exception, on one line and of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}…"


def load_tensors(
    table: NameTable,
    config: ModelConfig,
    stored: Mapping[str, StoredTensor],
    where: Path,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    """Every parameter of the model, by our names, in `dtype` on `device`.

    `stored` holds the checkpoint's tensors by their names in `table` (without its prefix). They are read one at a
    time, so no more than one tensor exists twice. `where` is named when a tensor is in no file.

    Raises WeightsError for a missing, extra, wrongly shaped or non-finite tensor.
    """
    shapes = _parameter_shapes(table, config, stored, where)
    plan = table.plan(shapes, config.n_layers)
    for name, entry in plan.items():
        if name not in stored:
            raise WeightsError(f"{where}: tensor {name!r} is missing; expected shape {entry.stored_shape}")
        if stored[name].shape != entry.stored_shape:
            raise WeightsError(
                f"{stored[name].file}: tensor {name!r} has shape {stored[name].shape}; expected {entry.stored_shape}"
            )
    for name in sorted(set(stored) - set(plan)):
        if not table.is_harmless(name):
            raise WeightsError(f"{stored[name].file}: tensor {name!r} is not a parameter of this model")
    tensors: dict[str, Tensor] = {}
    for name, entry in plan.items():
        value = stored[name].read(dtype)
        check_finite(value, name, stored[name], dtype)
        parts = entry.layout.unpack(value.to(device), config)
        tensors.update(zip(entry.parameters, parts, strict=True))
    return tensors


def _parameter_shapes(
    table: NameTable, config: ModelConfig, stored: Mapping[str, StoredTensor], where: Path
) -> dict[str, Shape]:
    # A layer too many is found here rather than by name: a corrupted count may ask for billions of them.
    n_layers = table.count_layers(stored)
    if config.n_layers > n_layers:
        raise WeightsError(
            f"{where}: tensors of layer {n_layers} are missing; the configuration has {config.n_layers} layers"
        )
    try:
        return HookedTransformer.parameter_shapes(config)
    except (RuntimeError, OverflowError, TypeError) as error:
        raise WeightsError(f"{where}: the configured sizes are impossible ({one_line(error)})") from error


def check_finite(value: Tensor, name: str, stored: StoredTensor, dtype: torch.dtype) -> None:
    """Raises WeightsError, naming the tensor, for values that are not finite in this dtype."""
    # aminmax keeps NaN and makes no temporary, unlike isfinite.
    if _is_finite(value):
        return
    if dtype == torch.float16 and _is_finite(stored.read(stored.dtype)):
        raise WeightsError(
            f"{stored.file}: tensor {name!r} exceeds the range of float16; load it as bfloat16 or float32"
        )
    raise WeightsError(f"{stored.file}: tensor {name!r} holds values that are not finite (NaN or infinity)")


def _is_finite(value: Tensor) -> bool:
    low, high = value.aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())


class ConfigValues:
    """The key/value part of a checkpoint, read with types checked.

    `where` names the file in errors. A value of None counts as absent.
    """

    def __init__(self, values: Mapping[str, object], where: Path, defaults: Mapping[str, object] | None = None) -> None:
        self.values = {**(defaults or {}), **{key: value for key, value in values.items() if value is not None}}
        self.where = where

    def fail(self, message: str) -> NoReturn:
        raise WeightsError(f"{self.where}: {message}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer.  Raises WeightsError when it is something else, or absent without a default."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**40:
            self.fail(f"{key!r} is {value!r}; expected a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number.  Raises WeightsError when it is something else, or absent without a default."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self.fail(f"{key!r} is {value!r}; expected a positive number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            self.fail(f"{key!r} is {value!r}; expected true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            self.fail(f"{key!r} is {value!r}; expected a string")
        return value

    def _get(self, key: str, default: object) -> object:
        value = self.values.get(key, default)
        if value is None:
            self.fail(f"{key!r} is missing")
        return value
