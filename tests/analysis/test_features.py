"""Scores of features: exact ones against hooks, attribution against finite differences, and the tokens they fire on."""

from __future__ import annotations

import random

import pytest
import torch

from dictionary_cases import ACTIVATIONS, PLACES, plain_encode, random_dictionary
from patching_cases import CONFIGS, random_model, random_prompts, random_sequence_task, relative_error
from subcircuit.analysis.features import feature_scores, firing_tokens
from subcircuit.analysis.gradients import gradient_scores
from subcircuit.analysis.screen import screen
from subcircuit.analysis.sweep import sweep
from subcircuit.analysis.tasks import Task
from subcircuit.engine.errors import HookError, PatchError
from subcircuit.engine.patching.answers import token_sets
from subcircuit.engine.patching.metric import measure

SEED = random.randrange(10**6)


@pytest.fixture(params=CONFIGS)
def model(request):
    print(f"seed {SEED}")
    return random_model(CONFIGS[request.param], SEED).double()


@pytest.fixture
def task():
    prompts = random_prompts(SEED + 1, n_prompts=19)  # more than are run at once
    return Task("random", prompts.clean, prompts.corrupted, prompts.answer, prompts.wrong)


def metric_with(model, task, dictionary, change, metric="logit_difference"):
    """The metric with `change` [prompt, pos, d_in] added at the dictionary's hook point."""
    hooks = [(dictionary.hook_name, lambda value, name: value + change.view_as(value))]
    logits = model.run_with_hooks(task.clean, hooks)[:, -1]
    return measure(logits, None, *token_sets(task), metric)


def changes_of(model, task, dictionary, source):
    """f_source − f [prompt, pos, d_sae], by the definitions."""
    clean, corrupted = (model.run_with_cache(x)[1][dictionary.hook_name] for x in (task.clean, task.corrupted))
    acts, other = plain_encode(dictionary, clean), plain_encode(dictionary, corrupted)
    return {"corrupted": other, "mean": other.mean(0, keepdim=True), "zero": torch.zeros_like(acts)}[source] - acts


