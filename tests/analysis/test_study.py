"""A study of the bundled model, from beginning to report."""

from __future__ import annotations

import gc
import json
import re
import weakref
from dataclasses import replace

import pytest
import torch

from subcircuit.analysis import metrics, model_study
from subcircuit.analysis import study as study_module
from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.faithfulness import score
from subcircuit.analysis.records import circuits_of, fingerprint, scores_of, slugs_of
from subcircuit.analysis.report import write_report
from subcircuit.analysis.stages import STAGES, TASK_STAGES
from subcircuit.analysis.store import RunDirectory
from subcircuit.analysis.study import StudySettings, study
from subcircuit.analysis.sweep import sweep
from subcircuit.analysis.tasks import task, transfer_kinds
from subcircuit.engine.errors import PatchError, StoreError, TaskError, WeightsError
from subcircuit.weights.names import load

SETTINGS = StudySettings(models=("tiny-gpt2",), tasks=("numerals", "months"), n=8, n_random=4, max_sweeps=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return study(SETTINGS, str(tmp_path_factory.mktemp("study") / "run"), command="subcircuit study <test>")


def test_a_study_leaves_circuits_scores_and_a_report(run):
    circuits = circuits_of(run, "tiny-gpt2")
    assert list(circuits) == ["numerals", "months"]
    model = load("tiny-gpt2")
    for name, circuit in circuits.items():
        assert circuit.nodes
        assert circuit.score > 80
        assert score(model, task(name, model, n=8, seed=0), circuit) == pytest.approx(circuit.score, abs=1e-3)
        result = run.read_json(f"results/tiny-gpt2.{name}.json")
        assert result["accuracy"] >= 0.95
        chance = run.read_json(f"results/tiny-gpt2.{name}.random.json")
        assert max(chance["random_scores"]) < circuit.score
        assert set(chance["drops"]) == {str(node) for node in circuit.nodes}
        for node, (low, high) in chance["drop_intervals"].items():
            assert low <= chance["drops"][node] <= high
        intervals = (result["intervals"]["accuracy"], chance["score_interval"])
        for (low, high), mean in zip(intervals, (result["accuracy"], circuit.score), strict=True):
            assert low - 1e-4 <= mean <= high + 1e-4
    compare = run.read_json("results/tiny-gpt2.compare.json")
    for i, name in enumerate(circuits):
        assert compare["cross_task"][i][i] == pytest.approx(circuits[name].score, abs=1e-3)
        chance = run.read_json(f"results/tiny-gpt2.{name}.random.json")
        assert compare["cross_task_intervals"][i][i] == pytest.approx(chance["score_interval"], abs=1e-3)
    overlap = compare["overlap_heads"][0][1]
    assert overlap["jaccard"] == pytest.approx(compare["jaccard_heads"][0][1])
    assert f"chance {overlap['expected_jaccard']:.2f}" in (run.path / "report.html").read_text()
    rows = (run.path / "scores.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * (4 * 8 + 4)
    assert rows[0].endswith(",q")
    for name in circuits:
        result = run.read_json(f"results/tiny-gpt2.{name}.json")
        n_called = sum(q <= 0.05 for q in result["q"].values())
        assert (len(result["q"]), n_called > 0) == (36, True)
        said = f"{n_called} of 36 sites have an effect, at a false discovery rate of 5% (q)"
        assert said in (run.path / "report.html").read_text()


def test_the_report_says_what_was_found_and_needs_nothing_from_outside(run):
    page = (run.path / "report.html").read_text()
    circuit = circuits_of(run, "tiny-gpt2")["months"]
    assert f"{len(circuit.heads)} of 32 heads" in page
    assert "subcircuit study &lt;test&gt;" in page
    assert "<svg" in page
    assert not re.search(r"(src|href)=\"https?:|url\(http|@import", page)
    again = write_report(run).read_text()
    assert write_report(run).read_text() == again


def test_every_stage_leaves_its_values_and_figures_and_a_section_of_the_report(run):
    page = (run.path / "report.html").read_text()
    for stage in TASK_STAGES:
        for name in ("numerals", "months"):
            section = run.read_json(f"results/tiny-gpt2.{name}.{stage}.json")
            assert f"<h3>{section['title']}</h3>" in page
            assert section["figures"]
            for figure in section["figures"]:
                assert (run.path / f"figures/tiny-gpt2.{name}.{stage}.{figure}.svg").read_text().startswith("<svg")
    circuit = circuits_of(run, "tiny-gpt2")["months"]
    edges = run.read_json("results/tiny-gpt2.months.edges.json")["data"]
    assert 0 < len(circuit.edges) == edges["n_edges"] < edges["n_candidates"]
    alone = run.read_json("results/tiny-gpt2.months.edge-faithfulness.json")["data"]
    assert alone["score"][0] == pytest.approx(edges["score"], abs=1e-3)
    found = run.read_json("results/tiny-gpt2.months.faithfulness.json")["data"]
    assert found["score"][0] == pytest.approx(circuit.score, abs=1e-3)
    survival = run.read_json("results/tiny-gpt2.months.sensitivity.json")["data"]["survival"]
    assert survival["recovers"][0] > 0
    rows = run.read_json("results/tiny-gpt2.transfer.json")["data"]["rows"]
    assert {row["kind"] for row in rows} == {"numerals", "months", *transfer_kinds()}
    without = {row["kind"]: row["share"] for row in rows if row["circuit"] == "months"}
    assert without["months"] < 0.5


def results_of(run):
    return {file.name.removeprefix("tiny-gpt2.") for file in (run.path / "results").iterdir()}


def test_stages_are_left_out_and_made_up_for_later(run, tmp_path):
    settings = replace(SETTINGS, tasks=("months",), stages=("sweep",))
    found = study(settings, str(tmp_path / "run"))
    assert results_of(found) == {"months.json"}
    assert not circuits_of(found, "tiny-gpt2")
    page = (found.path / "report.html").read_text()
    assert "no circuit is found yet" in page
    assert "effect of patching a head or MLP" in page
    study(replace(settings, stages=("sweep", "lens", "edges")), str(tmp_path / "run"), resume=True)
    assert results_of(found) == {"months.json", "months.lens.json", "months.edges.json"}
    assert found.read_json("results/tiny-gpt2.months.edges.json")["left_out"]
    assert "edges, since no circuit was looked for" in RunDirectory.open(found.path).run["notes"][-1]
    study(replace(settings, stages=("prune", "edges")), str(tmp_path / "run"), resume=True)
    for name in ("results/tiny-gpt2.months.edges.json", "circuits/tiny-gpt2.months.json"):
        assert (found.path / name).read_bytes() == (run.path / name).read_bytes()
    study(replace(settings, stages=("transfer",)), str(tmp_path / "no circuits"))
    study(replace(settings, stages=("prune", "transfer")), str(tmp_path / "no circuits"), resume=True)
    later = RunDirectory.open(tmp_path / "no circuits")
    assert not later.run["notes"]
    assert not later.read_json("results/tiny-gpt2.transfer.json")["left_out"]
    assert not study(replace(settings, stages=STAGES), str(tmp_path / "run"), resume=True).run["notes"]
    for name in ("months", "months.random", "months.faithfulness", "months.edge-faithfulness", "months.roles"):
        file = f"results/tiny-gpt2.{name}.json"
        assert (found.path / file).read_bytes() == (run.path / file).read_bytes()


@pytest.mark.usefixtures("no_report")
def test_a_circuit_is_asked_for_without_a_sweep(tmp_path):
    settings = replace(SETTINGS, tasks=("months",), stages=("prune", "faithfulness", "compare"))
    found = study(settings, str(tmp_path / "run"))
    assert results_of(found) == {"months.json", "months.faithfulness.json", "compare.json"}
    section = found.read_json("results/tiny-gpt2.months.faithfulness.json")
    assert section["data"]["recovered"]
    with_sweep = study(replace(settings, stages=("sweep", *settings.stages)), str(tmp_path / "with"))
    file = "results/tiny-gpt2.months.faithfulness.json"
    assert (found.path / file).read_bytes() == (with_sweep.path / file).read_bytes()


def test_edges_and_depths_in_common_are_written_and_shown(run):
    circuits = circuits_of(run, "tiny-gpt2")
    compare = run.read_json("results/tiny-gpt2.compare.json")
    edges = compare["shared"]["edges"]
    assert {(sender, receiver) for sender, receiver, _ in edges} == set.intersection(
        *(set(circuit.edges) for circuit in circuits.values())
    )
    for sender, receiver, points in edges:
        assert points == [circuit.edge_scores[sender, receiver] for circuit in circuits.values()]
    assert [row[0]["kind"] for row in compare["overlap_edges"]] == ["edges", "edges"]
    page = (run.path / "report.html").read_text()
    assert "Edges in every circuit" in page
    assert (run.path / "figures/tiny-gpt2.overlay_edges.svg").read_text().startswith("<svg")


def test_resuming_a_finished_study_computes_nothing_again(run, monkeypatch):
    before = {file: file.read_bytes() for file in run.path.rglob("*.json") if file.name != "run.json"}

    def never(*args, **kwargs):
        raise AssertionError("computed again")

    for name in ("load", "sweep", "discover", "node_drops", "random_baseline", "crossed"):
        monkeypatch.setattr(model_study, name, never)
    study(SETTINGS, str(run.path), resume=True)
    assert before == {file: file.read_bytes() for file in before}


@pytest.fixture
def no_report(monkeypatch):
    """Figures take longer than all the rest of a small study."""
    monkeypatch.setattr(study_module, "write_report", lambda directory: directory.write_text("report.html", "made"))


@pytest.mark.parametrize("stage", ["sweep", "discover", "random_baseline", "crossed", "write_report"])
@pytest.mark.usefixtures("no_report")
def test_a_study_that_was_killed_goes_on_where_it_stopped_and_ends_the_same(run, tmp_path, monkeypatch, stage):
    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study_module if stage == "write_report" else model_study, stage, die)
        with pytest.raises(KeyboardInterrupt):
            study(SETTINGS, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "report.html").exists()
    again = study(SETTINGS, str(tmp_path / "run"), resume=True)
    for name in [*files_of(run, "results"), *files_of(run, "circuits"), *files_of(run, "scores"), "scores.csv"]:
        assert (again.path / name).read_bytes() == (run.path / name).read_bytes()
    assert [model["slug"] for model in again.run["models"]] == ["tiny-gpt2"]


@pytest.mark.usefixtures("no_report")
def test_a_stage_that_was_finished_before_a_kill_is_not_computed_again(run, tmp_path, monkeypatch):
    calls = []

    def watch(patch, stage, dies_at=None):
        real = getattr(model_study, stage)

        def watched(*args, **options):
            calls.append(stage)
            if calls.count(stage) == dies_at:
                raise KeyboardInterrupt
            return real(*args, **options)

        patch.setattr(model_study, stage, watched)

    with monkeypatch.context() as patch:
        watch(patch, "discover", dies_at=2)
        with pytest.raises(KeyboardInterrupt):
            study(SETTINGS, str(tmp_path / "run"))
    folder = tmp_path / "run"
    finished = {
        file: file.stat().st_ino for part in ("scores", "circuits", "results") for file in folder.glob(f"{part}/*")
    }
    assert len(finished) == 4 + len(TASK_STAGES) + 2  # all of the first task, and the second's sweep
    calls.clear()
    with monkeypatch.context() as patch:
        for stage in ("sweep", "discover", "node_drops", "random_baseline"):
            watch(patch, stage)
        study(SETTINGS, str(folder), resume=True)
    assert calls == ["discover", "node_drops", "random_baseline"]
    assert finished == {file: file.stat().st_ino for file in finished}


def files_of(run, folder):
    found = [file.relative_to(run.path).as_posix() for file in (run.path / folder).iterdir()]
    assert found
    return found


@pytest.mark.usefixtures("no_report")
def test_what_cannot_be_studied_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(TaskError, match="at least one model and one task"):
        study(replace(SETTINGS, tasks=()), str(tmp_path / "a"))
    with pytest.raises(TaskError, match="task 'colours' is not known; expected one of numerals"):
        study(replace(SETTINGS, tasks=("months", "colours")), str(tmp_path / "a"))
    for wrong, words in (
        ({"threshold": 0.0}, "threshold 0.0 must be positive"),
        ({"threshold": float("nan")}, "must be positive"),
        ({"source": "median"}, "source 'median' is not known; expected one of corrupted"),
        ({"first": "sideways"}, "first 'sideways' is not known"),
        ({"precision": "fp8"}, "precision 'fp8' is not known"),
        ({"executor": "abacus"}, "executor 'abacus' is not known"),
        ({"n_random": 0}, "n_random is 0; expected at least 1"),
        ({"n": 0}, "n is 0; expected at least 1"),
        ({"n_edge_prompts": 0}, "n_edge_prompts is 0; expected at least 1"),
        ({"n_sensitivity_prompts": 0}, "n_sensitivity_prompts is 0; expected at least 1"),
        ({"stages": ("lens", "tea")}, "stage 'tea' is not known; expected some of sweep, prune"),
    ):
        with pytest.raises(PatchError, match=words):
            study(replace(SETTINGS, **wrong), str(tmp_path / "a"))
    with pytest.raises(TaskError, match="unknown template 'sung'"):
        study(replace(SETTINGS, template="sung"), str(tmp_path / "b"))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "file").touch()
    with pytest.raises(StoreError, match="not a run directory"):
        study(SETTINGS, str(tmp_path / "c"))
    assert not (tmp_path / "a").exists()
    study(replace(SETTINGS, tasks=("months",), n=2, n_random=1), str(tmp_path / "b"))


