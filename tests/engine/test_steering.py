"""Steering against hooks that add a vector by hand, with and without a KV cache, and as the source of a patch."""

from __future__ import annotations

import random

import pytest
import torch

import patching_cases
from engine_models import CONFIGS, ToyTokenizer, random_model
from subcircuit.engine.errors import PatchError
from subcircuit.engine.patching import Patch, Site, patch_effects
from subcircuit.engine.steering import Steering, mean_difference, steered_source

SEED = random.randrange(10**6)
PLACES = ("r0", "r2", "m1", "a1.h2", "a2.q0", "a0.k1", "a2.v0")


@pytest.fixture(params=CONFIGS)
def model(request):
    return random_model(CONFIGS[request.param], SEED, tokenizer=ToyTokenizer())


def random_vector(model, place, seed=0):
    size = model.config.d_model if place[0] in "rm" else model.config.d_head
    return torch.randn(size, generator=torch.Generator().manual_seed(SEED + seed), dtype=torch.float64)


def adding(steering, positions):
    """A hook that adds the vector at some positions of a whole prompt, by indexing."""

    def add(value, name):
        value = value.clone()
        for position in range(value.shape[1]) if positions is None else positions:
            if steering.component.kind in ("resid", "mlp"):
                value[:, position] += steering.coefficient * steering.vector
            else:
                value[:, position, steering.component.index] += steering.coefficient * steering.vector
        return value

    return [(steering.component.hook_name, add)]


def greedy_without_cache(model, text, n_new, hooks):
    tokens = model.prompt_batch(text).tokens
    for _ in range(n_new):
        tokens = torch.cat((tokens, model.run_with_hooks(tokens, hooks)[:, -1:].argmax(-1)), dim=1)
    return tokens[0, -n_new:].tolist()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("positions", [None, (-1,), (0, 2, -2)], ids=str)
def test_a_forward_pass_is_that_with_the_vector_added_by_hand(model, place, positions):
    steering = Steering.of(Site.of(place), random_vector(model, place), -2.5)
    steering = Steering(Site(steering.component, positions), steering.vector, -2.5)
    tokens = torch.randint(0, 40, (3, 6), generator=torch.Generator().manual_seed(SEED))
    steered = model.run_with_hooks(tokens, steering.hooks(model.config))
    torch.testing.assert_close(steered, model.run_with_hooks(tokens, adding(steering, positions)))
    # The same vector on all keys shifts all scores of a query alike, which a softmax undoes, unless it is rotated.
    if not (place == "a0.k1" and positions is None and model.config.positions == "learned"):
        assert not torch.allclose(steered, model(tokens))


@pytest.mark.parametrize("place", ["r1", "m1", "a1.h2"])
@pytest.mark.parametrize("positions", [None, (-1,), (1, -1)], ids=str)
def test_prompts_of_unequal_length_are_steered_as_each_is_without_cache_and_padding(model, place, positions):
    steering = Steering(Site.of(place), random_vector(model, place), 20.0)
    steering = Steering(Site(steering.component, positions), steering.vector, 20.0)
    texts = ["abcdefg", "kq", "xyzh"]
    together = model.generate(texts, 7, stop_at_eos=False, steering=[steering]).tokens
    for text, ids in zip(texts, together, strict=True):
        at = None if positions is None else {position % len(text) for position in positions}
        assert ids == greedy_without_cache(model, text, 7, adding(steering, at))
    assert changes(model, steering)


def changes(model, *steering):
    """Whether it makes a difference; the likeliest tokens may be the same all the same."""
    hooks = [hook for each in steering for hook in each.hooks(model.config)]
    return not torch.equal(model.run_with_hooks("abcdefg", hooks), model("abcdefg"))


def test_several_vectors_add_up(model):
    first, second = random_vector(model, "r1"), random_vector(model, "r1", 1)
    both = [Steering.of("r1", first, 2.0), Steering.of("r1", second, -1.0)]
    sum_of_both = Steering.of("r1", 2 * first - second)
    together = model.generate(["abc", "defgh"], 8, steering=both)
    assert together.tokens == model.generate(["abc", "defgh"], 8, steering=[sum_of_both]).tokens
    assert changes(model, *both)


@pytest.mark.parametrize("place", ["r1", "m2", "a1.h2", "a2.k1"])
def test_mean_difference_is_one_of_means_over_prompts_run_alone(model, place):
    sets = ["abcdefg", "kq", "xyzh"], ["hhh", "pqrstu"]

    def mean(texts, position):
        found = []
        for text in texts:
            value = model.run_with_cache(text)[1][Site.of(place).component.hook_name][0]
            value = value if place[0] in "rm" else value[:, Site.of(place).component.index]
            found.append(value.mean(0) if position is None else value[position])
        return torch.stack(found).mean(0)

    for position in (-1, -2, None):
        expected = mean(sets[0], position) - mean(sets[1], position)
        torch.testing.assert_close(mean_difference(model, place, *sets, position), expected)
    with pytest.raises(PatchError, match="position -3 is not in every prompt"):
        mean_difference(model, place, *sets, -3)


@pytest.mark.parametrize("kind", patching_cases.CONFIGS)
@pytest.mark.parametrize("place", ["r1", "m1", "a1.h2"])
def test_as_the_source_of_a_patch_it_has_the_effect_of_a_steered_run(kind, place):
    model = patching_cases.random_model(patching_cases.CONFIGS[kind], SEED).double()
    prompts = patching_cases.random_prompts(SEED)
    steering = Steering(Site(Site.of(place).component, (4, -1)), random_vector(model, place), 1.5)
    source = steered_source(model, prompts.clean, steering)
    effects = patch_effects(model, prompts, [Patch(steering.site, source)], precision="fp64").effects[0]

    def difference(logits):
        rows = torch.arange(len(prompts.clean))
        return logits[rows, -1, prompts.answer] - logits[rows, -1, prompts.wrong]

    steered = difference(model.run_with_hooks(prompts.clean, steering.hooks(model.config)))
    torch.testing.assert_close(effects, steered - difference(model(prompts.clean)))


@pytest.mark.parametrize(
    ("place", "size", "coefficient", "message"),
    [
        ("m1.n3", 24, 1.0, "'m1.n3' cannot be steered"),
        ("r1", 7, 1.0, "has 7 entries; expected 24"),
        ("r9", 24, 1.0, "'r9' does not exist"),
        ("r1", 24, float("nan"), "not finite"),
        ("r1@9", 24, 1.0, "position 9 of 'r1' is outside prompts of 3 tokens"),
    ],
)
def test_bad_steering_is_one_clear_line(model, place, size, coefficient, message):
    name, _, position = place.partition("@")
    site = Site(Site.of(name).component, (int(position),) if position else None)
    with pytest.raises(PatchError, match=message):
        model.generate("abc", 2, steering=[Steering(site, torch.ones(size), coefficient)])
