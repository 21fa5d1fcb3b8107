"""What a run writes down: sweeps as files, models, versions, times."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.store import RunDirectory
from subcircuit.analysis.sweep import Scores
from subcircuit.analysis.tasks import is_file_name
from subcircuit.engine.config import ModelConfig, RopeScaling
from subcircuit.engine.errors import StoreError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Site


def write_scores(directory: RunDirectory, file: str, scores: Scores) -> None:
    """A sweep as a safetensors file: `effects`, `clean_metric`, and the rest as JSON in its metadata."""
    about = {
        "sites": [str(site) for site in scores.sites],
        "settings": scores.settings,
        "config": asdict(scores.config),
    }
    tensors = {"effects": scores.effects, "clean_metric": scores.clean_metric}
    # One entry of metadata: safetensors writes several in any order, and the same sweep should be the same file.
    directory.write_tensors(file, tensors, {"sweep": json.dumps(about)})


def read_scores(directory: RunDirectory, file: str) -> Scores:
    """A sweep from its file. Raises StoreError, naming the file, for one that holds none."""
    tensors, labels = directory.read_tensors(file)
    try:
        about = json.loads(labels["sweep"])
        return Scores(
            tuple(Site.of(site) for site in about["sites"]),
            tensors["effects"],
            tensors["clean_metric"],
            config_of(about["config"]),
            about["settings"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{directory.path / file} holds no sweep: {error}") from error


def config_of(values: Mapping[str, Any]) -> ModelConfig:
    """A configuration from what `asdict` made of it. Raises TypeError for other values."""
    scaling = values["rope_scaling"]
    return ModelConfig(**{**values, "rope_scaling": scaling and RopeScaling(**scaling)})


def circuits_of(directory: RunDirectory, slug: str) -> dict[str, Circuit]:
    """The circuits that a run found for a model, by task."""
    files = _files_by_task(directory, f"circuits/{slug}.{{}}.json")
    return {task: Circuit.load(directory.path / file) for task, file in files.items()}


def scores_of(directory: RunDirectory, slug: str) -> dict[str, Scores]:
    """The sweeps that a run made for a model, by task."""
    files = _files_by_task(directory, f"scores/{slug}.{{}}.safetensors")
    return {task: read_scores(directory, file) for task, file in files.items()}


def _files_by_task(directory: RunDirectory, pattern: str) -> dict[str, str]:
    files = {task: pattern.format(task) for task in directory.run["tasks"]}
    return {task: file for task, file in files.items() if directory.has(file)}


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a table."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def describe(model: HookedTransformer, name: str, slug: str) -> dict[str, Any]:
    """What run.json says about a model. slug: its part in the names of files."""
    config, tokenizer = model.config, model.tokenizer
    return {
        "name": name,
        "slug": slug,
        "description": f"{config.family}, {config.n_layers} × {config.n_heads} heads, d_model {config.d_model}",
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.kv_heads,
        "n_params": config.n_params,
        "config": asdict(config),
        "tokenizer": tokenizer.name if tokenizer is not None else None,
        "adds_bos": tokenizer.adds_bos if tokenizer is not None else None,
        "fingerprint": fingerprint(model),
    }


def fingerprint(model: HookedTransformer) -> str:
    """A short hash of a model's configuration and of a sample of its weights, to tell one checkpoint from another."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, value in model.state_dict().items():
        sample = value.flatten()[:: max(1, value.numel() // 1024)].float().cpu().contiguous()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def slugs_of(names: Sequence[str]) -> list[str]:
    """A part of a file name for each, no two alike."""
    slugs: list[str] = []
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "unnamed"
        candidates = [plain, *(f"{plain}-{number}" for number in range(2, len(names) + 1))]
        slugs.append(next(slug for slug in candidates if slug not in slugs))
    return slugs


def slugs_of_tasks(tasks: Sequence[str]) -> dict[str, str]:
    """A part of a file name per task, no two alike: a name itself, and of a task file its name without the ending."""
    # Names first, so that a file of the same name is what gets a number.
    ordered = sorted(tasks, key=is_file_name)
    slugs = slugs_of([Path(task).stem if is_file_name(task) else task for task in ordered])
    found = dict(zip(ordered, slugs, strict=True))
    return {task: found[task] for task in tasks}


def versions() -> dict[str, str]:
    """Of all that the numbers of a run may depend on."""
    return {
        "subcircuit": metadata.version("subcircuit"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
    }


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def peak_memory_bytes() -> int:
    """The most memory that this process held so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def timed(directory: RunDirectory, stage: str) -> Iterator[None]:
    """Adds the seconds that a stage took to run.json."""
    start = time.perf_counter()
    yield
    timings = directory.run["timings"]
    timings[stage] = round(timings.get(stage, 0.0) + time.perf_counter() - start, 2)
    directory.update_run(timings=timings)
