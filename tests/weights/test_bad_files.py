"""Bad files: whatever is wrong, one line that names the file (and the tensor); never a traceback, never a hang."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from oracles import random_model, save_random_model, write_gguf, write_llama2c
from subcircuit.engine.errors import SubcircuitError, WeightsError
from subcircuit.engine.model import HookedTransformer
from subcircuit.weights.names import read_path

FORMS = ["safetensors", "gguf", "llama2c"]
N_TRUNCATIONS = 60
N_FLIPS = 300


@dataclass(frozen=True)
class GoodFile:
    """A sound model: `place` is what is loaded, `file` holds the tensors, `n_header` its bytes before them."""

    place: Path
    file: Path
    n_header: int


def make(form: str, directory: Path) -> GoodFile:
    if form == "safetensors":
        save_random_model(directory, "gpt2")
        file = directory / "model.safetensors"
        return GoodFile(directory, file, 8 + struct.unpack("<Q", file.read_bytes()[:8])[0])
    directory.mkdir(exist_ok=True)
    if form == "gguf":
        file = directory / "model.gguf"
        write_gguf(file, random_model("llama-gqa", intermediate_size=64), "Q8_0")
        return GoodFile(file, file, file.read_bytes().index(b"output_norm.weight"))
    file = directory / "model.bin"
    write_llama2c(file, random_model("llama-gqa"))
    return GoodFile(file, file, 28)


@pytest.fixture(params=FORMS)
def good(request: pytest.FixtureRequest, tmp_path: Path) -> GoodFile:
    return make(request.param, tmp_path / "model")


def load_fully(place: Path) -> HookedTransformer:
    checkpoint = read_path(place)
    return HookedTransformer(checkpoint.config, checkpoint.tensors, checkpoint.tokenizer)


def complaint(place: Path) -> str:
    """What is said about a file that must be refused: one line."""
    with pytest.raises(WeightsError) as error:
        load_fully(place)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def replaced(file: Path, content: bytes) -> None:
    # A new file in its place: the old one may still be mapped.
    file.unlink()
    file.write_bytes(content)


def edit_tensors(file: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    edit(tensors)
    file.unlink()
    save_file(tensors, file)


def test_the_files_are_good_before_they_are_spoiled(good: GoodFile) -> None:
    load_fully(good.place)


def test_a_truncated_file_is_named(good: GoodFile) -> None:
    whole = good.file.read_bytes()
    generator = random.Random(0)
    lengths = [1, 4, 7, 8, 28, good.n_header - 1, good.n_header, good.n_header + 1, len(whole) - 40, len(whole) - 1]
    lengths += [generator.randrange(1, len(whole)) for _ in range(N_TRUNCATIONS)]
    for length in lengths:
        if good.file.suffix == ".gguf" and length > len(whole) - 32:
            continue  # nothing but the padding after the last tensor is lost
        replaced(good.file, whole[:length])
        assert good.file.name in complaint(good.place), f"truncated to {length} bytes"


def test_a_flipped_header_byte_is_survived_or_named(good: GoodFile) -> None:
    """Many a flip is harmless (a name, a learned constant); the others are one line with the file's name."""
    whole = good.file.read_bytes()
    generator = random.Random(1)
    said: dict[tuple[int, int], str] = {}
    for _ in range(N_FLIPS):
        position, bit = generator.randrange(good.n_header), 1 << generator.randrange(8)
        spoiled = bytearray(whole)
        spoiled[position] ^= bit
        replaced(good.file, bytes(spoiled))
        try:
            load_fully(good.place)
        except SubcircuitError as error:
            said[position, bit] = str(error)
    assert {at: message for at, message in said.items() if "\n" in message or good.file.name not in message} == {}
    assert len(said) > N_FLIPS / 10


def test_an_empty_file_is_named(good: GoodFile) -> None:
    replaced(good.file, b"")
    assert good.file.name in complaint(good.place)


def test_a_text_file_of_that_name_is_named(good: GoodFile) -> None:
    replaced(good.file, b"This is not a model. " * 1000)
    assert good.file.name in complaint(good.place)


