"""Saved circuits, as commands read them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import subcircuit as sc
from subcircuit.console import warn
from subcircuit.engine.errors import StoreError

if TYPE_CHECKING:
    from subcircuit.engine.config import ModelConfig
    from subcircuit.engine.model import HookedTransformer


def load_circuits(files: Iterable[Path]) -> dict[Path, sc.Circuit]:
    """Circuits by file. Raises StoreError that names the file when one cannot be read."""
    return {file: sc.Circuit.load(file) for file in files}


def load_circuit(file: Path, model: str | None, task: str, device: str) -> tuple[sc.Circuit, ModelConfig]:
    """A circuit in our JSON or MIB's, with the configuration of its model: the one named, or the one the file names.

    Raises StoreError that names the file when it cannot be read, or does not say whose it is when nobody else does.
    """
    from subcircuit.analysis.circuit_formats import is_mib, load_mib

    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        values = None  # what is wrong with the file, `Circuit.load` says
    circuit = None if is_mib(values) else sc.Circuit.load(file)
    name = model or (circuit.model if circuit is not None else "")
    if not name:
        raise StoreError(f"{file} does not say of which model its circuit is; expected --model")
    config = sc.load(name, device=device).config
    return load_mib(file, config, task=task)[0] if circuit is None else circuit, config


def warn_of_other_model(circuits: dict[Path, sc.Circuit], model: HookedTransformer) -> None:
    """A line on standard error where circuits were found in a model of another name than the one they are used with, or
    their features in other dictionaries than those of the model.

    That is no error: another copy of the weights may have another name, and whether nodes of one model do anything in a
    finetuned one is a question that people ask. Nodes that the model lacks are refused where they are used.
    """
    name = model.config.name
    others = {str(file): circuit.model for file, circuit in circuits.items() if circuit.model not in ("", name)}
    if others and name:
        found = ", ".join(f"{file} (found in {other})" for file, other in others.items())
        warn(f"the nodes of {found} are used as those of {name}")
    used = {hook: dictionary.fingerprint() for hook, dictionary in model.dictionaries.items()}
    for file, circuit in circuits.items():
        found_in = circuit.settings.get("dictionary_fingerprints", {}) if circuit.features else {}
        for hook in used.keys() & found_in.keys():
            if used[hook] != found_in[hook]:
                warn(f"the features of {file} at {hook} were found in another dictionary")


def warn_of_empty(circuit: sc.Circuit) -> None:
    """A line on standard error where a circuit has no nodes: what that means and what to try."""
    from subcircuit.analysis.discover import why_empty

    if not circuit.nodes:
        warn(f"the circuit is empty: {why_empty(circuit)}")