def test_an_unknown_second_model_is_said_before_the_first_is_studied(tmp_path, monkeypatch):
    def never(*args, **options):
        raise AssertionError("long work before every model was looked at")

    monkeypatch.setattr(model_study, "sweep", never)
    with pytest.raises(WeightsError, match="unknown model 'no-such'"):
        study(replace(SETTINGS, models=("tiny-gpt2", "no-such")), str(tmp_path / "run"))
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["run.json"]


@pytest.mark.usefixtures("no_report")
def test_several_models_are_studied_one_after_the_other_and_one_is_in_memory(tmp_path, monkeypatch):
    alive = weakref.WeakSet()

    def watched(name, **options):
        gc.collect()
        assert not alive
        model = load("tiny-gpt2", **options)
        alive.add(model)
        return model

    monkeypatch.setattr(model_study, "load", watched)
    settings = replace(SETTINGS, models=("one", "two"), tasks=("months",), n=2, n_random=1)
    found = study(settings, str(tmp_path / "run"))
    assert [model["name"] for model in found.run["models"]] == ["one", "two"]
    one, two = (found.read_json(f"circuits/{slug}.months.json") for slug in ("one", "two"))
    assert one == two
    [pair] = found.read_json("results/depths.json")["pairs"]
    assert (pair["models"], pair["tasks"], pair["distance"]) == (["one", "two"], ["months", "months"], 0)
    assert "Depths of the circuits" in write_report(found).read_text()


def test_resume_and_overwrite_together_delete_nothing(run):
    before = sorted(file for file in run.path.rglob("*"))
    with pytest.raises(StoreError, match="resume and overwrite contradict each other"):
        study(SETTINGS, str(run.path), resume=True, overwrite=True)
    assert sorted(file for file in run.path.rglob("*")) == before


def test_a_task_that_a_model_cannot_do_is_left_out_with_a_note(tmp_path, monkeypatch):
    def but_no_months(name, *args, **options):
        if name == "months":
            raise TaskError("task 'months': these months are not single tokens")
        return task(name, *args, **options)

    monkeypatch.setattr(model_study, "build_task", but_no_months)
    run = study(replace(SETTINGS, n=2, n_random=1), str(tmp_path / "run"))
    assert run.run["notes"] == ["tiny-gpt2: task 'months': these months are not single tokens"]
    assert list(circuits_of(run, "tiny-gpt2")) == ["numerals"]
    assert "these months are not single tokens" in (run.path / "report.html").read_text()


def test_an_empty_circuit_ends_no_study(tmp_path):
    settings = replace(SETTINGS, tasks=("greater_than", "numerals"), stages=STAGES)
    run = study(settings, str(tmp_path / "run"))
    circuit = circuits_of(run, "tiny-gpt2")["greater_than"]
    assert not circuit.nodes
    assert circuit.score > 100
    empty, left_out = run.run["notes"]
    assert empty.startswith(
        "tiny-gpt2: the circuit of task 'greater_than' is empty: no node is needed: with source mean"
    )
    assert "the model scores 104 of 100 by logit difference; try another source or metric, or more prompts" in empty
    stages = "faithfulness, sensitivity, edges, edge-faithfulness, roles"
    assert left_out == f"tiny-gpt2: left out for task 'greater_than': {stages}, since its circuit is empty"
    assert run.read_json("results/tiny-gpt2.greater_than.lens.json")["figures"]
    assert run.read_json("results/tiny-gpt2.greater_than.random.json")["random_scores"] == []
    assert run.read_json("results/tiny-gpt2.numerals.faithfulness.json")["data"]["score"]
    assert {row["circuit"] for row in run.read_json("results/tiny-gpt2.transfer.json")["data"]["rows"]} == {"numerals"}
    page = (run.path / "report.html").read_text()
    assert page.count("Left out: its circuit is empty.") == 5
    assert "the circuit of task &#39;greater_than&#39; is empty" in page


