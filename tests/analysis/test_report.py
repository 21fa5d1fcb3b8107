"""The report of a run, from made-up results: what it says, what it survives, that it needs nothing from outside."""

from __future__ import annotations

import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from subcircuit.analysis import drawing, figures
from subcircuit.analysis.circuit import Circuit, TraceStep, intersection, union
from subcircuit.analysis.report import render_report, write_report
from subcircuit.analysis.store import RunDirectory
from subcircuit.engine.errors import StoreError

TASKS = ("numerals", "number_words", "months")
MODELS = ({"name": "big/model v2", "slug": "big-model-v2", "n_layers": 30, "n_heads": 9, "n_params": 134_515_008},)
MODELS += ({"name": "tiny-gpt2", "slug": "tiny-gpt2", "n_layers": 4, "n_heads": 4, "n_params": 817_280},)
SCORES = {"numerals": 81.25, "number_words": 80.5, "months": 83.75}


def made_up_circuit(model: dict[str, Any], task: str) -> Circuit:
    """Every task has head 0 of every other layer and every other MLP; the rest is drawn for the task."""
    rng = random.Random(f"{model['slug']} {task}")
    heads = [(layer, 0) for layer in range(0, model["n_layers"], 2)]
    heads += [(rng.randrange(model["n_layers"]), rng.randrange(1, model["n_heads"])) for _ in range(model["n_layers"])]
    mlps = [layer for layer in range(model["n_layers"]) if layer % 2 == 0 or rng.random() < 0.5]
    trace = tuple(
        TraceStep(1 + i // 20, "backward" if i < 20 else "forward", f"a{i % model['n_layers']}.h1", 99 - i, i % 3 > 0)
        for i in range(40)
    )
    return Circuit(
        heads,
        mlps,
        model=model["name"],
        task=task,
        method="prune",
        score=SCORES[task],
        trace=trace,
        settings={"threshold": 20.0},
    )


def made_up_result(model: dict[str, Any], circuit: Circuit) -> dict[str, Any]:
    rng = random.Random(circuit.task)
    grid = [[rng.gauss(0, 0.03) for _ in range(model["n_heads"])] for _ in range(model["n_layers"])]
    for layer, head in circuit.heads[::3]:
        grid[layer][head] = -rng.uniform(0.3, 2.4)
    example = {"prompt": "March <b>2</b> & May", "corrupted": "June 7", "answer": " June", "wrong": " May"}
    return {
        "examples": [example | {"model_top": " June", "correct": True, "top": [[" June", 0.87], [" May", 0.06]]}] * 3,
        "accuracy": 0.9375,
        "full_logit_difference": 4.321,
        "n_prompts": 32,
        "n_pos": 23,
        "template": "done",
        "intervals": {"accuracy": [0.875, 1.0], "full_logit_difference": [3.9, 4.7], "score": [70.0, 90.0]},
        "drops": {str(node): rng.expovariate(0.1) for node in circuit.nodes},
        "drop_intervals": {str(node): [0.25, 99.5] for node in circuit.nodes},
        "random_scores": [rng.uniform(-12, 9) for _ in range(19)] + [11.5],
        "heads": grid,
        "mlps": [-abs(rng.gauss(0, 1)) for _ in range(model["n_layers"])],
        "clean_mean": 4.321,
    }


def made_up_comparison(circuits: list[Circuit]) -> dict[str, Any]:
    shared, either = intersection(circuits), union(circuits)
    return {
        "tasks": [circuit.task for circuit in circuits],
        "jaccard_heads": [[a.jaccard(b, "heads") for b in circuits] for a in circuits],
        "jaccard_nodes": [[a.jaccard(b) for b in circuits] for a in circuits],
        "cross_task": [[SCORES[c.task] - 7 * abs(i - j) for j in range(5)] for i, c in enumerate(circuits)],
        "cross_task_intervals": [[[-3.4, 71.2]] * 5] * len(circuits),
        "cross_task_columns": [*(circuit.task for circuit in circuits), "shared", "union"],
        "shared": {"heads": shared.heads, "mlps": shared.mlps},
        "union": {"heads": either.heads, "mlps": either.mlps},
    }


def made_up_run(path: Path, models: tuple[dict[str, Any], ...] = MODELS) -> RunDirectory:
    """A run directory as a study leaves it, apart from its report."""
    stages = ("load", "sweep", "discover", "compare")
    run = {
        "command": "subcircuit study --model <tiny> --seed 7",
        "settings": {"models": [model["name"] for model in models], "tasks": list(TASKS), "n": 32, "seed": 7}
        | {"threshold": 20.0, "precision": "fp32", "executor": "torch"},
        "tasks": list(TASKS),
        "seed": 7,
        "versions": {"subcircuit": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
        "models": [model | {"description": "made up", "fingerprint": "0123456789abcdef"} for model in models],
        "timings": {f"{model['slug']}: {stage}": 12.5 for model in models for stage in stages},
        "notes": [],
        "peak_memory_bytes": 3 * 2**29,
    }
    directory = RunDirectory.create(path, run)
    for model in models:
        circuits = [made_up_circuit(model, task) for task in TASKS]
        for circuit in circuits:
            directory.write_json(f"circuits/{model['slug']}.{circuit.task}.json", circuit.to_dict())
            directory.write_json(f"results/{model['slug']}.{circuit.task}.json", made_up_result(model, circuit))
        directory.write_json(f"results/{model['slug']}.compare.json", made_up_comparison(circuits))
    return directory


class Page(HTMLParser):
    """What a browser would make of the report: its elements with their attributes, and the text of each panel."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.panels: dict[str, str] = {"": ""}
        self._panel, self._open = "", []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        if "data-panel" in attributes:
            self._panel = attributes["data-panel"]
            self.panels[self._panel] = ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "section":
            self._panel = ""

    def handle_data(self, data: str) -> None:
        self.panels[self._panel] = " ".join(f"{self.panels[self._panel]} {data}".split())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    directory = made_up_run(tmp_path_factory.mktemp("report") / "run")
    write_report(directory)
    return directory


@pytest.fixture(scope="module")
def html(run: RunDirectory) -> str:
    return (run.path / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["slug"])
def test_a_models_panel_tells_what_was_found(page: Page, model: dict[str, Any]) -> None:
    panel = page.panels[model["slug"]]
    circuits = [made_up_circuit(model, task) for task in TASKS]
    n_heads = model["n_layers"] * model["n_heads"]
    for circuit in circuits:
        assert f"kept by {len(circuit.heads)} of {n_heads} heads" in panel
        assert f"{len(circuit.mlps)} of {model['n_layers']} MLPs" in panel
        assert f"{circuit.score:.1f} %" in panel
    shared = intersection(circuits)
    assert f"{len(shared.heads)} heads and {len(shared.mlps)} MLPs are in all circuits" in panel
    assert "Heads " + " ".join(f"{layer}.{head}" for layer, head in shared.heads) in panel
    assert "MLPs " + " ".join(map(str, shared.mlps)) in panel
    assert "Alone they keep 60 to 77 %" in panel
    assert "the best of 20 12 % (p = 0.048)" in panel
    assert f"{model['n_params']:,} parameters · 50 s" in panel
    assert "numerals, number words and months" in panel


def test_a_task_shows_its_prompts_every_node_and_every_decision(page: Page) -> None:
    model = MODELS[1]
    panel = page.panels[model["slug"]]
    circuit = made_up_circuit(model, "months")
    for node, drop in made_up_result(model, circuit)["drops"].items():
        assert f"{node} {drop:.2f} 0.25 99.50" in panel
    for i, step in enumerate(circuit.trace, 1):
        decision = "removed" if step.removed else "kept"
        assert f"{i} {step.sweep} {step.direction} {step.node} {step.score_without:.2f} {decision}" in panel
    assert "94 % [88, 100] 4.32 [3.90, 4.70]" in panel
    assert "corrupted: June 7 June May June ✓ June 87 %, May 6 %" in panel


def test_where_the_numbers_come_from_is_told(page: Page) -> None:
    told = page.panels[""]
    assert "subcircuit study --model <tiny> --seed 7" in told
    assert "threshold 20.0" in told
    assert "tiny-gpt2: discover 12.5 s" in told
    assert "torch 2.13.0" in told
    assert "weights of tiny-gpt2 0123456789abcdef" in told
    assert "peak memory 1.50 GiB" in told
    assert "2 models · 1 min 40 s in all" in told


def test_text_from_outside_stays_text(html: str, page: Page) -> None:
    assert "March <b>2</b> & May" in page.panels["tiny-gpt2"]
    assert "March <b>" not in html
    assert "--model <tiny>" not in html


def test_the_page_asks_for_nothing_from_anywhere(html: str, page: Page) -> None:
    assert not {"link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                assert value.startswith(("#", "data:image/png;base64,")), f"<{tag} {name}={value!r}>"
    assert re.findall(r"url\((?!#)|@import", html) == []
    code = html.split("<script>", 1)[1]
    assert re.findall(r"fetch|XMLHttpRequest|import\s*\(|eval|https?:", code) == []


def test_what_figures_refer_to_is_in_the_page_once(html: str, page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'(?:href="#|url\(#|aria-controls=")([^")]+)', html))
    assert referred
    assert referred <= set(ids)


def test_a_tab_for_each_model_and_none_for_a_single_one(page: Page, tmp_path: Path) -> None:
    tabs = [attributes["data-tab"] for _, attributes in page.elements if "data-tab" in attributes]
    hidden = [attributes["data-panel"] for _, attributes in page.elements if "hidden" in attributes]
    assert tabs == ["big-model-v2", "tiny-gpt2"]
    assert hidden == ["tiny-gpt2"]
    single = Page(render_report(made_up_run(tmp_path / "run", MODELS[1:])))
    assert not any("data-tab" in attributes or "hidden" in attributes for _, attributes in single.elements)


def test_several_models_are_compared_by_the_depths_of_roles(tmp_path: Path) -> None:
    directory = made_up_run(tmp_path / "run")
    assert "Roles by depth" not in render_report(directory)
    heads = {
        "big-model-v2": [(3, "previous token"), (14, "induction")],
        "tiny-gpt2": [(0, "induction"), (3, "induction")],
    }
    for slug, found in heads.items():
        rows = [{"layer": layer, "index": 1, "roles": [role]} for layer, role in found]
        section = {"title": "Roles", "sentences": [], "tables": [], "figures": [], "data": {"heads": rows}}
        directory.write_json(f"results/{slug}.months.roles.json", section)
    told = Page(render_report(directory)).panels[""]
    assert "months previous token 0.12 – months induction 0.48 0.50 (0.12–0.88)" in told


def test_the_same_run_gives_the_same_report_and_rendering_writes_nothing(run: RunDirectory, html: str) -> None:
    before = {file: file.stat().st_mtime_ns for file in run.path.rglob("*")}
    assert render_report(RunDirectory.open(run.path)) == html
    assert {file: file.stat().st_mtime_ns for file in run.path.rglob("*")} == before


def test_figures_are_files_of_their_own_too(run: RunDirectory) -> None:
    names = {file.name for file in (run.path / "figures").iterdir()}
    of_a_model = {"overlay", "overlap", "overlap_nodes", "cross_task", "random"}
    of_a_model |= {f"{task}.{kind}" for task in TASKS for kind in ("effects", "drops", "trace")}
    assert names == {f"{model['slug']}.{name}.svg" for model in MODELS for name in of_a_model}
    assert "−3 to 71" in (run.path / "figures" / "tiny-gpt2.cross_task.svg").read_text()
    for file in (run.path / "figures").iterdir():
        assert ElementTree.parse(file).getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("missing", "told", "not_told"),
    [
        ("results/*", "kept by 6 of 16 heads", "Random circuits of that size"),
        ("results/*.compare.json", "kept by 6 of 16 heads", "Alone they keep"),
        ("circuits/*.months.json", "numerals and number words", "months: how it was found"),
        ("circuits/*", "no circuit is found yet", "kept by"),
    ],
)
def test_a_stage_that_is_not_done_is_left_out(tmp_path: Path, missing: str, told: str, not_told: str) -> None:
    directory = made_up_run(tmp_path / "run", MODELS[1:])
    whole = Page(render_report(directory)).panels["tiny-gpt2"]
    assert not_told in whole
    for file in directory.path.glob(missing):
        file.unlink()
    panel = Page(render_report(directory)).panels["tiny-gpt2"]
    assert told in panel
    assert not_told not in panel


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    assert "No model of this run is loaded yet" in render_report(RunDirectory.create(tmp_path / "run", {}))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("circuits/tiny-gpt2.months.json", "{}"),
        ("results/tiny-gpt2.months.json", "{"),
        ("circuits/tiny-gpt2.months.json", "["),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: str) -> None:
    directory = made_up_run(tmp_path / "run", MODELS[1:])
    directory.write_text(file, content)
    with pytest.raises(StoreError, match=re.escape(file)):
        render_report(directory)


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}text")]


@pytest.mark.parametrize(("n_layers", "n_heads"), [(4, 4), (12, 12), (30, 9), (32, 32)])
def test_an_overlay_has_a_mark_for_every_node_and_task(n_layers: int, n_heads: int) -> None:
    model = MODELS[1] | {"n_layers": n_layers, "n_heads": n_heads}
    circuits = {task: made_up_circuit(model, task) for task in TASKS}
    svg = figures.overlay_figure(circuits, n_layers, n_heads, "overlay")
    shared = intersection(list(circuits.values()))
    for i, (task, circuit) in enumerate(circuits.items()):
        marks = re.findall(rf"<use [^>]*fill: {drawing.task_colour(i)}", svg, flags=re.IGNORECASE)
        assert len(marks) == len(circuit) + 2, "its nodes, its line of the legend, and its part in that of all"
        line = f"{drawing.words(task)}: {len(circuit.heads)} heads and {len(circuit.mlps)} MLPs"
        assert any(text.startswith(line) for text in texts(svg))
    assert f"in every circuit: {len(shared.heads)} heads and {len(shared.mlps)} MLPs" in texts(svg)
    free = n_layers * (n_heads + 1) - len(union(list(circuits.values())))
    assert len(re.findall(rf"<use [^>]*fill: {drawing.FAINT}", svg, flags=re.IGNORECASE)) == free


def test_a_heat_map_writes_out_what_is_largest_and_leaves_out_what_was_not_measured() -> None:
    nan = float("nan")
    svg = figures.heatmap_figure([[0.01, -1.26], [nan, 0.5]], [-31.6, 0.002], "effects", n_labels=3)
    assert {"−1.3", "0.50", "−32"} <= set(texts(svg))
    assert "nan" not in svg.lower().replace("dominant", "")
    assert texts(figures.heatmap_figure([[nan, nan]], [nan], "nothing"))
    assert texts(figures.heatmap_figure([[0.0, 0.0]], [0.0], "none"))


def test_names_are_drawn_as_they_are() -> None:
    title = "$a_1$ <b> & --> 'x'"
    svg = figures.matrix_figure([[1.0]], ["my_task$"], ["a"], title)
    assert title in texts(svg)
    assert "my_task$" not in texts(svg)
    assert {"my", "task$"} <= set(texts(svg))


def test_a_trace_ends_at_the_score_of_the_circuit() -> None:
    trace = [TraceStep(1, "backward", "m3", 95.0, True), TraceStep(1, "backward", "m2", -900.0, False)]
    svg = figures.trace_figure(trace, "trace", 20.0)
    assert "score of what is left" in texts(svg)
    assert not any("800" in text for text in texts(svg)), "one dear node does not squeeze the line"


def test_settings_of_0_and_1_are_numbers_and_no_answers(tmp_path):
    directory = made_up_run(tmp_path / "run", MODELS[1:])
    directory.update_run(settings={"seed": 0, "n": 1, "filter": False, "n_random": None})
    page = render_report(directory)
    for name, value in (("seed", "0"), ("n", "1"), ("filter", "no"), ("n random", "–")):
        assert f"<td>{name}</td><td>{value}</td>" in page
