"""Metrics against their definitions, and bootstrap intervals against what they promise."""

from __future__ import annotations

import math

import pytest
import torch

from subcircuit.analysis.metrics import (
    accuracy,
    is_top,
    kl_divergence,
    last_logits,
    log_probability,
    logit_difference,
    recovered_share,
)
from subcircuit.analysis.statistics import bootstrap_mean

LOGITS = torch.tensor([[1.0, 3.0, 0.0], [2.0, -1.0, 2.5]])
ANSWER, WRONG = torch.tensor([1, 0]), torch.tensor([0, 2])


def test_logit_difference_is_answer_minus_wrong() -> None:
    assert logit_difference(LOGITS, ANSWER, WRONG).tolist() == [2.0, -0.5]


def test_log_probability_is_the_log_of_the_softmax() -> None:
    expected = [
        math.log(math.exp(3) / (math.exp(1) + math.exp(3) + 1)),
        math.log(1 / (1 + math.exp(-3) + math.exp(0.5))),
    ]
    assert log_probability(LOGITS, ANSWER).tolist() == pytest.approx(expected)


def test_accuracy_counts_top_tokens() -> None:
    assert is_top(LOGITS, ANSWER).tolist() == [True, False]
    assert accuracy(LOGITS, ANSWER) == 0.5


def test_kl_divergence_is_the_expectation_under_the_reference() -> None:
    reference = torch.tensor([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]]).log()
    predicted = torch.tensor([[0.25, 0.25, 0.5], [0.9, 0.05, 0.05]]).log() + 7
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert kl_divergence(predicted, reference).tolist() == pytest.approx([expected, 0.0], abs=1e-6)


def test_kl_divergence_ignores_what_the_reference_rules_out() -> None:
    reference = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert kl_divergence(torch.zeros(1, 3), reference).item() == pytest.approx(math.log(1.5))
    assert kl_divergence(reference, reference).item() == 0
    assert kl_divergence(reference, torch.zeros(1, 3)).item() == math.inf


@pytest.mark.parametrize("metric", [logit_difference, log_probability, kl_divergence, is_top])
def test_logits_of_all_positions_are_read_at_the_last(metric) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 4, 5, 3, generator=generator)
    arguments = {
        logit_difference: (torch.tensor([0, 1, 2, 0]), torch.tensor([1, 2, 0, 2])),
        kl_divergence: (other,),
    }.get(metric, (torch.tensor([0, 1, 2, 0]),))
    last = tuple(argument[:, -1] if argument.ndim == 3 else argument for argument in arguments)
    assert torch.equal(metric(logits, *arguments), metric(logits[:, -1], *last))


def test_low_precision_logits_are_measured_in_float32_and_float64_stays() -> None:
    assert logit_difference(LOGITS.bfloat16(), ANSWER, WRONG).dtype == torch.float32
    assert log_probability(LOGITS.double(), ANSWER).dtype == torch.float64
    assert last_logits(LOGITS[:, None].half()).shape == (2, 3)


def test_recovered_share_is_zero_at_corrupted_and_one_at_clean() -> None:
    clean, corrupted = torch.tensor([6.0, 4.0, 1.0]), torch.tensor([2.0, -4.0, 1.0])
    assert recovered_share(corrupted, clean, corrupted)[:2].tolist() == [0.0, 0.0]
    assert recovered_share(clean, clean, corrupted)[:2].tolist() == [1.0, 1.0]
    assert recovered_share(torch.tensor([3.0, 6.0, 1.0]), clean, corrupted)[:2].tolist() == [0.25, 1.25]
    assert recovered_share(clean, clean, corrupted)[2].isnan()


def test_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(400, 40, generator=generator) + 3
    interval = bootstrap_mean(samples, confidence=0.9, n_resamples=500)
    covered = ((interval.low <= 3) & (interval.high >= 3)).double().mean()
    assert 0.82 < covered < 0.95
    assert torch.allclose(interval.mean, samples.mean(-1))


def test_bootstrap_width_is_that_of_the_normal_interval() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean, low, high = bootstrap_mean(values)
    assert (high - low).item() == pytest.approx(2 * 1.96 * values.std().item() / 1000**0.5, rel=0.08)
    assert low < mean < high


def test_bootstrap_depends_on_its_seed_alone() -> None:
    values = torch.arange(10.0)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = bootstrap_mean(values)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert bootstrap_mean(values) == first
    assert bootstrap_mean(values, seed=1) != first


def test_bootstrap_of_many_sites_equals_that_of_each() -> None:
    values = torch.randn(3, 2, 12, generator=torch.Generator().manual_seed(2))
    together = bootstrap_mean(values)
    assert together.low.shape == (3, 2)
    assert torch.allclose(together.low[1, 1], bootstrap_mean(values[1, 1]).low)


def test_bootstrap_of_one_prompt_has_no_width() -> None:
    assert [part.item() for part in bootstrap_mean(torch.tensor([2.5]))] == [2.5, 2.5, 2.5]


@pytest.mark.parametrize("bad", [{"values": torch.zeros(3, 0)}, {"confidence": 1.0}, {"n_resamples": 0}])
def test_bootstrap_refuses_what_has_no_interval(bad: dict) -> None:
    with pytest.raises(ValueError, match="expected at least one prompt"):
        bootstrap_mean(**{"values": torch.zeros(3), **bad})
