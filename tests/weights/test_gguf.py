"""GGUF files: the same logits as `transformers`, whatever the architecture and quantisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFWriter

from oracles import (
    LLAMA3_SCALING,
    max_abs_difference,
    oracle_logits,
    random_model,
    random_tokens,
    shared_models,
    smollm2_gguf,
    smollm2_in_transformers,
    write_gguf,
)
from subcircuit.engine.config import RopeScaling
from subcircuit.engine.errors import WeightsError
from subcircuit.engine.model import HookedTransformer
from subcircuit.weights.gguf import read_gguf
from subcircuit.weights.gguf_file import open_gguf

TOLERANCE = 1e-4
KINDS = ["gpt2", "gpt2-untied", "llama-mha", "llama-gqa", "llama-mqa", "llama-tied", "llama-biased"]
KINDS += ["llama-attention-bias-only", "llama-own-head-size", "mistral", "qwen2", "qwen2-tied"]


def difference(file: Path, reference: Any, **options: Any) -> float:
    checkpoint = read_gguf(file, **options)
    tokens = random_tokens(checkpoint.config.d_vocab)
    ours = HookedTransformer(checkpoint.config, checkpoint.tensors)(tokens)
    return max_abs_difference(ours, oracle_logits(reference, tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_transformers(tmp_path: Path, kind: str) -> None:
    reference = random_model(kind)
    write_gguf(tmp_path / "model.gguf", reference)
    assert difference(tmp_path / "model.gguf", reference) <= TOLERANCE


@pytest.mark.parametrize("quantization", ["Q8_0", "Q4_0", "Q4_1", "Q5_1", "F16", "BF16"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama-gqa", {"intermediate_size": 64}),
        ("gpt2", {"n_embd": 32, "n_head": 4}),
        ("qwen2-tied", {"intermediate_size": 64}),
    ],
)
def test_quantised_tensors_are_dequantised(
    tmp_path: Path, kind: str, settings: dict[str, Any], quantization: str
) -> None:
    reference = random_model(kind, **settings)
    exact = oracle_logits(reference, random_tokens(reference.config.vocab_size))
    write_gguf(tmp_path / "model.gguf", reference, quantization)
    quantised = oracle_logits(reference, random_tokens(reference.config.vocab_size))
    assert max_abs_difference(exact, quantised) > TOLERANCE, "the fixture is not quantised"
    assert difference(tmp_path / "model.gguf", reference) <= TOLERANCE


def test_dequantising_in_chunks_equals_dequantising_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "model.gguf", random_model("llama-gqa", intermediate_size=64), "Q4_1")
    at_once = read_gguf(tmp_path / "model.gguf").tensors
    monkeypatch.setattr("subcircuit.weights.gguf.CHUNK_ELEMENTS", 100)
    in_chunks = read_gguf(tmp_path / "model.gguf").tensors
    assert all(torch.equal(at_once[name], in_chunks[name]) for name in at_once)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_every_parameter_has_the_asked_dtype(tmp_path: Path, dtype: str) -> None:
    write_gguf(tmp_path / "model.gguf", random_model("llama-gqa", intermediate_size=64), "Q8_0")
    exact = read_gguf(tmp_path / "model.gguf").tensors
    asked = read_gguf(tmp_path / "model.gguf", dtype=dtype).tensors
    wanted = getattr(torch, dtype)
    assert all(value.dtype == wanted and torch.equal(value, exact[name].to(wanted)) for name, value in asked.items())


def test_llama_3_scaling_is_recognised_by_its_factors(tmp_path: Path) -> None:
    rope = {**LLAMA3_SCALING, "rope_theta": 500_000.0, "factor": 32.0, "original_max_position_embeddings": 8192}
    reference = random_model("llama-3-scaling", head_dim=64, rope_parameters=rope, max_position_embeddings=16384)
    write_gguf(tmp_path / "model.gguf", reference)
    assert read_gguf(tmp_path / "model.gguf").config.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert difference(tmp_path / "model.gguf", reference) <= TOLERANCE


def test_other_rotary_factors_are_refused(tmp_path: Path) -> None:
    """A scaling whose numbers differ from Llama 3's would be guessed."""
    write_gguf(tmp_path / "model.gguf", random_model("llama-3-scaling", head_dim=64))
    with pytest.raises(WeightsError, match=r"model\.gguf: tensor 'rope_freqs\.weight' is not Llama 3's scaling by 8"):
        read_gguf(tmp_path / "model.gguf")


