"""Sparse dictionaries read from files written by hand in the layouts of SAELens and dictionary_learning."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import save_file

from dictionary_cases import ACTIVATIONS, PLACES, random_dictionary
from patching_cases import CONFIGS
from subcircuit.engine.errors import WeightsError
from subcircuit.weights.dictionary import load_dictionary, save_dictionary

SEED = random.randrange(10**6)
CONFIG = CONFIGS["gpt2"]
NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


@pytest.fixture(autouse=True)
def show_seed():
    print(f"seed {SEED}")


def a_dictionary(activation="relu", hook=PLACES["r"]):
    return random_dictionary(hook, CONFIG, SEED, activation)


def tensors_of(dictionary):
    return {name: getattr(dictionary, name) for name in NAMES if getattr(dictionary, name) is not None}


def write_saelens(directory, tensors, **config):
    values = {"architecture": "standard", "hook_name": PLACES["r"], "normalize_activations": "none", **config}
    (directory / "cfg.json").write_text(json.dumps(values))
    save_file({name: each.contiguous() for name, each in tensors.items()}, directory / "sae_weights.safetensors")


def write_learning(directory, dictionary, bias="bias", **more):
    tensors = {
        "encoder.weight": dictionary.W_enc.T,
        "decoder.weight": dictionary.W_dec.T,
        "encoder.bias": dictionary.b_enc,
        bias: dictionary.b_dec,
    }
    save_file({name: each.contiguous() for name, each in (tensors | more).items()}, directory / "ae.safetensors")


def assert_same(found, expected):
    x = torch.randn(6, expected.d_in, generator=torch.Generator().manual_seed(SEED))
    assert found.hook_name == expected.hook_name
    torch.testing.assert_close(found.encode(x), expected.encode(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.error(x), expected.error(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hook", PLACES.values())
def test_what_is_written_is_read_back_to_the_bit(tmp_path, activation, hook):
    dictionary = a_dictionary(activation, hook)
    save_dictionary(tmp_path / "new" / "folder", dictionary, {"model_name": "tiny"})
    found = load_dictionary(tmp_path / "new" / "folder")
    assert all(torch.equal(each, tensors_of(found)[name]) for name, each in tensors_of(dictionary).items())
    scalars = ("hook_name", "activation", "k", "subtract_b_dec")
    assert [getattr(found, name) for name in scalars] == [getattr(dictionary, name) for name in scalars]
    assert json.loads((tmp_path / "new" / "folder" / "cfg.json").read_text())["metadata"]["model_name"] == "tiny"


@pytest.mark.parametrize(
    ("activation", "config"),
    [
        ("relu", {}),
        ("relu", {"architecture": "standard", "activation_fn_str": "relu", "apply_b_dec_to_input": True}),
        ("jumprelu", {"architecture": "jumprelu", "metadata": {"hook_name": PLACES["r"]}, "hook_name": None}),
        ("topk", {"architecture": "topk", "k": 7, "activation_fn_str": "relu", "activation_fn_kwargs": {}}),
        ("topk", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}}),
    ],
)
def test_directories_of_every_saelens_version_are_read(tmp_path, activation, config):
    dictionary = a_dictionary(activation)
    write_saelens(tmp_path, tensors_of(dictionary), **config)
    assert_same(load_dictionary(tmp_path), dictionary)


def test_the_bias_is_subtracted_only_where_the_file_says_so(tmp_path):
    write_saelens(tmp_path, tensors_of(a_dictionary()), apply_b_dec_to_input=False)
    assert load_dictionary(tmp_path).subtract_b_dec is False


def test_the_stream_leaving_a_layer_is_the_one_entering_the_next(tmp_path):
    write_saelens(tmp_path, tensors_of(a_dictionary()), hook_name="blocks.4.hook_resid_post")
    assert load_dictionary(tmp_path).hook_name == "blocks.5.hook_resid_pre"
    assert load_dictionary(tmp_path, hook="blocks.2.hook_mlp_out").hook_name == "blocks.2.hook_mlp_out"


def test_scaling_by_the_decoder_norm_is_folded_in(tmp_path):
    """SAELens multiplies pre-activations by the decoder rows' norms before the top k, and divides while decoding."""
    dictionary = a_dictionary("topk")
    config = {"architecture": "topk", "k": 7, "rescale_acts_by_decoder_norm": True}
    write_saelens(tmp_path, tensors_of(dictionary), **config)
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(SEED))
    norm = dictionary.W_dec.norm(dim=1)
    pre = ((x - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc) * norm
    kept = torch.zeros_like(pre).scatter(-1, pre.topk(7).indices, pre.topk(7).values.relu())
    found = load_dictionary(tmp_path)
    torch.testing.assert_close(found.encode(x), kept, rtol=1e-5, atol=1e-6)
    decoded = (kept / norm) @ dictionary.W_dec + dictionary.b_dec
    torch.testing.assert_close(found.decode(found.encode(x)), decoded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("activation", "bias", "more"), [("relu", "bias", {}), ("topk", "b_dec", {"k": 7})])
def test_tensors_of_dictionary_learning_are_read(tmp_path, activation, bias, more):
    dictionary = a_dictionary(activation)
    write_learning(tmp_path, dictionary, bias, **{name: torch.tensor(float(each)) for name, each in more.items()})
    for path in (tmp_path, tmp_path / "ae.safetensors"):
        assert_same(load_dictionary(path, hook=PLACES["r"]), dictionary)
    with pytest.raises(WeightsError, match="does not say where the dictionary sits"):
        load_dictionary(tmp_path)


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        ({"W_dec": None}, {}, "tensor 'W_dec' is missing"),
        ({"W_dec": torch.zeros(40, 31)}, {}, r"tensor 'W_dec' has shape \(40, 31\); expected \(40, 32\)"),
        ({"b_enc": torch.full((40,), float("nan"))}, {}, "tensor 'b_enc' holds values that are not finite"),
        ({}, {"architecture": "jumprelu"}, "tensor 'threshold' is missing"),
        ({"b_gate": torch.zeros(40)}, {}, "tensor 'b_gate' is not one of a dictionary"),
        ({}, {"architecture": "gated"}, "architecture 'gated' is not supported"),
        ({}, {"normalize_activations": "layer_norm"}, "'normalize_activations' is 'layer_norm'"),
        ({}, {"hook_head_index": 3}, "'hook_head_index' is set"),
        ({}, {"hook_name": None}, "'hook_name' is missing"),
        ({}, {"architecture": "topk"}, "'k' is missing"),
        ({}, {"architecture": "topk", "k": 41}, "k is 41; expected 1 to the 40 features"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, change, config, words):
    tensors = tensors_of(a_dictionary()) | change
    write_saelens(tmp_path, {name: each for name, each in tensors.items() if each is not None}, **config)
    with pytest.raises(WeightsError, match=words) as caught:
        load_dictionary(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_folders_without_a_dictionary_are_named(tmp_path):
    with pytest.raises(WeightsError, match="holds 0 safetensors files"):
        load_dictionary(tmp_path)
    (tmp_path / "sae_weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        load_dictionary(tmp_path)
