from __future__ import annotations

import os

import pytest
import torch

from subcircuit.analysis.store import RunDirectory
from subcircuit.engine.errors import StoreError


def test_what_is_written_reads_back(tmp_path):
    run = RunDirectory.create(tmp_path / "run", {"settings": {"n": 4}, "seed": 0})
    run.write_json("results/a.json", {"x": [1, 2.5, "é"]})
    run.write_tensors("scores/a.safetensors", {"effects": torch.eye(3).T}, {"sites": "[]"})
    opened = RunDirectory.open(tmp_path / "run")
    assert opened.run == {"settings": {"n": 4}, "seed": 0}
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
    first.write_text("scores.csv", "kept")
    with pytest.raises(StoreError, match="holds a run already"):
        RunDirectory.create(tmp_path / "run", {"settings": {"n": 4, "seed": 0}})
    resumed = RunDirectory.create(tmp_path / "run", {"settings": {"n": 4, "seed": 0}}, resume=True)
    assert resumed.has("scores.csv")
    with pytest.raises(StoreError, match="was run with n = 4, not 8; it cannot be resumed"):
        RunDirectory.create(tmp_path / "run", {"settings": {"n": 8, "seed": 0}}, resume=True)
    fresh = RunDirectory.create(tmp_path / "run", {"settings": {"n": 8}}, overwrite=True)
    assert not fresh.has("scores.csv")


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
