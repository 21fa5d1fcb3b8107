"""A sweep as a run directory: block after block of sites is written whole, and what is written is not run again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from subcircuit.analysis.baselines import table_with_q
from subcircuit.analysis.records import (
    csv_text,
    describe,
    fingerprint,
    now,
    peak_memory_bytes,
    read_scores,
    slugs_of,
    timed,
    versions,
    write_scores,
)
from subcircuit.analysis.store import RunDirectory
from subcircuit.analysis.sweep import Components, Scores, exact_scores, sites_of
from subcircuit.analysis.tasks import Task
from subcircuit.engine.errors import PatchError, StoreError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import DeltaSession, Effects, Site, Source, patch_effects
from subcircuit.engine.patching.metric import Metric
from subcircuit.engine.patching.options import Executor, Precision, default_budget
from subcircuit.engine.patching.sites import as_patch_set

BLOCKS = "blocks"
ROWS_PER_BLOCK = {"cpu": 512, "cuda": 65536}
"""What is lost at most when a sweep is killed: some seconds of work, rarely half a minute."""
LEAST_SITES = 16
"""In a block: with more prompts than memory holds, every block runs them anew without patches."""

Measure = Callable[..., Effects]
"""Takes sites and `progress`, and gives their effects."""


def durable_sweep(
    model: HookedTransformer,
    task: Task,
    out: str | os.PathLike[str],
    components: Components = "heads",
    *,
    resume: bool = False,
    overwrite: bool = False,
    source: Source = "corrupted",
    positions: str | Iterable[int] | None = None,
    executor: Executor = "torch",
    precision: Precision = "fp32",
    budget_bytes: int | None = None,
    check: int = 0,
    sites_per_block: int | None = None,
    command: str = "",
    progress: Callable[[int, int], None] | None = None,
    metric: Metric = "logit_difference",
) -> Scores:
    """The `sweep` of the same arguments, kept in the run directory `out` block by block of sites.

    With `resume` a sweep that was killed goes on where it stopped: with the blocks and the memory budget it began with,
    so that, with as many threads of the same machine, its effects are the same to the last bit. One that is whole is
    read. At the end there are `scores/`, `scores.csv` and `run.json`, and no blocks. `progress` counts rows, those of
    earlier runs among them.

    Raises PatchError as `sweep` does; StoreError when the folder is taken, or holds a sweep of another model or task or
    with other settings, and for both `resume` and `overwrite`.
    """
    if resume and overwrite:
        raise StoreError("resume and overwrite contradict each other; expected one of them")
    if sites_per_block is not None and sites_per_block < 1:
        raise PatchError(f"sites_per_block is {sites_per_block}; expected at least 1")
    positions = positions if positions is None or isinstance(positions, str) else tuple(positions)
    sites = sites_of(model.config, components, positions, task.pos)
    if not sites:
        raise PatchError("there is no site to patch; expected at least one component")
    exact: dict[str, Any] = {"source": source, "executor": executor, "precision": precision, "metric": metric}
    settings = _settings(model, task, sites, components, positions, exact)
    run = {
        "command": command,
        "settings": settings,
        "tasks": [_slug(task.name)],
        "seed": task.seed,
        "versions": versions(),
        "started": now(),
        "models": [describe(model, model.config.name or "model", _slug(model.config.name))],
        "timings": {},
        "notes": [],
        "n_sites": len(sites),
        "sites_per_block": sites_per_block or _sites_per_block(model, task),
        "budget_bytes": default_budget(model.device) if budget_bytes is None else budget_bytes,
    }
    directory = RunDirectory.create(out, run, resume=resume, overwrite=overwrite)
    file = f"scores/{_slug(model.config.name)}.{_slug(task.name)}.safetensors"
    if not directory.has(file):
        measure = _measure(model, task, sites, directory.run["budget_bytes"], exact)
        with timed(directory, "sweep"):
            result = _Blocks(directory, sites, task.n).effects(measure, progress)
            scores = exact_scores(model, task, sites, result, **exact, check=check)
        about = {name: settings[name] for name in ("task_seed", "template", "task_fingerprint", "model_fingerprint")}
        write_scores(directory, file, replace(scores, settings=scores.settings | about))
    return _finish(directory, file)


def _settings(
    model: HookedTransformer,
    task: Task,
    sites: tuple[Site, ...],
    components: Components,
    positions: str | tuple[int, ...] | None,
    exact: Mapping[str, Any],
) -> dict[str, Any]:
    """All that the effects depend on, in the order in which a difference is told."""
    source = exact["source"]
    return {
        "model": model.config.name,
        "model_fingerprint": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "task": task.name,
        "task_seed": task.seed,
        "template": task.template,
        "n_prompts": task.n,
        "task_fingerprint": task.fingerprint(),
        "components": components if isinstance(components, str) else "listed",
        "positions": positions,
        "sites_fingerprint": _digest(str(site).encode() for site in sites),
        **exact,
        "source": source if isinstance(source, str) else f"tensors {_digest(_bytes_of(source))}",
    }


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part + b"\0")
    return digest.hexdigest()[:16]


def _bytes_of(tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    for name, tensor in sorted(tensors.items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _slug(name: str) -> str:
    """A model's or task's name as part of a file's."""
    return slugs_of([name])[0]


