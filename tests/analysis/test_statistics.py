"""Statistics against what they are by definition: enumerations, hand-computed values, plain loops."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from subcircuit.analysis.statistics import (
    benjamini_hochberg,
    bootstrap_mean,
    bootstrap_ratio,
    empirical_p,
    hypergeometric_pmf,
    interval_columns,
    jaccard_mean,
    rank_correlation,
    resampled_means,
    sign_flip_p,
    smallest_p,
    tail_p,
)

SEED = random.randrange(10**6)


@pytest.fixture
def generator():
    print(f"seed {SEED}")
    return torch.Generator().manual_seed(SEED)


@pytest.mark.parametrize(("n_all", "n_a", "n_b"), [(6, 2, 3), (7, 0, 4), (5, 5, 2), (8, 4, 4)])
def test_overlap_by_chance_is_what_all_pairs_of_sets_give(n_all, n_a, n_b):
    first = set(range(n_a))
    overlaps = [len(first & set(other)) for other in itertools.combinations(range(n_all), n_b)]
    pmf = hypergeometric_pmf(n_all, n_a, n_b)
    assert len(pmf) == min(n_a, n_b) + 1
    for overlap, p in enumerate(pmf.tolist()):
        assert p == pytest.approx(overlaps.count(overlap) / len(overlaps), abs=1e-12)
        at_least = sum(found >= overlap for found in overlaps) / len(overlaps)
        assert tail_p(overlap, pmf) == pytest.approx(at_least)
    jaccards = [k / (n_a + n_b - k) for k in overlaps]
    assert jaccard_mean(pmf, n_a, n_b) == pytest.approx(sum(jaccards) / len(jaccards))


def test_overlap_of_many_edges_keeps_its_precision():
    pmf = hypergeometric_pmf(32491, 900, 1200)
    assert float(pmf.sum()) == pytest.approx(1, abs=1e-8)
    assert float((pmf * torch.arange(len(pmf))).sum()) == pytest.approx(900 * 1200 / 32491, rel=1e-8)


def test_sets_larger_than_their_source_are_refused():
    with pytest.raises(ValueError, match="sets of 7 and 2 from 6 things"):
        hypergeometric_pmf(6, 7, 2)


def test_q_values_are_those_computed_by_hand():
    p = torch.tensor([0.01, 0.04, 0.03, 0.005, 0.9])
    # ranks 2, 4, 3, 1, 5: p · 5 / rank = 0.025, 0.05, 0.05, 0.025, 0.9, then the least of itself and all above
    assert torch.allclose(benjamini_hochberg(p), torch.tensor([0.025, 0.05, 0.05, 0.025, 0.9], dtype=torch.float64))
    both = benjamini_hochberg(torch.tensor([[0.6, 0.5]], dtype=torch.float64))
    assert both.tolist() == [[0.6, 0.6]]


def test_calling_by_q_is_the_step_up_rule(generator):
    p = torch.rand(60, generator=generator).double() ** 3
    for rate in (0.05, 0.2):
        ordered = p.sort().values
        passing = [rank for rank in range(1, 61) if float(ordered[rank - 1]) <= rate * rank / 60]
        limit = float(ordered[max(passing) - 1]) if passing else -1.0
        assert torch.equal(benjamini_hochberg(p) <= rate, p <= limit)


def test_few_prompts_have_every_sign_pattern_counted(generator):
    values = torch.randn(3, 7, generator=generator) + 0.5
    for row, p in zip(values.double(), sign_flip_p(values).tolist(), strict=True):
        sums = [
            abs(sum(s * float(v) for s, v in zip(signs, row, strict=True)))
            for signs in itertools.product((1, -1), repeat=7)
        ]
        assert p == pytest.approx(sum(total >= abs(float(row.sum())) - 1e-9 for total in sums) / 2**7)
    assert sign_flip_p(torch.ones(5)).item() == 2 / 2**5
    assert sign_flip_p(torch.zeros(5)).item() == 1


@pytest.mark.parametrize("n_prompts", [1, 4, 14, 15, 40])
def test_no_p_is_smaller_than_that_of_values_of_one_sign(n_prompts):
    found = sign_flip_p(torch.ones(n_prompts)).item()
    assert found >= smallest_p(n_prompts) * (1 - 1e-6) > 0
    # where signs are drawn, those observed may be drawn again
    assert found == pytest.approx(smallest_p(n_prompts), rel=1e-6 if n_prompts <= 14 else 4)
    assert smallest_p(n_prompts, n_flips=9) == (1 if n_prompts == 1 else 0.1)


def test_drawn_sign_patterns_come_near_the_enumerated_ones(generator):
    values = torch.randn(4, 12, generator=generator) + torch.tensor([[0.0], [0.3], [0.6], [3.0]])
    exact, drawn = sign_flip_p(values), sign_flip_p(values, n_flips=4000, seed=1)
    assert not torch.equal(exact, drawn)
    assert (exact - drawn).abs().max() < 0.04
    assert float(sign_flip_p(torch.ones(100), n_flips=99)) == pytest.approx(0.01)


def test_sign_flips_of_many_sites_are_those_of_each(generator):
    values = torch.randn(2100, 3, generator=generator)
    together = sign_flip_p(values)
    assert together.tolist() == [sign_flip_p(row).item() for row in values]


def test_intervals_of_many_sites_are_those_of_each(generator):
    values = torch.randn(3, 700, 4, generator=generator)
    together = bootstrap_mean(values, n_resamples=50, seed=2)
    alone = [bootstrap_mean(row, n_resamples=50, seed=2) for row in values.view(-1, 4)]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole.view(-1), torch.stack(parts))


def test_the_ends_of_an_interval_are_columns_and_one_prompt_has_none(generator):
    values = torch.randn(2, 9, generator=generator)
    found = bootstrap_mean(values, seed=3)
    columns = interval_columns(values, "share_", seed=3)
    for i, row in enumerate(columns):
        assert list(row.values()) == pytest.approx(found.at(i)[1:], abs=1e-6)
        assert list(row) == ["share_low", "share_high"]
    assert interval_columns(values[:, :1]) == 2 * [{"low": None, "high": None}]


def test_chance_counts_the_observed_value_in():
    null = torch.tensor([1.0, 2.0, 3.0])
    assert empirical_p(2.5, null) == 2 / 4
    assert empirical_p(9, null) == 1 / 4
    assert empirical_p(2, null) == 3 / 4


def test_a_ratio_resamples_both_means_together(generator):
    below = torch.rand(2, 30, generator=generator) + 1
    mean, low, high = bootstrap_ratio(3 * below, below)
    assert torch.allclose(torch.stack([mean, low, high]), torch.full((3, 2), 3.0, dtype=torch.float64))
    above = torch.randn(2, 30, generator=generator)
    found = bootstrap_ratio(above, below, n_resamples=300, seed=4)
    ratios = resampled_means(above, n_resamples=300, seed=4) / resampled_means(below, n_resamples=300, seed=4)
    assert torch.allclose(found.mean, above.double().mean(1) / below.double().mean(1))
    assert torch.allclose(found.low, ratios.quantile(0.025, dim=1))
    ones = bootstrap_ratio(above, torch.ones_like(above))
    assert torch.allclose(ones.high.float(), bootstrap_mean(above).high)


def test_a_resampled_mean_is_that_of_drawn_prompts():
    drawn = resampled_means(torch.tensor([0.0, 1.0, 10.0]), n_resamples=200)
    possible = {round((a + b + c) / 3, 6) for a, b, c in itertools.product((0, 1, 10), repeat=3)}
    assert {round(value, 6) for value in drawn.tolist()} <= possible
    assert len(drawn.unique()) > 5


def test_rank_correlation_shares_the_ranks_of_equal_values():
    b = torch.tensor([1.0, 2.0, 3.0, 4.0])
    a = torch.tensor([[10.0, 20.0, 30.0, 99.0], [4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 2.0, 3.0]])
    # of the last row the ranks are ½ ½ 2 3: covariance 4.5, variances 4.5 and 5
    expected = torch.tensor([1.0, -1.0, 4.5 / (4.5 * 5) ** 0.5], dtype=torch.float64)
    assert torch.allclose(rank_correlation(a, b), expected)
    assert rank_correlation(torch.ones(1, 4), b).isnan().all()
