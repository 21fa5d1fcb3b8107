"""Transfer against a plain loop: one generation per prompt and set of heads, with a hook that zeroes them."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ElementTree

import pytest
import torch

import subcircuit as sc
from patching_cases import CONFIGS, random_model
from subcircuit.analysis.tasks import TransferPrompt, transfer_kinds
from subcircuit.analysis.transfer import prompts_of_kind, random_head_sets, transfer
from subcircuit.analysis.transfer_figures import transfer_figure
from subcircuit.engine.errors import PatchError, PromptError, TaskError

SEED = random.randrange(10**6)
CIRCUIT = sc.Circuit([(0, 1), (1, 3), (2, 0)], [1])
OTHER = sc.Circuit([(1, 0)], [])


class WordTokenizer:
    """Words `w0` to `w49`, a token each."""

    name, n_vocab, bos_id, eos_id, adds_bos = "words", 50, None, None, False

    def encode(self, text, bos=None):
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids):
        return "".join(f" w{token}" for token in ids)


@pytest.fixture(params=CONFIGS)
def model(request):
    print(f"seed {SEED}")
    model = random_model(CONFIGS[request.param], SEED).double()
    model.tokenizer = WordTokenizer()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # Random ones outweigh the prompt: every prompt then has the same continuation.
            parameter.data.zero_()
    return model


def random_prompts(model, n=30):
    """Prompts of unequal lengths; two thirds expect what the whole model goes on with, the others something else."""
    generator = random.Random(SEED)
    prompts = []
    for i in range(n):
        text = " ".join(f"w{generator.randrange(50)}" for _ in range(generator.randint(3, 9)))
        words = model.generate(text, 2).texts[0].split()[: 1 + i % 2]
        expected = " ".join(words) if i % 3 else f"w{(int(words[0][1:]) + 1) % 50}"
        prompts.append(TransferPrompt("random", text, expected))
    return prompts


def mean_z(model, prompts):
    """Mean of every head's z over all tokens of all prompts, per layer, a prompt at a time."""
    runs = [model.run_with_cache(prompt.prompt)[1] for prompt in prompts]
    return [torch.cat([run["z", layer][0] for run in runs]).mean(0) for layer in range(model.config.n_layers)]


def is_right_without(model, prompt, heads, stand_in=None):
    def zero(value, name):
        value, layer = value.clone(), int(name.split(".")[1])
        for at, head in heads:
            if at == layer:
                value[:, :, head] = 0 if stand_in is None else stand_in[layer][head]
        return value

    hooks = [(f"blocks.{layer}.attn.hook_z", zero) for layer in {layer for layer, _ in heads}]
    n_new = len(prompt.expected.split()) + 2
    return prompt.is_continued_by(model.generate(prompt.prompt, n_new, hooks=hooks).texts[0])


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_shares_equal_those_of_a_plain_loop(model, ablation, monkeypatch):
    monkeypatch.setattr("subcircuit.analysis.transfer.ROWS_AT_ONCE", 23)
    prompts = random_prompts(model)
    found = transfer(
        model, {"one": CIRCUIT, "two": OTHER}, {"random": prompts}, ablation=ablation, n_random=4, seed=SEED
    )
    answered = [prompt for prompt in prompts if is_right_without(model, prompt, [])]
    kind = found.kinds[0]
    assert list(kind.prompts) == answered
    assert 15 <= len(answered) < kind.n_asked == 30
    stand_in = mean_z(model, answered) if ablation == "mean" else None
    rows = found.table()
    for row, (name, circuit) in zip(rows, {"one": CIRCUIT, "two": OTHER}.items(), strict=True):
        right = [is_right_without(model, prompt, circuit.heads, stand_in) for prompt in answered]
        assert kind.correct[name].tolist() == right
        assert row["share"] == pytest.approx(sum(right) / len(right))
        drawn = [
            [is_right_without(model, prompt, heads, stand_in) for prompt in answered]
            for heads in found.random_heads[name]
        ]
        assert kind.random[name].tolist() == drawn
        shares = [sum(each) / len(each) for each in drawn]
        assert row["random"] == pytest.approx(sum(shares) / 4)
        assert row["random_least"] == pytest.approx(min(shares))
        assert row["p"] == pytest.approx((1 + sum(share <= row["share"] + 1e-9 for share in shares)) / 5)
        assert row["share_low"] <= row["share"] <= row["share_high"]
        assert row["full"] == pytest.approx(len(answered) / 30)
    every_set = [*kind.correct.values(), *kind.random.values()]
    assert not all(bool(each.all()) for each in every_set), "ablations do something"


