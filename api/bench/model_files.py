"""The model of a benchmark as files that every contestant reads: a directory in Hugging Face's form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import BenchError
from subcircuit.engine.model import HookedTransformer
from subcircuit.weights.families import GPT2_HUGGINGFACE, LLAMA_HUGGINGFACE, TRANSPOSED, TRANSPOSED_QKV


def random_gpt2(config: ModelConfig, seed: int) -> HookedTransformer:
    """A GPT-2 with the weights that its training starts from, drawn from a seed.

    Matrices and embeddings are normal with standard deviation 0.02, those that write into the residual stream that
    over √(2 · layers); biases are 0, norms 1 (Radford et al. 2019, and `transformers`).
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in HookedTransformer.parameter_shapes(config).items():
        if len(shape) == 1:
            tensors[name] = torch.full(shape, float(name.endswith("weight")))
        else:
            writes = name.endswith(("w_o.weight", "w_out.weight"))
            scale = 0.02 / (2 * config.n_layers) ** 0.5 if writes else 0.02
            tensors[name] = torch.randn(shape, generator=generator) * scale
    return HookedTransformer(config, tensors)


def gpt2_config(n_layers: int, d_model: int, n_heads: int, d_vocab: int, n_ctx: int = 1024) -> ModelConfig:
    """GPT-2's architecture in a given size."""
    if d_model % n_heads:
        raise BenchError(f"d_model ({d_model}) must be divisible by the number of heads ({n_heads})")
    return ModelConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        d_head=d_model // n_heads,
        d_mlp=4 * d_model,
        d_vocab=d_vocab,
        n_ctx=n_ctx,
        qkv_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
        tied_unembed=True,
        name="random GPT-2",
    )


def save_huggingface(model: HookedTransformer, directory: Path) -> None:
    """Write config.json and model.safetensors as `transformers` reads them.

    Raises BenchError for what its GPT-2 and Llama classes cannot express.
    """
    directory.mkdir(parents=True, exist_ok=True)
    values = _gpt2_values(model.config) if model.config.family == "gpt2" else _llama_values(model.config)
    values |= {"tie_word_embeddings": model.config.tied_unembed, "dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
    save_file(_stored_tensors(model), directory / "model.safetensors", metadata={"format": "pt"})


def _stored_tensors(model: HookedTransformer) -> dict[str, Tensor]:
    """Parameters by the names and in the layouts of the family's table, which is read here from right to left."""
    table = GPT2_HUGGINGFACE if model.config.family == "gpt2" else LLAMA_HUGGINGFACE
    parameters = model.state_dict()
    plan = table.plan({name: tuple(value.shape) for name, value in parameters.items()}, model.config.n_layers)
    stored = {}
    for name, planned in plan.items():
        value = torch.cat([parameters[parameter] for parameter in planned.parameters]).float()
        if planned.layout in (TRANSPOSED, TRANSPOSED_QKV):
            value = value.t()
        prefix = "" if name.startswith("lm_head") else table.prefix
        stored[prefix + name] = value.contiguous()
    return stored


def _gpt2_values(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_embd": config.d_model,
        "n_inner": config.d_mlp,
        "n_positions": config.n_ctx,
        "vocab_size": config.d_vocab,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": config.activation,
    }


def _llama_values(config: ModelConfig) -> dict[str, Any]:
    if config.rope_scaling is not None or config.qkv_bias != config.attn_out_bias:
        raise BenchError(
            f"model {config.name!r} cannot be written for the peers: rotary scaling and biases of q, k and v alone "
            "are not supported; --peer subcircuit measures ours"
        )
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.d_head,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp,
        "max_position_embeddings": config.n_ctx,
        "vocab_size": config.d_vocab,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": config.activation,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }
