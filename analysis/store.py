"""A run directory: every file is written whole or not at all, so that what is there after a kill can be trusted.

run.json                what was run: command, settings, models, versions, seed, seconds per stage
scores/M.T.safetensors  effects of model M's sweep on task T, per site and prompt
scores.csv              the same as a table of means
circuits/M.T.json       the circuit found
results/*.json          what else a stage found
figures/*.svg  report.html
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from subcircuit.engine.errors import StoreError

RUN_FILE = "run.json"


class RunDirectory:
    """A run's files, by name relative to its folder.

    Raises StoreError, naming the file, for a folder that is no run or is another one, and for an unreadable file.
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self.path, self.run = path, run

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], run: dict[str, Any], *, resume: bool = False, overwrite: bool = False
    ) -> RunDirectory:
        """A new run directory, or with `resume` the one that is there, whose `settings` must then be the same.

        With `overwrite` an earlier run is deleted; a folder with other things in it is never touched.
        """
        folder = Path(path)
        if (folder / RUN_FILE).exists():
            if resume:
                return cls._resumed(folder, run)
            if not overwrite:
                raise StoreError(f"{folder} holds a run already; expected --resume, --overwrite or another folder")
            shutil.rmtree(folder)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise StoreError(f"{folder} exists and is not a run directory; expected a new or empty folder")
        folder.mkdir(parents=True, exist_ok=True)
        created = cls(folder, {})
        created.update_run(**run)
        return created

    @classmethod
    def _resumed(cls, folder: Path, run: dict[str, Any]) -> RunDirectory:
        found = cls.open(folder)
        before, now = found.run.get("settings", {}), json.loads(json.dumps(run.get("settings", {})))
        for name in [*before, *(name for name in now if name not in before)]:
            if before.get(name) != now.get(name):
                raise StoreError(
                    f"{folder} was run with {name} = {before.get(name)!r}, not {now.get(name)!r}; it cannot be resumed"
                )
        return found

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunDirectory:
        folder = Path(path)
        if not (folder / RUN_FILE).is_file():
            raise StoreError(f"{folder} is not a run directory: it has no {RUN_FILE}")
        opened = cls(folder, {})
        opened.run = opened.read_json(RUN_FILE)
        return opened

    def update_run(self, **fields: Any) -> None:
        """Add to run.json."""
        self.run |= fields
        self.write_json(RUN_FILE, self.run)

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=1) + "\n")

    def read_json(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise StoreError(f"{self.path / name} cannot be read as JSON: {error}") from error

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        contiguous = {key: value.contiguous() for key, value in tensors.items()}
        self._write(name, save(contiguous, metadata=dict(metadata)))

    def read_tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """A safetensors file's tensors and its metadata."""
        try:
            with safe_open(self.path / name, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{self.path / name} cannot be read as safetensors: {error}") from error

    def write_text(self, name: str, text: str) -> None:
        self._write(name, text.encode("utf-8"))

    def _write(self, name: str, content: bytes) -> None:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