def test_linear_scaling_is_read_from_the_metadata(tmp_path: Path) -> None:
    reference = random_model("llama-linear-scaling")
    write_gguf(tmp_path / "model.gguf", reference, rope__scaling__type="linear", rope__scaling__factor=2.5)
    assert difference(tmp_path / "model.gguf", reference) <= TOLERANCE


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"rope__scaling__type": "yarn"}, "rotary scaling 'yarn'"),
        ({"expert_count": 8}, "mixtures of experts"),
        ({"rope__dimension_count": 4}, "rotary positions cover 4 of 8"),
        ({"attention__value_length": 4}, "values of 4 and keys of 8"),
        ({"attention__head_count_kv": 3}, "n_kv_heads"),
        ({"block_count": 3}, "tensors of layer 2 are missing"),
        ({"block_count": 2**31}, "tensors of layer 2 are missing"),
        ({"block_count": 1}, r"tensor 'blk\.1\..*' is not a parameter"),
    ],
)
def test_unsupported_variants_are_refused_by_name(
    tmp_path: Path, metadata: dict[str, float | str], message: str
) -> None:
    write_gguf(tmp_path / "model.gguf", random_model("llama-gqa"), **metadata)
    with pytest.raises(WeightsError, match=rf"model\.gguf: .*{message}"):
        read_gguf(tmp_path / "model.gguf")


def test_a_sliding_window_limits_the_context(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", random_model("mistral"), attention__sliding_window=20)
    assert read_gguf(tmp_path / "model.gguf").config.n_ctx == 20


def test_a_file_of_vocabulary_only_is_refused() -> None:
    file = shared_models() / "tokenizers/ggml-vocab-llama-spm.gguf"
    with pytest.raises(WeightsError, match=r"ggml-vocab-llama-spm\.gguf: tensor 'token_embd\.weight' is missing"):
        read_gguf(file)


def test_metadata_equals_what_the_gguf_package_reads(tmp_path: Path) -> None:
    file = tmp_path / "metadata.gguf"
    writer = GGUFWriter(file, "llama")
    for bits, number in ((8, 200), (16, 60_000), (32, 4_000_000_000), (64, 2**63)):
        getattr(writer, f"add_uint{bits}")(f"unsigned.{bits}", number)
        getattr(writer, f"add_int{bits}")(f"signed.{bits}", -(number // 2))
    writer.add_float32("float.32", 1e-5)
    writer.add_float64("float.64", 0.1)
    writer.add_bool("flag", True)
    writer.add_string("text", "▁ and \n")
    writer.add_array("numbers", [3, -4, 5])
    writer.add_array("fractions", [0.25, -1e-3])
    writer.add_array("flags", [True, False])
    writer.add_array("texts", ["a", "", "ä\n"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields = GGUFReader(file).fields
    theirs = {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    ours = open_gguf(file).metadata
    assert ours.keys() == theirs.keys()
    assert len(ours) == 17
    for name, value in theirs.items():
        assert ours[name] == (pytest.approx(value, rel=1e-6) if name in ("float.32", "fractions") else value), name
    assert ours["float.32"] == 1e-5, "the shortest decimal of the float32"


def test_smollm2_gives_the_logits_of_transformers() -> None:
    file = smollm2_gguf()
    assert difference(file, smollm2_in_transformers(file)) <= TOLERANCE
