"""The benchmark: contestants compute the same effects, numbers mean what they say, what is missing has a reason."""

from __future__ import annotations

import json
import sys
from functools import partial

import pytest
import torch

import oracles
import subcircuit as sc
from subcircuit.analysis.figures import bars_figure
from subcircuit.bench import PEERS, Contestant, Measurement, Problem, ScenarioResult, Settings, measurement
from subcircuit.bench.contestants import WORKERS, chosen, interpreters
from subcircuit.bench.gemm import gemm_share, matrix_product_flops
from subcircuit.bench.model_files import gpt2_config, random_gpt2, save_huggingface
from subcircuit.bench.problem import sample_of
from subcircuit.bench.workers.harness import Job, Patch, load_worker
from subcircuit.engine.errors import BenchError, ConfigError
from subcircuit.kernels.linear import laid_out, linear

SETTINGS = Settings(n_prompts=3, length=8, first_difference=3, sample=4, runs=1, threads=1)
SMALL = "--layers 2 --d-model 32 --heads 4 --vocab 101 --prompts 3 --length 8 --first-difference 3".split()


@pytest.fixture
def bench(run):
    """Run `subcircuit bench` in this process: (exit status, standard output, standard error)."""
    return partial(run, "bench")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A small random GPT-2, saved, and the problem made of it."""
    directory = tmp_path_factory.mktemp("model")
    config = gpt2_config(n_layers=3, d_model=32, n_heads=4, d_vocab=101, n_ctx=16)
    save_huggingface(random_gpt2(config, seed=1), directory)
    return Problem.draw(directory, config, SETTINGS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The same of a small random Llama with grouped queries."""
    source, directory = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("llama")
    oracles.save_random_model(source, "llama-gqa")
    model = sc.load(source)
    save_huggingface(model, directory)
    return Problem.draw(directory, model.config, SETTINGS)


def job_of(problem, patches):
    tokens = {name: getattr(problem, name) for name in ("clean", "corrupted", "answer", "wrong")}
    return Job(str(problem.model), patches, runs=1, threads=1, device="cpu", **tokens)


@torch.no_grad()
def effects_of_worker(name, problem, patches):
    engine = load_worker(WORKERS / f"{name}.py").prepare(job_of(problem, patches))
    clean = engine.start()
    return torch.stack([engine.patched(patch) - clean for patch in patches])


def our_effects(problem, patches):
    tokens = {name: getattr(problem, name) for name in ("clean", "corrupted", "answer", "wrong")}
    sites = [
        sc.Site(sc.Component(layer, "z", head), None if position is None else (position,))
        for layer, head, position in patches
    ]
    model = sc.load(problem.model)
    return sc.patch_effects(model, sc.task_from_tokens(**tokens), sites, executor="reference", precision="fp64").effects


@pytest.mark.parametrize("scenario", ["heads", "pairs", "last"])
@pytest.mark.parametrize("worker", ["plain_torch", "transformers_hooks"])
def test_a_peer_computes_our_effects(gpt2, worker, scenario):
    patches = gpt2.patches(scenario)
    exact = our_effects(gpt2, patches)
    assert exact.abs().max() > 1e-3
    error = (effects_of_worker(worker, gpt2, patches) - exact).abs().max() / exact.abs().max()
    assert error < 1e-4


def test_hooks_on_a_llama_compute_our_effects(llama):
    patches = llama.patches("heads")
    exact = our_effects(llama, patches)
    error = (effects_of_worker("transformers_hooks", llama, patches) - exact).abs().max() / exact.abs().max()
    assert error < 1e-3


def test_the_plain_baseline_leaves_a_llama_out(llama):
    with pytest.raises(NotImplementedError, match="written for GPT-2, and the model is a llama"):
        effects_of_worker("plain_torch", llama, [])


