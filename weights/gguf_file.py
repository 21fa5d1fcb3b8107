"""The GGUF container: metadata and the place of every tensor, with each length checked before it is used.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package's own reader makes a NumPy view
of every element of every metadata array (4 s for SmolLM2's vocabulary, where this takes 0.1 s) and follows corrupted
lengths beyond the end of the file; its constants and dequantisation are used as they are.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from subcircuit.engine.errors import WeightsError
from subcircuit.weights.families import Shape

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies in its file. `shape` has the slowest dimension first, as in PyTorch."""

    shape: Shape
    kind: GGMLQuantizationType
    start: int
    n_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """An opened GGUF file: `metadata` as plain Python values, `tensors` by name, `data` the memory-mapped bytes."""

    metadata: dict[str, object]
    tensors: dict[str, GGUFTensor]
    data: np.ndarray[tuple[int], np.dtype[np.uint8]]


def open_gguf(path: Path) -> GGUFFile:
    """Map a GGUF file and read its header.  Raises WeightsError for one that is missing, corrupted or truncated."""
    try:
        with path.open("rb") as file:
            # A private copy-on-write map: tensors may be views of it, and writing to one does not reach the file.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError:
        raise WeightsError(f"{path}: the file is missing") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: not a readable GGUF file ({error})") from error
    try:
        return _read_header(mapped)
    except _CorruptedError as error:
        raise WeightsError(f"{path}: not a readable GGUF file ({error})") from error


class _CorruptedError(Exception):
    """What is wrong with the bytes, to be joined with the file's name."""


class _Cursor:
    """Reads little-endian values one after the other and never beyond the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.offset = 0

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > len(self.data) - self.offset:
            raise _CorruptedError(
                f"the header wants {n_bytes} bytes at {self.offset} of a file of {len(self.data)} bytes"
            )
        start, self.offset = self.offset, self.offset + n_bytes
        return self.data[start : self.offset]

    def integer(self, code: str) -> int:
        value: int = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]
        return value

    def text(self) -> str:
        start = self.offset
        try:
            return self.take(self.integer("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise _CorruptedError(f"the string at byte {start} is not UTF-8") from None

    def value(self) -> object:
        kind = self.value_type()
        if kind != GGUFValueType.ARRAY:
            return self.text() if kind == GGUFValueType.STRING else self.numbers(kind, 1)[0]
        kind, length = self.value_type(), self.integer("Q")
        if kind == GGUFValueType.ARRAY:
            raise _CorruptedError(f"the array at byte {self.offset} holds arrays")
        # Each string takes at least the 8 bytes of its length, so a wrong count ends at the end of the file.
        return [self.text() for _ in range(length)] if kind == GGUFValueType.STRING else self.numbers(kind, length)

    def value_type(self) -> GGUFValueType:
        return GGUFValueType(self._known(self.integer("I"), GGUFValueType, "value type"))

    def numbers(self, kind: GGUFValueType, length: int) -> list[object]:
        code = _SCALARS[kind]
        raw = self.take(length * struct.calcsize(f"<{code}"))
        if kind == GGUFValueType.FLOAT32:
            # The shortest decimal of each float32, so that an epsilon of 1e-5 is read as 1e-5.
            return [float(str(value)) for value in np.frombuffer(raw, "<f4")]
        return list(struct.unpack(f"<{length}{code}", raw))

    def tensor_type(self) -> GGMLQuantizationType:
        return GGMLQuantizationType(self._known(self.integer("I"), GGMLQuantizationType, "tensor type"))

    def _known(self, value: int, kinds: type[GGUFValueType] | type[GGMLQuantizationType], what: str) -> int:
        if value not in list(kinds):
            raise _CorruptedError(f"unknown {what} {value} at byte {self.offset - 4}")
        return value


def _read_header(data: mmap.mmap) -> GGUFFile:
    cursor = _Cursor(data)
    if cursor.take(4) != _MAGIC:
        raise _CorruptedError(f"it begins with {bytes(data[:4])!r}, not {_MAGIC!r}")
    version = cursor.integer("I")
    if version not in _VERSIONS:
        raise _CorruptedError(f"version {version}; expected 2 or 3, little-endian")
    n_tensors, n_values = cursor.integer("Q"), cursor.integer("Q")
    metadata: dict[str, object] = {}
    for _ in range(n_values):
        key = cursor.text()
        metadata[key] = cursor.value()
    infos = [_read_tensor_info(cursor) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
        raise _CorruptedError(f"general.alignment is {alignment!r}; expected a multiple of 8")
    start = math.ceil(cursor.offset / alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in infos:
        if name in tensors:
            raise _CorruptedError(f"tensor {name!r} is there twice")
        tensors[name] = _place(name, shape, kind, start + offset, alignment, len(data))
    return GGUFFile(metadata, tensors, np.frombuffer(data, np.uint8))


def _read_tensor_info(cursor: _Cursor) -> tuple[str, Shape, GGMLQuantizationType, int]:
    name = cursor.text()
    n_dimensions = cursor.integer("I")
    if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
        raise _CorruptedError(f"tensor {name!r} has {n_dimensions} dimensions; expected 1 to {_MAX_DIMENSIONS}")
    fastest_first = [cursor.integer("Q") for _ in range(n_dimensions)]
    kind = cursor.tensor_type()
    return name, tuple(reversed(fastest_first)), kind, cursor.integer("Q")


def _place(
    name: str, shape: Shape, kind: GGMLQuantizationType, start: int, alignment: int, file_bytes: int
) -> GGUFTensor:
    block_elements, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block_elements:
        raise _CorruptedError(
            f"tensor {name!r} has rows of {shape[-1]} elements; {kind.name} needs a multiple of {block_elements}"
        )
    n_bytes = math.prod(shape) // block_elements * block_bytes
    if start % alignment:
        raise _CorruptedError(f"tensor {name!r} begins at byte {start}, not a multiple of {alignment}")
    if start + n_bytes > file_bytes:
        raise _CorruptedError(
            f"tensor {name!r} ends at byte {start + n_bytes} of a file of {file_bytes} bytes: truncated or corrupted"
        )
    return GGUFTensor(shape, kind, start, n_bytes)
