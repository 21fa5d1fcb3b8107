"""Training a dictionary and scoring its features from the command line."""

from __future__ import annotations

import json

import pytest

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