@pytest.mark.parametrize("source", ["corrupted", "mean", "zero"])
@pytest.mark.parametrize("letter", PLACES)
def test_exact_scores_of_active_features_are_all_effects_there_are(model, task, letter, source):
    dictionary = random_dictionary(PLACES[letter], model.config, SEED, "topk")
    scores = feature_scores(model, task, dictionary, source=source, precision="fp64", check=5)
    change = changes_of(model, task, dictionary, source)
    moved = (change != 0).any(0).any(0).nonzero()[:, 0].tolist()
    assert [str(site) for site in scores.sites] == [f"{letter}1.f{feature}" for feature in moved]
    assert scores.settings["method"] == "exact patching"
    assert scores.settings["check"]["passed"]
    clean = metric_with(model, task, dictionary, torch.zeros(19, 9, dictionary.d_in))
    for feature in moved[:4]:
        term = change[..., feature, None] * dictionary.W_dec[feature].double()
        expected = metric_with(model, task, dictionary, term) - clean
        torch.testing.assert_close(scores.of(f"{letter}1.f{feature}"), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("metric", ["logit_difference", "log_probability"])
@pytest.mark.parametrize("positions", [None, (-1,), (4, 6), "each"])
def test_attribution_is_the_slope_of_the_metric_along_the_patch(model, task, activation, metric, positions):
    for letter, hook in PLACES.items():
        dictionary = random_dictionary(hook, model.config, SEED, activation)
        change = changes_of(model, task, dictionary, "corrupted")
        features = change.abs().sum((0, 1)).topk(2).indices.tolist()
        scores = feature_scores(
            model, task, dictionary, features, method="attribution", positions=positions, metric=metric
        )
        expected = []
        for site in scores.sites:
            feature, where = site.component.index, list(site.positions or range(9))
            held = torch.zeros(9, 1, dtype=torch.float64)
            held[where] = 1
            step = 1e-5 * held * change[..., feature, None] * dictionary.W_dec[feature].double()
            up, down = (metric_with(model, task, dictionary, sign * step, metric) for sign in (1, -1))
            expected.append((up - down) / 2e-5)
        assert len(expected) == 2 * (9 if positions == "each" else 1)
        assert relative_error(scores.effects, torch.stack(expected)) < 1e-6, letter
        assert scores.settings["method"] == "attribution"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("source", ["corrupted", "mean"])
def test_gradient_scores_of_all_dictionaries_at_once_are_attribution_to_each(model, task, activation, source):
    at = {letter: random_dictionary(hook, model.config, SEED, activation) for letter, hook in PLACES.items()}
    spliced, options = model.with_dictionaries(*at.values()), {"source": source, "positions": (2, -1)}
    sites = [f"{letter}1.f{feature}" for letter in PLACES for feature in range(40)]
    scores = gradient_scores(spliced, task, ["a2.h1", *sites], precision="fp64", **options)
    for letter, dictionary in at.items():
        each = feature_scores(model, task, dictionary, range(40), method="attribution", **options)
        first = 1 + sites.index(f"{letter}1.f0")
        assert relative_error(scores.effects[first : first + 40], each.effects) < 1e-10
    plain = gradient_scores(model, task, ["a2.h1"], precision="fp64", **options)
    assert relative_error(scores.effects[:1], plain.effects) < 1e-10
    steps = gradient_scores(spliced, task, sites, method="ig", steps=1, precision="fp64", **options)
    assert relative_error(steps.effects, scores.effects[1:]) < 1e-10
    with pytest.raises(PatchError, match=r"'atp\*' knows no features"):
        gradient_scores(spliced, task, sites, method="atp*")


def test_screened_features_have_the_effects_that_a_sweep_gives_them(model, task):
    spliced = model.with_dictionaries(*(random_dictionary(hook, model.config, SEED) for hook in PLACES.values()))
    sites = [f"{letter}1.f{feature}" for letter in PLACES for feature in range(40)]
    exact = sweep(spliced, task, sites, precision="fp64")
    found = screen(spliced, task, sites, k=10, precision="fp64").scores
    assert len(found.sites) >= 10
    assert relative_error(found.effects, torch.stack([exact.of(site) for site in found.sites])) < 1e-10


def test_attribution_nears_the_exact_effect_of_a_small_change(model, task):
    dictionary = random_dictionary(PLACES["r"], model.config, SEED)
    tiny = dictionary.map(torch.Tensor.double)
    clean = model.run_with_cache(task.clean)[1][dictionary.hook_name]
    acts = tiny.encode(clean)
    source = {f"{dictionary.hook_name}.hook_sae_acts_post": 0.9999 * acts}
    features = acts.sum((0, 1)).topk(3).indices.tolist()
    exact, slope = (
        feature_scores(model, task, dictionary, features, source=source, method=method, precision="fp64").effects
        for method in ("exact", "attribution")
    )
    assert relative_error(slope, exact) < 1e-2


def test_a_sweep_takes_features_of_a_model_with_dictionaries(model, task):
    dictionary = random_dictionary(PLACES["m"], model.config, SEED)
    spliced = model.with_dictionaries(dictionary)
    scores = sweep(spliced, task, ["m1.f3", "a0.h1"], precision="fp64")
    alone = feature_scores(model, task, dictionary, [3], precision="fp64")
    torch.testing.assert_close(scores.of("m1.f3"), alone.effects[0])
    with pytest.raises(PatchError, match="no dictionary is known at 'blocks.1.hook_mlp_out'"):
        sweep(model, task, ["m1.f3"])


def test_tokens_that_a_feature_fires_on_are_ranked_by_activation(model):
    tokens = random_sequence_task(SEED).clean
    dictionary = random_dictionary("blocks.0.hook_resid_pre", model.config, SEED)
    acts = plain_encode(dictionary, model.run_with_cache(tokens)[1]["blocks.0.hook_resid_pre"])
    totals = {}
    for token, values in zip(tokens.flatten().tolist(), acts.flatten(0, 1), strict=True):
        totals[token] = totals.get(token, 0) + values
    features = acts.sum((0, 1)).topk(3).indices.tolist()
    for feature, found in zip(features, firing_tokens(model, dictionary, tokens, features, 4), strict=True):
        whole = float(acts[..., feature].sum())
        best = sorted(totals, key=lambda token: -float(totals[token][feature]))[:4]
        assert [token for token, _ in found] == best
        for token, share in found:
            assert share == pytest.approx(float(totals[token][feature]) / whole, rel=1e-9)
    never = dictionary.map(lambda each: each)
    never.b_enc[:] = -1e6
    assert firing_tokens(model, never, tokens, [0]) == [[]]


def test_bad_requests_are_named(model, task):
    dictionary = random_dictionary(PLACES["r"], model.config, SEED)
    with pytest.raises(PatchError, match="method 'guess' is not known"):
        feature_scores(model, task, dictionary, method="guess")
    with pytest.raises(PatchError, match="metric 'kl' has no attribution"):
        feature_scores(model, task, dictionary, method="attribution", metric="kl")
    for method in ("exact", "attribution"):
        with pytest.raises(PatchError, match="'r1.f99' does not exist: the dictionary has features 0 to 39"):
            feature_scores(model, task, dictionary, [99], method=method)
    wide = random_dictionary("blocks.7.hook_resid_pre", model.config, SEED)
    with pytest.raises(HookError, match="layers 0 to 2"):
        feature_scores(model, task, wide)
