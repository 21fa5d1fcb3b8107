"""Models in Hugging Face's form: a directory with config.json, safetensors (one file or shards) and tokenizer files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from subcircuit.engine.config import Activation, ModelConfig, RopeScaling
from subcircuit.engine.errors import ConfigError, WeightsError
from subcircuit.weights.checkpoint import Checkpoint, ConfigValues, StoredTensor, load_tensors, one_line, parse_dtype
from subcircuit.weights.families import GPT2_HUGGINGFACE, LLAMA_HUGGINGFACE, NameTable
from subcircuit.weights.text_tokenizer import TextTokenizer
from subcircuit.weights.tokenizers import from_tokenizer_json, gpt2_bpe, llama3_tiktoken, sentencepiece

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# As safetensors spells them. Integer and 8-bit tensors are quantised weights, which only GGUF describes completely.
STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}


def read_huggingface(
    path: str | Path, *, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
) -> Checkpoint:
    """Read a model directory as `transformers` saves it.

    Weights are memory-mapped where the file has the asked dtype, and converted tensor by tensor where it has another.
    The tokenizer is built from the directory's own files; without any it is None.

    Raises WeightsError for a directory, configuration or tensor that is missing, corrupted or not supported, and
    TokenizerError for tokenizer files that are.
    """
    directory = Path(path)
    family, config, values = read_config(directory)
    stored = _strip_prefix(_open_tensors(directory), family.table)
    if config.tied_unembed:
        _drop_tied_unembedding(stored, values)
    where = directory / (SINGLE_FILE if (directory / SINGLE_FILE).is_file() else INDEX_FILE)
    tensors = load_tensors(family.table, config, stored, where, parse_dtype(dtype), torch.device(device))
    return Checkpoint(config, tensors, read_tokenizer(directory), str(directory))


def read_config(directory: Path) -> tuple[Family, ModelConfig, ConfigValues]:
    """The family and configuration that config.json describes.  Raises WeightsError for one that is not supported."""
    where = directory / "config.json"
    raw = read_json(where)
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        raise WeightsError(
            f"{where}: model_type {raw.get('model_type')!r} is not supported; expected one of {', '.join(FAMILIES)}"
        )
    values = ConfigValues(raw, where, family.defaults)
    for key, required in family.required.items():
        if values.values.get(key, required) != required:
            values.fail(f"{key!r} is {values.values[key]!r}; only {required!r} is supported")
    if values.has("quantization_config"):
        values.fail("'quantization_config' is set; of quantised models only GGUF files are supported")
    try:
        return family, family.config(values, directory.name), values
    except ConfigError as error:
        raise WeightsError(f"{where}: {error}") from error


def _gpt2_config(values: ConfigValues, name: str) -> ModelConfig:
    d_model, n_heads = values.integer("n_embd"), values.integer("n_head")
    return ModelConfig(
        n_layers=values.integer("n_layer"),
        d_model=d_model,
        n_heads=n_heads,
        d_head=_head_size(values, d_model, n_heads),
        d_mlp=values.integer("n_inner", 4 * d_model),
        d_vocab=values.integer("vocab_size"),
        n_ctx=values.integer("n_positions"),
        norm="layernorm",
        norm_eps=values.number("layer_norm_epsilon"),
        positions="learned",
        activation=_activation(values, "activation_function"),
        qkv_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
        tied_unembed=values.flag("tie_word_embeddings"),
        family="gpt2",
        name=name,
    )


def _llama_config(values: ConfigValues, name: str) -> ModelConfig:
    d_model, n_heads = values.integer("hidden_size"), values.integer("num_attention_heads")
    theta, scaling = _rope(values)
    attention_bias = values.flag("attention_bias")
    return ModelConfig(
        n_layers=values.integer("num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        d_head=values.integer("head_dim") if values.has("head_dim") else _head_size(values, d_model, n_heads),
        d_mlp=values.integer("intermediate_size"),
        d_vocab=values.integer("vocab_size"),
        n_ctx=_context(values),
        n_kv_heads=values.integer("num_key_value_heads", n_heads),
        norm="rmsnorm",
        norm_eps=values.number("rms_norm_eps"),
        positions="rope",
        rope_theta=theta,
        rope_scaling=scaling,
        activation=_activation(values, "hidden_act"),
        gated_mlp=True,
        qkv_bias=attention_bias or values.text("model_type") == "qwen2",
        attn_out_bias=attention_bias,
        mlp_bias=values.flag("mlp_bias"),
        tied_unembed=values.flag("tie_word_embeddings"),
        family="llama",
        name=name,
    )


@dataclass(frozen=True)
class Family:
    """A model_type: its tensor names, how its configuration is read, and what `transformers` assumes for absent keys.

    `required` are settings of which only one value is supported.
    """

    table: NameTable
    config: Callable[[ConfigValues, str], ModelConfig]
    defaults: Mapping[str, object]
    required: Mapping[str, object]


_LLAMA_DEFAULTS: Mapping[str, object] = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_LLAMA_REQUIRED: Mapping[str, object] = {"partial_rotary_factor": 1.0}

FAMILIES: Mapping[str, Family] = {
    "gpt2": Family(
        GPT2_HUGGINGFACE,
        _gpt2_config,
        defaults={
            "n_positions": 1024,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
        },
        required={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
        },
    ),
    "llama": Family(
        LLAMA_HUGGINGFACE, _llama_config, {**_LLAMA_DEFAULTS, "max_position_embeddings": 2048}, _LLAMA_REQUIRED
    ),
    "mistral": Family(
        LLAMA_HUGGINGFACE,
        _llama_config,
        {**_LLAMA_DEFAULTS, "max_position_embeddings": 131072, "num_key_value_heads": 8},
        {**_LLAMA_REQUIRED, "attention_bias": False, "mlp_bias": False},
    ),
    "qwen2": Family(
        LLAMA_HUGGINGFACE,
        _llama_config,
        {**_LLAMA_DEFAULTS, "max_position_embeddings": 32768},
        {**_LLAMA_REQUIRED, "attention_bias": False, "mlp_bias": False},
    ),
}


def _head_size(values: ConfigValues, d_model: int, n_heads: int) -> int:
    if d_model % n_heads:
        values.fail(f"the width of the model ({d_model}) is not a multiple of its number of heads ({n_heads})")
    return d_model // n_heads


def _activation(values: ConfigValues, key: str) -> Activation:
    name = values.text(key)
    if name not in ACTIVATIONS:
        values.fail(f"{key!r} is {name!r}; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _context(values: ConfigValues) -> int:
    """Longest prompt, in tokens.

    A sliding window of w lets each token read the last w tokens, so up to w tokens it is full attention and the results
    are exact; the engine has no windows, and longer prompts are refused. Qwen2 uses its window only where
    `use_sliding_window` says so.
    """
    n_ctx = values.integer("max_position_embeddings")
    windowed = {"mistral": True, "qwen2": values.flag("use_sliding_window")}
    if windowed.get(values.text("model_type")) and values.has("sliding_window"):
        return min(n_ctx, values.integer("sliding_window"))
    return n_ctx


def _rope(values: ConfigValues) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary frequencies.

    transformers 5 writes both into `rope_parameters`; before, they were `rope_theta` and `rope_scaling`, whose kind was
    called `type` before it was called `rope_type`.
    """
    key = "rope_parameters" if values.has("rope_parameters") else "rope_scaling"
    raw = values.values.get(key, {})
    if not isinstance(raw, dict):
        values.fail(f"{key!r} is {raw!r}; expected an object")
    rope = ConfigValues(raw, values.where)
    theta = rope.number("rope_theta", values.number("rope_theta", 10_000.0))
    kind = rope.text("rope_type", rope.text("type", "default"))
    if rope.values.get("partial_rotary_factor", 1.0) != 1.0:
        values.fail(f"'partial_rotary_factor' is {rope.values['partial_rotary_factor']!r}; only 1.0 is supported")
    if kind == "default":
        if any(isinstance(value, dict) for value in rope.values.values()):
            values.fail(f"{key!r} differs between layers; one setting for all of them is supported")
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", factor=rope.number("factor"))
    if kind == "llama3":
        return theta, RopeScaling(
            "llama3",
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_n_ctx=rope.integer("original_max_position_embeddings"),
        )
    return values.fail(f"rotary scaling {kind!r} is not supported; expected 'default', 'linear' or 'llama3'")


