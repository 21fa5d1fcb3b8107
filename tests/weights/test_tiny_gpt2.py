"""The bundled model: what it weighs, what it knows, and that its script makes it."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from subcircuit.analysis.tasks import task
from subcircuit.engine.model import HookedTransformer
from subcircuit.weights import tiny_text, train_tiny
from subcircuit.weights.bpe_training import LearnedBPE, learn_bpe
from subcircuit.weights.huggingface import read_huggingface
from subcircuit.weights.names import load

DIRECTORY = Path(str(files("subcircuit.weights"))) / "data" / "tiny-gpt2"
TASKS = ("numerals", "number_words", "months", "weekdays", "letters")
TEMPLATES = [template.name for template in tiny_text.TASK_TEMPLATES]


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return load("tiny-gpt2")


@pytest.fixture(scope="module")
def bpe() -> LearnedBPE:
    return train_tiny.learn_vocabulary(train_tiny.Settings())


def top1(logits: Tensor, answer: Tensor) -> float:
    return (logits[:, -1].argmax(-1) == answer).double().mean().item()


def difference(logits: Tensor, answer: Tensor, wrong: Tensor) -> Tensor:
    rows = torch.arange(len(logits))
    return logits[rows, -1, answer] - logits[rows, -1, wrong]


def held_out_prompts(name: str, template_name: str, n: int) -> tuple[list[str], list[str]]:
    """Prompts whose words no training document put into a template, and the members that come next."""
    sequence = next(sequence for sequence in tiny_text.SEQUENCES if sequence.name == name)
    template = next(template for template in tiny_text.TASK_TEMPLATES if template.name == template_name)
    random, prompts, answers = Random(f"{name} {template_name}"), [], []
    for index in range(n):
        start = index % (len(sequence.members) - 4)
        words = random.sample(tiny_text.held_out_words(template), 5) if template.words else []
        prompts.append(template.render(sequence.members[start : start + 4], words, ask=True))
        answers.append(sequence.members[start + 4])
    return prompts, answers


def test_files_are_at_most_4_mb() -> None:
    sizes = {path.name: path.stat().st_size for path in DIRECTORY.iterdir()}
    assert set(sizes) == {"config.json", "model.safetensors", "vocab.json", "merges.txt"}
    assert sum(sizes.values()) <= 4_000_000


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", TASKS)
def test_held_out_prompts_are_continued(model: HookedTransformer, name: str, template: str) -> None:
    prompts, answers = held_out_prompts(name, template, 66)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    wanted = [tokenizer.encode(f" {answer}") for answer in answers]
    assert {len(ids) for ids in wanted} == {1}
    assert top1(model(prompts), torch.tensor(wanted)[:, 0]) >= 0.95


@pytest.mark.parametrize("name", TASKS)
def test_tasks_are_answered_and_their_corrupted_prompts_are_not(model: HookedTransformer, name: str) -> None:
    prompts = task(name, model, n=60, seed=1)
    assert prompts.corrupted is not None
    clean, corrupted = model(prompts.clean), model(prompts.corrupted)
    assert top1(clean, prompts.answer) >= 0.95
    assert difference(clean, prompts.answer, prompts.wrong).mean() > 3
    assert difference(corrupted, prompts.answer, prompts.wrong).mean().abs() < 1


def test_successor_is_foretold_only_where_members_are_in_order(model: HookedTransformer) -> None:
    ordered = model("Ring lost in May. Van lost in June. Box lost in July. Key lost in August. Hat lost in")
    disordered = model("Ring lost in July. Van lost in March. Box lost in October. Key lost in August. Hat lost in")
    assert model.tokenizer is not None
    september = model.tokenizer.encode(" September")
    assert ordered[0, -1].softmax(-1)[september].item() > 0.6
    assert disordered[0, -1].softmax(-1)[september].item() < 0.3


def test_transformers_reads_the_same_model(model: HookedTransformer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(DIRECTORY, dtype=torch.float32).eval()
    tokens = model.to_tokens([f"Ring lost in {m}. Van lost in" for m in ("January", "three", "7")])
    with torch.no_grad():
        assert (model(tokens) - theirs(tokens).logits).abs().max() <= 1e-4


def test_transformers_tokenizes_the_same(model: HookedTransformer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2TokenizerFast.from_pretrained(DIRECTORY)
    random = Random(0)
    assert model.tokenizer is not None
    for _ in range(300):
        text = tiny_text.document(random)
        assert model.tokenizer.encode(text) == theirs(text)["input_ids"]


def test_vocabulary_is_what_the_script_learns(model: HookedTransformer, bpe: LearnedBPE, tmp_path: Path) -> None:
    train_tiny.write_huggingface(model, bpe, tmp_path)
    for name in ("config.json", "vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (DIRECTORY / name).read_bytes()


def test_script_and_tokenizer_encode_alike(model: HookedTransformer, bpe: LearnedBPE) -> None:
    random = Random(1)
    assert model.tokenizer is not None
    for text in [tiny_text.document(random) for _ in range(100)] + ["  Unseen words,\n\n it's 2049\t(a - b) "]:
        assert model.tokenizer.encode(text) == bpe.encode(text)


def test_training_is_reproducible_and_what_it_writes_is_what_it_made(bpe: LearnedBPE, tmp_path: Path) -> None:
    settings = replace(train_tiny.Settings(), n_steps=3, n_rows=2, n_warmup_steps=1)
    first, losses = train_tiny.train(bpe, settings)
    second, _ = train_tiny.train(bpe, settings)
    assert losses[-1] < losses[0]
    train_tiny.write_huggingface(first, bpe, tmp_path)
    read = read_huggingface(tmp_path).tensors
    assert set(read) == set(second.state_dict())
    for name, value in second.state_dict().items():
        assert torch.equal(read[name], value), name


def test_held_out_words_and_orders_are_kept_out_of_training() -> None:
    random = Random(3)
    for _ in range(3000):
        text = tiny_text.document(random)
        for template in tiny_text.TASK_TEMPLATES:
            windows = [" ".join(tiny_text.held_out_window(sequence, template)) for sequence in tiny_text.SEQUENCES]
            if template.phrase:
                clauses = text.split(f" {template.phrase} ")
                words = {clause.split()[-1] for clause in clauses[:-1]}
                assert words.isdisjoint(tiny_text.held_out_words(template))
                members = " ".join(clause.split(".")[0] for clause in clauses[1:])
                assert not any(window in members for window in windows)
            else:
                assert not text.startswith(tuple(windows))


def test_bpe_merges_the_most_frequent_pair_first() -> None:
    learned = learn_bpe(["ab ab ab bc"], "<|endoftext|>")
    assert learned.merges[0] == ("a", "b")
    assert learned.encode("ab") == [learned.vocab["ab"]]
    assert learned.vocab["<|endoftext|>"] == 256 + len(learned.merges)
