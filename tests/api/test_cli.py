"""The command line as a person meets it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from subcircuit import cli


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process: (exit status, standard output, standard error)."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["subcircuit", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


TINY = ("--model", "tiny-gpt2", "--n", 4)


def test_a_sweep_prints_the_largest_effects_and_writes_every_site(run, tmp_path):
    status, out, _ = run("sweep", *TINY, "--task", "months", "--top", 3, "--out", tmp_path / "s.csv")
    assert status == 0
    assert "32 sites × 4 prompts" in out
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 33


def test_json_is_all_that_standard_output_holds(run):
    status, out, _ = run("sweep", *TINY, "--task", "months", "--components", "a0.h1", "--positions", "-1,2", "--json")
    assert status == 0
    assert [site["site"] for site in json.loads(out)["sites"]] == ["a0.h1@-1,2"]
    status, out, _ = run("info", "tiny-gpt2", "--json")
    assert json.loads(out)["n_layers"] == 4
    status, out, _ = run("models", "--json")
    assert "tiny-gpt2" in {model["name"] for model in json.loads(out)}


def test_discover_writes_a_circuit_and_generate_continues(run, tmp_path):
    status, out, _ = run("discover", *TINY, "--task", "months", "--max-sweeps", 1, "--out", tmp_path / "c.json")
    assert (status, json.loads((tmp_path / "c.json").read_text())["task"]) == (0, "months")
    assert "heads" in out
    status, out, _ = run(
        "generate", "-m", "tiny-gpt2", "-p", "Ring lost in May. Van lost in June. Box lost in", "--max-new-tokens", 1
    )
    assert (status, out.strip().split()[-1]) == (0, "July")


def test_a_study_ends_with_its_findings_and_the_report(run, tmp_path):
    arguments = ("study", *TINY, "--tasks", "numerals", "--out", tmp_path / "run", "--max-sweeps", 1, "--random", 2)
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    assert "numerals" in out
    assert str(tmp_path / "run" / "report.html") in out
    status, _, err = run(*arguments)
    assert status == 2
    assert "holds a run already" in err
    status, out, _ = run("report", tmp_path / "run")
    assert (status, out.strip()) == (0, str(tmp_path / "run" / "report.html"))


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
        (("sweep", "--task", "months"), "--model"),
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


def test_help_and_version_do_not_wait_for_torch():
    code = "import sys; sys.argv = ['subcircuit', '--version']; from subcircuit.cli import main\n"
    code += "try: main()\nexcept SystemExit as end: assert not end.code\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("subcircuit ")
