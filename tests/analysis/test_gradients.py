"""Gradient scores against finite differences of hooked forwards in float64, and against exact effects."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from gradient_references import attention_slope, site_slope, source_values
from patching_cases import CONFIGS, random_model, random_task
from subcircuit.analysis.gradients import gradient_scores
from subcircuit.analysis.sweep import sweep
from subcircuit.engine.errors import PatchError
from subcircuit.engine.patching import Component, Site, patch_effects

SEED = random.randrange(10**6)


def build(name):
    print(f"seed {SEED}")
    return random_model(CONFIGS[name], SEED).double(), random_task(SEED + 1, n_prompts=4)


@pytest.fixture(scope="module", params=list(CONFIGS))
def case(request):
    return build(request.param)


def sites(*names, positions=None):
    return [Site(Component.parse(name), positions) for name in names]


LINEAR = [
    *sites("a0.h1", "a1.h3", "a2.h0", "m0", "m2", "m1.n17", "m0.n40", "r0", "r2", "a1.v1", "a0.g1"),
    *sites("a1.h0", "m1.n3", "r1", "a1.g0", positions=(4, -1)),
]
QUERIES_AND_KEYS = [*sites("a0.q1", "a1.k0", "a2.k1"), *sites("a1.q3", "a1.k1", positions=(3, 5))]


@pytest.mark.parametrize("source", ["corrupted", "mean", "zero"])
def test_attribution_patching_is_the_slope_towards_the_source(case, source):
    model, task = case
    scores = gradient_scores(model, task, [*LINEAR, *QUERIES_AND_KEYS], source=source, precision="fp64")
    slopes = torch.stack([site_slope(model, task, site, source) for site in scores.sites])
    torch.testing.assert_close(scores.effects, slopes, rtol=1e-5, atol=1e-7)


def test_exact_effects_of_ever_smaller_patches_tend_to_it(case):
    model, task = case
    names = sorted({site.component.hook_name for site in LINEAR})
    clean = model.run_with_cache(task.clean, names)[1]
    source = source_values(model, task, "corrupted", names)
    epsilon = 1e-6
    near = {name: clean[name] + epsilon * (source[name] - clean[name]) for name in names}
    exact = patch_effects(model, task, LINEAR, source=near, precision="fp64").effects / epsilon
    for given, scale in (("corrupted", 1), (near, epsilon)):
        scores = gradient_scores(model, task, LINEAR, source=given, precision="fp64")
        torch.testing.assert_close(scores.effects / scale, exact, rtol=1e-3, atol=1e-6)


def test_single_precision_and_chunks_of_one_prompt_change_nothing(case):
    model, task = case
    precise = gradient_scores(model, task, "heads+mlps+neurons+residual+keys", precision="fp64", method="atp*")
    for budget in (1, None):
        single = gradient_scores(
            model.float(), task, "heads+mlps+neurons+residual+keys", method="atp*", budget_bytes=budget
        )
        model.double()
        torch.testing.assert_close(single.effects.double(), precise.effects, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(single.clean_metric.double(), precise.clean_metric, rtol=1e-4, atol=1e-4)


def test_each_position_adds_up_to_all_of_them(case):
    model, task = case
    whole = gradient_scores(model, task, "heads+residual", precision="fp64")
    each = gradient_scores(model, task, "heads+residual", positions="each", precision="fp64")
    torch.testing.assert_close(each.effects.reshape(len(whole.sites), 9, -1).sum(1), whole.effects)


def test_integrated_gradients_are_the_mean_slope_on_the_way_from_the_source(case):
    model, task = case
    n_steps, entry = 3, "blocks.0.hook_resid_pre"
    clean = model.run_with_cache(task.clean, [entry])[1][entry]
    for source in ("corrupted", "zero"):
        start = source_values(model, task, source, [entry])[entry]
        ways = [start + (clean - start) * k / n_steps for k in range(1, n_steps + 1)]
        chosen = [LINEAR[0], LINEAR[3], LINEAR[7], LINEAR[11]]
        scores = gradient_scores(model, task, chosen, source=source, method="ig", steps=n_steps, precision="fp64")
        for site in chosen:
            # Along the way the site moves by the same difference, that of the clean run.
            slopes = [site_slope(model, task, site, source, entry=way) for way in ways]
            torch.testing.assert_close(scores.of(site), torch.stack(slopes).mean(0), rtol=1e-5, atol=1e-7)


def test_integrated_gradients_of_the_embeddings_add_up_to_the_whole_effect(case):
    model, task = case
    scores = gradient_scores(model, task, ["r0"], method="ig", steps=400, precision="fp64")
    exact = sweep(model, task, ["r0"], precision="fp64").effects
    torch.testing.assert_close(scores.effects, exact, rtol=0.03, atol=0.01 * float(exact.abs().max()))


def test_one_step_of_integrated_gradients_is_attribution_patching(case):
    model, task = case
    one = gradient_scores(model, task, "heads+mlps", method="ig", steps=1, precision="fp64")
    assert torch.equal(one.effects, gradient_scores(model, task, "heads+mlps", precision="fp64").effects)
    assert (one.settings["method"], one.settings["steps"]) == ("ig", 1)


@pytest.mark.parametrize("source", ["corrupted", "zero"])
def test_atp_star_recomputes_attention_and_drops_one_layer_at_a_time(case, source):
    model, task = case
    chosen = [*QUERIES_AND_KEYS, *sites("a0.h1", "a2.h2", "m1", "m0.n5", "r1", "a1.v0")]
    scores = gradient_scores(model, task, chosen, source=source, method="atp*", precision="fp64")
    for site in chosen:
        slope = attention_slope if site in QUERIES_AND_KEYS else site_slope
        layers = [layer for layer in range(3) if site.component.kind == "resid" or layer != site.component.layer]
        dropped = [slope(model, task, site, source, frozen_layer=layer).abs() for layer in layers]
        expected = slope(model, task, site, source).sign() * torch.stack(dropped).mean(0)
        torch.testing.assert_close(scores.of(site), expected, rtol=1e-4, atol=1e-6)


def test_the_qk_fix_brings_saturated_heads_nearer_to_their_effects():
    """With queries ten times as large, attention is all or nothing and its slope says little."""
    model, task = build("gpt2")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.w_q.weight *= 30
    exact = sweep(model, task, "queries+keys", precision="fp64").effects
    errors = {}
    for method in ("atp", "atp*"):
        # GradDrop changes the scale: compare by how effects are ordered.
        estimate = gradient_scores(model, task, "queries+keys", method=method, precision="fp64").effects
        ranks = torch.stack((estimate.abs().flatten(), exact.abs().flatten())).argsort().argsort().double()
        errors[method] = 1 - float(torch.corrcoef(ranks)[0, 1])
    assert errors["atp*"] < errors["atp"]


def test_several_answers_count_by_their_mean(case):
    model, task = case
    both = torch.stack((task.answer, task.wrong), 1)
    several = replace(task, answers=both, wrongs=torch.stack((task.wrong, torch.full_like(task.wrong, -1)), 1))
    half = gradient_scores(model, task, "heads", precision="fp64").effects / 2
    torch.testing.assert_close(gradient_scores(model, several, "heads", precision="fp64").effects, half)


def test_parameters_that_ask_for_gradients_get_none(case):
    model, task = case
    model.requires_grad_(True)
    with torch.no_grad():
        gradient_scores(model, task, "heads", precision="fp64")
    assert all(parameter.grad is None for parameter in model.parameters())
    model.requires_grad_(False)


def test_bad_options_are_named(case):
    model, task = case
    with pytest.raises(PatchError, match="gradient method 'magic' is not known; expected one of atp, ig, atp*"):
        gradient_scores(model, task, "heads", method="magic")
    with pytest.raises(PatchError, match="steps 0 must be at least 1"):
        gradient_scores(model, task, "heads", method="ig", steps=0)
    with pytest.raises(PatchError, match="precision 'bf16' of gradients"):
        gradient_scores(model, task, "heads", precision="bf16")
    with pytest.raises(PatchError, match="source 'median' is not known"):
        gradient_scores(model, task, "heads", source="median")
    with pytest.raises(PatchError, match="'a9.h0' does not exist"):
        gradient_scores(model, task, ["a9.h0"])
    with pytest.raises(PatchError, match="needs corrupted prompts"):
        gradient_scores(model, replace(task, corrupted=None), "heads")