def _sites_per_block(model: HookedTransformer, task: Task) -> int:
    rows = ROWS_PER_BLOCK["cpu" if model.device.type == "cpu" else "cuda"]
    return max(LEAST_SITES, rows // task.n)


def _measure(
    model: HookedTransformer, task: Task, sites: tuple[Site, ...], budget_bytes: int, exact: Mapping[str, Any]
) -> Measure:
    """How blocks are measured: in one session, whose clean run and means serve them all."""
    if exact["executor"] == "reference":
        return partial(patch_effects, model, task, budget_bytes=budget_bytes, **exact)
    session = DeltaSession(model, task, budget_bytes=budget_bytes, **exact)
    session.prepare([as_patch_set(site) for site in sites])
    return session.effects


@dataclass(frozen=True)
class _Blocks:
    """The sites of a sweep in blocks, each with a file once it is measured."""

    directory: RunDirectory
    sites: tuple[Site, ...]
    n_prompts: int

    def effects(self, measure: Measure, progress: Callable[[int, int], None] | None) -> Effects:
        """Effects of all sites; those of blocks with a file are read."""
        found, n_rows = [], len(self.sites) * self.n_prompts
        step = self.directory.run["sites_per_block"]
        for first in range(0, len(self.sites), step):
            block, before = self.sites[first : first + step], first * self.n_prompts

            def report(done: int, total: int, before: int = before) -> None:
                if progress is not None:
                    progress(before + done, n_rows)

            result = self._read(first, len(block))
            if result is None:
                result = measure(block, progress=report)
                self._write(first, result)
            report(len(block) * self.n_prompts, n_rows)
            found.append(result)
        return Effects(
            torch.cat([result.effects.cpu() for result in found]),
            found[0].clean_metric.cpu(),
            *(sum(getattr(result, name) for result in found) for name in ("n_precise", "n_full", "n_halvings")),
        )

    def _file(self, first: int) -> str:
        return f"{BLOCKS}/{first:08d}.safetensors"

    def _write(self, first: int, result: Effects) -> None:
        tensors = {"effects": result.effects.cpu(), "clean_metric": result.clean_metric.cpu()}
        counts = {"n_precise": result.n_precise, "n_full": result.n_full, "n_halvings": result.n_halvings}
        self.directory.write_tensors(self._file(first), tensors, {"counts": json.dumps(counts)})

    def _read(self, first: int, n_sites: int) -> Effects | None:
        """What a block's file holds; None where it is not there, or is not what was written."""
        if not self.directory.has(self._file(first)):
            return None
        try:
            tensors, labels = self.directory.read_tensors(self._file(first))
            result = Effects(tensors["effects"], tensors["clean_metric"], **json.loads(labels["counts"]))
        except (StoreError, KeyError, TypeError, ValueError):
            return None
        shapes = tuple(result.effects.shape), tuple(result.clean_metric.shape)
        return result if shapes == ((n_sites, self.n_prompts), (self.n_prompts,)) else None


def _finish(directory: RunDirectory, file: str) -> Scores:
    """The sweep from its file, with all that a finished run has beside it."""
    scores = read_scores(directory, file)
    labels = {"model": scores.settings["model"], "task": scores.settings["task"]}
    directory.write_text("scores.csv", csv_text([labels | row for row in table_with_q(scores)]))
    directory.delete_folder(BLOCKS)
    if "finished" not in directory.run:
        directory.update_run(finished=now(), peak_memory_bytes=peak_memory_bytes())
    return scores
