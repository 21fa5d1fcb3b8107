"""Hugging Face directories: the same logits as `transformers`, however they were saved."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from oracles import (
    CONFIGURATIONS,
    LLAMA3_SCALING,
    max_abs_difference,
    oracle_logits,
    random_model,
    random_tokens,
    save_random_model,
    shared_models,
)
from subcircuit.engine.errors import WeightsError
from subcircuit.engine.model import HookedTransformer
from subcircuit.weights.huggingface import read_huggingface

TOLERANCE = 1e-4


def our_logits(directory: Path, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    checkpoint = read_huggingface(directory, **options)
    return HookedTransformer(checkpoint.config, checkpoint.tensors)(tokens)


def edit_config(directory: Path, remove: tuple[str, ...] = (), **changes: object) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    kept = {key: value for key, value in config.items() if key not in remove}
    file.write_text(json.dumps({**kept, **changes}))


def edit_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors; `__` in a name stands for a dot."""
    file = directory / "model.safetensors"
    tensors = {**load_file(file), **{name.replace("__", "."): value for name, value in changes.items()}}
    save_file({name: value for name, value in tensors.items() if value is not None}, file)


@pytest.mark.parametrize("kind", CONFIGURATIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_logits_equal_those_of_transformers(tmp_path: Path, kind: str, seed: int) -> None:
    reference = save_random_model(tmp_path, kind, seed)
    tokens = random_tokens(reference.config.vocab_size, seed=seed)
    assert max_abs_difference(our_logits(tmp_path, tokens), oracle_logits(reference, tokens)) <= TOLERANCE


@pytest.mark.parametrize("kind", ["gpt2", "llama-gqa"])
def test_sharded_checkpoint_equals_single_file(tmp_path: Path, kind: str) -> None:
    save_random_model(tmp_path / "single", kind)
    save_random_model(tmp_path / "sharded", kind, max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    single = read_huggingface(tmp_path / "single").tensors
    sharded = read_huggingface(tmp_path / "sharded").tensors
    assert single.keys() == sharded.keys()
    assert all(torch.equal(single[name], sharded[name]) for name in single)


@pytest.mark.parametrize(("kind", "prefix"), [("gpt2", "transformer."), ("llama-tied", "model.")])
def test_names_without_the_prefix_are_read(tmp_path: Path, kind: str, prefix: str) -> None:
    save_random_model(tmp_path, kind)
    with_prefix = read_huggingface(tmp_path).tensors
    file = tmp_path / "model.safetensors"
    # Copies: the file is still mapped by what was read from it.
    renamed = {name.removeprefix(prefix): value.clone() for name, value in load_file(file).items()}
    file.unlink()
    save_file(renamed, file)
    without = read_huggingface(tmp_path).tensors
    assert all(torch.equal(with_prefix[name], without[name]) for name in with_prefix)


def test_masks_of_old_gpt2_checkpoints_are_ignored(tmp_path: Path) -> None:
    reference = save_random_model(tmp_path, "gpt2")
    mask = torch.ones(1, 1, 48, 48).tril()
    edit_tensors(tmp_path, h__0__attn__bias=mask, transformer__h__1__attn__masked_bias=torch.tensor(-1e4))
    tokens = random_tokens(61)
    assert max_abs_difference(our_logits(tmp_path, tokens), oracle_logits(reference, tokens)) <= TOLERANCE


def test_rotary_frequencies_of_old_llama_checkpoints_are_ignored(tmp_path: Path) -> None:
    reference = save_random_model(tmp_path, "llama-gqa")
    edit_tensors(tmp_path, model__layers__1__self_attn__rotary_emb__inv_freq=torch.ones(4))
    tokens = random_tokens(67)
    assert max_abs_difference(our_logits(tmp_path, tokens), oracle_logits(reference, tokens)) <= TOLERANCE


@pytest.mark.parametrize(("kind", "embedding"), [("gpt2", "transformer.wte"), ("qwen2-tied", "model.embed_tokens")])
def test_a_saved_copy_of_a_tied_unembedding_is_dropped_and_another_refused(
    tmp_path: Path, kind: str, embedding: str
) -> None:
    save_random_model(tmp_path, kind)
    weight = load_file(tmp_path / "model.safetensors")[f"{embedding}.weight"].clone()
    edit_tensors(tmp_path, lm_head__weight=weight.clone())
    assert "unembed.weight" not in read_huggingface(tmp_path).tensors
    edit_tensors(tmp_path, lm_head__weight=weight + 1)
    with pytest.raises(WeightsError, match=r"config\.json: 'tie_word_embeddings' is true, but .*lm_head"):
        read_huggingface(tmp_path)


@pytest.mark.parametrize("kind", ["llama-3-scaling", "llama-linear-scaling", "mistral", "qwen2"])
def test_rotary_settings_are_read_in_the_form_before_transformers_5(tmp_path: Path, kind: str) -> None:
    reference = save_random_model(tmp_path, kind)
    rope = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    kind_key = "type" if rope["rope_type"] == "linear" else "rope_type"
    scaling = {kind_key: rope.pop("rope_type"), **rope}
    edit_config(
        tmp_path,
        remove=("rope_parameters",),
        rope_theta=theta,
        rope_scaling=None if scaling == {"rope_type": "default"} else scaling,
    )
    tokens = random_tokens(67)
    assert max_abs_difference(our_logits(tmp_path, tokens), oracle_logits(reference, tokens)) <= TOLERANCE


def test_llama_3_scaling_changes_the_logits(tmp_path: Path) -> None:
    """What the scaling tests compare is not blind to the scaling."""
    scaled = save_random_model(tmp_path, "llama-3-scaling")
    edit_config(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": LLAMA3_SCALING["rope_theta"]})
    tokens = random_tokens(67)
    assert max_abs_difference(our_logits(tmp_path, tokens), oracle_logits(scaled, tokens)) > 100 * TOLERANCE


def test_a_sliding_window_limits_the_context(tmp_path: Path) -> None:
    reference = save_random_model(tmp_path, "mistral-window")
    assert reference.config.sliding_window == 32
    assert read_huggingface(tmp_path).config.n_ctx == 32
    tokens = random_tokens(67, n_tokens=32)
    assert max_abs_difference(our_logits(tmp_path, tokens), oracle_logits(reference, tokens)) <= TOLERANCE


def test_qwen2_uses_its_window_only_when_told(tmp_path: Path) -> None:
    save_random_model(tmp_path, "qwen2")
    edit_config(tmp_path, sliding_window=16)
    assert read_huggingface(tmp_path).config.n_ctx == 64
    edit_config(tmp_path, use_sliding_window=True)
    assert read_huggingface(tmp_path).config.n_ctx == 16


def test_absent_keys_mean_what_transformers_assumes(tmp_path: Path) -> None:
    save_random_model(tmp_path, "llama-mha")
    edit_config(tmp_path, remove=("num_key_value_heads", "tie_word_embeddings", "head_dim", "hidden_act"))
    config = read_huggingface(tmp_path).config
    assert (config.kv_heads, config.tied_unembed, config.d_head, config.activation) == (4, False, 8, "silu")
    shutil.rmtree(tmp_path)
    save_random_model(tmp_path, "gpt2")
    edit_config(tmp_path, remove=("tie_word_embeddings", "activation_function", "layer_norm_epsilon"))
    config = read_huggingface(tmp_path).config
    assert (config.tied_unembed, config.activation, config.norm_eps) == (True, "gelu_new", 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["gpt2", "llama-gqa"])
def test_every_parameter_has_the_asked_dtype(tmp_path: Path, kind: str, dtype: str) -> None:
    save_random_model(tmp_path, kind)
    exact = read_huggingface(tmp_path).tensors
    asked = read_huggingface(tmp_path, dtype=dtype).tensors
    wanted = getattr(torch, dtype)
    assert all(value.dtype == wanted and torch.equal(value, exact[name].to(wanted)) for name, value in asked.items())


@pytest.mark.parametrize("kind", ["gpt2", "llama-biased"])
def test_models_saved_in_half_precision_are_read(tmp_path: Path, kind: str) -> None:
    reference = random_model(kind)
    half = {name: value.bfloat16() for name, value in reference.state_dict().items()}
    reference.save_pretrained(tmp_path, state_dict=dict(half))
    reference.load_state_dict({name: value.float() for name, value in half.items()})
    tokens = random_tokens(reference.config.vocab_size)
    assert max_abs_difference(our_logits(tmp_path, tokens), oracle_logits(reference, tokens)) <= TOLERANCE


def test_weights_in_the_stored_dtype_are_views_of_the_file(tmp_path: Path) -> None:
    save_random_model(tmp_path, "gpt2")
    tensors = read_huggingface(tmp_path).tensors
    q, k, v = (tensors[f"blocks.0.attn.w_{x}.weight"] for x in "qkv")
    storage = q.untyped_storage().data_ptr()
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr() == storage
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system has no /proc/self/maps")
    ranges = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in maps.read_text().splitlines()
        if line.endswith(str(tmp_path / "model.safetensors"))
    ]
    addresses = [value.data_ptr() for value in tensors.values()]
    assert all(any(start <= address < stop for start, stop in ranges) for address in addresses)


def test_writing_to_a_weight_does_not_reach_the_file(tmp_path: Path) -> None:
    save_random_model(tmp_path, "llama-gqa")
    before = (tmp_path / "model.safetensors").read_bytes()
    tensors = read_huggingface(tmp_path).tensors
    for value in tensors.values():
        value.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_directory_without_tokenizer_has_none(tmp_path: Path) -> None:
    save_random_model(tmp_path, "gpt2")
    checkpoint = read_huggingface(tmp_path)
    assert checkpoint.tokenizer is None
    assert (checkpoint.source, checkpoint.config.name) == (str(tmp_path), tmp_path.name)


def test_a_trained_gpt2_gives_the_logits_of_transformers() -> None:
    from transformers import GPT2LMHeadModel

    directory = shared_models() / "gpt2-capp"
    tokens = random_tokens(53, n_tokens=64)
    reference = oracle_logits(GPT2LMHeadModel.from_pretrained(directory), tokens)
    assert max_abs_difference(our_logits(directory, tokens), reference) <= TOLERANCE


MEASURE_PEAK = """
import re, sys
import torch
from subcircuit.weights.huggingface import read_huggingface
def private_peak_kib():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.set_num_threads(1)
read = torch.Tensor.to
peak = 0
def watched(tensor, *args, **kwargs):
    global peak
    value = read(tensor, *args, **kwargs)
    peak = max(peak, private_peak_kib())
    return value
torch.Tensor.to = watched
read_huggingface(sys.argv[1])  # what is imported on first use does not count
for dtype in ("float32", "bfloat16"):
    peak = before = private_peak_kib()
    tensors = read_huggingface(sys.argv[2], dtype=dtype).tensors
    print((peak - before) * 1024 / sum(value.nbytes for value in tensors.values()))
    del tensors
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured by Linux's /proc")
def test_loading_keeps_no_second_copy(tmp_path: Path) -> None:
    """Memory of the process's own (mapped pages are the file's), relative to the bytes of the model."""
    small, large = tmp_path / "small", tmp_path / "large"
    save_random_model(small, "llama-gqa")
    save_random_model(large, "llama-gqa", hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    command = [sys.executable, "-c", MEASURE_PEAK, str(small), str(large)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    as_stored, converted = map(float, result.stdout.split())
    assert as_stored < 0.1
    assert converted < 1.3
