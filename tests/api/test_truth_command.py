"""subcircuit truth."""

from __future__ import annotations

import json

from subcircuit.analysis.truth import known, methods

QUICK = ("truth", "induction", "--family", "llama", "--method", "exact sweep, mean", "--n-seeds", "1", "--n", "4")


def test_the_table_has_a_line_per_method_and_known_model(run):
    status, out, err = run(*QUICK)
    assert status == 0
    assert len(out.splitlines()) == 2
    assert "exact sweep, mean" in out
    assert "1.000" in out
    assert "methods on known models" in err


def test_bench_prints_the_same_table(run, monkeypatch):
    monkeypatch.setattr(known, "BLUEPRINTS", {"induction": known.INDUCTION})
    monkeypatch.setattr(methods, "BLUEPRINTS", known.BLUEPRINTS)
    monkeypatch.setattr(methods, "METHODS", {"exact edges": methods.METHODS["exact edges"]})
    same = run("truth", "--quiet", "--json", "--n", "4", "--seed", "5")
    bench = run("bench", "--truth", "--quiet", "--json", "--prompts", "4", "--seed", "5")
    assert bench[0] == same[0] == 0
    rows, expected = (json.loads(out) for _, out, _ in (bench, same))
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in expected]
    assert [(row["family"], row["what"], row["exact"], row["recall"]) for row in rows] == [
        (family, what, True, 1) for family in ("gpt2", "llama") for what in ("nodes", "edges")
    ]


def test_json_has_the_same_rows(run):
    status, out, _ = run(*QUICK, "--json", "--quiet")
    assert status == 0
    (row,) = json.loads(out)
    assert (row["model"], row["family"], row["precision"], row["recall"]) == ("induction", "llama", 1, 1)


def test_what_does_not_exist_is_one_line_and_status_2(run):
    for arguments, message in (
        (("magic",), "known model 'magic' does not exist"),
        (("--family", "mamba"), "family 'mamba' is not known"),
        (("--method", "magic"), "method 'magic' is not known"),
    ):
        status, _, err = run("truth", "--quiet", *arguments)
        assert (status, len(err.splitlines())) == (2, 1)
        assert message in err
