"""Screen-then-verify against whole exact sweeps."""

from __future__ import annotations

import random

import pytest
import torch

import subcircuit as sc
from patching_cases import CONFIGS, random_model, random_task
from subcircuit.analysis.gradients import gradient_scores
from subcircuit.analysis.screen import screen, verify
from subcircuit.analysis.statistics import rank_correlation
from subcircuit.analysis.sweep import sweep
from subcircuit.engine.errors import PatchError

SEED = random.randrange(10**6)


@pytest.fixture(scope="module", params=list(CONFIGS))
def case(request):
    print(f"seed {SEED}")
    return random_model(CONFIGS[request.param], SEED), random_task(SEED + 1)


@pytest.mark.parametrize("method", ["atp", "ig", "atp*"])
def test_the_top_is_that_of_the_exact_sweep(case, method):
    model, task = case
    exact = sweep(model, task, "heads+mlps", precision="fp64").top(4)
    found = screen(model, task, "heads+mlps", k=4, method=method, precision="fp64", seed=SEED)
    assert [site for site, _ in found.top] == [site for site, _ in exact]
    assert [effect for _, effect in found.top] == pytest.approx([effect for _, effect in exact])


@pytest.mark.parametrize("name", ["months", "numerals", "ioi"])
@pytest.mark.parametrize("source", ["corrupted", "mean"])
def test_the_bundled_models_top_is_that_of_the_exact_sweep(name, source):
    model = sc.load("tiny-gpt2")
    task = sc.task(name, model, n=8, seed=0)
    exact = sweep(model, task, "heads+mlps", source=source).top(5)
    found = screen(model, task, "heads+mlps", k=5, source=source)
    assert [site for site, _ in found.top] == [site for site, _ in exact]
    assert found.n_exact <= found.n_sites == 36


def test_many_neurons_are_screened_by_a_few_exact_rows():
    model = sc.load("tiny-gpt2")
    task = sc.task("months", model, n=4, seed=0)
    found = screen(model, task, "neurons", k=5)
    assert [site for site, _ in found.top] == [site for site, _ in sweep(model, task, "neurons").top(5)]
    assert found.n_exact < found.n_sites / 5
    assert found.saved == 1 - found.n_exact / found.n_sites


def test_what_is_reported_agrees_with_the_scores(case):
    model, task = case
    found = screen(model, task, "heads+mlps", k=3, executor="reference", precision="fp64")
    gradient = gradient_scores(model, task, "heads+mlps", precision="fp64")
    assert torch.equal(found.gradient.effects, gradient.effects)
    exact = sweep(model, task, [str(site) for site in found.scores.sites], precision="fp64")
    torch.testing.assert_close(found.scores.effects, exact.effects)
    assert found.scores.settings["screened_by"] == "atp"
    best = {site for site, _ in gradient.top(3)}
    assert found.overlap == pytest.approx(len(best & {site for site, _ in found.top}) / 3)
    mean = torch.stack([gradient.of(site).mean() for site in found.scores.sites])
    assert found.rank_agreement == pytest.approx(rank_correlation(mean, exact.mean))
    assert found.summary()["n_exact"] == found.n_exact == len(set(found.scores.sites))


def verified_for(bound, effects, **options):
    """Sites that `verify` looks at when their exact effects are as given."""
    asked = []

    def exact(chosen):
        asked.extend(chosen)
        return effects[list(chosen)]

    settings = {"k": 2, "n_random": 0, "n_recent": 2, "margin": 1.0, "seed": 0, **options}
    found, error = verify(bound, exact, *settings.values())
    assert found == asked
    assert len(set(found)) == len(found)
    return found, error


def test_no_more_is_verified_when_what_is_left_is_too_small():
    bound = torch.tensor([5.0, 4.0, 1.0, 0.5, 0.2, 0.1, 0.0])
    assert verified_for(bound, bound) == ([0, 1], 0.0)
    assert verified_for(bound, 0.9 * bound) == ([0, 1], 0.0)
    # The bound fell short by 1 for the second site: the third, at 1 + 1, cannot reach 4, but a bound of 3 would.
    effects = bound + torch.tensor([0.0, 1.0, 0, 0, 0, 0, 0])
    assert verified_for(bound, effects) == ([0, 1], 1.0)
    found, _ = verified_for(
        torch.tensor([5.0, 4.0, 3.5, 0.5, 0.2, 0.1, 0.0]), torch.tensor([5, 4.8, 3.5, 0.5, 0.2, 0.1, 0])
    )
    assert found == [0, 1]
    found, _ = verified_for(
        torch.tensor([5.0, 4.0, 3.5, 0.5, 0.2, 0.1, 0.0]), torch.tensor([4, 4.8, 3.5, 0.5, 0.2, 0.1, 0])
    )
    assert found == [0, 1, 2, 3, 4, 5]  # three would do; so many are verified at once


def test_what_random_sites_fall_short_by_counts_for_all_that_are_left():
    bound, effects = torch.linspace(1, 0, 40), torch.linspace(1, 0, 40)
    effects[30:] += 2  # what the gradient takes for small is large
    found, error = verified_for(bound, effects, n_random=20)
    assert error == pytest.approx(2.0)
    assert {30, 31} <= set(found)
    assert verified_for(bound, effects)[0] == [0, 1]  # without random sites nobody would know
    larger = verified_for(bound, bound + 0.01, n_random=5, margin=3.0)[1]
    assert larger == pytest.approx(0.03, rel=1e-3)


def test_everything_is_verified_where_as_much_is_asked_for(case):
    model, task = case
    found = screen(model, task, "mlps", k=10)
    assert (found.k, found.n_exact, found.saved, found.overlap) == (3, 3, 0, 1)


def test_bad_options_are_named(case):
    model, task = case
    with pytest.raises(PatchError, match="k 0"):
        screen(model, task, k=0)
    with pytest.raises(PatchError, match="margin -1"):
        screen(model, task, margin=-1)
    with pytest.raises(PatchError, match="gradient method 'exact'"):
        screen(model, task, method="exact")
