"""A padded prompt gives the logits it gives alone, and prompts that cannot be run are one clear line."""

from __future__ import annotations

import pytest
import torch

from engine_models import CONFIGS, ToyTokenizer, random_model, random_tokens
from subcircuit.engine.errors import PromptError

TEXTS = ["abcdefgh", "q", "zyx"]


@pytest.fixture(params=CONFIGS)
def model(request):
    return random_model(CONFIGS[request.param], seed=41, dtype=torch.float32, tokenizer=ToyTokenizer())


def real_positions(n_real, n_pos, side):
    return slice(n_pos - n_real, None) if side == "left" else slice(0, n_real)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_padded_texts_equal_those_of_each_text_alone(model, side):
    logits = model(TEXTS, padding_side=side)
    assert logits.shape == (3, 8, 40)
    for row, text in zip(logits, TEXTS, strict=True):
        alone = model(text)[0]
        assert (row[real_positions(len(text), 8, side)] - alone).abs().max() < 1e-5
    assert logits.isfinite().all()


@pytest.mark.parametrize("filler", [0, 13])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_masked_token_ids_equal_those_without_padding_whatever_fills_it(model, side, filler):
    lengths = (7, 2, 4)
    tokens = torch.full((3, 7), filler)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    prompts = [random_tokens(model.config, 1, length, seed=length)[0] for length in lengths]
    for row, prompt in enumerate(prompts):
        where = real_positions(len(prompt), 7, side)
        tokens[row, where], mask[row, where] = prompt, True
    logits = model(tokens, attention_mask=mask)
    for row, prompt in zip(logits, prompts, strict=True):
        assert (row[real_positions(len(prompt), 7, side)] - model(prompt)[0]).abs().max() < 1e-5
    # An integer mask, as tokenizers give it, means the same.
    assert torch.equal(model(tokens, attention_mask=mask.long()), logits)


def test_without_its_mask_padding_would_change_the_logits(model):
    """What the tests above would see if masks did nothing."""
    padded = model.prompt_batch(TEXTS).tokens
    assert (model(padded)[1, -1] - model("q")[0, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_attention_never_reads_a_padding_position(model, side):
    _, cache = model.run_with_cache(TEXTS, "*.hook_pattern", padding_side=side)
    for row, text in enumerate(TEXTS):
        where = real_positions(len(text), 8, side)
        for pattern in cache.values():
            torch.testing.assert_close(
                pattern[row, :, where, where].sum(-1), torch.ones(1).expand(pattern.shape[1], len(text))
            )


@pytest.mark.parametrize("side", ["left", "right"])
def test_activations_at_real_positions_equal_those_of_each_text_alone(model, side):
    names = ["*.hook_resid_*", "*.attn.hook_[qkvz]", "*.mlp.hook_post"]
    _, cache = model.run_with_cache(TEXTS, names, padding_side=side)
    for row, text in enumerate(TEXTS):
        _, alone = model.run_with_cache(text, names)
        for name, value in alone.items():
            assert (cache[name][row, real_positions(len(text), 8, side)] - value[0]).abs().max() < 1e-5, name


def test_gradients_are_finite_with_padding(model):
    model.requires_grad_()
    model(TEXTS).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_texts_are_padded_on_the_asked_side(model):
    batch = model.prompt_batch(["abc", "z"])
    assert batch.tokens.tolist() == [[1, 2, 3], [0, 0, 26]]
    assert batch.mask.tolist() == [[True] * 3, [False, False, True]]
    assert torch.equal(model(batch.tokens, attention_mask=batch.mask), model(["abc", "z"]))
    assert model.prompt_batch(["abc", "z"], padding_side="right").tokens.tolist() == [[1, 2, 3], [26, 0, 0]]


def test_token_ids_of_unequal_texts_are_refused_because_they_could_not_say_what_is_padding(model):
    assert model.to_tokens(["abc", "xyz"]).shape == (2, 3)
    with pytest.raises(PromptError, match=r"texts have 1, 3 tokens; expected equally many"):
        model.to_tokens(["abc", "z"])


def test_bos_follows_the_tokenizers_rule_unless_overridden(model):
    assert model.to_tokens("ab").tolist() == [[1, 2]]
    assert model.to_tokens("ab", bos=True).tolist() == [[0, 1, 2]]
    model.tokenizer = ToyTokenizer(adds_bos=True)
    assert model.to_tokens("ab").tolist() == [[0, 1, 2]]
    assert model.to_tokens("ab", bos=False).tolist() == [[1, 2]]
    torch.testing.assert_close(model("ab"), model(torch.tensor([0, 1, 2])))


def test_one_row_of_ids_is_a_batch_of_one(model):
    ids = torch.tensor([4, 5, 6])
    assert model(ids).shape == (1, 3, 40)
    assert torch.equal(model(ids.to(torch.int32)), model(ids[None]))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("", {}, "prompt 0 is empty"),
        (["ab", ""], {}, "prompt 1 is empty"),
        ([], {}, "no prompts"),
        (["ab", 3], {}, "prompt 1 is int; expected str"),
        ("ab", {"padding_side": "top"}, "padding_side 'top' is not known"),
        ("ab", {"attention_mask": torch.ones(1, 2)}, "attention_mask applies to token ids"),
        (torch.empty(1, 0, dtype=torch.long), {}, "are empty"),
        (torch.tensor([[1.0]]), {}, "expected integers"),
        (torch.tensor([[True]]), {}, "expected integers"),
        (torch.zeros(1, 1, 1, dtype=torch.long), {}, r"expected integers \[batch, pos\]"),
        (torch.tensor([[1, 40]]), {}, "token id 40 is outside the vocabulary of 40"),
        (torch.tensor([[-1, 3]]), {}, "token id -1 is outside"),
        (torch.tensor([[1, 2]]), {"attention_mask": torch.ones(1, 3)}, r"shape \(1, 3\); expected \(1, 2\)"),
        (torch.tensor([[1, 2]]), {"attention_mask": torch.zeros(1, 2)}, "hides every token"),
        (torch.tensor([[1, 2]]), {"bos": True}, "bos=True applies to text"),
    ],
)
def test_prompts_that_cannot_be_run_are_one_clear_line(model, prompts, options, message):
    with pytest.raises(PromptError, match=message) as caught:
        model(prompts, **options)
    assert "\n" not in str(caught.value)
