"""llama2.c's v0 files: the same logits as a `transformers` Llama made of the same tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oracles import max_abs_difference, oracle_logits, random_model, random_tokens, shared_models, write_llama2c
from subcircuit.engine.model import HookedTransformer
from subcircuit.weights.llama2c import read_llama2c

TOLERANCE = 1e-4


def our_logits(file: Path, tokens: torch.Tensor) -> torch.Tensor:
    checkpoint = read_llama2c(file)
    return HookedTransformer(checkpoint.config, checkpoint.tensors)(tokens)


@pytest.mark.parametrize("kind", ["llama-mha", "llama-gqa", "llama-mqa", "llama-tied"])
def test_logits_equal_those_of_transformers(tmp_path: Path, kind: str) -> None:
    reference = random_model(kind, rms_norm_eps=1e-5)
    write_llama2c(tmp_path / "model.bin", reference)
    tokens = random_tokens(reference.config.vocab_size)
    assert max_abs_difference(our_logits(tmp_path / "model.bin", tokens), oracle_logits(reference, tokens)) <= TOLERANCE


def stories_in_transformers(file: Path) -> Any:
    """stories260K as a `transformers` Llama, read here independently of the loader."""
    from transformers import LlamaConfig, LlamaForCausalLM

    d, d_mlp, n_layers, n_heads, n_kv, vocab, n_ctx = np.fromfile(file, "<i4", 7).tolist()
    flat = torch.from_numpy(np.fromfile(file, "<f4", offset=28))
    d_kv = d // n_heads * n_kv
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=d,
        intermediate_size=d_mlp,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv,
        max_position_embeddings=n_ctx,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    state: dict[str, torch.Tensor] = {}

    def take(name: str, *shape: int) -> torch.Tensor:
        nonlocal flat
        n = int(np.prod(shape))
        state[name], flat = flat[:n].view(shape), flat[n:]
        return state[name]

    take("model.embed_tokens.weight", vocab, d)
    for stored, *shape in (
        ("input_layernorm", d),
        ("self_attn.q_proj", d, d),
        ("self_attn.k_proj", d_kv, d),
        ("self_attn.v_proj", d_kv, d),
        ("self_attn.o_proj", d, d),
        ("post_attention_layernorm", d),
        ("mlp.gate_proj", d_mlp, d),
        ("mlp.down_proj", d, d_mlp),
        ("mlp.up_proj", d_mlp, d),
    ):
        for layer in range(n_layers):
            name = f"model.layers.{layer}.{stored}.weight"
            weight = take(name, *shape)
            if stored.endswith(("q_proj", "k_proj")):
                # As transformers' own conversion of Meta's checkpoints: even rows of a head first, then odd ones.
                heads = weight.view(-1, d // n_heads, d)
                state[name] = torch.cat((heads[:, 0::2], heads[:, 1::2]), dim=1).reshape(weight.shape)
    take("model.norm.weight", d)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    return model


def test_stories260k_gives_the_logits_of_transformers() -> None:
    file = shared_models() / "stories260K/stories260K.bin"
    tokens = random_tokens(512, n_tokens=100)
    reference = oracle_logits(stories_in_transformers(file), tokens)
    assert max_abs_difference(our_logits(file, tokens), reference) <= TOLERANCE


def test_stories260k_tells_a_story_with_the_tokenizer_beside_it() -> None:
    checkpoint = read_llama2c(shared_models() / "stories260K/stories260K.bin")
    assert checkpoint.tokenizer is not None
    ids = checkpoint.tokenizer.encode("Once upon a time, there was a little girl named")
    assert ids[0] == checkpoint.tokenizer.bos_id
    model = HookedTransformer(checkpoint.config, checkpoint.tensors)
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert "named Lily. She loved to" in checkpoint.tokenizer.decode(ids[1:])
