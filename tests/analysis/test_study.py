"""A study of the bundled model, from beginning to report."""

from __future__ import annotations

import re

import pytest

from subcircuit.analysis import study as study_module
from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.faithfulness import score
from subcircuit.analysis.report import write_report
from subcircuit.analysis.study import StudySettings, circuits_of, study
from subcircuit.analysis.tasks import task
from subcircuit.engine.errors import StoreError, TaskError
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
        assert max(result["random_scores"]) < circuit.score
        assert set(result["drops"]) == {str(node) for node in circuit.nodes}
    compare = run.read_json("results/tiny-gpt2.compare.json")
    for i, name in enumerate(circuits):
        assert compare["cross_task"][i][i] == pytest.approx(circuits[name].score, abs=1e-3)
    rows = (run.path / "scores.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * (4 * 8 + 4)


def test_the_report_says_what_was_found_and_needs_nothing_from_outside(run):
    page = (run.path / "report.html").read_text()
    circuit = circuits_of(run, "tiny-gpt2")["months"]
    assert f"{len(circuit.heads)} of 32 heads" in page
    assert "subcircuit study &lt;test&gt;" in page
    assert "<svg" in page
    assert not re.search(r"(src|href)=\"https?:|url\(http|@import", page)
    again = write_report(run).read_text()
    assert write_report(run).read_text() == again


def test_resuming_a_finished_study_computes_nothing_again(run, monkeypatch):
    before = {file: file.read_bytes() for file in run.path.rglob("*.json") if file.name != "run.json"}

    def never(*args, **kwargs):
        raise AssertionError("computed again")

    for name in ("sweep", "discover", "node_drops", "random_circuits", "cross_task_scores"):
        monkeypatch.setattr(study_module, name, never)
    study(SETTINGS, str(run.path), resume=True)
    assert before == {file: file.read_bytes() for file in before}


def test_a_study_that_was_killed_goes_on_where_it_stopped_and_ends_the_same(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(study_module, "cross_task_scores", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            study(SETTINGS, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "report.html").exists()
    again = study(SETTINGS, str(tmp_path / "run"), resume=True)
    for name in ("circuits/tiny-gpt2.months.json", "results/tiny-gpt2.compare.json"):
        assert again.read_json(name) == run.read_json(name)
    assert (again.path / "scores.csv").read_text() == (run.path / "scores.csv").read_text()


def test_what_cannot_be_studied_is_said_before_long_work(tmp_path):
    with pytest.raises(TaskError, match="at least one model and one task"):
        study(StudySettings(models=("tiny-gpt2",), tasks=()), str(tmp_path / "a"))
    with pytest.raises(TaskError, match="colours"):
        study(StudySettings(models=("tiny-gpt2",), tasks=("colours",)), str(tmp_path / "b"))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "file").touch()
    with pytest.raises(StoreError, match="not a run directory"):
        study(SETTINGS, str(tmp_path / "c"))


def test_circuits_written_by_a_study_are_circuits(run):
    assert Circuit.load(run.path / "circuits" / "tiny-gpt2.months.json") == circuits_of(run, "tiny-gpt2")["months"]
