"""The names and calls that others script against."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import subcircuit as sc


@pytest.fixture(scope="module")
def model():
    return sc.load("tiny-gpt2", dtype="float32")


def test_the_snippet_of_the_readme_works(model):
    logits = model("Ring lost in January. Van lost in")
    assert logits.shape[-1] == model.config.d_vocab
    ids = model.tokenizer.encode("Ring lost in January.")
    assert model.tokenizer.decode(ids) == "Ring lost in January."
    tokens = model.to_tokens(["Ring lost in January. Van lost in"])
    assert torch.equal(model(tokens), logits)
    _, cache = model.run_with_cache(tokens, names=None)
    assert cache["blocks.3.attn.hook_z"].shape == (1, tokens.shape[1], model.config.n_heads, model.config.d_head)
    changed = model.run_with_hooks(tokens, hooks=[("blocks.3.attn.hook_z", lambda value, name: value * 0)])
    assert not torch.allclose(changed, logits)
    task = sc.task("months", model, n=8, seed=0)
    assert task.clean.shape == task.corrupted.shape
    assert task.answer.shape == task.wrong.shape == (8,)
    assert len(task.prompts) == 8
    scores = sc.sweep(model, task, components="heads", source="corrupted", executor="torch", precision="fp32")
    assert scores.effects.shape == (model.config.n_layers * model.config.n_heads, 8)
    assert scores.heads().shape == (model.config.n_layers, model.config.n_heads)
    circuit = sc.discover(model, task, method="prune", threshold=20, max_sweeps=1)
    assert all(len(head) == 2 for head in circuit.heads)
    assert all(isinstance(layer, int) for layer in circuit.mlps)
    assert sc.score(model, task, circuit) == pytest.approx(circuit.score, abs=1e-3)
    assert circuit.faithfulness(model, task) == pytest.approx(circuit.score, abs=1e-3)


def test_a_task_of_tensors_needs_no_tokenizer(model):
    task = sc.task("numerals", model, n=4)
    same = sc.task_from_tokens(clean=task.clean, corrupted=task.corrupted, answer=task.answer, wrong=task.wrong)
    a, b = (sc.sweep(model, which, ["a0.h1", "m3"]).effects for which in (task, same))
    assert torch.equal(a, b)


def test_every_error_can_be_caught_by_its_name(model):
    with pytest.raises(sc.errors.TaskError, match="colours"):
        sc.task("colours", model)
    assert issubclass(sc.errors.WeightsError, sc.SubcircuitError)


def test_every_public_name_can_be_imported_and_is_listed_once():
    for name in sc.__all__:
        assert getattr(sc, name) is not None
    homes = [name for names in sc._HOMES.values() for name in names]
    assert len(homes) == len(set(homes))
    assert set(sc.__all__) == {*homes, "__version__", "errors"}
    tree = ast.parse(Path(sc.__file__).read_text())
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    for line in typed.body:  # what type checkers see
        assert sorted(alias.name for alias in line.names) == sorted(sc._HOMES[line.module.removeprefix("subcircuit.")])
    assert len(typed.body) == len(sc._HOMES)
    with pytest.raises(AttributeError, match="no attribute 'frobnicate'"):
        sc.frobnicate  # noqa: B018
