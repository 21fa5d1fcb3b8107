"""One self-contained HTML page about a run, made from its run directory alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from subcircuit.analysis import figures
from subcircuit.analysis.baselines import beside_random
from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.circuit_figure import overlay_diagram
from subcircuit.analysis.depth import role_depths
from subcircuit.analysis.drawing import task_colour, words
from subcircuit.analysis.overlap import Overlap
from subcircuit.analysis.records import circuits_of, read_scores
from subcircuit.analysis.stages import TASK_STAGES
from subcircuit.analysis.store import RunDirectory


def write_report(directory: RunDirectory) -> Path:
    """Write `report.html`, and its figures to `figures/`, into the run directory; returns the page's path.

    Raises StoreError, naming the file, when one of the run's files cannot be read.
    """
    models = _models(directory)
    for model in models:
        for name, svg in model["drawn"].items():
            directory.write_text(f"figures/{model['slug']}.{name}.svg", svg)
    directory.write_text("report.html", _page(directory, models))
    return directory.path / "report.html"


def render_report(directory: RunDirectory) -> str:
    """The report as HTML text. What a run has not done, or not yet, is left out.

    Raises StoreError, naming the file, when one of the run's files cannot be read.
    """
    return _page(directory, _models(directory))


def _page(directory: RunDirectory, models: list[dict[str, Any]]) -> str:
    environment = Environment(
        loader=PackageLoader("subcircuit.analysis"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"words": words, "number": _number, "duration": _duration, "listed": _listed}
    seconds = sum(directory.run.get("timings", {}).values())
    about: dict[str, Any] = {}
    if len(models) > 1:
        about = {"roles": _roles_by_depth(models), "depths": directory.json_if_there("results/depths.json")}
    return environment.get_template("report.html").render(run=directory.run, models=models, seconds=seconds, **about)


def _models(directory: RunDirectory) -> list[dict[str, Any]]:
    return [_model_values(directory, model) for model in directory.run.get("models", ())]


def _model_values(directory: RunDirectory, model: dict[str, Any]) -> dict[str, Any]:
    slug = model["slug"]
    circuits = circuits_of(directory, slug)
    results = {name: _result(directory, f"{slug}.{name}") for name in directory.run.get("tasks", ())}
    known = [name for name in results if results[name] or name in circuits]
    compare = directory.json_if_there(f"results/{slug}.compare.json")
    drawn = _figures(model, circuits, results, compare)
    return {
        **model,
        "n_nodes": model["n_layers"] * (model["n_heads"] + 1),
        "tasks": [
            _task_values(i, name, circuits.get(name), results[name])
            | {"sections": _sections(directory, f"{slug}.{name}")}
            for i, name in enumerate(known)
        ],
        "transfer": _section(directory, f"{slug}.transfer"),
        "role_depths": {name: _role_depths(directory, f"{slug}.{name}", model["n_layers"]) for name in circuits},
        "compare": compare,
        "shared_scores": _shared_scores(compare),
        "drawn": drawn,
        "figures": {name: _inline(svg, f"{slug}.{name}") for name, svg in drawn.items()},
        "seconds": sum(
            seconds for stage, seconds in directory.run.get("timings", {}).items() if stage.startswith(f"{slug}: ")
        ),
    }


def _result(directory: RunDirectory, name: str) -> dict[str, Any]:
    """What is known of a task: the clean run, the sweep, the circuit beside random ones; whatever of it is there."""
    found, chance = (directory.json_if_there(f"results/{name}{part}.json") for part in ("", ".random"))
    if not found and directory.has(f"scores/{name}.safetensors"):
        scores = read_scores(directory, f"scores/{name}.safetensors")
        found = {
            "heads": scores.heads().tolist(),
            "mlps": scores.mlps().tolist(),
            "clean_mean": float(scores.clean_metric.mean()),
            "n_prompts": scores.effects.shape[1],
        }
    intervals = found.get("intervals", {})
    if "score_interval" in chance:
        intervals = intervals | {"score": chance["score_interval"]}
    return found | chance | ({"intervals": intervals} if intervals else {})


def _sections(directory: RunDirectory, name: str) -> list[dict[str, Any]]:
    """What the stages found for one task, in their order."""
    found = (_section(directory, f"{name}.{stage}") for stage in TASK_STAGES)
    return [section for section in found if section]


def _section(directory: RunDirectory, name: str) -> dict[str, Any]:
    """A stage's section, with its figures as part of the page; empty where the stage was not run."""
    section = directory.json_if_there(f"results/{name}.json")
    if not section:
        return {}
    files = {figure: f"figures/{name}.{figure}.svg" for figure in section["figures"]}
    drawn = [_inline(directory.read_text(file), f"{name}.{figure}") for figure, file in files.items()]
    return section | {"figures": drawn, "tables": [table for table in section["tables"] if table["rows"]]}


def _role_depths(directory: RunDirectory, name: str, n_layers: int) -> dict[str, tuple[float, float, float]]:
    """Mean, least and greatest depth of a circuit's heads of each role; nothing where roles were not asked for."""
    roles: dict[str, list[tuple[int, int]]] = {}
    for row in directory.json_if_there(f"results/{name}.roles.json").get("data", {}).get("heads", ()):
        for role in row["roles"]:
            roles.setdefault(role, []).append((row["layer"], row["index"]))
    return role_depths(roles, n_layers)


