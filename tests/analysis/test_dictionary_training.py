"""The trainer on activations whose dictionary is known, and the figures of quality against their definitions."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from dictionary_cases import PLACES, plain_encode, random_dictionary
from patching_cases import CONFIGS, random_model
from subcircuit.analysis.dictionary_training import (
    TrainingSettings,
    _Trainer,
    dictionary_quality,
    held_out_rows,
    train_dictionary,
)
from subcircuit.engine.errors import ConfigError, HookError, TaskError
from subcircuit.weights.dictionary import load_dictionary, save_dictionary

SEED = random.randrange(10**6)


@pytest.fixture
def model():
    print(f"seed {SEED}")
    return random_model(CONFIGS["gpt2"], SEED)


@pytest.fixture
def tokens():
    return torch.randint(0, 50, (60, 12), generator=torch.Generator().manual_seed(SEED))


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_directions_that_activations_are_sums_of_are_found(activation):
    generator = torch.Generator().manual_seed(SEED)
    truth = F.normalize(torch.randn(24, 20, generator=generator), dim=1)
    settings = TrainingSettings(size=48, activation=activation, k=3, l1=0.1, steps=900, dead_after=30, seed=SEED)
    trainer = _Trainer(20, settings)
    for step in range(settings.steps):
        chosen = torch.rand(256, 24, generator=generator).topk(3).indices
        sizes = 1 + torch.rand(256, 3, generator=generator)
        trainer.step(torch.zeros(256, 24).scatter(1, chosen, sizes) @ truth, step)
    found = trainer.dictionary("blocks.0.hook_resid_pre", torch.zeros(20), 1.0)
    torch.testing.assert_close(found.W_dec.norm(dim=1), torch.ones(48))
    assert float((truth @ found.W_dec.T).amax(1).mean()) > 0.9


def test_features_that_stopped_firing_come_back():
    """Without the last term of the loss, features that are pushed below zero everywhere stay there."""
    settings = TrainingSettings(size=64, k=4, steps=400, dead_after=20, seed=SEED)
    trainer = _Trainer(16, settings)
    with torch.no_grad():
        trainer.b_enc[32:] = -5.0
    x = torch.randn(400, 256, 16, generator=torch.Generator().manual_seed(SEED))
    for step, batch in enumerate(x):
        trainer.step(batch, step)
        if step == 25:
            n_dead = int((trainer.silent_steps >= 20).sum())
    assert n_dead >= 32
    assert int((trainer.silent_steps >= 20).sum()) < n_dead / 2


@pytest.mark.parametrize("letter", PLACES)
def test_a_trained_dictionary_explains_text_that_it_has_not_seen_and_survives_a_file(model, tokens, letter, tmp_path):
    settings = TrainingSettings(size=96, k=8, steps=300, tokens_per_step=128, seed=SEED)
    calls = []
    found = train_dictionary(model, PLACES[letter], tokens, settings, progress=lambda *call: calls.append(call))
    again = train_dictionary(model, PLACES[letter], tokens, settings)
    assert torch.equal(found.W_enc, again.W_enc)
    assert calls[-1] == (300, 300)
    save_dictionary(tmp_path, found)
    quality = dictionary_quality(model, load_dictionary(tmp_path), held_out_rows(tokens))
    assert quality == dictionary_quality(model, found, held_out_rows(tokens))
    untrained = train_dictionary(model, PLACES[letter], tokens, TrainingSettings(size=96, k=8, steps=1, seed=SEED))
    before = dictionary_quality(model, untrained, held_out_rows(tokens))
    assert quality.explained_variance > max(0.5, before.explained_variance + 0.1)
    assert quality.l0 <= 8


def test_what_leaves_a_layer_is_trained_on_as_what_enters_the_next(model, tokens):
    settings = TrainingSettings(size=32, k=8, steps=3, seed=SEED)
    left, entering = (
        train_dictionary(model, f"blocks.{at}", tokens, settings) for at in ("0.hook_resid_post", "1.hook_resid_pre")
    )
    assert left.hook_name == entering.hook_name == PLACES["r"]
    assert torch.equal(left.W_enc, entering.W_enc)


def test_figures_of_quality_are_those_of_the_definitions(model, tokens):
    dictionary = random_dictionary(PLACES["a"], model.config, SEED)
    double, name = model.double(), dictionary.hook_name
    quality = dictionary_quality(double, dictionary, tokens)
    value = double.run_with_cache(tokens)[1][name]
    x, acts = value.flatten(2).flatten(0, 1), plain_encode(dictionary, value).flatten(0, 1)
    decoded = acts @ dictionary.W_dec.double() + dictionary.b_dec.double()
    variance = (x - x.mean(0)).square().sum()
    explained = float(1 - (x - decoded).square().sum() / variance)
    assert quality.explained_variance == pytest.approx(explained, rel=1e-5, abs=1e-5)
    assert quality.l0 == pytest.approx(float((acts > 0).sum() / len(acts)))
    assert quality.dead_share == float((acts == 0).all(0).double().mean())
    assert quality.n_tokens == tokens.numel()

    def loss(value):
        logits = double.run_with_hooks(tokens, [(name, lambda old, _: old if value is None else value.view_as(old))])
        picked = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])
        return -float(picked.mean())

    for found, value in (("loss", None), ("reconstructed_loss", decoded), ("zeroed_loss", torch.zeros_like(x))):
        assert getattr(quality, found) == pytest.approx(loss(value), abs=1e-5)
    recovered = (quality.zeroed_loss - quality.reconstructed_loss) / (quality.zeroed_loss - quality.loss)
    assert quality.loss_recovered == pytest.approx(recovered)


def test_bad_settings_are_named(model, tokens):
    with pytest.raises(ConfigError, match="k is 9; expected 1 to the 8 features"):
        TrainingSettings(size=8, k=9)
    with pytest.raises(ConfigError, match="steps is 0; expected a positive number"):
        TrainingSettings(steps=0)
    with pytest.raises(ConfigError, match="activation 'jumprelu' cannot be trained"):
        TrainingSettings(activation="jumprelu")
    with pytest.raises(HookError, match="cannot sit at 'blocks.0.hook_attn_out'"):
        train_dictionary(model, "blocks.0.hook_attn_out", tokens, TrainingSettings(steps=1))
    with pytest.raises(TaskError, match="1 rows of text; expected at least 2"):
        train_dictionary(model, PLACES["r"], tokens[:1])
