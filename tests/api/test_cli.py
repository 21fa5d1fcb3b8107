"""The command line as a person meets it."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import subcircuit as sc
from subcircuit import console, options
from subcircuit.analysis import sweep as sweep_module

TINY = ("--model", "tiny-gpt2", "--n", 4)


def test_a_sweep_prints_the_largest_effects_and_writes_every_site(run, tmp_path):
    status, out, err = run("sweep", *TINY, "--task", "months", "--top", 3, "--out", tmp_path / "s.csv")
    assert status == 0
    assert "32 sites × 4 prompts" in out
    assert err.endswith(f"wrote {tmp_path / 's.csv'}\n")
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 33


@pytest.mark.parametrize(
    ("n", "said"),
    [
        (1, "With 1 prompt no q-value can reach 0.05; at least 6 prompts are needed"),
        (5, "With 5 prompts no q-value can reach 0.05; at least 6 prompts are needed"),
        (6, "0 of 1 sites have an effect, at a false discovery rate of 5% (q)"),
    ],
)
def test_too_few_prompts_for_any_q_value_are_said_to_be(run, n, said):
    # One key of the last layer, whose effects have both signs: it could be called from 6 prompts on, and is not.
    arguments = ("--model", "tiny-gpt2", "--task", "months", "--components", "a3.k0", "--n", n, "--check", 0, "-q")
    assert said in run("sweep", *arguments)[1].splitlines()


def test_few_prompts_call_many_sites_or_none(run):
    out = run("sweep", "--model", "tiny-gpt2", "--task", "months", "--n", 6, "--check", 0, "-q")[1]
    assert (
        "0 of 32 sites have an effect, at a false discovery rate of 5% (q); with 6 prompts that takes at least 20"
        in out
    )


def test_a_sweep_measures_on_another_metric(run):
    sweep = ("sweep", *TINY, "--task", "months", "--components", "m0+m1", "--source", "zero", "--metric", "kl")
    status, out, _ = run(*sweep)
    assert status == 0
    assert "clean kl 0.000" in out
    status, out, _ = run(*sweep, "--json")
    found = json.loads(out)
    assert found["settings"]["metric"] == "kl"
    assert all(site["effect"] > 0 and site["share"] is None for site in found["sites"])


def test_json_is_all_that_standard_output_holds(run):
    status, out, _ = run("sweep", *TINY, "--task", "months", "--components", "a0.h1", "--positions", "-1,2", "--json")
    assert status == 0
    assert [site["site"] for site in json.loads(out)["sites"]] == ["a0.h1@-1,2"]
    status, out, _ = run("info", "tiny-gpt2", "--json")
    assert json.loads(out)["n_layers"] == 4
    status, out, _ = run("models", "--json")
    assert "tiny-gpt2" in {model["name"] for model in json.loads(out)}


def test_a_dry_run_prints_the_plan_and_patches_nothing(run, monkeypatch):
    monkeypatch.setattr(sc, "sweep", lambda *_, **__: pytest.fail("the sweep ran"))
    dry = ("sweep", *TINY, "--task", "months", "--dry-run")
    status, out, _ = run(*dry)
    assert status == 0
    assert "32 sites × 4 prompts of 23 tokens = 128 rows, in 4 chunks" in out
    assert re.search(r"^3 +8 +[\d.]+ GFLOP +[\d.]+ GFLOP$", out, re.MULTILINE)
    assert re.search(r"Time on this machine, torch fp32: about [\d.]+ s", out)
    status, out, _ = run(*dry, "--metric", "kl")
    assert status == 0
    assert re.search(r"^Reading the kl: [\d.]+ GFLOP$", out, re.MULTILINE)
    status, out, _ = run(*dry, "--json", "--budget", "10MB", "--components", "mlps")
    plan = json.loads(out)
    assert (plan["n_rows"], plan["budget_bytes"], plan["sites_by_layer"]) == (16, 10_000_000, [1, 1, 1, 1])
    assert plan["seconds"] > 0


def test_a_sweep_is_checked_and_one_that_fails_ends_with_status_1(run, tmp_path, monkeypatch):
    sweep = ("sweep", *TINY, "--task", "months", "--out", tmp_path / "s.csv", "--quiet")
    status, out, err = run(*sweep)
    assert (status, err) == (0, "")
    assert "Check: 4 rows once more in float64: relative error" in out
    status, out, _ = run(*sweep, "--check", 0, "--json")
    assert "check" not in json.loads(out)["settings"]
    right = sweep_module.patch_effects

    def wrong(*arguments, **options):
        result = right(*arguments, **options)
        return replace(result, effects=result.effects * 1.01)

    monkeypatch.setattr(sweep_module, "patch_effects", wrong)
    for more in ((), ("--json",)):
        (tmp_path / "s.csv").unlink()
        status, out, err = run(*sweep, *more)
        assert status == 1
        assert err.startswith("error: the sweep's check failed: 4 rows once more in float64: relative error 1.0e-02")
        assert err.count("\n") == 1
        assert len((tmp_path / "s.csv").read_text().splitlines()) == 33
        assert not more or json.loads(out)["settings"]["check"]["passed"] is False


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("4GB", 4 * 10**9), ("1.5GiB", 3 * 2**29), ("512 mib", 2**29), ("2000000", 2 * 10**6), (None, None)],
)
def test_sizes_of_memory_read_as_people_write_them(text, n_bytes):
    assert options.bytes_of(text) == n_bytes


def test_discover_writes_a_circuit_or_a_graph(run, tmp_path):
    discover = ("discover", *TINY, "--task", "months", "--max-sweeps", 1, "--quiet")
    status, out, err = run(*discover, "--out", tmp_path / "c.json")
    assert (status, err) == (0, "")
    assert "heads" in out
    circuit = json.loads((tmp_path / "c.json").read_text())
    assert (circuit["task"], circuit["settings"]["threshold"]) == ("months", 20)
    status, out, _ = run(*discover, "--out", tmp_path / "c.dot", "--json")
    assert json.loads(out) == circuit
    assert (tmp_path / "c.dot").read_text().startswith("digraph")


@pytest.mark.parametrize("method", ["atp", "ig", "atp*"])
def test_a_sweep_to_first_order_says_by_which_method(run, method):
    status, out, _ = run("sweep", *TINY, "--task", "months", "--method", method, "--top", 3)
    assert status == 0
    assert f"effects to first order: {method}" in out
    status, out, _ = run("sweep", *TINY, "--task", "months", "--method", method, "--json", "--steps", 2)
    made = json.loads(out)
    assert (made["settings"]["method"], len(made["sites"])) == (method, 32)
    assert made["settings"].get("steps") == (2 if method == "ig" else None)


def test_a_screened_sweep_shows_the_largest_effects_and_what_they_took(run):
    status, out, _ = run("sweep", *TINY, "--task", "months", "--components", "heads+mlps", "--screen", 3, "--json")
    assert status == 0
    screened = json.loads(out)
    _, out, _ = run("sweep", *TINY, "--task", "months", "--components", "heads+mlps", "--json")
    swept = json.loads(out)

    def largest(found):
        return [site["site"] for site in sorted(found["sites"], key=lambda site: -abs(site["effect"]))[:3]]

    assert largest(screened) == largest(swept)
    assert screened["screening"]["n_exact"] == len(screened["sites"]) <= screened["screening"]["n_sites"] == 36
    status, out, _ = run("sweep", *TINY, "--task", "months", "--screen", 3, "--method", "ig")
    assert "the 3 largest effects, certain after" in out
    assert "rank agreement of ig" in out


def test_discover_says_how_many_of_the_edges_asked_for_are_left(run):
    out = run("discover", *TINY, "--task", "months", "--method", "eap", "--n-edges", 40, "--quiet")[1]
    n_edges, n_lost = (int(re.search(pattern, out)[1]) for pattern in (r"(\d+) edges", r"without (\d+) of the 40"))
    assert n_edges + n_lost == 40
    assert n_lost > 0
    out = run("discover", *TINY, "--task", "months", "--method", "eap", "--n-edges", 2000, "--quiet")[1]
    assert "without" not in out


@pytest.mark.parametrize("method", ["eap", "eap-ig"])
def test_discover_by_edge_attribution_writes_a_circuit_of_edges(run, tmp_path, method):
    discover = ("discover", *TINY, "--task", "months", "--method", method, "--n-edges", 60, "--quiet")
    discover += ("--steps", 2) if method == "eap-ig" else ()
    status, out, err = run(*discover, "--out", tmp_path / "c.json", "--json")
    assert (status, err) == (0, "")
    circuit = json.loads(out)
    assert 0 < len(circuit["edges"]) <= 60
    assert (circuit["method"], circuit["settings"]["n_edges"]) == (method, 60)
    assert json.loads((tmp_path / "c.json").read_text()) == circuit


def test_discover_prunes_edges_or_starts_from_them(run, tmp_path):
    arguments = ("discover", *TINY, "--task", "months", "--max-sweeps", 1, "--n", 4, "--quiet", "--edges")
    status, out, err = run(*arguments, "--edge-threshold", 0.7, "--out", tmp_path / "c.svg", "--json")
    assert (status, err) == (0, "")
    circuit = json.loads(out)
    assert circuit["settings"]["edges"]["threshold"] == 0.7
    assert 0 < len(circuit["edges"]) == len(circuit["edge_scores"]) < circuit["settings"]["edges"]["n_candidates"]
    assert ">months in tiny-gpt2<" in (tmp_path / "c.svg").read_text()
    arguments = (
        "discover",
        *TINY,
        "--task",
        "months",
        "--n",
        2,
        "--quiet",
        "--method",
        "acdc",
        "--source",
        "corrupted",
    )
    status, out, err = run(*arguments, "--threshold", 40, "--json")
    assert (status, err) == (0, "")
    circuit = json.loads(out)
    assert (circuit["method"], circuit["settings"]["source"]) == ("acdc", "corrupted")
    assert all(score >= 40 for _, _, score in circuit["edge_scores"])
    status, _, err = run(*arguments, "--edges")
    assert (status, "method 'acdc' finds edges itself; expected --edges with prune or masks" in err) == (2, True)
    status, _, err = run(*arguments, "--edge-threshold", 0.7)
    assert (status, "--edge-threshold is of edges that are pruned; expected --edges with it" in err) == (2, True)


def test_generate_takes_prompts_as_words_or_as_options(run):
    prompt = "Ring lost in May. Van lost in June. Box lost in"
    for arguments in ((prompt,), ("--prompt", prompt)):
        status, out, _ = run("generate", "--model", "tiny-gpt2", *arguments, "--max-new-tokens", 1)
        assert (status, out.strip()) == (0, f"{prompt} July")
    status, out, _ = run("generate", "-m", "tiny-gpt2", "May June", "one two", "--max-new-tokens", 2, "--json")
    assert [made["text"] for made in json.loads(out)] == [" July August", " three four"]


def test_info_takes_the_model_as_a_word_or_as_an_option(run):
    for arguments in (("tiny-gpt2",), ("--model", "tiny-gpt2")):
        status, out, _ = run("info", *arguments)
        assert status == 0
        assert "817,280" in out


def test_a_study_ends_with_its_findings_and_the_report(run, tmp_path):
    arguments = ("study", *TINY, "--tasks", "numerals", "--out", tmp_path / "run", "--max-sweeps", 1, "--random", 2)
    arguments += ("--stages", "sweep,prune,random,lens,compare")
    status, out, err = run(*arguments)
    assert status == 0
    assert "numerals" in out
    written = f"wrote {tmp_path / 'run' / 'report.html'}"
    assert [re.sub(r"[\d.]+ s", "", line) for line in err.splitlines()] == [
        "tiny-gpt2: load ()",
        "tiny-gpt2: tasks ()",
        "tiny-gpt2: numerals, sweep of heads and MLPs ()",
        "tiny-gpt2: numerals, pruning ()",
        "tiny-gpt2: numerals, drops and random circuits ()",
        "tiny-gpt2: numerals, lens ()",
        "tiny-gpt2: circuits on each other's tasks ()",
        "report ()",
        written,
    ]
    status, _, err = run(*arguments)
    assert status == 2
    assert "holds a run already; expected --resume" in err
    status, out, err = run(*arguments, "--resume", "--json")
    assert status == 0
    assert re.fullmatch(r"report \([\d.]+ s\)\n", err), "nothing else is done again"
    circuit = json.loads(out)["models"]["tiny-gpt2"]["circuits"]["numerals"]
    assert circuit["heads"]
    assert len(circuit["random_scores"]) == 2
    status, out, _ = run("report", tmp_path / "run")
    assert (status, out.strip()) == (0, str(tmp_path / "run" / "report.html"))


def test_an_interrupted_study_says_how_to_go_on(run, tmp_path, monkeypatch):
    def die(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sc, "study", die)
    folder = tmp_path / "my run"
    status, out, err = run("study", *TINY, "--out", folder, "--overwrite")
    assert (status, out) == (130, "")
    again = f"subcircuit study --model tiny-gpt2 --n 4 --out '{folder}' --resume"
    assert err.strip() == f"error: interrupted; to go on: {again}"


@pytest.mark.parametrize("given", ["--out {}", "-o {}", "--out={}"])
def test_an_interrupted_sweep_goes_on_as_it_says(run, tmp_path, monkeypatch, given):
    folder = tmp_path / "run"
    sweep = ("sweep", *TINY, "--task", "months", *given.format(folder).split(), "--quiet", "--json")
    real, calls = sc.DeltaSession.effects, []

    def effects(self, sites, **options):
        calls.append(len(sites))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, sites, **options)

    monkeypatch.setattr(sc.DeltaSession, "effects", effects)
    monkeypatch.setattr("subcircuit.analysis.durable.ROWS_PER_BLOCK", {"cpu": 64})
    status, out, err = run(*sweep)
    assert (status, out) == (130, "")
    again = shlex.split(err.strip().removeprefix("error: interrupted; to go on: subcircuit "))
    assert again == [*map(str, sweep), "--resume"]
    assert run(*sweep)[0] == 2, "without --resume nothing is written over"
    calls[:] = [0, 0]
    status, out, err = run(*again)
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert calls[2:], "the rest of the blocks"
    assert sum(calls) == len(found["sites"]) - 16, "but not the first one"
    assert found["settings"]["check"]["passed"]
    plain = json.loads(run("sweep", *TINY, "--task", "months", "--quiet", "--json")[1])
    expected = {row["site"]: row["effect"] for row in plain["sites"]}
    assert {row["site"]: row["effect"] for row in found["sites"]} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert run("sweep", *TINY, "--task", "numerals", "--out", folder, "--resume")[0] == 2


def test_an_interrupted_sweep_without_a_run_directory_has_nothing_to_go_on_with(run, tmp_path, monkeypatch):
    def die(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sc, "sweep", die)
    for out in ((), ("--out", tmp_path / "s.csv"), (f"--out={tmp_path / 's.csv'}",)):
        assert run("sweep", *TINY, "--task", "months", *out) == (130, "", "error: interrupted\n")


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("study", "--help")])
def test_help_is_shown_where_nothing_is_asked_for(run, arguments):
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    assert out.startswith("Usage: subcircuit")


def test_the_tasks_that_help_names_are_there():
    named = options.TASKS.split(", …")[0].split(", ")
    assert named
    assert set(named) <= set(sc.task_names())


def test_tasks_lists_them_and_shows_the_card_of_one(run):
    status, out, _ = run("tasks")
    assert status == 0
    assert {line.split()[0] for line in out.splitlines() if line} >= set(sc.task_names())
    status, out, _ = run("tasks", "months", *TINY)
    assert status == 0
    assert "arXiv 2311.04131" in out
    assert re.search(r"tokens per prompt +23", out)
    assert re.search(r"top-1 +100.0%", out)
    status, out, _ = run("tasks", "months", *TINY, "--json")
    card = json.loads(out)
    assert (card["n"], card["n_pos"], card["first_difference"], card["accuracy"]) == (4, 23, 3, 1.0)
    status, out, _ = run("tasks", "months", *TINY, "--markdown")
    assert out.startswith("# Tasks\n")
    assert "| tiny-gpt2 | all | 23 | 3 | 100% |" in out


def test_a_file_is_a_task_of_the_command_line(run, tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("clean,corrupted,answer,wrong\nMay June July,May June March,August,July\n")
    status, out, _ = run("sweep", "--model", "tiny-gpt2", "--task", file, "--components", "a0.h1")
    assert status == 0
    assert "1 site × 1 prompt, " in out
    file.write_text("clean,corrupted,answer,wrong\nMay June July,May June March,Xanthippe,July\n")
    status, _, err = run("sweep", "--model", "tiny-gpt2", "--task", file)
    assert status == 2
    assert "mine.csv, row 1: 'Xanthippe'" in err


def test_bars_on_a_terminal_show_rate_and_time_left(monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=140)
    monkeypatch.setattr(console, "err", terminal)
    with console.progress_bars(quiet=False) as progress:
        for done in range(0, 50, 10):
            progress("tiny-gpt2: months, sweep", done, 100)
            time.sleep(0.15)
        progress("tiny-gpt2: months, pruning", 36, 36)
        progress("tiny-gpt2: months, pruning", 2, 7)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "tiny-gpt2: months, sweep" in shown
    assert re.search(r"40/100 .* rows/s, \d+ s left", shown)
    assert "2/7" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("info", "no-such-model"), "no-such-model"),
        (("sweep", *TINY, "--task", "colours"), "colours"),
        (("sweep", *TINY, "--task", "months", "--components", "a99.h0"), "'a99.h0' does not exist"),
        (("sweep", *TINY, "--task", "months", "--components", "attention"), "'attention' is not known"),
        (("sweep", *TINY, "--task", "months", "--source", "median"), "'median' is not known"),
        (("sweep", *TINY, "--task", "months", "--positions", "last"), "positions 'last'"),
        (("sweep", *TINY, "--task", "months", "--precision", "fp8"), "fp8"),
        (("sweep", *TINY, "--task", "months", "--device", "abacus"), "abacus"),
        (("sweep", *TINY, "--task", "months", "--budget", "much"), "memory 'much'"),
        (("sweep", *TINY, "--task", "months", "--dry-run", "--executor", "reference"), "'reference' has no plan"),
        (("sweep", "--task", "months"), "--model"),
        (("sweep", *TINY, "--task", "months", "--method", "guess"), "guess"),
        (("sweep", *TINY, "--task", "months", "--method", "atp", "--precision", "bf16"), "'bf16' of gradients"),
        (("sweep", *TINY, "--task", "months", "--screen", "0"), "screen"),
        (("discover", *TINY, "--task", "months", "--method", "guess"), "'guess' is not known"),
        (("discover", *TINY, "--task", "months", "--method", "eap"), "expected --n-edges or --threshold"),
        (
            ("discover", *TINY, "--task", "months", "--method", "eap", "--n-edges", 4, "--threshold", 1),
            "expected --n-edges or --threshold, one of the two",
        ),
        (
            ("discover", *TINY, "--task", "months", "--n-edges", 4),
            "method 'prune' has no --n-edges; expected some of --s",
        ),
        (("discover", *TINY, "--task", "months", "--edges", "--metric", "kl"), "expected no --metric kl"),
        (("discover", *TINY, "--task", "months", "--out", "unused.txt"), "ends in one of .json, .dot, .svg"),
        (("discover", *TINY, "--task", "months", "--method", "eap", "--n-edges", "99999"), "out of range"),
        (("discover", *TINY, "--task", "months", "--threshold", "-1"), "must be positive"),
        (("discover", *TINY, "--task", "months", "--threshold", "nan"), "threshold nan must be positive"),
        (("discover", *TINY, "--task", "months", "--threshold", "nan", "--method", "acdc"), "nan must be positive"),
        (("discover", *TINY, "--task", "months", "--threshold", "nan", "--method", "masks"), "nan must be positive"),
        (("discover", *TINY, "--task", "months", "--threshold", "nan", "--method", "edge-masks"), "must be positive"),
        (("discover", *TINY, "--task", "months", "--threshold", "nan", "--method", "eap"), "threshold nan is out of"),
        (("discover", *TINY, "--task", "months", "--edges", "--edge-threshold", "-3"), "--edge-threshold -3.0 must be"),
        (("discover", *TINY, "--task", "months", "--edges", "--edge-threshold", "nan"), "--edge-threshold nan must be"),
        (("sweep", *TINY, "--task", "months", "--out", "s.csv", "--resume"), "are for a run directory"),
        (("sweep", *TINY, "--task", "months", "--overwrite"), "are for a run directory"),
        (("sweep", *TINY, "--task", "months", "--out", "unused", "--method", "atp"), "holds an exact sweep"),
        (("sweep", *TINY, "--task", "months", "--out", "unused", "--screen", 3), "holds an exact sweep"),
        (("study", *TINY, "--out", "unused", "--tasks", "months,colours"), "'colours' is not known"),
        (("study", *TINY, "--out", "unused", "--tasks", ","), "at least one model and one task"),
        (("study", *TINY, "--out", "unused", "--threshold", "-5"), "must be positive"),
        (("study", *TINY, "--out", "unused", "--source", "median"), "'median' is not known"),
        (("study", *TINY, "--out", "unused", "--resume", "--overwrite"), "contradict each other"),
        (("generate", "-m", "tiny-gpt2"), "no prompt"),
        (("tasks", "months"), "expected --model once"),
        (("tasks", "colours", *TINY), "'colours' is not known"),
        (("tasks", "--markdown"), "expected --model at least once"),
        (("info",), "no model"),
        (("generate", "-m", "tiny-gpt2", "-p", ""), "empty"),
        (("generate", "-m", "tiny-gpt2", "-p", "May " * 500), "context"),
        (("report", "/nonexistent"), "not a run directory"),
        (("frobnicate",), "frobnicate"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(run, arguments, words):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
    assert not Path("unused").exists()


def test_output_that_nobody_reads_to_the_end_is_no_error():
    command = f"{shlex.quote(sys.executable)} -c 'from subcircuit.cli import main; main()' models | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout.split(), done.stderr) == (["name", "model", "where"], "")


def test_help_and_version_do_not_wait_for_torch():
    code = "import sys; sys.argv = ['subcircuit', '--version']; from subcircuit.cli import main\n"
    code += "try: main()\nexcept SystemExit as end: assert not end.code\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("subcircuit ")