def test_a_missing_file_is_named(good: GoodFile) -> None:
    good.file.unlink()
    assert good.file.name in complaint(good.place)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    file = make("safetensors", tmp_path / "model").file

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["transformer.h.1.mlp.c_fc.weight"][3, 5] = value

    edit_tensors(file, spoil)
    message = complaint(file.parent)
    assert "'h.1.mlp.c_fc.weight' holds values that are not finite" in message
    assert file.name in message


@pytest.mark.parametrize("kind", ["gguf", "llama2c"])
def test_a_nan_in_the_other_forms_is_named(tmp_path: Path, kind: str) -> None:
    model = random_model("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = float("nan")
    file = tmp_path / ("model.gguf" if kind == "gguf" else "model.bin")
    (write_gguf if kind == "gguf" else write_llama2c)(file, model)
    name = "blk.1.ffn_up.weight" if kind == "gguf" else "layers.1.feed_forward.w3.weight"
    assert f"{file}: tensor {name!r} holds values that are not finite" in complaint(file)


def test_values_beyond_float16_are_named_when_that_is_asked_for(tmp_path: Path) -> None:
    file = make("safetensors", tmp_path / "model").file
    edit_tensors(file, lambda tensors: tensors["transformer.ln_f.bias"].fill_(1e5))
    load_fully(file.parent)
    with pytest.raises(WeightsError, match=r"'ln_f\.bias' exceeds the range of float16; load it as bfloat16"):
        read_path(file.parent, dtype="float16")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    file = make("safetensors", tmp_path / "model").file
    edit_tensors(file, lambda tensors: tensors.pop("transformer.h.0.attn.c_attn.bias"))
    assert complaint(file.parent) == f"{file}: tensor 'h.0.attn.c_attn.bias' is missing; expected shape (72,)"


def test_a_missing_layer_is_named(tmp_path: Path) -> None:
    file = make("safetensors", tmp_path / "model").file

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".h.1." in name]:
            del tensors[name]

    edit_tensors(file, drop)
    assert complaint(file.parent) == f"{file}: tensors of layer 1 are missing; the configuration has 2 layers"


def test_an_extra_tensor_is_named(tmp_path: Path) -> None:
    file = make("safetensors", tmp_path / "model").file
    edit_tensors(file, lambda tensors: tensors.update({"transformer.h.0.crossattention.bias": torch.zeros(3)}))
    assert complaint(file.parent) == f"{file}: tensor 'h.0.crossattention.bias' is not a parameter of this model"


def test_a_wrongly_shaped_tensor_is_named(tmp_path: Path) -> None:
    file = make("safetensors", tmp_path / "model").file
    edit_tensors(file, lambda tensors: tensors.update({"transformer.h.0.attn.c_attn.weight": torch.zeros(72, 24)}))
    assert complaint(file.parent) == (f"{file}: tensor 'h.0.attn.c_attn.weight' has shape (72, 24); expected (24, 72)")


def test_integer_tensors_are_refused(tmp_path: Path) -> None:
    file = make("safetensors", tmp_path / "model").file
    edit_tensors(
        file, lambda tensors: tensors.update({"transformer.wte.weight": torch.zeros(61, 24, dtype=torch.int8)})
    )
    assert f"{file}: tensor 'transformer.wte.weight' is I8; expected one of F64, F32, F16, BF16" in complaint(
        file.parent
    )


