"""A run directory: every file is written whole or not at all, so that what is there after a kill can be trusted.

run.json                what was run: command, settings, models, versions, seed, seconds per stage
blocks/*.safetensors    effects of a part of a sweep's sites, until the sweep is whole
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
SCHEMA_VERSION = 1
FINISHED = ("blocks", "scores", "circuits", "results")
"""Folders of what a stage took its time for."""
OWN = (*FINISHED, "figures", "scores.csv", "report.html", RUN_FILE)
"""All that a run writes, `run.json` last: what is deleted to start anew, and nothing else."""
_PARTIAL = ".partial"


def write_whole(target: Path, content: bytes) -> None:
    """Write a file so that a kill or a full disk leaves the old one or the new one, never half of it.

    Raises StoreError, naming the file, when it cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=_PARTIAL)
    except OSError as error:
        raise StoreError(f"{target} cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise StoreError(f"{target} cannot be written: {error.strerror}") from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Makes a rename in it last through a power cut, where the system can do that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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

        With `overwrite` the files of an earlier run are deleted, and no others; so are those of a run that finished no
        stage. A folder with other things in it, and no run, is never touched.
        """
        folder = Path(path)
        if (folder / RUN_FILE).exists():
            found = cls.open(folder)
            finished = [file for part in FINISHED for file in (folder / part).glob("*") if not _is_partial(file)]
            if finished and not overwrite:
                different = _difference(found.run.get("settings", {}), run.get("settings", {}))
                if different is None and resume:
                    found._delete_partial()
                    return found
                if different is None:
                    raise StoreError(f"{folder} holds a run already; expected --resume, --overwrite or another folder")
                raise StoreError(f"{folder} holds a run already, {different}; expected --overwrite or another folder")
            found._delete()
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise StoreError(f"{folder} exists and is not a run directory; expected a new or empty folder")
        created = cls(folder, {"schema": SCHEMA_VERSION})
        created.update_run(**run)
        return created

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunDirectory:
        folder = Path(path)
        if not (folder / RUN_FILE).is_file():
            raise StoreError(f"{folder} is not a run directory: it has no {RUN_FILE}")
        opened = cls(folder, {})
        opened.run = opened.read_json(RUN_FILE)
        if not isinstance(opened.run, dict) or opened.run.get("schema") != SCHEMA_VERSION:
            raise StoreError(
                f"{folder / RUN_FILE} is not that of a run of schema {SCHEMA_VERSION}; expected another folder"
            )
        return opened

    def _delete(self) -> None:
        for name in OWN:
            what = self.path / name
            if what.is_dir():
                shutil.rmtree(what)
            else:
                what.unlink(missing_ok=True)
        self._delete_partial()

    def _delete_partial(self) -> None:
        """Remove what a process that was killed was writing."""
        for file in [*self.path.glob(".*"), *self.path.glob("*/.*")]:
            if _is_partial(file):
                file.unlink(missing_ok=True)

    def update_run(self, **fields: Any) -> None:
        """Add to run.json."""
        self.run |= fields
        self.write_json(RUN_FILE, self.run)

    def delete_folder(self, name: str) -> None:
        """Remove one of the run's folders, if it is there, with all that is in it."""
        shutil.rmtree(self.path / name, ignore_errors=True)

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=1) + "\n")

    def json_if_there(self, file: str) -> dict[str, Any]:
        """A file's object, or an empty one where there is no such file. Raises StoreError for one that is not JSON."""
        found: dict[str, Any] = self.read_json(file) if self.has(file) else {}
        return found

    def read_json(self, name: str) -> Any:
        try:
            return json.loads(self.read_text(name))
        except json.JSONDecodeError as error:
            raise StoreError(f"{self.path / name} cannot be read as JSON: {error}") from error

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        contiguous = {key: value.contiguous() for key, value in tensors.items()}
        write_whole(self.path / name, save(contiguous, metadata=dict(metadata)))

    def read_tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """A safetensors file's tensors and its metadata."""
        try:
            with safe_open(self.path / name, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{self.path / name} cannot be read as safetensors: {error}") from error

    def read_text(self, name: str) -> str:
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise StoreError(f"{self.path / name} cannot be read: {error}") from error

    def write_text(self, name: str, text: str) -> None:
        write_whole(self.path / name, text.encode("utf-8"))


def _is_partial(file: Path) -> bool:
    return file.name.startswith(".") and file.suffix == _PARTIAL


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first setting that is not the same, as half a sentence."""
    now = json.loads(json.dumps(now))
    for name in [*before, *(name for name in now if name not in before)]:
        if before.get(name) != now.get(name):
            return f"with {name} = {before.get(name)!r}, not {now.get(name)!r}"
    return None
