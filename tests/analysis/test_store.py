from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from subcircuit.analysis.store import RunDirectory
from subcircuit.engine.errors import StoreError


def test_what_is_written_reads_back(tmp_path):
    run = RunDirectory.create(tmp_path / "run", {"settings": {"n": 4}, "seed": 0})
    run.write_json("results/a.json", {"x": [1, 2.5, "é"]})
    run.write_tensors("scores/a.safetensors", {"effects": torch.eye(3).T}, {"sites": "[]"})
    opened = RunDirectory.open(tmp_path / "run")
    assert opened.run == {"schema": 1, "settings": {"n": 4}, "seed": 0}
    assert opened.read_json("results/a.json") == {"x": [1, 2.5, "é"]}
    tensors, metadata = opened.read_tensors("scores/a.safetensors")
    assert torch.equal(tensors["effects"], torch.eye(3))
    assert metadata == {"sites": "[]"}


def test_a_write_that_dies_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    run = RunDirectory.create(tmp_path / "run", {})
    run.write_text("notes.txt", "old")

    def die(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        run.write_text("notes.txt", "new")
    assert (tmp_path / "run" / "notes.txt").read_text() == "old"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["notes.txt", "run.json"]


def test_an_existing_run_is_kept_unless_told(tmp_path):
    first = RunDirectory.create(tmp_path / "run", {"settings": {"n": 4, "seed": 0}})
    first.write_text("results/a.json", "kept")
    with pytest.raises(StoreError, match="holds a run already; expected --resume, --overwrite or another folder"):
        RunDirectory.create(tmp_path / "run", {"settings": {"n": 4, "seed": 0}})
    resumed = RunDirectory.create(tmp_path / "run", {"settings": {"n": 4, "seed": 0}}, resume=True)
    assert resumed.has("results/a.json")
    with pytest.raises(StoreError, match="a run already, with n = 4, not 8; expected --overwrite or another folder"):
        RunDirectory.create(tmp_path / "run", {"settings": {"n": 8, "seed": 0}}, resume=True)
    fresh = RunDirectory.create(tmp_path / "run", {"settings": {"n": 8}}, overwrite=True)
    assert not fresh.has("results/a.json")


def test_a_run_that_finished_nothing_does_not_stand_in_the_way(tmp_path):
    RunDirectory.create(tmp_path / "run", {"settings": {"models": ["a name that was misspelt"]}})
    again = RunDirectory.create(tmp_path / "run", {"settings": {"models": ["a name"]}})
    assert RunDirectory.open(tmp_path / "run").run == again.run == {"schema": 1, "settings": {"models": ["a name"]}}


def test_overwriting_deletes_what_a_run_wrote_and_nothing_else(tmp_path):
    run = RunDirectory.create(tmp_path / "run", {"settings": {}})
    for name in ("scores/a.safetensors", "figures/a.svg", "scores.csv", "report.html", "notes.md", "plots/mine.png"):
        run.write_text(name, "x")
    RunDirectory.create(tmp_path / "run", {"settings": {}}, overwrite=True)
    left = sorted(path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file())
    assert left == ["notes.md", "plots/mine.png", "run.json"]


def test_a_run_json_of_another_program_is_not_ours_to_overwrite(tmp_path):
    (tmp_path / "run.json").write_text('{"loss": 0.1}')
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "theirs.json").write_text("{}")
    with pytest.raises(StoreError, match=r"run\.json is not that of a run of schema 1"):
        RunDirectory.create(tmp_path, {}, overwrite=True)
    assert (tmp_path / "results" / "theirs.json").exists()


def test_what_a_killed_process_was_writing_is_gone_when_the_run_is_resumed(tmp_path):
    """SIGKILL in the middle of a write: nothing of the process can clean up after it."""
    run = RunDirectory.create(tmp_path / "run", {"settings": {}})
    run.write_text("results/a.json", "{}")
    code = (
        "import os, signal, sys; from pathlib import Path; from subcircuit.analysis import store\n"
        "store.os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
        "store.write_whole(Path(sys.argv[1]), b'new' * 1000)"
    )
    target = tmp_path / "run" / "results" / "a.json"
    done = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert target.read_text() == "{}"
    assert len(list(target.parent.iterdir())) == 2
    RunDirectory.create(tmp_path / "run", {"settings": {}}, resume=True)
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file/run/run\.json cannot be written: Not a directory"):
        RunDirectory.create(tmp_path / "file" / "run", {})


def test_a_folder_with_other_things_is_never_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match="is not a run directory"):
        RunDirectory.create(tmp_path, {}, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(StoreError, match=r"it has no run\.json"):
        RunDirectory.open(tmp_path)


@pytest.mark.parametrize("name", ["run.json", "scores/a.safetensors"])
def test_a_truncated_file_is_named(tmp_path, name):
    run = RunDirectory.create(tmp_path / "run", {"seed": 0})
    run.write_tensors("scores/a.safetensors", {"effects": torch.ones(8)}, {})
    file = tmp_path / "run" / name
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(StoreError) as caught:
        RunDirectory.open(tmp_path / "run").read_tensors("scores/a.safetensors")
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
