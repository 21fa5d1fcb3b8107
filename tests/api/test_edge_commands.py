"""The commands about edges, as a person meets them: found, judged, patched as paths, written for other tools."""

from __future__ import annotations

import csv
import json
import re

import pytest

import subcircuit as sc

TINY = ("--model", "tiny-gpt2", "--task", "months", "--n", 4)


@pytest.fixture
def pruned(run, tmp_path):
    """A circuit of the bundled model with the edges that path patching keeps."""
    file = tmp_path / "pruned.json"
    assert run("discover", *TINY, "--edges", "--out", file, "--quiet")[0] == 0
    return file


def test_discover_takes_what_prune_edges_takes(run, tmp_path):
    file = tmp_path / "c.json"
    asked = ("--freeze", "none", "--relative-to", "circuit", "--from-input", "--same-layer", "--edge-threshold", 0.9)
    status, out, _ = run("discover", *TINY, "--edges", *asked, "--out", file, "--quiet")
    assert status == 0
    assert "edges that were judged matter; without the others the score is" in out
    how = sc.Circuit.load(file).settings["edges"]
    expected = {"freeze": "none", "relative_to": "circuit", "from_input": True, "same_layer": True, "threshold": 0.9}
    assert {name: how[name] for name in expected} == expected
    refused = run("discover", *TINY, "--freeze", "none")[2]
    assert refused == "error: --freeze is of edges that are pruned; expected --edges with it\n"


def test_edges_by_gradients_are_verified(run):
    status, out, _ = run("discover", *TINY, "--method", "eap-ig", "--n-edges", 40, "--verify", "--quiet")
    assert status == 0
    assert "rank correlation with the gradients'" in out
    assert "score" in out


def test_faithfulness_judges_edges_where_there_are_any(run, pruned, tmp_path):
    narrow = (*TINY, "--circuit", pruned, "--random", 2, "--knockouts", 1, "--drops", 3, "--quiet")
    status, out, _ = run("faithfulness", *narrow, "--figure", tmp_path / "curve.svg")
    assert status == 0
    assert "Its edges are judged; all others of the model are removed." in out
    assert re.search(r"\d+ edges \(and \d+ that were not judged\)", out)
    assert "of 3 edges (interval of the drop above 0)" in out
    assert "Edges of the model by EAP-IG: CPR" in out
    assert (tmp_path / "curve.svg").read_text().startswith("<svg")
    found = json.loads(run("faithfulness", *narrow, "--json", "--match", "nodes")[1])
    assert found["random"]["match"] == "nodes"
    how = sc.Circuit.load(pruned).settings["edges"]
    assert found["score"][0] == pytest.approx(how["score"], abs=1e-3)
    assert "Its nodes are judged" in run("faithfulness", *narrow, "--nodes")[1]


def test_compare_scores_edges_beside_nodes(run, pruned, tmp_path):
    other = tmp_path / "other.json"
    assert run("discover", *TINY, "--edges", "--seed", 1, "--out", other, "--quiet")[0] == 0
    overlay = tmp_path / "overlay.svg"
    status, out, _ = run("compare", pruned, other, "--task", "months", "--n", 4, "--overlay", overlay)
    assert status == 0
    assert "in every circuit:" in overlay.read_text()
    assert "edges between shared nodes" in out
    found = json.loads(run("compare", pruned, other, "--task", "months", "--n", 4, "--json")[1])["scored"]
    assert set(found) == {"months", "months, by edges"}
    score = sc.Circuit.load(pruned).settings["edges"]["score"]
    model = sc.load("tiny-gpt2")
    task = sc.task("months", model, n=4, seed=0)
    nothing = sc.EdgeAblation(model, task).score_of(())
    expected = 100 * (score - nothing) / (100 - nothing)
    assert found["months, by edges"]["pruned"][0] == pytest.approx(expected, abs=1e-2)


def test_paths_are_patched(run, tmp_path):
    file = tmp_path / "paths.csv"
    arguments = ("paths", *TINY, "--to", "a2.h1,logits", "--from", "a0.h1,m0", "--freeze", "heads+mlps", "--quiet")
    status, out, err = run(*arguments, "--out", file)
    assert (status, err) == (0, "")
    assert out.startswith("8 paths, mean logit difference")
    one = run("paths", *TINY, "--from", "m0", "--members", 2, "--quiet")[1]
    assert re.match(r"1 path, mean logit difference \d", one)
    rows = json.loads(run(*arguments, "--json")[1])["paths"]
    with file.open() as lines:
        assert [float(row["effect"]) for row in csv.DictReader(lines)] == [row["effect"] for row in rows]
    model = sc.load("tiny-gpt2")
    task = sc.task("months", model, n=4, seed=0)
    shown = sc.Ablation(model, sc.task("months", model, n=4, seed=0, members=2))
    assert f"difference {float(shown.clean.mean()):.3f}\n" in one
    direct = sc.verify_edges(model, task, [("m0", "logits")])
    [found] = [row for row in rows if (row["sender"], row["receiver"]) == ("m0", "logits")]
    assert found["effect"] == pytest.approx(float(direct.mean[0]), rel=1e-4)
    for name in ("foo", "m3.n17"):
        assert run("paths", *TINY, "--to", name)[2] == (
            f"error: '{name}' reads nothing; expected logits, m9, a7.q11, a7.k2, a7.v2, or a7.h11 for its query, key "
            "and value\n"
        )
    assert run("paths", *TINY, "--to", "a0.q1", "--from", "m3")[2] == (
        "error: edge 'm3' -> 'a0.q1' does not exist: no such sender below 'a0.q1'\n"
    )


def test_a_circuit_is_converted_to_mib_and_back(run, pruned, tmp_path):
    mib, again = tmp_path / "c.mib.json", tmp_path / "again.json"
    assert run("convert", pruned, mib)[0] == 0
    assert run("convert", mib, again)[2] == (
        f"error: {mib} does not say of which model its circuit is; expected --model\n"
    )
    assert run("convert", mib, again, "--model", "tiny-gpt2", "--task", "months")[0] == 0
    before, after = sc.Circuit.load(pruned), sc.Circuit.load(again)
    config = sc.load("tiny-gpt2").config
    assert after.edges == tuple(sc.edges_kept(before, config))
    assert (after.nodes, after.task, after.model) == (before.nodes, "months", "tiny-gpt2")
    for suffix, start in ((".dot", "digraph"), (".svg", "<svg")):
        assert run("convert", pruned, tmp_path / f"c{suffix}")[0] == 0
        assert (tmp_path / f"c{suffix}").read_text().startswith(start)
    none = tmp_path / "none.json"
    assert run("convert", none, again)[2] == f"error: {none}: No such file or directory\n"