def read_tokenizer(directory: Path) -> TextTokenizer | None:
    """The tokenizer that the directory's own files describe; None where there is none.

    A sentencepiece model comes first, as the original of what tokenizer.json then repeats. `add_bos_token` of
    tokenizer_config.json decides about the beginning-of-sequence token where it is given.

    Raises TokenizerError for files that are corrupted or not supported.
    """
    tokenizer = _build_tokenizer(directory)
    config_file = directory / "tokenizer_config.json"
    if tokenizer is None or not config_file.is_file():
        return tokenizer
    adds_bos = read_json(config_file).get("add_bos_token")
    return tokenizer.with_bos(adds_bos) if isinstance(adds_bos, bool) and tokenizer.bos_id is not None else tokenizer


def _build_tokenizer(directory: Path) -> TextTokenizer | None:
    model, fast = directory / "tokenizer.model", directory / "tokenizer.json"
    vocabulary, merges = directory / "vocab.json", directory / "merges.txt"
    # Two formats share the name: sentencepiece's protocol buffer begins with its first field's tag, Llama 3's is text.
    has_sentencepiece = model.is_file() and model.read_bytes()[:1] == b"\n"
    if has_sentencepiece:
        return sentencepiece(model)
    if fast.is_file():
        return from_tokenizer_json(fast)
    if vocabulary.is_file() and merges.is_file():
        return gpt2_bpe(vocabulary, merges)
    return llama3_tiktoken(model) if model.is_file() else None