def test_a_tensor_with_and_without_prefix_is_named(tmp_path: Path) -> None:
    file = make("safetensors", tmp_path / "model").file
    edit_tensors(file, lambda tensors: tensors.update({"ln_f.bias": torch.zeros(24)}))
    assert f"{file}: tensor 'ln_f.bias' is there with and without 'transformer.'" in complaint(file.parent)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_random_model(tmp_path, "gpt2", max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    assert complaint(tmp_path) == f"{shard}: the file is missing"


def test_a_tensor_that_is_not_in_its_shard_is_named(tmp_path: Path) -> None:
    save_random_model(tmp_path, "gpt2", max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shard = tmp_path / index["weight_map"]["transformer.ln_f.weight"]
    edit_tensors(shard, lambda tensors: tensors.pop("transformer.ln_f.weight"))
    assert complaint(tmp_path).startswith(f"{shard}: tensor 'transformer.ln_f.weight' is missing, though")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "'weight_map' is not an object of file names"),
        ({"a": 1}, "'weight_map' is not an object of file names"),
        ({"a": "../other/model.safetensors"}, "shard '../other/model.safetensors' is not a file name"),
        ({}, "tensors of layer 0 are missing"),
    ],
)
def test_a_bad_index_is_named(tmp_path: Path, weight_map: object, message: str) -> None:
    save_random_model(tmp_path, "gpt2", max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert complaint(tmp_path).startswith(f"{index}: {message}")


def test_pickled_weights_are_not_read_and_named(tmp_path: Path) -> None:
    file = make("safetensors", tmp_path / "model").file
    file.rename(file.with_name("pytorch_model.bin"))
    assert "pytorch_model.bin must be saved as safetensors first" in complaint(file.parent)
    assert "pytorch_model.bin: " in complaint(file.with_name("pytorch_model.bin"))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gpt2", {"model_type": "gpt_neox"}, "model_type 'gpt_neox' is not supported; expected one of gpt2, llama"),
        ("gpt2", {"model_type": None}, "model_type None is not supported"),
        ("gpt2", {"model_type": ["gpt2"]}, "is not supported"),
        ("gpt2", {"n_layer": None}, "'n_layer' is missing"),
        ("gpt2", {"n_layer": "2"}, "'n_layer' is '2'; expected a positive integer"),
        ("gpt2", {"n_layer": 3}, "tensors of layer 2 are missing"),
        ("gpt2", {"n_layer": 10**9}, "tensors of layer 2 are missing"),
        ("gpt2", {"n_layer": 1}, "'h.1.attn.c_attn.bias' is not a parameter"),
        ("gpt2", {"n_head": 5}, "is not a multiple of its number of heads (5)"),
        ("gpt2", {"n_head": True}, "'n_head' is True; expected a positive integer"),
        ("gpt2", {"vocab_size": 10**13}, "'vocab_size' is"),
        ("gpt2", {"vocab_size": 10**11}, "'wte.weight' has shape (61, 24); expected (100000000000, 24)"),
        ("gpt2", {"n_embd": 3 * 10**11, "n_inner": 10**11}, "sizes are impossible"),
        ("gpt2", {"layer_norm_epsilon": -1.0}, "'layer_norm_epsilon' is -1.0; expected a positive number"),
        ("gpt2", {"layer_norm_epsilon": float("nan")}, "'layer_norm_epsilon' is nan"),
        ("gpt2", {"activation_function": "gelu_10"}, "'activation_function' is 'gelu_10'; expected one of"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx' is True; only False"),
        ("gpt2", {"scale_attn_weights": False}, "'scale_attn_weights' is False; only True"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "'reorder_and_upcast_attn' is True"),
        ("gpt2", {"add_cross_attention": True}, "'add_cross_attention' is True"),
        ("gpt2", {"tie_word_embeddings": "yes"}, "'tie_word_embeddings' is 'yes'; expected true or false"),
        ("gpt2", {"quantization_config": {"quant_method": "gptq"}}, "only GGUF files are supported"),
        ("llama-gqa", {"num_key_value_heads": 3}, "n_kv_heads (3) must divide n_heads (4)"),
        ("llama-gqa", {"head_dim": 7}, "rotary positions need an even d_head"),
        ("llama-gqa", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5; only 1.0"),
        ("llama-gqa", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rotary scaling 'yarn'"),
        ("llama-gqa", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic'"),
        ("llama-gqa", {"rope_parameters": {"rope_type": "longrope"}}, "rotary scaling 'longrope'"),
        ("llama-gqa", {"rope_parameters": None, "rope_scaling": {"type": "yarn"}}, "rotary scaling 'yarn'"),
        ("llama-gqa", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor' is missing"),
        ("llama-gqa", {"rope_parameters": {"full_attention": {}}}, "'rope_parameters' differs between layers"),
        ("llama-gqa", {"rope_parameters": "default"}, "'rope_parameters' is 'default'; expected an object"),
        ("qwen2", {"attention_bias": True}, "'attention_bias' is True; only False"),
    ],
)
def test_a_configuration_that_is_not_supported_is_named(
    tmp_path: Path, kind: str, changes: dict[str, object], message: str
) -> None:
    save_random_model(tmp_path, kind)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    said = complaint(tmp_path)
    assert message in said
    assert said.startswith((f"{file}: ", f"{tmp_path / 'model.safetensors'}: "))


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_named(tmp_path: Path, content: bytes) -> None:
    save_random_model(tmp_path, "gpt2")
    (tmp_path / "config.json").write_bytes(content)
    assert complaint(tmp_path).startswith(f"{tmp_path / 'config.json'}: ")


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    assert complaint(tmp_path) == f"{tmp_path / 'config.json'}: the file is missing"


def test_an_unknown_gguf_architecture_is_named(tmp_path: Path) -> None:
    file = make("gguf", tmp_path / "model").file
    replaced(file, file.read_bytes().replace(b"llama", b"mamba"))
    assert complaint(file) == f"{file}: architecture 'mamba' is not supported; expected one of llama, qwen2, gpt2"


def test_a_part_of_a_split_gguf_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, random_model("llama-gqa"), general_parts=3)
    content = file.read_bytes().replace(b"llama.general_parts", b"split.count" + b" " * 8)
    replaced(
        file, content.replace(struct.pack("<Q", 19) + b"split.count" + b" " * 8, struct.pack("<Q", 11) + b"split.count")
    )
    assert f"{file}: one of 3 parts of a split model" in complaint(file)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"GGML" + bytes(100), "it begins with b'GGML', not b'GGUF'"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(100), "version 1; expected 2 or 3"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(100), "version 50331648"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "the header wants"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "the header wants"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62), f"the header wants {2**62} bytes"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 5, 2**61), "the header wants"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 8, 2**61), "the header wants"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 77), "unknown value type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 9, 1), "holds arrays"),
        (b"GGUF" + struct.pack("<IQQQ1s", 3, 0, 1, 1, b"\xff"), "is not UTF-8"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"a", 9), "tensor 'a' has 9 dimensions"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"a", 1, 7, 999, 0), "unknown tensor type 999"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"a", 1, 7, 8, 0), "Q8_0 needs a multiple of 32"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"a", 1, 7, 0, 3), "not a multiple of 32"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"a", 1, 2**62, 0, 0), "truncated or corrupted"),
    ],
)
def test_a_gguf_header_that_lies_is_refused(tmp_path: Path, header: bytes, message: str) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(header)
    said = complaint(file)
    assert said.startswith(f"{file}: ")
    assert message in said


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ((64, 172, 5, 0, 4, 512, 512), "n_heads"),
        ((64, 172, -5, 8, 4, 512, 512), "n_layers"),
        ((66, 172, 5, 8, 4, 512, 512), "does not divide d_model 66"),
        ((64, 172, 2**30, 8, 4, 512, 512), "truncated, or not a llama2.c v0 file"),
        ((64, 172, 5, 8, 4, -(2**31), 512), "truncated, or not a llama2.c v0 file"),
        ((0x616B3432, 1, 5, 8, 4, 512, 512), "a versioned llama2.c file"),
    ],
)
def test_a_llama2c_header_that_lies_is_refused(tmp_path: Path, header: tuple[int, ...], message: str) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(struct.pack("<7i", *header) + bytes(300_000))
    said = complaint(file)
    assert said.startswith(f"{file}: ")
    assert message in said


def test_bytes_after_a_llama2c_file_are_refused(tmp_path: Path) -> None:
    file = make("llama2c", tmp_path / "model").file
    replaced(file, file.read_bytes() + b"more")
    assert complaint(file).startswith(f"{file}: 4 bytes are left after the last tensor")
