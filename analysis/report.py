"""One self-contained HTML page about a run, made from its run directory alone."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from subcircuit.analysis import figures
from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.store import RunDirectory


def write_report(directory: RunDirectory) -> Path:
    """Render the report and its figures into the run directory; returns the page's path."""
    directory.write_text("report.html", render_report(directory))
    return directory.path / "report.html"


def render_report(directory: RunDirectory) -> str:
    """The report as HTML text. Figures are also written to `figures/`. Stages without a result are left out."""
    environment = Environment(loader=PackageLoader("subcircuit.analysis"), autoescape=True, trim_blocks=True)
    environment.filters["words"] = lambda name: name.replace("_", " ")
    models = [_model_values(directory, model) for model in directory.run["models"]]
    return environment.get_template("report.html").render(run=directory.run, models=models)


def _model_values(directory: RunDirectory, model: dict[str, Any]) -> dict[str, Any]:
    slug = model["slug"]
    tasks = [name for name in directory.run["tasks"] if directory.has(f"circuits/{slug}.{name}.json")]
    circuits = {name: Circuit.from_dict(directory.read_json(f"circuits/{slug}.{name}.json")) for name in tasks}
    results = {
        name: directory.read_json(f"results/{slug}.{name}.json")
        for name in tasks
        if directory.has(f"results/{slug}.{name}.json")
    }
    compare_file = f"results/{slug}.compare.json"
    compare = directory.read_json(compare_file) if directory.has(compare_file) else None
    drawn = _figures(model, circuits, results, compare)
    for name, svg in drawn.items():
        directory.write_text(f"figures/{slug}.{name}.svg", svg)
    return {
        **model,
        "tasks": [_task_values(name, circuits[name], results.get(name)) for name in tasks],
        "compare": compare,
        "figures": {name: Markup(svg) for name, svg in drawn.items()},
        "timings": {
            stage.split(": ", 1)[1]: seconds
            for stage, seconds in directory.run["timings"].items()
            if stage.startswith(f"{slug}: ")
        },
    }


def _task_values(name: str, circuit: Circuit, result: dict[str, Any] | None) -> dict[str, Any]:
    steps = [
        {"number": number, "sweep": step.sweep, "direction": step.direction, "node": step.node}
        | {"score": step.score_without, "removed": step.removed}
        for number, step in enumerate(circuit.trace, 1)
    ]
    values: dict[str, Any] = {"name": name, "circuit": circuit, "trace": steps, "result": result}
    if result is not None:
        values["drops"] = sorted(result["drops"].items(), key=lambda item: -item[1])
        values["random_mean"] = mean(result["random_scores"])
        values["random_best"] = max(result["random_scores"])
    return values


def _figures(
    model: dict[str, Any],
    circuits: dict[str, Circuit],
    results: dict[str, dict[str, Any]],
    compare: dict[str, Any] | None,
) -> dict[str, str]:
    drawn: dict[str, str] = {}
    if circuits:
        title = f"{model['name']}: circuits of {len(circuits)} tasks"
        drawn["overlay"] = figures.overlay_figure(circuits, model["n_layers"], model["n_heads"], title)
    for name, result in results.items():
        title = f"{name.replace('_', ' ')}: effect of patching each head and MLP"
        drawn[f"{name}.effects"] = figures.heatmap_figure(result["heads"], result["mlps"], title)
        if result["drops"]:
            title = f"{name.replace('_', ' ')}: what the circuit loses without a node"
            drawn[f"{name}.drops"] = figures.drops_figure(result["drops"], title)
    scores = {
        name: circuit.score for name, circuit in circuits.items() if circuit.score is not None and name in results
    }
    if scores:
        baselines = {name: results[name]["random_scores"] for name in scores}
        drawn["random"] = figures.random_figure(scores, baselines, "circuits against random ones")
    if compare is not None:
        tasks = compare["tasks"]
        drawn["overlap"] = figures.matrix_figure(
            compare["jaccard_heads"], tasks, tasks, "heads in common (Jaccard index)"
        )
        drawn["cross_task"] = figures.matrix_figure(
            compare["cross_task"],
            tasks,
            compare["cross_task_columns"],
            "score of each circuit (column) on each task (row)",
            "{:.0f}",
        )
    return drawn