@pytest.mark.parametrize("kind", ["gpt2", "llama-gqa", "llama-tied", "llama-own-head-size"])
def test_a_saved_model_has_the_logits_it_had(tmp_path, kind):
    from transformers import AutoModelForCausalLM

    theirs = oracles.save_random_model(tmp_path / "source", kind)
    model = sc.load(tmp_path / "source")
    save_huggingface(model, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    tokens = oracles.random_tokens(model.config.d_vocab)
    assert oracles.max_abs_difference(oracles.oracle_logits(again, tokens), oracles.oracle_logits(theirs, tokens)) == 0
    assert torch.equal(sc.load(tmp_path / "saved")(tokens), model(tokens))


def test_random_weights_are_those_of_the_seed():
    config = gpt2_config(n_layers=2, d_model=64, n_heads=4, d_vocab=500)
    first, again, other = (random_gpt2(config, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
    assert first["embed.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert first["blocks.1.mlp.w_out.weight"].std() == pytest.approx(0.01, rel=0.05)


def test_corrupted_prompts_differ_from_the_first_difference_on(gpt2):
    different = gpt2.clean != gpt2.corrupted
    assert not different[:, :3].any()
    assert different[:, 3:].all()
    assert (gpt2.answer != gpt2.wrong).all()
    assert len(gpt2.patches("pairs")) == 3 * 4 * 5
    assert {patch.position for patch in gpt2.patches("last")} == {7}


@pytest.mark.parametrize("scenario", ["heads", "pairs", "last"])
def test_a_sample_is_spread_evenly_over_the_layers(scenario):
    config = gpt2_config(n_layers=12, d_model=48, n_heads=12, d_vocab=50)
    patches = Problem.draw("", config, Settings()).patches(scenario)
    sample = [patches[i] for i in sample_of(patches, 6)]
    assert [patch.layer for patch in sample] == [0, 2, 4, 7, 9, 11]
    assert len({patch.head for patch in sample}) > 3
    assert sample_of(patches[:5], 9) == sorted(set(sample_of(patches[:5], 9)))


def test_a_time_that_falls_with_the_layer_is_estimated_exactly():
    patches = [Patch(layer, head, None) for layer in range(12) for head in range(2)]
    timed = [patches[0], patches[4], patches[6]]
    times = [2.0 - 0.1 * patch.layer for patch in timed]
    result = {"start_s": [5.0, 3.0, 4.0], "patch_s": [times, times, [9.0] * 3]}
    expected = 4.0 + sum(2.0 - 0.1 * patch.layer for patch in patches)
    assert measurement.estimated_seconds(result, timed, patches) == pytest.approx(expected)
    assert measurement.estimated_seconds(result | {"patch_s": [[2.0]]}, timed[:1], patches) == 4.0 + 24 * 2.0


def test_flops_are_counted_by_dtype():
    left, right = torch.ones(3, 5), torch.ones(5, 7)
    batch = torch.ones(2, 3, 4, dtype=torch.bfloat16)

    def products():
        torch.nn.functional.linear(left, right.T, torch.ones(7))
        linear(left, laid_out(right.T))
        batch @ batch.transpose(1, 2)

    flops = matrix_product_flops(products)
    assert flops == {"float32": 2 * (2 * 3 * 5 * 7), "bfloat16": 2 * (2 * 3 * 4 * 3)}
    assert gemm_share(flops, {"float32": 420.0, "bfloat16": 144.0}, seconds=4.0) == 0.5


def fake_worker(monkeypatch, effects, **result):
    result = {"status": "ok", "version": "1", "torch": "2", "peak_bytes": 5, "start_s": [0.5], **result}
    monkeypatch.setattr(measurement, "run_worker", lambda *_: (result, effects))


def test_wrong_effects_are_noticed(gpt2, monkeypatch):
    patches, sample, exact = gpt2.patches("heads"), [0, 5], torch.ones(2, 3, dtype=torch.float64)
    fake_worker(monkeypatch, exact * 1.001, patch_s=[[0.1, 0.1]])
    row = measurement.measure(PEERS[0], sys.executable, gpt2, patches, sample, exact)
    assert (row.status, row.reason) == ("ok", "")
    assert row.seconds == pytest.approx(0.5 + len(patches) * 0.1)
    assert row.patches_per_s == pytest.approx(len(patches) * 3 / row.seconds)
    fake_worker(monkeypatch, exact * torch.tensor([1.0, 1.0, 1.1]), patch_s=[[0.1, 0.1]])
    row = measurement.measure(PEERS[0], sys.executable, gpt2, patches, sample, exact)
    assert (row.status, row.reason) == ("differs", "an effect is off by 1.0e-01 of the largest")


def test_ratios_are_of_times():
    rows = [Measurement(name, name, "ok", seconds=seconds) for name, seconds in (("subcircuit-fp32", 2.0), ("p", 9.0))]
    rows.append(Measurement("q", "q", "skipped", "absent"))
    result = ScenarioResult("heads", 2, 8, SETTINGS, tuple(rows))
    assert result.times_faster("subcircuit-fp32", rows[1]) == 4.5
    assert result.times_faster("subcircuit-fp32", rows[2]) is None
    assert result.to_dict()["times_faster"] == {"subcircuit-fp32": {"subcircuit-fp32": 1.0, "p": 4.5}}


@pytest.mark.parametrize(
    ("distribution", "major", "reason"),
    [("no-such-library", None, "no-such-library is not installed in "), ("torch", 1, "torch 1 is needed, and ")],
)
def test_a_missing_peer_is_skipped_with_a_reason(gpt2, distribution, major, reason):
    peer = Contestant("absent", "Absent", "plain_torch", distribution, major)
    row = measurement.measure(peer, sys.executable, gpt2, gpt2.patches("heads"), [0], torch.ones(1, 3))
    assert row.status == "skipped"
    assert row.reason.startswith(reason)
    assert row.seconds is None


def test_a_process_that_ends_badly_is_told_by_its_last_line(gpt2, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho one >&2; echo 'RuntimeError: no' >&2; exit 3\n")
    python.chmod(0o755)
    row = measurement.measure(PEERS[0], str(python), gpt2, gpt2.patches("heads"), [0], torch.ones(1, 3))
    assert (row.status, row.reason) == ("failed", "RuntimeError: no")


def test_triton_needs_a_gpu(gpt2):
    row = measurement.measure(chosen(["subcircuit-triton-fp32"])[0], sys.executable, gpt2, [], [], torch.ones(0, 3))
    assert (row.status, row.reason) == ("skipped", "needs a GPU (--device cuda)")


def test_interpreters_are_given_found_or_ours(tmp_path):
    found = tmp_path / "nnsight" / "bin" / "python"
    found.parent.mkdir(parents=True)
    found.touch()
    given = tmp_path / "other"
    given.touch()
    pythons = interpreters([f"pyvene={given}"], tmp_path)
    assert pythons["nnsight"] == str(found)
    assert pythons["pyvene"] == str(given)
    assert pythons["transformers"] == sys.executable
    for wrong in ("pyvene", "nobody=x", "pyvene=/no/such/python"):
        with pytest.raises(BenchError):
            interpreters([wrong], None)


def test_the_command_writes_a_table_json_and_a_figure(bench, tmp_path):
    status, out, err = bench(
        *SMALL, "--peer", "subcircuit-fp32", "--peer", "plain_torch", "--sample", 2, "--runs", 2,
        "--threads", 1, "--out", tmp_path, "--quiet",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "Every head, at all positions: 8 patches × 3 prompts of 8 tokens" in out
    report = json.loads((tmp_path / "bench.json").read_text())
    assert set(report) == {"schema", "model", "machine", "scenarios", "grid"}
    (scenario,) = report["scenarios"]
    ours, plain = scenario["rows"]
    assert [row["name"] for row in (ours, plain)] == ["subcircuit-fp32", "plain_torch"]
    assert [row["status"] for row in (ours, plain)] == ["ok", "ok"]
    assert len(ours["timings"]["sweep_s"]) == 2
    assert [len(run) for run in plain["timings"]["patch_s"]] == [2, 2]
    assert max(ours["effect_error"], plain["effect_error"]) < 1e-4
    assert ours["gemm_flops"]["float32"] > 0
    assert 0 < ours["gemm_share"] < 1
    assert min(ours["peak_bytes"], plain["peak_bytes"]) > 50e6
    assert scenario["times_faster"]["subcircuit-fp32"]["plain_torch"] == plain["seconds"] / ours["seconds"]
    assert "plain torch, cached prefix" in (tmp_path / "bench.svg").read_text()
    table = [line for line in (tmp_path / "bench.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peer", "nobody"], "contestant 'nobody' is not known; expected one of subcircuit-fp32, "),
        (["--peer-python", "pyvene"], "interpreter 'pyvene' is not understood; expected NAME=PATH"),
        (["--first-difference", 8], "first_difference 8 is not a position of prompts of 8 tokens"),
        (["--length", 2000], "prompts of 2000 tokens are longer than the model's 1024"),
        (["--heads", 5], "d_model (32) must be divisible by the number of heads (5)"),
        (["--scenario", "none"], "'none' is not one of"),
        (["--model", "no-such-model"], "no-such-model"),
    ],
)
def test_bad_options_are_one_line(bench, arguments, message):
    status, out, err = bench(*SMALL, *arguments, "--quiet")
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_settings_must_be_positive():
    with pytest.raises(BenchError, match="runs must be at least 1, got 0"):
        Settings(runs=0)
    with pytest.raises((BenchError, ConfigError), match="scenario 'some' is not known"):
        Problem.draw("", gpt2_config(1, 8, 2, 20), Settings()).patches("some")


def test_bars_carry_their_names_and_numbers():
    svg = bars_figure({"ours": 1234.4, "theirs": 7.25}, "Speed", "patches per second", n_first=1)
    assert all(text in svg for text in ("ours", "theirs", "1,234", "7.2", "Speed", "patches per second"))
