"""Screen-then-verify against whole exact sweeps."""

from __future__ import annotations

import random

import pytest
import torch

import subcircuit as sc
from patching_cases import CONFIGS, random_model, random_task
from subcircuit.analysis.gradients import gradient_scores
from subcircuit.analysis.race import Rule
from subcircuit.analysis.screen import screen
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
    assert found.saved == 1 - found.n_rows / (found.n_sites * task.n)


def test_prompts_are_looked_at_part_by_part():
    """In a fixed order: not every order of the prompts finds the whole top."""
    model = sc.load("tiny-gpt2")
    task = sc.task("months", model, n=12, seed=0)
    exact = sweep(model, task, "neurons", precision="fp64")
    found = screen(model, task, "neurons", k=5, precision="fp64", seed=0)
    assert found.n_exact < found.n_rows / task.n < found.n_sites / 5
    rows = [exact.sites.index(site) for site in found.scores.sites]
    torch.testing.assert_close(found.scores.effects, exact.effects[rows])
    assert [site for site, _ in found.top] == [site for site, _ in exact.top(5)]


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


def test_everything_is_verified_where_as_much_is_asked_for(case):
    model, task = case
    found = screen(model, task, "mlps", k=10)
    assert (found.k, found.n_exact, found.saved, found.overlap) == (3, 3, 0, 1)


def test_bad_options_are_named(case):
    model, task = case
    with pytest.raises(PatchError, match="k 0"):
        screen(model, task, k=0)
    with pytest.raises(PatchError, match="margin=-1"):
        Rule(margin=-1)
    with pytest.raises(PatchError, match="gradient method 'exact'"):
        screen(model, task, method="exact")
