"""Features of sparse dictionaries as sites, against plain forwards with hooks that know no dictionary."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from dictionary_cases import ACTIVATIONS, PLACES, plain_encode, random_dictionary
from patching_cases import CONFIGS, random_model, random_prompts, relative_error
from subcircuit.analysis.plan import plan
from subcircuit.engine.ablation import RowAblations
from subcircuit.engine.errors import ConfigError, HookError, PatchError
from subcircuit.engine.patching import Component, DeltaSession, Patch, Site, patch_effects
from subcircuit.engine.patching import features as features_module
from subcircuit.engine.patching.sites import as_patch_set

SEED = random.randrange(10**6)
SOURCES = ("corrupted", "mean", "zero")


@pytest.fixture(params=CONFIGS)
def model(request):
    print(f"seed {SEED}")
    return random_model(CONFIGS[request.param], SEED).double()


@pytest.fixture
def prompts():
    return random_prompts(SEED + 1)


def dictionaries_of(model, activation="relu"):
    return {letter: random_dictionary(hook, model.config, SEED + 2, activation) for letter, hook in PLACES.items()}


def logit_difference(prompts, logits):
    rows = torch.arange(len(logits))
    return logits[rows, -1, prompts.answer] - logits[rows, -1, prompts.wrong]


def source_acts(model, prompts, dictionary, source):
    """[prompt, pos, d_sae]"""
    if source == "zero":
        return torch.zeros(*prompts.clean.shape, dictionary.d_sae, dtype=torch.float64)
    value = model.run_with_cache(prompts.corrupted)[1][dictionary.hook_name]
    acts = plain_encode(dictionary, value)
    return acts.mean(0, keepdim=True).expand_as(acts) if source == "mean" else acts


def moved_most(model, prompts, dictionary, source):
    """Two features that the source differs most in: with few that fire, most others change nothing."""
    clean = plain_encode(dictionary, model.run_with_cache(prompts.clean)[1][dictionary.hook_name])
    change = source_acts(model, prompts, dictionary, source) - clean
    return change.abs().sum((0, 1)).topk(2).indices.tolist()


def hooked_effect(model, prompts, patches):
    """Effect of [(dictionary, {feature: positions}, source)] from one forward whose hooks edit the values."""
    hooks = []
    for dictionary, chosen, source in patches:
        wanted = source_acts(model, prompts, dictionary, source)

        def edit(value, name, dictionary=dictionary, chosen=chosen, wanted=wanted):
            acts, changed = plain_encode(dictionary, value), value.flatten(2).clone()
            for feature, positions in chosen.items():
                for at in range(value.shape[1]) if positions is None else positions:
                    change = wanted[:, at, feature] - acts[:, at, feature]
                    changed[:, at] += change[:, None] * dictionary.W_dec[feature].double()
            return changed.view_as(value)

        hooks.append((dictionary.hook_name, edit))
    clean = logit_difference(prompts, model(prompts.clean))
    return logit_difference(prompts, model.run_with_hooks(prompts.clean, hooks)) - clean


@pytest.mark.parametrize("letter", PLACES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("subtract", [True, False])
def test_activations_are_those_of_the_definitions(model, prompts, letter, activation, subtract):
    dictionary = random_dictionary(PLACES[letter], model.config, SEED, activation, subtract)
    cache = model.with_dictionaries(dictionary).run_with_cache(prompts.clean)[1]
    x = cache[dictionary.hook_name].flatten(2)
    acts = cache[f"{dictionary.hook_name}.hook_sae_acts_post"]
    torch.testing.assert_close(acts, plain_encode(dictionary, x), rtol=1e-12, atol=1e-12)
    exact = dictionary.map(torch.Tensor.double)
    torch.testing.assert_close(exact.decode(exact.encode(x)) + exact.error(x), x, rtol=1e-12, atol=1e-12)
    chosen = torch.tensor([[0, 5, 5], [9, 0, 39]])
    some = exact.encode_chosen(torch.stack((x, x)), chosen)
    torch.testing.assert_close(some, torch.stack([acts[..., row] for row in chosen]), rtol=1e-12, atol=1e-12)


def test_a_dictionary_that_nobody_edits_changes_no_bit(model, prompts):
    spliced = model.with_dictionaries(*dictionaries_of(model).values())
    seen = []
    hooks = [("*.hook_sae_acts_post", lambda value, name: seen.append(name))]
    assert torch.equal(spliced.run_with_hooks(prompts.clean, hooks), model(prompts.clean))
    assert sorted(seen) == sorted(f"{name}.hook_sae_acts_post" for name in PLACES.values())


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("letter", PLACES)
def test_effects_of_features_equal_plain_hooked_forwards(model, prompts, letter, activation, source):
    dictionary = dictionaries_of(model, activation)[letter]
    features, where = (*moved_most(model, prompts, dictionary, source), 0), (None, (-1,), (4, 6))
    sites = [Site(Component.parse(f"{letter}1.f{f}"), at) for f in features for at in where]
    expected = [hooked_effect(model, prompts, [(dictionary, {f: at}, source)]) for f in features for at in where]
    # -1 counts from the end for hooks too: they index.
    spliced = model.with_dictionaries(dictionary)
    for executor in ("torch", "reference"):
        result = patch_effects(spliced, prompts, sites, source=source, executor=executor, precision="fp64")
        assert torch.stack(expected).abs().max() > 1e-3
        assert relative_error(result.effects, torch.stack(expected)) < 1e-10, executor


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sets_of_features_read_what_earlier_patches_left(model, prompts, activation, monkeypatch):
    """A feature above other patches is set from what it is in that row, not in the clean run."""
    monkeypatch.setattr(features_module, "ENTRIES_AT_ONCE", 50)  # so that sets are cut into several pieces
    at = dictionaries_of(model, activation)
    at["late"] = replace(at["r"], hook_name="blocks.2.hook_resid_pre")
    spliced = model.with_dictionaries(*at.values())
    plans = [
        [("r", 1, {0: None, 3: None, 11: (4,)}, "corrupted")],
        [("r", 1, {5: None}, "zero"), ("late", 2, {6: None, 2: (-1,)}, "mean")],
        [("a", 1, {1: None, 2: None}, "mean"), ("m", 1, {8: None}, "corrupted"), ("late", 2, {0: None}, "zero")],
        [("m", 1, dict.fromkeys(range(40)), "zero")],
        [("r", 1, {2: None}, "zero"), ("mid", 1, {4: None, 7: (5,)}, "corrupted"), ("m", 1, {8: None}, "mean")],
    ]
    sets, expected = [], []
    for parts in plans:
        sets.append(
            [
                Patch(Site(Component.parse(f"{'r' if letter == 'late' else letter}{layer}.f{f}"), positions), source)
                for letter, layer, chosen, source in parts
                for f, positions in chosen.items()
            ]
        )
        hooked = [(at[letter], chosen, source) for letter, _, chosen, source in parts]
        expected.append(hooked_effect(model, prompts, hooked))
    for executor in ("torch", "reference"):
        effects = patch_effects(spliced, prompts, sets, executor=executor, precision="fp64").effects
        assert relative_error(effects, torch.stack(expected)) < 1e-10, executor


def test_features_mix_with_components_and_bases(model, prompts):
    spliced = model.with_dictionaries(*dictionaries_of(model).values())
    sets = [
        ("a0.h1", "r1.f3", "m1.f4"),
        ("a1.h0", "a1.f2", "m2"),
        ("m1", "m1.f5"),
        ("a0.h1", "r1.f3", "a1.h2", "mid1.f6", "mid1.f7", "m1.f4"),
        ("mid1.f2", "m1.n3", "m2"),
        (Patch(Site.of("a1.g0"), "zero"), "a1.f9"),
        ("a1.h0", "a1.h1", "a1.h2", "a1.h3", "a1.f1"),
        (Patch(Site.of("r1.f3"), "zero"), Patch(Site(Component.parse("r1.f3"), (5,)), "mean")),
        ("a0.h0",),
    ]
    reference = patch_effects(spliced, prompts, sets, executor="reference", precision="fp64").effects
    assert relative_error(patch_effects(spliced, prompts, sets, precision="fp64").effects, reference) < 1e-10
    pieces = patch_effects(spliced, prompts, sets, precision="fp64", budget_bytes=100_000).effects
    assert relative_error(pieces, reference) < 1e-10
    session = DeltaSession(spliced, prompts, precision="fp64")
    base = as_patch_set(["a0.h2", "r1.f8", "mid1.f9"])
    extras = [as_patch_set(s) for s in sets]
    whole = patch_effects(spliced, prompts, [(*base, *e) for e in extras], executor="reference", precision="fp64")
    assert relative_error(session.effects(extras, base=base).effects, whole.effects) < 1e-10


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_lower_precisions_stay_close(model, prompts, precision, tolerance):
    spliced = model.with_dictionaries(*dictionaries_of(model).values()).float()
    sites = [f"{letter}1.f{f}" for letter in PLACES for f in range(0, 40, 5)]
    exact = patch_effects(spliced, prompts, sites, executor="reference", precision="fp64").effects
    assert relative_error(patch_effects(spliced, prompts, sites, precision=precision).effects, exact) < tolerance


def test_a_source_may_hold_activations_or_the_values_they_are_read_from(model, prompts):
    dictionary = dictionaries_of(model)["a"]
    spliced = model.with_dictionaries(dictionary)
    cache = spliced.run_with_cache(prompts.corrupted)[1]
    acts = f"{dictionary.hook_name}.hook_sae_acts_post"
    sites = [f"a1.f{feature}" for feature in moved_most(model, prompts, dictionary, "corrupted")]
    wanted = patch_effects(spliced, prompts, sites, precision="fp64").effects
    for name in (acts, dictionary.hook_name):
        found = patch_effects(spliced, prompts, sites, source={name: cache[name]}, precision="fp64").effects
        assert relative_error(found, wanted) < 1e-10


@pytest.mark.parametrize("name", ["r4.f17", "m3.f17", "a5.f17", "mid4.f17"])
def test_feature_names_read_back(name):
    assert str(Component.parse(name)) == name
    assert Component.parse(name).is_feature


@pytest.mark.parametrize("executor", ["torch", "reference"])
def test_features_that_do_not_exist_are_named(model, prompts, executor):
    spliced = model.with_dictionaries(dictionaries_of(model)["r"])
    with pytest.raises(PatchError, match="'r1.f40' does not exist: the dictionary has features 0 to 39"):
        patch_effects(spliced, prompts, ["r1.f40"], executor=executor)
    with pytest.raises(PatchError, match="'m1.f0' does not exist: no dictionary is known at 'blocks.1.hook_mlp_out'"):
        patch_effects(spliced, prompts, ["m1.f0"], executor=executor)


def test_the_stream_leaving_a_layer_is_the_one_entering_the_next(model, prompts):
    dictionary = dictionaries_of(model)["r"]
    spliced = model.with_dictionaries(replace(dictionary, hook_name="blocks.0.hook_resid_post"))
    assert list(spliced.dictionaries) == [dictionary.hook_name]
    with pytest.raises(HookError, match=r"'blocks.3.hook_resid_pre'.* what leaves the last one is no site"):
        model.with_dictionaries(replace(dictionary, hook_name="blocks.2.hook_resid_post"))


def test_dictionaries_that_do_not_fit_are_named(model):
    good = dictionaries_of(model)["r"]
    cases = [
        (replace(good, hook_name="blocks.9.hook_resid_pre"), "layers 0 to 2"),
        (replace(good, hook_name="blocks.1.hook_attn_out"), "cannot sit at 'blocks.1.hook_attn_out'"),
        (good.map(lambda x: x), "one at each"),
    ]
    for dictionary, words in cases:
        with pytest.raises(HookError, match=words):
            model.with_dictionaries(good, dictionary)
    narrow = replace(good, W_enc=good.W_enc[:31], W_dec=good.W_dec[:, :31], b_dec=good.b_dec[:31])
    with pytest.raises(HookError, match="reads 31 entries; the model has 32"):
        model.with_dictionaries(narrow)
    with pytest.raises(ConfigError, match=r"'W_dec' has shape \(40, 31\); expected \(40, 32\)"):
        replace(good, W_dec=good.W_dec[:, :31])
    with pytest.raises(ConfigError, match="k is None; expected 1 to the 40 features"):
        replace(good, activation="topk")
    with pytest.raises(ConfigError, match="'jumprelu' has one"):
        replace(good, activation="jumprelu")


def test_features_are_set_while_generating(model):
    dictionary = dictionaries_of(model)["r"]
    spliced, name = model.with_dictionaries(dictionary), f"{dictionary.hook_name}.hook_sae_acts_post"
    exact, prompt = dictionary.map(torch.Tensor.double), torch.randint(0, 50, (2, 5))

    def by_hand(value, _):
        return value - exact.encode(value) @ exact.W_dec

    found = spliced.generate(prompt, 6, hooks=[(name, lambda acts, _: acts * 0)]).tokens
    tokens = prompt
    for _ in range(6):
        logits = model.run_with_hooks(tokens, [(dictionary.hook_name, by_hand)])
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)
    assert [list(row)[-6:] for row in found] == tokens[:, -6:].tolist()


def test_what_knows_no_features_says_so(model, prompts):
    spliced = model.with_dictionaries(dictionaries_of(model)["r"])
    with pytest.raises(PatchError, match="'r1.f3' does not exist: no dictionary is known"):
        RowAblations([["r1.f3"]]).hooks(spliced.config)
    with pytest.raises(PatchError, match="site 'r1.f3' has no plan"):
        plan(spliced, prompts, ["a0.h1", "r1.f3"])


def test_gradients_reach_features_and_pass_through_unedited_ones(model, prompts):
    dictionary = dictionaries_of(model)["m"]
    spliced, where = model.with_dictionaries(dictionary), dictionary.hook_name
    got = {}

    def slope(of, names):
        entered = ("hook_embed", lambda value, name: got.setdefault(name, value.detach().requires_grad_()))
        watched = [(name, lambda grad, name: got.update({name: grad})) for name in names]
        got.clear()
        logits = of.run_with_hooks(prompts.clean, [entered], watched)
        logit_difference(prompts, logits).sum().backward()
        return got["hook_embed"].grad

    with torch.enable_grad():
        plain = slope(model, [where])
        at_value = got[where].clone()
        through = slope(spliced, [f"{where}.hook_sae_acts_post"])
    torch.testing.assert_close(through, plain, rtol=1e-9, atol=1e-11)
    expected = at_value @ dictionary.W_dec.double().T
    torch.testing.assert_close(got[f"{where}.hook_sae_acts_post"], expected, rtol=1e-9, atol=1e-11)
