"""Training a dictionary and scoring its features from the command line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from subcircuit import load_dictionary
from subcircuit.analysis.circuit import Circuit

HOOK = "blocks.2.hook_resid_pre"


@pytest.fixture
def trained(run, tmp_path):
    size = ("--size", 64, "--k", 8, "--steps", 60, "--rows", 30)
    status, out, _ = run(
        "train-dictionary", "--model", "tiny-gpt2", "--hook", HOOK, *size, "--out", tmp_path / "d", "--json"
    )
    assert status == 0
    found = json.loads(out)
    assert 0.3 < found["explained_variance"] < 1
    assert found["l0"] <= 8
    assert found["loss"] < found["reconstructed_loss"] < found["zeroed_loss"]
    return tmp_path / "d"


def test_a_trained_dictionary_is_scored_and_shown_with_its_tokens(run, trained):
    command = ("features", "--model", "tiny-gpt2", "--dictionary", trained, "--task", "months", "--n", 4)
    status, out, _ = run(*command, "--top", 3)
    assert status == 0
    assert "of 64 features × 4 prompts, clean logit difference" in out
    assert out.count("r2.f") == 3
    both = []
    for method in ("exact", "attribution"):
        status, out, _ = run(*command, "--json", "--method", method)
        assert status == 0
        found = json.loads(out)
        assert found["settings"]["dictionary"] == HOOK
        assert found["features"][0]["fires_on"][0]["share"] > 0
        both.append({row["site"]: row["effect"] for row in found["features"]})
    assert both[0].keys() == both[1].keys()
    assert both[0] != both[1]
    name = next(iter(both[0]))
    status, out, _ = run(*command, "--json", "--features", name.split(".f")[1])
    assert [row["site"] for row in json.loads(out)["features"]] == [name]
    assert json.loads(out)["features"][0]["effect"] == pytest.approx(both[0][name], rel=1e-3, abs=1e-4)


def test_features_are_nodes_of_circuits_and_these_need_the_dictionary(run, trained, tmp_path):
    task = ("--model", "tiny-gpt2", "--task", "months", "--n", 4, "--quiet")
    file = tmp_path / "c.json"
    status, out, err = run("discover", *task, "--dictionary", trained, "--out", file)
    assert (status, err) == (0, "")
    circuit = Circuit.load(file)
    assert out.strip() == str(circuit)
    assert circuit.features
    assert circuit.settings["dictionaries"] == {HOOK: 64}
    assert circuit.settings["dictionary_fingerprints"] == {HOOK: load_dictionary(trained).fingerprint()}
    judge = ("faithfulness", *task, "--circuit", file, "--random", 3, "--knockouts", 1, "--greedy", 0, "--json")
    status, out, _ = run(*judge, "-d", trained)
    assert status == 0
    found = json.loads(out)
    assert found["score"][0] == pytest.approx(circuit.score, abs=0.01)
    assert set(found["drops"]) == set(map(str, circuit.nodes))
    for arguments, words in [
        (judge, f"no dictionary is known at '{HOOK}'"),
        ((*judge, "-d", trained, "--hook", HOOK, "--hook", HOOK), "--hook is given 2 times and --dictionary 1 times"),
        (("sensitivity", *task, "--circuit", file, "--seeds", 1), "no dictionary is known"),
        (("compare", file, file), "given twice"),
        (("discover", *task, "-d", trained, "--method", "acdc"), "finds edges between heads and MLPs"),
        (("discover", *task, "-d", trained, "--edges"), "expected no --dictionary"),
    ]:
        status, out, err = run(*arguments)
        assert (status, out) == (2, "")
        assert words in err
        assert err.count("\n") == 1


@pytest.fixture
def circuits(trained, tmp_path):
    """Two circuits with features of the dictionary, of two tasks."""
    files = []
    dictionary = load_dictionary(trained)
    features = [f"r2.f{i}" for i in range(64)]
    for name, chosen in (("months", features[:20]), ("numerals", features[10:40])):
        provenance = {"model": "tiny-gpt2", "task": name}
        settings = {"dictionary_fingerprints": {HOOK: dictionary.fingerprint()}}
        circuit = Circuit.of_nodes(["a0.h1", "m0", "m2", *chosen], settings=settings, **provenance)
        circuit.save(tmp_path / f"{name}.json")
        files.append(tmp_path / f"{name}.json")
    return files


def test_circuits_with_features_are_compared(run, trained, circuits, tmp_path):
    figure = tmp_path / "overlap.svg"
    command = ("compare", *circuits, "-d", trained, "--n", 4)
    status, out, err = run(*command, "-t", "months", "--figure", figure, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    overlaps = {each["kind"]: each for each in found["pairs"][0]["overlaps"]}
    assert list(overlaps) == ["nodes", "heads", "mlps", "features"]
    features = overlaps["features"]
    assert (features["n_a"], features["n_b"], features["n_both"]) == (20, 30, 10)
    assert 40 <= features["n_all"] <= 64
    assert len(found["shared"]["tiny-gpt2"]["features"]) == 10
    assert set(found["scored"]["months"]) == {"months", "numerals", "shared by all", "union"}
    assert "Nodes in common" in figure.read_text()
    on_their_own = json.loads(run(*command, "--json")[1])["pairs"][0]["overlaps"][3]
    assert features["n_all"] <= on_their_own["n_all"] <= 64


def test_what_cannot_be_compared_is_said_in_one_line(run, trained, circuits, tmp_path):
    plain, untold, too_many = (tmp_path / name for name in ("plain.json", "untold.json", "many.json"))
    Circuit([(0, 1)], [0], model="tiny-gpt2", task="months").save(plain)
    Circuit([(0, 1)], [0], model="tiny-gpt2").save(untold)
    Circuit([], [], features=["r2.f64"], model="tiny-gpt2", task="months").save(too_many)
    for arguments, words in [
        ((circuits[0], plain), "circuit 'months' has features (such as r2.f0); expected their --dictionary"),
        ((plain, untold, "-d", trained), "no circuit has features; expected no --dictionary"),
        ((circuits[0], untold, "-d", trained), "circuit 'untold' does not say on which task it was found"),
        ((circuits[0], too_many, "-d", trained), "circuit 'many': component 'r2.f64' does not exist"),
    ]:
        status, out, err = run("compare", *arguments, "--n", 4)
        assert (status, out) == (2, "")
        assert words in err
        assert err.count("\n") == 1


def test_features_of_another_dictionary_are_used_with_a_warning(run, trained, circuits):
    circuit = Circuit.load(circuits[0])
    replace(circuit, settings={"dictionary_fingerprints": {HOOK: "0" * 16}}).save(circuits[0])
    status, _, err = run("compare", *circuits, "-d", trained, "--n", 4)
    assert status == 0
    assert err == f"warning: the features of {circuits[0]} at {HOOK} were found in another dictionary\n"


def test_bad_input_is_one_line_and_status_2(run, trained, tmp_path):
    command = ("features", "--model", "tiny-gpt2", "--task", "months", "--n", 4, "--dictionary")
    for arguments, words in [
        ((trained, "--features", "many"), "expected 'active' or indices"),
        ((trained, "--features", "64"), "features 0 to 63"),
        ((tmp_path / "none",), "holds 0 safetensors files"),
    ]:
        status, out, err = run(*command, *arguments)
        assert (status, out) == (2, "")
        assert words in err
        assert err.count("\n") == 1
    status, _, err = run(
        "train-dictionary", "--model", "tiny-gpt2", "--hook", "blocks.1.hook_attn_out", "--out", tmp_path
    )
    assert status == 2
    assert "cannot sit at" in err
