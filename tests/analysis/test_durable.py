"""Sweeps in run directories: killed anywhere they go on, and end as if nothing had happened."""

from __future__ import annotations

import csv
import os
import random
from dataclasses import replace

import pytest
import torch

from patching_cases import CONFIGS, random_model, random_prompts
from subcircuit.analysis import durable
from subcircuit.analysis.durable import durable_sweep
from subcircuit.analysis.records import scores_of
from subcircuit.analysis.store import RunDirectory
from subcircuit.analysis.sweep import sweep
from subcircuit.analysis.tasks import task_from_tokens
from subcircuit.engine.errors import PatchError, StoreError
from subcircuit.engine.patching import DeltaSession
from subcircuit.engine.patching.delta import DeltaRun

SEED = random.randrange(10**6)
SCORES = "scores/a-model.random.safetensors"
BLOCKS = {"sites_per_block": 4}
"""Fifteen heads and MLPs in blocks of 4, 4, 4 and 3."""


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    print(f"seed {SEED}")
    return random_model(replace(CONFIGS[request.param], name="a/model"), SEED), task_of(SEED + 1)


def task_of(seed: int):
    prompts = random_prompts(seed)
    return task_from_tokens(
        clean=prompts.clean, corrupted=prompts.corrupted, answer=prompts.answer, wrong=prompts.wrong, name="random"
    )


def durable_sweep_of(case, folder, components="heads+mlps", **options):
    return durable_sweep(*case, folder, components, **(BLOCKS | options))


@pytest.fixture
def measured(monkeypatch):
    """The sites of every block measured since; `measured.dies_at` is the block at which the process is stopped."""

    class Watch(list):
        dies_at: int | None = None

    watch, real = Watch(), DeltaSession.effects

    def effects(self, patch_sets, **options):
        if len(watch) == watch.dies_at:
            raise KeyboardInterrupt
        watch.append([str(site) for site in patch_sets])
        return real(self, patch_sets, **options)

    monkeypatch.setattr(DeltaSession, "effects", effects)
    return watch


def test_it_finds_what_a_plain_sweep_finds_and_leaves_a_run_directory(case, tmp_path):
    plain = sweep(*case, "heads+mlps", check=3)
    rows = []
    found = durable_sweep_of(case, tmp_path / "run", check=3, progress=lambda done, total: rows.append((done, total)))
    torch.testing.assert_close(found.effects, plain.effects, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.clean_metric, plain.clean_metric)
    assert found.sites == plain.sites
    assert found.settings["check"]["passed"]
    assert {name: found.settings[name] for name in plain.settings if name != "check"}.items() <= plain.settings.items()
    assert rows[-1] == (75, 75)
    assert [done for done, _ in rows] == sorted(done for done, _ in rows)
    names = sorted(str(file.relative_to(tmp_path / "run")) for file in (tmp_path / "run").rglob("*.*"))
    assert names == ["run.json", "scores.csv", SCORES]
    with (tmp_path / "run" / "scores.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["site"] for row in table] == [str(site) for site in plain.sites]
    assert [float(row["effect"]) for row in table] == found.mean.tolist()
    run = RunDirectory.open(tmp_path / "run")
    assert torch.equal(scores_of(run, "a-model")["random"].effects, found.effects)
    assert {"command", "settings", "models", "versions", "seed", "timings", "started", "finished"} <= set(run.run)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dies_at", range(4))
def test_killed_at_any_block_it_computes_only_the_rest_and_ends_the_same(case, tmp_path, measured, dies_at, precision):
    durable_sweep_of(case, tmp_path / "whole", precision=precision)
    whole = list(measured)
    assert [len(block) for block in whole] == [4, 4, 4, 3]
    measured.clear()
    measured.dies_at = dies_at
    with pytest.raises(KeyboardInterrupt):
        durable_sweep_of(case, tmp_path / "run", precision=precision)
    assert not (tmp_path / "run" / SCORES).exists()
    measured.clear()
    measured.dies_at = None
    rows = []
    durable_sweep_of(
        case, tmp_path / "run", precision=precision, resume=True, progress=lambda done, total: rows.append(done)
    )
    assert measured == whole[dies_at:]
    assert rows[:dies_at] == [20, 40, 60][:dies_at], "blocks that are there count as done"
    for file in (SCORES, "scores.csv"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_killed_at_any_write_it_ends_the_same(case, tmp_path, monkeypatch):
    durable_sweep_of(case, tmp_path / "whole")
    real, n_kills, done = os.fsync, 0, False
    while not done:
        left = [n_kills]

        def fsync(descriptor, left=left):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            durable_sweep_of(case, tmp_path / f"run{n_kills}")
            done = True
        except KeyboardInterrupt:
            monkeypatch.setattr(os, "fsync", real)
            durable_sweep_of(case, tmp_path / f"run{n_kills}", resume=True)
            n_kills += 1
        assert (tmp_path / f"run{n_kills - (not done)}" / SCORES).read_bytes() == (
            tmp_path / "whole" / SCORES
        ).read_bytes()
    assert n_kills >= 2 * (1 + 4 + 2), "run.json, the blocks, the scores and their table: each file and its folder"


def test_one_clean_run_serves_all_blocks(case, tmp_path, monkeypatch):
    made, real = [], DeltaRun.__init__

    def init(self, *arguments, **options):
        made.append(self)
        real(self, *arguments, **options)

    monkeypatch.setattr(DeltaRun, "__init__", init)
    sweep(*case, "heads+mlps")
    n_plain = len(made)
    made.clear()
    durable_sweep_of(case, tmp_path / "run")
    assert len(made) == n_plain > 0


def test_files_that_are_not_whole_are_not_believed(case, tmp_path, measured):
    durable_sweep_of(case, tmp_path / "whole")
    whole = list(measured)
    measured.clear()
    measured.dies_at = 3
    with pytest.raises(KeyboardInterrupt):
        durable_sweep_of(case, tmp_path / "run")
    measured.clear()
    measured.dies_at = None
    first, second, third = sorted((tmp_path / "run" / durable.BLOCKS).iterdir())
    first.write_bytes(first.read_bytes()[:-5])
    third.write_bytes((tmp_path / "whole" / SCORES).read_bytes())
    partial = second.with_name(f".{second.name}.x.partial")
    partial.write_bytes(b"half")
    durable_sweep_of(case, tmp_path / "run", resume=True)
    assert measured == [whole[0], whole[2], whole[3]]
    assert not partial.exists()
    assert (tmp_path / "run" / SCORES).read_bytes() == (tmp_path / "whole" / SCORES).read_bytes()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"source": "zero"}, "source = 'corrupted', not 'zero'"),
        ({"metric": "kl"}, "metric = 'logit_difference', not 'kl'"),
        ({"precision": "bf16"}, "precision = 'fp32', not 'bf16'"),
        ({"executor": "reference"}, "executor = 'torch', not 'reference'"),
        ({"positions": [-1]}, "positions = None"),
        ({"components": "heads"}, "components = 'heads[+]mlps', not 'heads'"),
        ({"components": ["a0.h1"]}, "components = 'heads[+]mlps', not 'listed'"),
    ],
)
def test_other_settings_are_refused(case, tmp_path, measured, changed, named):
    measured.dies_at = 2
    with pytest.raises(KeyboardInterrupt):
        durable_sweep_of(case, tmp_path / "run")
    with pytest.raises(StoreError, match=f"holds a run already, with {named}"):
        durable_sweep_of(case, tmp_path / "run", resume=True, **changed)