def _roles_by_depth(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per task and role that any model's circuit has: its depths in each model, None where it is not found."""
    depths = [model["role_depths"] for model in models]
    rows = dict.fromkeys((task, role) for found in depths for task, roles in found.items() for role in roles)
    return [
        {"task": task, "role": role, "depths": [found.get(task, {}).get(role) for found in depths]}
        for task, role in rows
    ]


def _shared_scores(compare: Mapping[str, Any]) -> list[float]:
    """What the nodes that all circuits share keep of each task, without the rest of its circuit."""
    if "shared" not in compare.get("cross_task_columns", ()):
        return []
    column = compare["cross_task_columns"].index("shared")
    return [row[column] for row in compare["cross_task"]]


def _task_values(index: int, name: str, circuit: Circuit | None, result: Mapping[str, Any]) -> dict[str, Any]:
    baseline = [value for value in result.get("random_scores", ()) if math.isfinite(value)]
    ends = result.get("drop_intervals", {})
    return {
        "name": name,
        "colour": task_colour(index),
        "circuit": circuit,
        "result": result,
        "drops": sorted(
            ((node, drop, ends.get(node)) for node, drop in result.get("drops", {}).items()), key=lambda row: -row[1]
        ),
        "intervals": result.get("intervals", {}),
        **beside_random(None if circuit is None else circuit.score, baseline),
    }


def _figures(
    model: Mapping[str, Any],
    circuits: Mapping[str, Circuit],
    results: Mapping[str, Mapping[str, Any]],
    compare: Mapping[str, Any],
) -> dict[str, str]:
    """SVG texts by name; `months.effects` for those of one task."""
    drawn: dict[str, str] = {}
    if circuits:
        tasks = " and ".join(words(", ".join(circuits)).rsplit(", ", 1))
        title = f"{model['name']}: what does {tasks}"
        drawn["overlay"] = figures.overlay_figure(circuits, model["n_layers"], model["n_heads"], title)
    if len(circuits) > 1 and all(circuit.edges for circuit in circuits.values()):
        group_size = model["n_heads"] // model["n_kv_heads"]
        drawn["overlay_edges"] = overlay_diagram(circuits, f"{model['name']}: edges of the circuits", group_size)
    for name, result in results.items():
        task = words(name)
        if _has_numbers(result.get("heads", ())) or _has_numbers([result.get("mlps", ())]):
            title = f"{task}: effect of patching a head or MLP"
            drawn[f"{name}.effects"] = figures.heatmap_figure(result["heads"], result["mlps"], title)
        if result.get("drops"):
            title = f"{task}: what the circuit loses without a node"
            drawn[f"{name}.drops"] = figures.drops_figure(result["drops"], title, result.get("drop_intervals"))
        circuit = circuits.get(name)
        if circuit is not None and circuit.trace:
            threshold = circuit.settings.get("threshold")
            drawn[f"{name}.trace"] = figures.trace_figure(circuit.trace, f"{task}: how it was found", threshold)
    scores = {name: circuit.score for name, circuit in circuits.items() if circuit.score is not None}
    baselines = {name: results[name].get("random_scores", ()) for name in scores}
    if any(baselines.values()):
        drawn["random"] = figures.random_figure(scores, baselines, "Circuits against random ones of equal size")
    if compare:
        tasks, columns = compare["tasks"], compare["cross_task_columns"]
        drawn["overlap"] = _overlap_figure(compare, "heads", "Heads in common (Jaccard index)")
        drawn["overlap_nodes"] = _overlap_figure(compare, "nodes", "Heads and MLPs in common (Jaccard index)")
        if "overlap_edges" in compare:
            drawn["overlap_edges"] = _overlap_figure(compare, "edges", "Edges in common (Jaccard index)")
            among = "Of edges between nodes of both (Jaccard index)"
            drawn["overlap_edges_between_shared"] = _overlap_figure(compare, "edges_between_shared", among)
        title = "Score of each circuit (column) on each task (row)"
        ends = compare.get("cross_task_intervals")
        drawn["cross_task"] = figures.matrix_figure(compare["cross_task"], tasks, columns, title, "{:.0f}", ends)
    return drawn


def _has_numbers(rows: Sequence[Sequence[float]]) -> bool:
    """Whether any value is one: a sweep of other components has none for heads and MLPs."""
    return any(math.isfinite(value) for row in rows for value in row)


def _overlap_figure(compare: Mapping[str, Any], kind: str, title: str) -> str:
    """Jaccard indices, with what chance gives where the run says it."""
    tasks, found = compare["tasks"], compare.get(f"overlap_{kind}")
    if found is None:
        return figures.matrix_figure(compare[f"jaccard_{kind}"], tasks, tasks, title)
    return figures.overlap_figure([[Overlap(**each) for each in row] for row in found], tasks, title)


def _inline(svg: str, name: str) -> Markup:
    """A figure as part of a page: its ids made the page's only ones of that name."""
    prefix = re.sub(r"[^A-Za-z0-9_-]", "-", name)
    svg = re.sub(r'(\bid=")', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r'(\bhref="#|url\(#)', rf"\g<1>{prefix}-", svg)
    return Markup(svg.replace("<svg ", '<svg role="img" ', 1))


def _number(value: float | None, digits: int = 0) -> str:
    """With the sign that a minus has in print, and no minus before zero; a dash for none."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def _duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _listed(value: Any) -> str:
    """A setting as it is read."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else str(value)