@pytest.mark.usefixtures("no_report")
def test_a_study_whose_circuits_are_all_empty_is_finished_once(tmp_path, monkeypatch):
    settings = replace(SETTINGS, tasks=("greater_than",))
    run = study(settings, str(tmp_path / "run"))
    assert run.run["notes"][-1] == "tiny-gpt2: transfer is left out: no circuit has heads"
    monkeypatch.setattr(model_study, "load", lambda *args, **options: pytest.fail("loaded again"))
    assert study(settings, str(tmp_path / "run"), resume=True).run["notes"] == run.run["notes"]


def test_task_files_are_studied_under_short_names_and_resumed_while_they_say_the_same(tmp_path):
    rows = [f"{a} {b} {c},{a} {b} {z},{d},{c}" for a, b, c, d, z in MONTHS_SHOWN]
    files = tmp_path / "my months.csv", tmp_path / "numerals.json"
    files[0].write_text("\n".join(["clean,corrupted,answer,wrong", *rows]))
    bare = [{"clean": f"{a} {b} {c}", "answer": d, "wrong": c} for a, b, c, d, _ in MONTHS_SHOWN]
    files[1].write_text(json.dumps(bare))
    settings = replace(SETTINGS, tasks=(*files, "numerals"), source="mean", stages=STAGES)
    run = study(settings, str(tmp_path / "run"))
    assert run.run["tasks"] == ["my-months", "numerals-2", "numerals"]
    circuits = circuits_of(run, "tiny-gpt2")
    assert [circuit.task for circuit in circuits.values()] == list(circuits) == run.run["tasks"]
    model = load("tiny-gpt2")
    assert score(model, task(files[0], model), circuits["my-months"]) == pytest.approx(circuits["my-months"].score)
    rows = run.read_json("results/tiny-gpt2.transfer.json")["data"]["rows"]
    answered = {row["kind"]: row["n_answered"] for row in rows}
    assert (answered["my-months"], answered["numerals-2"]) == (len(MONTHS_SHOWN), len(MONTHS_SHOWN))
    assert run.run["notes"] == [
        "tiny-gpt2: left out for task 'numerals-2': edges, "
        "since paths are patched with corrupted prompts, which the task lacks",
        "tiny-gpt2: left out for task 'numerals-2': edge-faithfulness, since its circuit has no edges",
    ]
    assert "corrupted: None" not in (run.path / "report.html").read_text()
    files[1].write_text(json.dumps(bare, indent=3))
    study(settings, str(tmp_path / "run"), resume=True)
    files[1].write_text(json.dumps(bare[1:]))
    with pytest.raises(StoreError, match=r"holds a run already, with contents_of_files = .*numerals\.json"):
        study(settings, str(tmp_path / "run"), resume=True)


