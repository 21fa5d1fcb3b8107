"""The commands that judge and compare circuits, as a person meets them."""

from __future__ import annotations

import json
import re

import pytest

import subcircuit as sc
from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.evaluation import circuits_scored


@pytest.fixture
def files(tmp_path):
    """Two circuits of the bundled model, one of which does not say so."""
    Circuit([(0, 1), (0, 6), (1, 6)], [0, 1, 2, 3], model="tiny-gpt2").save(tmp_path / "a.json")
    Circuit([(0, 1), (1, 3)], [0, 2, 3]).save(tmp_path / "b.json")
    return tmp_path / "a.json", tmp_path / "b.json"


TINY = ("--model", "tiny-gpt2", "--task", "months", "--n", 4)


def test_compare_says_what_chance_gives_and_scores_circuits(run, files, tmp_path):
    arguments = ("compare", *files, "--model", "tiny-gpt2", "--figure", tmp_path / "overlap.svg")
    status, out, err = run(*arguments, "--task", "months", "--n", 4)
    assert (status, err) == (0, f"wrote {tmp_path / 'overlap.svg'}\n")
    assert run(*arguments, "--quiet")[2] == ""
    assert "by chance" in out
    assert "shared by all" in out
    assert (tmp_path / "overlap.svg").read_text().startswith("<svg")
    found = json.loads(run(*arguments, "--task", "months", "--n", 4, "--json")[1])
    heads = found["pairs"][0]["overlaps"][1]
    assert (heads["kind"], heads["n_all"], heads["n_a"], heads["n_b"], heads["n_both"]) == ("heads", 32, 3, 2, 1)
    assert set(found["scored"]["months"]) == {"a", "b", "shared by all", "union"}
    low, high = found["scored"]["months"]["a"][1:]
    assert low <= found["scored"]["months"]["a"][0] <= high


def test_compare_scores_on_the_prompts_asked_for(run, files):
    arguments = ("compare", *files, "--model", "tiny-gpt2", "--task", "numerals", "--n", 4)
    found = [json.loads(run(*arguments, *more, "--json")[1])["scored"] for more in ((), ("--members", 2))]
    assert found[0] != found[1]
    model = sc.load("tiny-gpt2")
    task = sc.task("numerals", model, n=4, seed=0, members=3, filter=True)
    expected = circuits_scored(sc.Ablation(model, task), {"a": Circuit.load(files[0])}, seed=0)["a"]
    [filtered] = [json.loads(run(*arguments, "--members", 3, "--filter", "--json")[1])["scored"]]
    assert filtered["numerals"]["a"] == pytest.approx(expected, abs=1e-4)


def test_compare_gives_every_circuit_all_mlps(run, files):
    asked = ("compare", *files, "--model", "tiny-gpt2", "--task", "months", "--n", 4, "--json")
    with_mlps = json.loads(run(*asked, "--with-mlps")[1])
    assert [circuit["mlps"] for circuit in with_mlps["circuits"].values()] == [[0, 1, 2, 3]] * 2
    plain = json.loads(run(*asked)[1])
    assert with_mlps["scored"]["months"]["a"] == plain["scored"]["months"]["a"]
    assert with_mlps["scored"]["months"]["b"] != plain["scored"]["months"]["b"]


def test_a_circuit_without_a_model_needs_one(run, files):
    status, _, err = run("compare", *files)
    assert (status, err) == (
        2,
        "error: circuit 'b' does not say of which model it is; expected --model\n",
    )
    assert run("compare", files[0])[2] == "error: circuits to compare: a; expected at least two\n"
    status, _, err = run("compare", files[0], "missing.json")
    assert (status, err) == (2, "error: missing.json: No such file or directory\n")
    (files[0].parent / "none.json").write_text("{}")
    status, _, err = run("compare", files[0], files[0].parent / "none.json")
    assert status == 2
    assert "none.json: not a circuit: it has no field 'schema'; expected an object with schema 1 or 2" in err
    status, _, err = run("compare", files[0], files[0])
    assert status == 2
    assert "a circuit is given twice" in err


def test_a_circuit_of_another_model_is_used_with_a_warning(run, tmp_path):
    file = tmp_path / "other.json"
    Circuit([(0, 1), (1, 6)], [0, 1, 2, 3], model="smollm2-135m").save(file)
    Circuit([(0, 1)], [0], model="tiny-gpt2").save(tmp_path / "own.json")
    warning = f"warning: the nodes of {file} (found in smollm2-135m) are used as those of tiny-gpt2\n"
    narrow = {
        "faithfulness": (*TINY, "--circuit", file, "--random", 0, "--knockouts", 1, "--greedy", 0, "--quiet"),
        "sensitivity": (*TINY, "--circuit", file, "--metrics", "kl", "--scopes", "last", "--random", 1, "--quiet"),
        "heads": (*TINY, "--circuit", file, "--quiet"),
        "transfer": ("-m", "tiny-gpt2", "-c", file, "-k", "months", "-n", 2, "--random", 1, "--quiet"),
        "compare": (file, tmp_path / "own.json", "--model", "tiny-gpt2"),
    }
    for command, arguments in narrow.items():
        status, out, err = run(command, *arguments, "--json")
        assert (status, err) == (0, warning), command
        json.loads(out)
    Circuit([(29, 1)], [0], model="smollm2-135m").save(file)
    status, _, err = run("faithfulness", *narrow["faithfulness"])
    assert status == 2
    assert err.startswith(warning + "error: ")


