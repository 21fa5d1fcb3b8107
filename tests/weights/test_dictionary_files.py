"""Sparse dictionaries read from files written by hand in the layouts in which they come."""

from __future__ import annotations

import json
import random

import numpy as np
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


def write_sparsify(directory, dictionary, **config):
    """As EleutherAI's `SparseCoder.save_to_disk` does."""
    directory.mkdir(parents=True, exist_ok=True)
    values = {"activation": "topk", "k": 7, "d_in": 32, "num_latents": 40, "multi_topk": False, "transcode": False}
    (directory / "cfg.json").write_text(json.dumps(values | config))
    tensors = {"encoder.weight": dictionary.W_enc.T, "encoder.bias": dictionary.b_enc}
    tensors |= {name: getattr(dictionary, name) for name in ("W_dec", "b_dec")}
    save_file({name: each.contiguous() for name, each in tensors.items()}, directory / "sae.safetensors")


def gated_tensors():
    """By SAELens' names, with gates that are shut where the magnitude is not, and the other way round."""
    tensors = tensors_of(a_dictionary())
    generator = torch.Generator().manual_seed(SEED + 1)
    draws = {name: 0.5 * torch.randn(40, generator=generator) for name in ("b_gate", "b_mag", "r_mag")}
    return {name: tensors[name] for name in ("W_enc", "W_dec", "b_dec")} | draws


def gated_encode(tensors, x, subtract=True):
    """Rajamanoharan et al. 2024 (arXiv 2404.16014), equations 5 to 8, in float64."""
    W_enc, b_dec, b_gate, b_mag, r_mag = (
        tensors[name].double() for name in ("W_enc", "b_dec", "b_gate", "b_mag", "r_mag")
    )
    centred = x.double() - b_dec if subtract else x.double()
    gate = (centred @ W_enc + b_gate > 0).double()
    return gate * torch.relu(centred @ (W_enc * r_mag.exp()) + b_mag)


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


@pytest.mark.parametrize("subtract", [True, False])
def test_gated_dictionaries_of_saelens_are_read(tmp_path, subtract):
    tensors = gated_tensors()
    write_saelens(tmp_path, tensors, architecture="gated", apply_b_dec_to_input=subtract)
    assert_gated(load_dictionary(tmp_path, dtype="float64"), tensors, subtract)


def test_gated_dictionaries_of_dictionary_learning_are_read(tmp_path):
    tensors = gated_tensors()
    names = {"gate_bias": "b_gate", "mag_bias": "b_mag", "r_mag": "r_mag", "decoder_bias": "b_dec"}
    stored = {theirs: tensors[ours] for theirs, ours in names.items()}
    stored |= {"encoder.weight": tensors["W_enc"].T, "decoder.weight": tensors["W_dec"].T}
    save_file({name: each.contiguous() for name, each in stored.items()}, tmp_path / "ae.safetensors")
    assert_gated(load_dictionary(tmp_path, hook=PLACES["m"], dtype="float64"), tensors)
    with pytest.raises(WeightsError, match="does not say where the dictionary sits"):
        load_dictionary(tmp_path)