def _open_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the directory's safetensors, by its full name, memory-mapped and unread."""
    if (directory / SINGLE_FILE).is_file():
        return open_safetensors(directory / SINGLE_FILE)
    if (directory / INDEX_FILE).is_file():
        return _open_shards(directory)
    other = sorted(directory.glob("pytorch_model*.bin"))
    hint = f" ({other[0].name} must be saved as safetensors first)" if other else ""
    raise WeightsError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE} is there{hint}")


def _open_shards(directory: Path) -> dict[str, StoredTensor]:
    where = directory / INDEX_FILE
    weight_map = read_json(where).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise WeightsError(f"{where}: 'weight_map' is not an object of file names")
    stored: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise WeightsError(f"{where}: shard {shard!r} is not a file name")
        for name, tensor in open_safetensors(directory / shard).items():
            if weight_map.get(name, shard) == shard:
                stored[name] = tensor
    for name, shard in weight_map.items():
        if name not in stored:
            raise WeightsError(f"{directory / shard}: tensor {name!r} is missing, though {INDEX_FILE} places it there")
    return stored


def open_safetensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name, memory-mapped and unread.  Raises WeightsError for a file that is none."""
    try:
        opened: Any = safe_open(file, framework="pt")
        names = list(opened.keys())
        return {name: _stored_tensor(file, opened, name) for name in names}
    except FileNotFoundError:
        raise WeightsError(f"{file}: the file is missing") from None
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{file}: not a readable safetensors file ({one_line(error)})") from error


def _stored_tensor(file: Path, opened: Any, name: str) -> StoredTensor:
    entry = opened.get_slice(name)
    if entry.get_dtype() not in STORED_DTYPES:
        raise WeightsError(
            f"{file}: tensor {name!r} is {entry.get_dtype()}; expected one of {', '.join(STORED_DTYPES)}"
        )

    def read(dtype: torch.dtype) -> Tensor:
        tensor: Tensor = opened.get_tensor(name)
        return tensor.to(dtype)

    return StoredTensor(file, tuple(entry.get_shape()), STORED_DTYPES[entry.get_dtype()], read)


def _strip_prefix(stored: Mapping[str, StoredTensor], table: NameTable) -> dict[str, StoredTensor]:
    stripped: dict[str, StoredTensor] = {}
    for full_name, tensor in stored.items():
        name = full_name.removeprefix(table.prefix)
        if name in stripped:
            raise WeightsError(f"{tensor.file}: tensor {name!r} is there with and without {table.prefix!r}")
        stripped[name] = tensor
    return stripped


def _drop_tied_unembedding(stored: dict[str, StoredTensor], values: ConfigValues) -> None:
    """Leave out a saved lm_head that repeats the embedding.

    One that differs is an error: transformers 4 would tie it, transformers 5 would not.
    """
    embedding = stored.get("embed_tokens.weight", stored.get("wte.weight"))
    unembedding = stored.get("lm_head.weight")
    if embedding is None or unembedding is None:
        return
    alike = unembedding.shape == embedding.shape and unembedding.dtype == embedding.dtype
    if not alike or not torch.equal(unembedding.read(unembedding.dtype), embedding.read(embedding.dtype)):
        values.fail("'tie_word_embeddings' is true, but tensor 'lm_head.weight' differs from the embedding")
    del stored["lm_head.weight"]


def read_json(file: Path) -> dict[str, object]:
    """The object in a JSON file.  Raises WeightsError for a file that is missing or holds something else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{file}: the file is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{file}: not readable as JSON ({one_line(error)})") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return values