NOTHING_NEEDED = "warning: the circuit is empty: no node is needed: with source mean in place of every one"


def test_a_circuit_that_needs_no_node_is_said_to_and_what_to_try(run, tmp_path):
    task = ("--model", "tiny-gpt2", "--task", "greater_than", "--n", 8, "--quiet")
    for more in ((), ("--edges",), ("--json",), ("--method", "masks", "--steps", 5)):
        status, out, err = run("discover", *task, *more, "--out", tmp_path / "c.json")
        assert status == 0
        assert "0 heads" in out or json.loads(out)["heads"] == []
        assert err.startswith(NOTHING_NEEDED)
        assert "the model scores 104 of 100 by logit difference; try another source or metric, or more" in err
    for command in ("faithfulness", "sensitivity"):
        status, _, err = run(command, *task)
        assert status == 2
        assert err.startswith(NOTHING_NEEDED)
    status, _, err = run("discover", *task, "--method", "eap", "--threshold", 1000)
    assert (status, "no edge that was taken leads through a node" in err) == (0, True)
    few = ("discover", "--model", "tiny-gpt2", "--task", "months", "--n", 4, "--max-sweeps", 1, "--quiet")
    assert run(*few)[2] == ""


def test_kinds_of_which_the_model_continues_nothing_are_a_sentence_and_no_rows(run, files, tmp_path):
    arguments = ("transfer", "-m", "tiny-gpt2", "-c", files[0], "--random", 1, "-n", 2, "--quiet", "--kinds")
    status, out, _ = run(*arguments, "interval_2,months,addition_1_digit", "--out", tmp_path / "some.svg")
    svg = (tmp_path / "some.svg").read_text()
    assert (">months<" in svg, ">interval 2<" in svg) == (True, False)
    assert status == 0
    assert [line.split()[0] for line in out.splitlines() if "/2" in line] == ["months"]
    assert "continues no prompt of interval_2, addition_1_digit rightly" in out
    assert "answered" not in run(*arguments, "interval_2")[1].splitlines()[-1]
    status, _, err = run(*arguments, "interval_2", "--out", tmp_path / "none.svg")
    assert status == 0
    assert err.startswith(f"warning: {tmp_path / 'none.svg'} is not written: the whole model continues no prompt")
    assert not (tmp_path / "none.svg").exists()
    found = json.loads(run(*arguments, "interval_2,months", "--json")[1])
    assert [row["kind"] for row in found["kinds"]] == ["interval_2", "months"]


def test_faithfulness_judges_a_circuit(run, files, tmp_path):
    arguments = (
        "faithfulness",
        *TINY,
        "--circuit",
        files[0],
        "--random",
        5,
        "--knockouts",
        2,
        "--greedy",
        1,
        "--quiet",
    )
    assert run(*arguments, "--figure", tmp_path / "curve.png")[2].endswith("a file name that ends in .svg\n")
    status, out, err = run(*arguments, "--figure", tmp_path / "curve.svg")
    assert (status, err) == (0, "")
    assert "CPR" in out
    assert "5 random circuits alike in size" in out
    assert (tmp_path / "curve.svg").read_text().startswith("<svg")
    found = json.loads(run(*arguments, "--json", "--metric", "kl")[1])
    assert 0 < found["score"][0] < 100
    assert len(found["completeness"]) == 3
    assert len(found["values"]["circuit"]) == 4
    assert found["random"]["n"] == 5
    assert run(*arguments, "--match", "colour")[0] == 2


def test_sensitivity_tells_what_survives(run, files):
    narrow = ("--metrics", "kl,logit_difference", "--scopes", "all,last", "--seeds", 1, "--random", 3, "--quiet")
    status, out, err = run("sensitivity", *TINY, "--circuit", files[0], *narrow)
    assert (status, err) == (0, "")
    assert "Survives all:" in out
    found = json.loads(run("sensitivity", *TINY, "--circuit", files[0], *narrow, "--json")[1])
    assert len(found["outcomes"]) == 12
    assert set(found["survival"]) == {"recovers", "beats random", "all matter", "same ranking"}
    status, _, err = run("sensitivity", *TINY, "--circuit", files[0], "--metrics", "bleu")
    assert (status, err.startswith("error: metric 'bleu' is not known")) == (2, True)
    status, _, err = run("sensitivity", *TINY, "--circuit", files[0], "--scopes", "last,nowhere", "--quiet")
    assert (status, err.startswith("error: scope 'nowhere' is none of task 'months'; it has all, from_")) == (2, True)


def test_one_prompt_has_no_intervals(run, files):
    one = ("faithfulness", "--model", "tiny-gpt2", "--task", "months", "--n", 1, "--circuit", files[0])
    status, out, _ = run(*one, "--random", 2, "--knockouts", 1, "--greedy", 0, "--quiet")
    assert status == 0
    assert re.search(r"^recovered +[\d.-]+ +– +by the circuit alone", out, re.MULTILINE)
    assert "Minimal in" not in out
    assert "the least" in out