def test_random_sets_have_as_many_heads_all_outside_the_circuit(model):
    sets = random_head_sets(model, CIRCUIT.heads, 50, SEED)
    assert len(sets) == 50
    assert all(len(set(each)) == 3 and not set(each) & set(CIRCUIT.heads) for each in sets)
    assert {head for each in sets for head in each} == {(i, j) for i in range(3) for j in range(4)} - {*CIRCUIT.heads}
    assert sets == random_head_sets(model, CIRCUIT.heads, 50, SEED) != random_head_sets(model, CIRCUIT.heads, 50, -1)
    most = [(layer, head) for layer in range(3) for head in range(4)][:7]
    assert random_head_sets(model, most, 5, SEED) == []


def test_what_cannot_be_compared_is_none(model):
    wrong = [TransferPrompt("random", "w1 w2", "w99")]
    most = sc.Circuit([(layer, head) for layer in range(3) for head in range(4)][:7], [])
    row, other = transfer(model, {"most": most}, {"never": wrong, "some": random_prompts(model, 3)}).table()
    assert (row["n_answered"], row["full"]) == (0, 0)
    assert all(row[name] is None for name in ("share", "share_low", "random", "random_least", "p"))
    assert other["n_answered"] == 2
    assert (other["random"], other["p"], other["n_random"]) == (None, None, 0)
    assert other["share"] is not None


def test_a_prompt_without_room_in_the_context_is_not_answered(model):
    room = TransferPrompt("random", "w1 w2", model.generate("w1 w2", 1).texts[0].strip())
    long = TransferPrompt("random", " ".join(["w1"] * 31), "w1")
    found = transfer(model, {"one": OTHER}, {"random": [long, room]}, n_random=1)
    assert found.kinds[0].prompts == (room,)


def test_a_task_is_a_kind_whose_answers_are_expected():
    model = sc.load("tiny-gpt2")
    prompts = prompts_of_kind(model, "months", 6, SEED)
    task = sc.task("months", model, n=6, seed=SEED)
    assert tuple(prompt.prompt for prompt in prompts) == task.prompts
    assert [prompt.expected for prompt in prompts] == [model.tokenizer.decode([i]).strip() for i in task.answer]
    assert len(prompts_of_kind(model, transfer_kinds()[0], 6, SEED)) == 6


def test_the_figure_has_a_bar_for_every_share_and_is_the_same_again(model):
    found = transfer(model, {"one": CIRCUIT, "two": OTHER}, {"random": random_prompts(model)}, n_random=3)
    svg = transfer_figure(found.table(), "Right without heads")
    ElementTree.fromstring(svg)
    for text in ("Right without heads", "without the heads of one", "without the heads of two", "whole model"):
        assert text in svg
    assert svg == transfer_figure(found.table(), "Right without heads")


def test_bad_input_is_one_clear_line(model):
    with pytest.raises(PatchError, match="circuit 'empty' has no heads to ablate"):
        transfer(model, {"empty": sc.Circuit([], [1])}, {})
    with pytest.raises(PatchError, match="component 'a9.h0' does not exist"):
        transfer(model, {"far": sc.Circuit([(9, 0)], [])}, {})
    with pytest.raises(PatchError, match="ablation 'median' is not known"):
        transfer(model, {"one": OTHER}, {}, ablation="median")
    with pytest.raises(TaskError, match="kind 'interval_7' is not known"):
        transfer(model, {"one": OTHER}, ["interval_7"])
    model.tokenizer = None
    with pytest.raises(PromptError, match="expected a model with a tokenizer"):
        transfer(model, {"one": OTHER}, ["interval_1"])
