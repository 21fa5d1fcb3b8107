"""Models in llama.cpp's form: one GGUF file with configuration, tokenizer and (mostly quantised) tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from subcircuit.engine.config import ModelConfig, RopeScaling
from subcircuit.engine.errors import ConfigError, WeightsError
from subcircuit.engine.rope import rope_frequencies
from subcircuit.weights.checkpoint import Checkpoint, ConfigValues, StoredTensor, load_tensors, one_line, parse_dtype
from subcircuit.weights.families import GPT2_GGUF, LLAMA_GGUF, QWEN2_GGUF, NameTable
from subcircuit.weights.gguf_file import GGUFFile, GGUFTensor, open_gguf
from subcircuit.weights.tokenizers import from_gguf_metadata

# Stored as they are; everything else is dequantised.
PLAIN_DTYPES = {
    GGMLQuantizationType.F64: torch.float64,
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}

# Elements dequantised at a time: the float32 intermediate stays in the processor's cache.
CHUNK_ELEMENTS = 1 << 18

# What every Llama 3 was trained with. GGUF keeps the factors that follow from it (rope_freqs.weight), not these
# numbers.
LLAMA3_LOW_FREQ_FACTOR, LLAMA3_HIGH_FREQ_FACTOR, LLAMA3_ORIGINAL_N_CTX = 1.0, 4.0, 8192


def read_gguf(
    path: str | Path, *, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
) -> Checkpoint:
    """Read a GGUF file of architecture llama (Mistral is one), gpt2 or qwen2.

    Tensors are dequantised in chunks straight into `dtype`; those stored in that dtype stay memory-mapped. A file
    without a tokenizer gives None.

    Raises WeightsError for a file, configuration or tensor that is missing, corrupted or not supported, and
    TokenizerError for a tokenizer that is.
    """
    where = Path(path)
    file = open_gguf(where)
    stored = {name: _stored_tensor(where, file, name, tensor) for name, tensor in file.tensors.items()}
    table, config = read_config(where, file.metadata, stored)
    tensors = load_tensors(table, config, stored, where, parse_dtype(dtype), torch.device(device))
    has_tokenizer = file.metadata.get("tokenizer.ggml.model") not in (None, "no_vocab")
    tokenizer = from_gguf_metadata(file.metadata, where) if has_tokenizer else None
    return Checkpoint(config, tensors, tokenizer, str(where))


def read_config(
    where: Path, metadata: Mapping[str, object], stored: Mapping[str, StoredTensor]
) -> tuple[NameTable, ModelConfig]:
    """Name table and configuration that the metadata (and which tensors there are) describe.

    Raises WeightsError for one that is not supported.
    """
    architecture = str(metadata.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        raise WeightsError(
            f"{where}: architecture {architecture!r} is not supported; expected one of {', '.join(ARCHITECTURES)}"
        )
    if metadata.get("split.count") not in (None, 0, 1):
        raise WeightsError(f"{where}: one of {metadata['split.count']} parts of a split model; merge them first")
    if "token_embd.weight" not in stored:
        raise WeightsError(f"{where}: tensor 'token_embd.weight' is missing")
    prefix = f"{architecture}."
    values = ConfigValues({key.removeprefix(prefix): value for key, value in metadata.items()}, where)
    table, build = ARCHITECTURES[architecture]
    try:
        return table, build(values, stored)
    except ConfigError as error:
        raise WeightsError(f"{where}: {error}") from error


def _gpt2_config(values: ConfigValues, stored: Mapping[str, StoredTensor]) -> ModelConfig:
    return ModelConfig(
        **_sizes(values, stored),
        norm="layernorm",
        norm_eps=values.number("attention.layer_norm_epsilon"),
        positions="learned",
        activation="gelu_new",
        qkv_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
        family="gpt2",
    )


def _llama_config(values: ConfigValues, stored: Mapping[str, StoredTensor]) -> ModelConfig:
    sizes = _sizes(values, stored)
    if values.values.get("expert_count", 0) != 0:
        values.fail(f"'expert_count' is {values.values['expert_count']!r}; mixtures of experts are not supported")
    if values.integer("rope.dimension_count", sizes["d_head"]) != sizes["d_head"]:
        values.fail(f"rotary positions cover {values.values['rope.dimension_count']} of {sizes['d_head']} dimensions")
    theta = values.number("rope.freq_base", 10_000.0)
    return ModelConfig(
        **sizes,
        norm="rmsnorm",
        norm_eps=values.number("attention.layer_norm_rms_epsilon"),
        positions="rope",
        rope_theta=theta,
        rope_scaling=_rope_scaling(values, theta, sizes["d_head"], stored.get("rope_freqs.weight")),
        activation="silu",
        gated_mlp=True,
        qkv_bias="blk.0.attn_q.bias" in stored,
        attn_out_bias="blk.0.attn_output.bias" in stored,
        mlp_bias="blk.0.ffn_up.bias" in stored,
        family="llama",
    )


ARCHITECTURES: Mapping[str, tuple[NameTable, Callable[[ConfigValues, Mapping[str, StoredTensor]], ModelConfig]]] = {
    "llama": (LLAMA_GGUF, _llama_config),
    "qwen2": (QWEN2_GGUF, _llama_config),
    "gpt2": (GPT2_GGUF, _gpt2_config),
}


def _sizes(values: ConfigValues, stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    d_model, n_heads = values.integer("embedding_length"), values.integer("attention.head_count")
    d_head = values.integer("attention.key_length", d_model // n_heads or 1)
    if values.integer("attention.value_length", d_head) != d_head:
        values.fail(
            f"values of {values.values['attention.value_length']} and keys of {d_head} dimensions; expected one size"
        )
    n_ctx = values.integer("context_length")
    if values.has("attention.sliding_window"):
        # Exact up to the window, where every earlier token is still in it; see huggingface.py.
        n_ctx = min(n_ctx, values.integer("attention.sliding_window"))
    return {
        "n_layers": values.integer("block_count"),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": values.integer("attention.head_count_kv", n_heads),
        "d_head": d_head,
        "d_mlp": values.integer("feed_forward_length"),
        "d_vocab": stored["token_embd.weight"].shape[0],
        "n_ctx": n_ctx,
        "tied_unembed": "output.weight" not in stored,
        "name": values.text("general.name", values.where.stem),
    }


def _rope_scaling(values: ConfigValues, theta: float, d_head: int, divisors: StoredTensor | None) -> RopeScaling | None:
    """The scaling that the metadata names, or the Llama 3 one whose divisors are in rope_freqs.weight."""
    kind = values.text("rope.scaling.type", "none")
    if kind == "linear":
        return RopeScaling("linear", factor=values.number("rope.scaling.factor"))
    if kind != "none":
        values.fail(
            f"rotary scaling {kind!r} is not supported; expected 'none', 'linear' or Llama 3's rope_freqs.weight"
        )
    if divisors is None:
        return None
    if divisors.shape != (d_head // 2,):
        values.fail(f"tensor 'rope_freqs.weight' has shape {divisors.shape}; expected {(d_head // 2,)}")
    wanted = divisors.read(torch.float32)
    factor = wanted.max().item()
    if factor == 1:
        return None
    scaling = RopeScaling("llama3", factor, LLAMA3_LOW_FREQ_FACTOR, LLAMA3_HIGH_FREQ_FACTOR, LLAMA3_ORIGINAL_N_CTX)
    if not torch.allclose(_divisors(scaling, theta, d_head), wanted, rtol=1e-4):
        values.fail(f"tensor 'rope_freqs.weight' is not Llama 3's scaling by {factor:g}, the only one supported")
    return scaling


def _divisors(scaling: RopeScaling, theta: float, d_head: int) -> Tensor:
    """By what a scaling divides each rotary frequency."""
    one_head = ModelConfig(
        n_layers=1,
        d_model=d_head,
        n_heads=1,
        d_head=d_head,
        d_mlp=1,
        d_vocab=1,
        n_ctx=1,
        positions="rope",
        rope_theta=theta,
    )
    return rope_frequencies(one_head) / rope_frequencies(replace(one_head, rope_scaling=scaling))


def _stored_tensor(where: Path, file: GGUFFile, name: str, tensor: GGUFTensor) -> StoredTensor:
    data = file.data[tensor.start : tensor.start + tensor.n_bytes]
    plain = PLAIN_DTYPES.get(tensor.kind)

    def read(dtype: torch.dtype) -> Tensor:
        if plain is not None:
            return torch.from_numpy(data).view(plain).view(tensor.shape).to(dtype)
        try:
            return _dequantized(data, tensor, dtype)
        except NotImplementedError as error:
            raise WeightsError(
                f"{where}: tensor {name!r} is {tensor.kind.name}, which cannot be dequantised"
            ) from error
        except (ValueError, TypeError) as error:
            raise WeightsError(f"{where}: tensor {name!r} cannot be dequantised ({one_line(error)})") from error

    return StoredTensor(where, tensor.shape, plain or torch.float32, read)


def _dequantized(data: np.ndarray[Any, np.dtype[np.uint8]], tensor: GGUFTensor, dtype: torch.dtype) -> Tensor:
    d_row = tensor.shape[-1]
    n_rows = math.prod(tensor.shape) // d_row
    rows = data.reshape(n_rows, -1)
    out = torch.empty(tensor.shape, dtype=dtype)
    flat = out.view(n_rows, d_row)
    step = max(1, CHUNK_ELEMENTS // d_row)
    for start in range(0, n_rows, step):
        # What overflows is found with every other value that is not finite.
        with np.errstate(all="ignore"):
            flat[start : start + step] = torch.from_numpy(dequantize(rows[start : start + step], tensor.kind))
    return out