def assert_gated(found, tensors, subtract=True):
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    expected = gated_encode(tensors, x, subtract)
    assert 0.1 < (expected > 0).double().mean() < 0.9
    torch.testing.assert_close(found.encode(x), expected, rtol=1e-9, atol=1e-12)
    decoded = expected @ tensors["W_dec"].double() + tensors["b_dec"].double()
    torch.testing.assert_close(found.decode(found.encode(x)), decoded, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("folder", "hook"),
    [
        ("layers.4", "blocks.5.hook_resid_pre"),
        ("layers.4.mlp", "blocks.4.hook_mlp_out"),
        ("h.0.mlp", "blocks.0.hook_mlp_out"),
        ("gpt_neox.layers.11", "blocks.12.hook_resid_pre"),
    ],
)
def test_folders_of_sparsify_are_read_and_say_by_their_name_where_they_sit(tmp_path, folder, hook):
    dictionary = a_dictionary("topk")
    write_sparsify(tmp_path / folder, dictionary)
    found = load_dictionary(tmp_path / folder)
    assert found.hook_name == hook
    assert load_dictionary(tmp_path / folder, hook=PLACES["a"]).hook_name == PLACES["a"]
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(SEED))
    pre = torch.relu((x - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc)
    top, at = pre.topk(7)
    torch.testing.assert_close(found.encode(x), torch.zeros_like(pre).scatter(1, at, top), rtol=1e-5, atol=1e-6)
    decoded = torch.stack([(t[:, None] * dictionary.W_dec[i]).sum(0) for t, i in zip(top, at, strict=True)])
    torch.testing.assert_close(x - found.error(x), decoded + dictionary.b_dec, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("folder", "config", "words"),
    [
        ("layers.4.self_attn", {}, "'layers.4.self_attn' names no place of a dictionary"),
        ("layers.4", {"activation": "groupmax"}, "activation 'groupmax' is not supported; expected 'topk'"),
        ("layers.4.mlp", {"transcode": True}, "'transcode' is true"),
        ("layers.4", {"skip_connection": True}, "'skip_connection' is true"),
        ("layers.4", {"k": None}, "'k' is missing"),
        ("layers.4", {"k": 41}, "k is 41; expected 1 to the 40 features"),
    ],
)
def test_bad_folders_of_sparsify_are_named_in_one_line(tmp_path, folder, config, words):
    write_sparsify(tmp_path / folder, a_dictionary("topk"), **config)
    with pytest.raises(WeightsError, match=words) as caught:
        load_dictionary(tmp_path / folder)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_params_of_gemma_scope_are_read(tmp_path):
    """They read x as it is, without b_dec."""
    tensors = tensors_of(a_dictionary("jumprelu"))
    np.savez(tmp_path / "params.npz", **{name: each.numpy() for name, each in tensors.items()})
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(SEED))
    pre = x @ tensors["W_enc"] + tensors["b_enc"]
    expected = (pre > tensors["threshold"]) * torch.relu(pre)
    for path in (tmp_path, tmp_path / "params.npz"):
        found = load_dictionary(path, hook="blocks.3.hook_resid_post")
        assert found.hook_name == "blocks.4.hook_resid_pre"
        torch.testing.assert_close(found.encode(x), expected, rtol=1e-5, atol=1e-6)
        decoded = expected @ tensors["W_dec"] + tensors["b_dec"]
        torch.testing.assert_close(found.decode(expected), decoded, rtol=1e-5, atol=1e-5)
    with pytest.raises(WeightsError, match=r"params.npz: does not say where the dictionary sits"):
        load_dictionary(tmp_path)


def test_bad_npz_files_are_named_in_one_line(tmp_path):
    file = tmp_path / "params.npz"
    cases = [
        ({"W_enc": np.array([object()])}, "not a readable npz file"),
        ({"W_enc": np.zeros(3)}, "'W_dec' is missing"),
    ]
    for arrays, words in cases:
        np.savez(file, **arrays)
        with pytest.raises(WeightsError, match=words) as caught:
            load_dictionary(file, hook=PLACES["r"])
        assert "\n" not in str(caught.value)
    whole = file.read_bytes()
    for content in (b"nothing", whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(WeightsError, match=r"params.npz: not a readable npz file"):
            load_dictionary(file, hook=PLACES["r"])


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        ({"W_dec": None}, {}, "tensor 'W_dec' is missing"),
        ({"W_dec": torch.zeros(40, 31)}, {}, r"tensor 'W_dec' has shape \(40, 31\); expected \(40, 32\)"),
        ({"b_enc": torch.full((40,), float("nan"))}, {}, "tensor 'b_enc' holds values that are not finite"),
        ({}, {"architecture": "jumprelu"}, "tensor 'threshold' is missing"),
        ({"b_gate": torch.zeros(40)}, {}, "tensor 'b_gate' is not one of a dictionary"),
        ({}, {"architecture": "gated"}, "tensor 'b_enc' is not one of a dictionary"),
        ({}, {"architecture": "temporal"}, "architecture 'temporal' is not supported; .* topk, gated"),
        (
            {"b_enc": None, "b_gate": torch.zeros(39), "b_mag": torch.zeros(40), "r_mag": torch.zeros(40)},
            {"architecture": "gated"},
            r"tensor 'b_gate' has shape \(39,\); expected \(40,\)",
        ),
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
