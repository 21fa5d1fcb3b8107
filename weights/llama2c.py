"""llama2.c's first `.bin` form (v0): seven integers, then float32 tensors in a fixed order, without names.

Source: `legacy_export` in https://github.com/karpathy/llama2.c/blob/master/export.py.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

import torch
from torch import Tensor

from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import ConfigError, WeightsError
from subcircuit.weights.checkpoint import Checkpoint, StoredTensor, load_tensors, parse_dtype
from subcircuit.weights.families import LLAMA2C, Shape
from subcircuit.weights.text_tokenizer import TextTokenizer
from subcircuit.weights.tokenizers import sentencepiece

_HEADER = struct.Struct("<7i")
_VERSIONED_MAGIC = b"24ka"  # 0x616b3432, little-endian: llama2.c's later forms


def read_llama2c(
    path: str | Path, *, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
) -> Checkpoint:
    """Read a v0 `.bin` of llama2.c, memory-mapped, and the sentencepiece model beside it.

    The tokenizer is `tok<vocabulary size>.model` or `tokenizer.model` in the same directory; without either it is None.

    Raises WeightsError for a file that is missing, truncated or of another form.
    """
    where = Path(path)
    data = _map(where)
    config = _read_config(where, data)
    stored: dict[str, StoredTensor] = {}
    offset = _HEADER.size
    for name, shape in _layout(config):
        n_bytes = 4 * math.prod(shape)
        if offset + n_bytes > len(data):
            raise WeightsError(
                f"{where}: tensor {name!r} ends at byte {offset + n_bytes} of a file of {len(data)} bytes: "
                "truncated, or not a llama2.c v0 file"
            )
        if name not in _SKIPPED:
            stored.update(_per_layer(where, data, name, shape, offset))
        offset += n_bytes
    if offset != len(data):
        raise WeightsError(
            f"{where}: {len(data) - offset} bytes are left after the last tensor; not a llama2.c v0 file"
        )
    tensors = load_tensors(LLAMA2C, config, stored, where, parse_dtype(dtype), torch.device(device))
    return Checkpoint(config, tensors, _tokenizer(where, config.d_vocab), str(where))


# Tables of the rotary angles, one row per position: they follow from the configuration.
_SKIPPED = ("freq_cis_real", "freq_cis_imag")


def _layout(config: ModelConfig) -> list[tuple[str, Shape]]:
    """The tensors in the order of the file; those of the layers lie together, layer after layer."""
    layers, d_model, d_mlp = config.n_layers, config.d_model, config.d_mlp
    d_kv = config.kv_heads * config.d_head
    tensors: list[tuple[str, Shape]] = [
        ("tok_embeddings.weight", (config.d_vocab, d_model)),
        ("layers.{l}.attention_norm.weight", (layers, d_model)),
        ("layers.{l}.attention.wq.weight", (layers, d_model, d_model)),
        ("layers.{l}.attention.wk.weight", (layers, d_kv, d_model)),
        ("layers.{l}.attention.wv.weight", (layers, d_kv, d_model)),
        ("layers.{l}.attention.wo.weight", (layers, d_model, d_model)),
        ("layers.{l}.ffn_norm.weight", (layers, d_model)),
        ("layers.{l}.feed_forward.w1.weight", (layers, d_mlp, d_model)),
        ("layers.{l}.feed_forward.w2.weight", (layers, d_model, d_mlp)),
        ("layers.{l}.feed_forward.w3.weight", (layers, d_mlp, d_model)),
        ("norm.weight", (d_model,)),
        *((name, (config.n_ctx, config.d_head // 2)) for name in _SKIPPED),
    ]
    return tensors if config.tied_unembed else [*tensors, ("output.weight", (config.d_vocab, d_model))]


def _per_layer(where: Path, data: mmap.mmap, name: str, shape: Shape, offset: int) -> dict[str, StoredTensor]:
    whole = torch.frombuffer(data, dtype=torch.float32, count=math.prod(shape), offset=offset).view(shape)
    parts = dict(enumerate(whole)) if "{l}" in name else {0: whole}
    return {name.format(l=layer): _stored(where, part) for layer, part in parts.items()}


def _stored(where: Path, tensor: Tensor) -> StoredTensor:
    return StoredTensor(where, tuple(tensor.shape), torch.float32, tensor.to)


def _read_config(where: Path, data: mmap.mmap) -> ModelConfig:
    if data[:4] == _VERSIONED_MAGIC:
        raise WeightsError(
            f"{where}: a versioned llama2.c file; only the first form (v0, `export.py --version 0`) is read"
        )
    if len(data) < _HEADER.size:
        raise WeightsError(f"{where}: {len(data)} bytes, shorter than the header of a llama2.c v0 file")
    d_model, d_mlp, n_layers, n_heads, n_kv_heads, signed_vocab, n_ctx = _HEADER.unpack_from(data)
    try:
        config = ModelConfig(
            n_layers=n_layers,
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            d_head=d_model // n_heads if n_heads > 0 else 0,
            d_mlp=d_mlp,
            d_vocab=abs(signed_vocab),
            n_ctx=n_ctx,
            norm="rmsnorm",
            norm_eps=1e-5,
            positions="rope",
            activation="silu",
            gated_mlp=True,
            # A negative size says that the unembedding is a tensor of its own.
            tied_unembed=signed_vocab > 0,
            family="llama",
            name=where.stem,
        )
    except ConfigError as error:
        raise WeightsError(f"{where}: not a llama2.c v0 file ({error})") from error
    if d_model % n_heads:
        raise WeightsError(f"{where}: not a llama2.c v0 file (n_heads {n_heads} does not divide d_model {d_model})")
    return config


def _map(where: Path) -> mmap.mmap:
    try:
        with where.open("rb") as file:
            # Copy-on-write: writing to a tensor does not reach the file.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError:
        raise WeightsError(f"{where}: the file is missing") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{where}: not a readable llama2.c file ({error})") from error


def _tokenizer(where: Path, d_vocab: int) -> TextTokenizer | None:
    candidates = (where.with_name(f"tok{d_vocab}.model"), where.with_name("tokenizer.model"))
    return next((sentencepiece(path) for path in candidates if path.is_file()), None)