def test_another_model_or_task_or_source_is_refused(case, tmp_path, measured):
    model, task = case
    zeros = {f"blocks.{layer}.attn.hook_z": torch.zeros(5, 9, 4, 8) for layer in range(3)}
    measured.dies_at = 1
    with pytest.raises(KeyboardInterrupt):
        durable_sweep_of(case, tmp_path / "run", "heads", source=zeros)
    others = {
        "model_fingerprint": ((random_model(model.config, SEED + 3), task), zeros),
        "task_fingerprint": ((model, task_of(SEED + 5)), zeros),
        "source": (case, zeros | {"blocks.2.attn.hook_z": torch.ones(5, 9, 4, 8)}),
    }
    for named, (other, source) in others.items():
        with pytest.raises(StoreError, match=f"holds a run already, with {named} = "):
            durable_sweep_of(other, tmp_path / "run", "heads", source=source, resume=True)
    measured.dies_at = None
    again = durable_sweep_of(case, tmp_path / "run", "heads", source=zeros, resume=True)
    torch.testing.assert_close(again.effects, sweep(*case, "heads", source="zero").effects, rtol=1e-4, atol=1e-5)


def test_a_finished_sweep_is_read_and_an_unfinished_one_keeps_its_blocks(case, tmp_path, measured):
    measured.dies_at = 1
    with pytest.raises(KeyboardInterrupt):
        durable_sweep_of(case, tmp_path / "run", budget_bytes=2**24)
    with pytest.raises(StoreError, match="holds a run already; expected --resume, --overwrite or another folder"):
        durable_sweep_of(case, tmp_path / "run")
    measured.dies_at = None
    found = durable_sweep_of(case, tmp_path / "run", resume=True, sites_per_block=2, budget_bytes=2**30)
    assert [len(block) for block in measured] == [4, 4, 4, 3]
    assert RunDirectory.open(tmp_path / "run").run["budget_bytes"] == 2**24
    measured.dies_at = len(measured)
    again = durable_sweep_of(case, tmp_path / "run", resume=True)
    assert torch.equal(again.effects, found.effects)
    with pytest.raises(KeyboardInterrupt):
        durable_sweep_of(case, tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / SCORES).exists()


def test_the_reference_executor_goes_on_too(case, tmp_path, monkeypatch):
    real, calls = durable.patch_effects, []

    def effects(*arguments, **options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(arguments[2])
        return real(*arguments, **options)

    monkeypatch.setattr(durable, "patch_effects", effects)
    exact = {"executor": "reference", "precision": "fp64"}
    with pytest.raises(KeyboardInterrupt):
        durable_sweep_of(case, tmp_path / "run", **exact)
    calls.clear()
    calls.append("one less")
    with pytest.raises(KeyboardInterrupt):
        durable_sweep_of(case, tmp_path / "run", resume=True, **exact)
    assert [str(site) for site in calls[1]] == ["a2.h0", "a2.h1", "a2.h2", "a2.h3"]
    monkeypatch.setattr(durable, "patch_effects", real)
    found = durable_sweep_of(case, tmp_path / "run", resume=True, **exact)
    torch.testing.assert_close(found.effects, sweep(*case, "heads+mlps", **exact).effects)


def test_what_makes_no_sense_is_said(case, tmp_path):
    with pytest.raises(StoreError, match="resume and overwrite contradict each other"):
        durable_sweep_of(case, tmp_path / "run", resume=True, overwrite=True)
    with pytest.raises(PatchError, match="sites_per_block is 0; expected at least 1"):
        durable_sweep_of(case, tmp_path / "run", sites_per_block=0)
    with pytest.raises(PatchError, match="there is no site to patch"):
        durable_sweep_of(case, tmp_path / "run", [])
    assert not (tmp_path / "run").exists()
