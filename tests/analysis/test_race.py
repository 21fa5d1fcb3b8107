"""Races for the k largest effects, where all effects are known."""

from __future__ import annotations

import random

import pytest
import torch

from subcircuit.analysis.race import FEWEST_AT_ONCE, Race, Rule

SEED = random.randrange(10**6)
PARTS = [4, 8, 16]


def race(gradient, effects, k=2, parts=PARTS, seed=0, **rule):
    """A race that has been run, and the sites that were patched on all prompts."""
    starts, asked = [0, *parts], []

    def exact(sites, part):
        asked.extend((site, part) for site in sites)
        return effects[sites, starts[part] : starts[part + 1]]

    runner = Race(gradient, exact, parts, k, Rule(**{"n_random": 0, "n_recent": 2, **rule}), seed)
    complete = runner.run()
    assert len(set(asked)) == len(asked)
    assert runner.n_rows == sum(starts[part + 1] - starts[part] for _, part in asked)
    return runner, complete


def alike(means, n_prompts=16):
    """Effects that are the same on all prompts."""
    return torch.tensor(means, dtype=torch.float64)[:, None].expand(-1, n_prompts)


def noisy(n_sites, noise, generator):
    """Gradient scores and effects of sites of ever smaller effect, which differ by noise on every prompt."""
    means = 0.9 ** torch.arange(n_sites, dtype=torch.float64)
    shape = n_sites, PARTS[-1]
    gradient = means[:, None] * (1 + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64))
    return gradient, gradient + means[:, None] * noise * torch.randn(shape, generator=generator, dtype=torch.float64)


def test_exact_gradients_leave_nothing_to_do_but_the_top():
    effects = alike([5, -4, 1, 0.5, 0.2])
    runner, complete = race(effects, effects)
    assert (complete, runner.n_rows, runner.shortfall) == ([0, 1], 2 * 16, 0)


def test_a_bound_that_fell_short_makes_the_race_wider():
    gradient = alike([5, 4, 3.5, 0.5, 0.2, 0.1, 0, 0])
    wide = race(gradient, alike([4, 4.8, 3.5, 0.5, 0.2, 0.1, 0, 0]), margin=1.0)
    assert wide[0].shortfall == 0  # what was patched last fell short by nothing
    assert wide[0].n_rows == 2 * 16 + FEWEST_AT_ONCE * 4  # the third could have reached 3.5 + 0.8
    narrow = race(gradient, alike([5, 4.8, 3.5, 0.5, 0.2, 0.1, 0, 0]), margin=1.0)
    assert narrow[0].n_rows == 2 * 16
    assert race(gradient, alike([5, 4.8, 3.5, 0.5, 0.2, 0.1, 0, 0]), margin=2.0)[0].n_rows > 2 * 16


def test_random_sites_tell_of_what_the_order_hides():
    gradient = alike([0.9**i for i in range(40)])
    effects = gradient.clone()
    effects[30:] += 2
    assert race(gradient, effects)[1] == [0, 1]  # without random sites nobody would know
    runner, complete = race(gradient, effects, n_random=20, seed=SEED)
    assert runner.shortfall > 2
    assert {30, 31} <= set(complete)


def test_prompts_that_disagree_are_looked_at_longer():
    gradient, effects = alike([3, 2, 1.5, 1.5]), alike([3, 2, 1.5, 1.5]).clone()
    effects[2] += torch.tensor([-1.0, 1, 1, -1] * 4)  # could be 2 as well, from the first four prompts
    effects[3] += torch.tensor([0.01, -0.01, -0.01, 0.01] * 4)
    runner, complete = race(gradient, effects, margin=1.0, n_random=2, errors=1.5)
    assert runner.n_seen.tolist() == [16, 16, 8, 4]
    assert complete == [0, 1]


@pytest.mark.parametrize("k", [1, 5, 12])
def test_the_top_is_found_among_noise_from_part_of_the_rows(k):
    generator, shares, n_found = torch.Generator().manual_seed(SEED), [], 0
    for seed in range(20):
        gradient, effects = noisy(100, 0.5, generator)
        top = set(effects.mean(1).abs().topk(k).indices.tolist())
        runner, complete = race(gradient, effects, k, n_random=16, n_recent=20, seed=seed)
        n_found += top <= set(complete)
        shares.append(runner.n_rows / effects.numel())
    print(f"seed {SEED}")
    assert n_found >= 16
    assert sum(shares) / 20 < 0.5


def test_one_part_makes_every_site_complete():
    gradient, effects = noisy(30, 0.01, torch.Generator().manual_seed(SEED))
    runner, complete = race(gradient, effects, 5, parts=[16], n_random=8)
    assert runner.n_rows == 16 * len(complete) < effects.numel()
    assert set(effects.mean(1).abs().topk(5).indices.tolist()) <= set(complete)


def test_more_places_than_sites_makes_all_complete():
    gradient, effects = noisy(6, 0.2, torch.Generator().manual_seed(SEED))
    runner, complete = race(gradient, effects, 10)
    assert (runner.k, complete) == (6, list(range(6)))