MONTHS_SHOWN = [
    ("April", "May", "June", "July", "January"),
    ("May", "June", "July", "August", "March"),
    ("June", "July", "August", "September", "April"),
]


@pytest.mark.usefixtures("no_report")
def test_what_is_wrong_with_a_task_file_is_said_before_anything_is_written(tmp_path):
    file = tmp_path / "mine.csv"
    settings = replace(SETTINGS, tasks=(str(file),))
    with pytest.raises(TaskError, match=r"task file .*mine\.csv cannot be read"):
        study(settings, str(tmp_path / "run"))
    file.write_text("clean,answer\nMay June,July\n")
    with pytest.raises(TaskError, match=r"mine\.csv, row 1: no wrong"):
        study(settings, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    file.write_text("clean,answer,wrong\nMay June,July,June\n")
    with pytest.raises(TaskError, match="task 'mine' has no corrupted prompts; expected the source mean or zero"):
        study(settings, str(tmp_path / "run"))


def test_a_model_that_prefers_the_wrong_answer_does_not_do_the_task(tmp_path, monkeypatch):
    def swapped(*args, **options):
        built = task(*args, **options)
        return replace(built, answer=built.wrong, wrong=built.answer)

    monkeypatch.setattr(model_study, "build_task", swapped)
    with pytest.raises(TaskError, match="tiny-gpt2: task 'numerals': the model does not prefer the answers"):
        study(SETTINGS, str(tmp_path / "run"))


@pytest.mark.usefixtures("no_report")
def test_other_weights_of_the_same_name_do_not_resume_a_run(tmp_path, monkeypatch):
    settings = replace(SETTINGS, tasks=("months",), n=2, n_random=1)
    run = study(settings, str(tmp_path / "run"))
    (run.path / "results" / "tiny-gpt2.compare.json").unlink()

    def other_weights(*args, **options):
        model = load(*args, **options)
        with torch.no_grad():
            model.blocks[2].mlp.w_in.weight.mul_(1.01)
        return model

    monkeypatch.setattr(model_study, "load", other_weights)
    with pytest.raises(StoreError, match="was run with other weights of tiny-gpt2"):
        study(settings, str(run.path), resume=True)


def test_two_models_of_one_folder_name_do_not_share_their_files():
    assert slugs_of(("a/model", "a-model", "./a-model", "tiny-gpt2", "???", "a-model-2")) == [
        "a-model",
        "a-model-2",
        "a-model-3",
        "tiny-gpt2",
        "unnamed",
        "a-model-2-2",
    ]


def test_circuits_and_scores_of_a_study_can_be_read_from_its_files(run):
    circuits, scores = circuits_of(run, "tiny-gpt2"), scores_of(run, "tiny-gpt2")
    circuit = Circuit.load(run.path / "circuits" / "tiny-gpt2.months.json")
    assert circuit == circuits["months"]
    assert (circuit.settings["n_prompts"], circuit.settings["task_seed"]) == (8, 0)
    model = load("tiny-gpt2")
    again = sweep(model, task("months", model, n=8, seed=0), "heads+mlps")
    assert torch.allclose(scores["months"].effects, again.effects, atol=1e-5)
    assert (scores["months"].config, scores["months"].sites) == (model.config, again.sites)


def test_examples_show_what_the_model_expects(run):
    for name in ("numerals", "months"):
        for example in run.read_json(f"results/tiny-gpt2.{name}.json")["examples"]:
            assert example["top"][0][0] == example["model_top"]
            assert example["correct"] == (example["model_top"] == example["answer"])
            chances = [chance for _, chance in example["top"]]
            assert 1 >= chances[0] >= chances[1] >= chances[2] > 0


@pytest.mark.usefixtures("no_report")
def test_prompts_run_in_parts_are_the_same_as_all_at_once(run, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "LOGIT_BYTES", 3 * 23 * 1087 * 4)
    again = study(replace(SETTINGS, tasks=("months",)), str(tmp_path / "run"))
    a, b = (each.read_json("results/tiny-gpt2.months.json") for each in (run, again))
    assert a["accuracy"] == b["accuracy"]
    assert [example["model_top"] for example in a["examples"]] == [example["model_top"] for example in b["examples"]]


def test_a_run_says_where_it_came_from(run):
    about = run.run
    assert about["settings"]["models"] == ["tiny-gpt2"]
    assert (about["seed"], about["command"]) == (0, "subcircuit study <test>")
    assert {"subcircuit", "torch", "python", "platform"} <= set(about["versions"])
    assert about["started"] <= about["finished"]
    assert about["peak_memory_bytes"] > 2**20
    (model,) = about["models"]
    assert model["fingerprint"] == fingerprint(load("tiny-gpt2"))
    assert all(seconds >= 0 for seconds in about["timings"].values())
