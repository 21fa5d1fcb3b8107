"""Steering vectors in files, and steering from one line of text."""

from __future__ import annotations

import os
import re
from pathlib import Path

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from subcircuit.analysis.store import write_whole
from subcircuit.engine.errors import PatchError, StoreError
from subcircuit.engine.patching import Component, Site
from subcircuit.engine.steering import Steering

_STEER = re.compile(
    r"(?P<file>.+)@(?P<component>[amr]\d[\w.]*)(@(?P<positions>-?\d+(,-?\d+)*))?(\*(?P<coefficient>[-+.\deE]+))?"
)


def save_vector(path: str | os.PathLike[str], vector: Float[Tensor, " d"], about: dict[str, str] | None = None) -> None:
    """Write a vector as the one tensor, `vector`, of a safetensors file. about: how it was made, kept as metadata.

    Raises StoreError, naming the file, when it cannot be written.
    """
    write_whole(Path(path), save({"vector": vector.detach().cpu().contiguous()}, about))


def load_vector(path: str | os.PathLike[str]) -> Float[Tensor, " d"]:
    """The one tensor of a safetensors file, which has one dimension. Raises StoreError, naming the file, for others."""
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            tensors: list[Tensor] = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{os.fspath(path)}: no steering vector can be read: {error}") from error
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(shapes) != 1 or len(shapes[0]) != 1:
        raise StoreError(f"{os.fspath(path)}: holds tensors of shapes {shapes}; expected one vector")
    return tensors[0]


def parse_steering(text: str) -> Steering:
    """Steering from `FILE@SITE*COEFFICIENT`, such as `calm.safetensors@r12*4`, or `calm.safetensors@a5.h1@-1,-2`.

    The site may name positions of the prompt, after a second `@`; without them the vector is added everywhere. The
    coefficient is 1 where it is left out.

    Raises PatchError for text of another form or a component that cannot be steered, StoreError for a file without a
    vector.
    """
    match = _STEER.fullmatch(text)
    if match is None:
        raise PatchError(f"steering {text!r} is not understood; expected FILE@SITE*COEFFICIENT, as v.safetensors@r12*4")
    part = match.groupdict()
    try:
        coefficient = float(part["coefficient"] or 1)
    except ValueError:
        raise PatchError(f"steering {text!r}: coefficient {part['coefficient']!r} is no number") from None
    positions = tuple(map(int, part["positions"].split(","))) if part["positions"] else None
    return Steering(Site(Component.parse(part["component"]), positions), load_vector(part["file"]), coefficient)
