"""Importance weights between engine and trainer, by hand."""

import math

import pytest
import torch

from longrl.algorithms import (
    Tokens,
    masked_sequence,
    masked_token,
    no_correction,
    truncated_sequence,
    truncated_token,
)

CORRECTIONS = [truncated_token, masked_token, truncated_sequence, masked_sequence]

# q = old / sampler per row; completions 4, 1 and 8 with rows mixed up
Q = [4.0, 0.5, 1.0, 0.5, 2.0, 2.5, 0.25]
INDEX = [4, 1, 8, 4, 1, 1, 8]
# products: completion 4: 2.0; completion 1: 2.5; completion 8: 0.25


def tokens(q=Q, index=INDEX) -> Tokens:
    sampler = torch.linspace(-3, -0.5, len(q), dtype=torch.float64)
    old = sampler + torch.tensor(q, dtype=torch.float64).log()
    return Tokens(old.clone().requires_grad_(), old, torch.ones_like(old), torch.tensor(index), sampler)


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_no_correction_is_one_also_without_sampler():
    assert no_correction(tokens(), 2.0).tolist() == [1.0] * 7
    without = Tokens(torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    assert no_correction(without, 2.0).tolist() == [1.0, 1.0]


def test_truncated_token_caps_each_ratio():
    close(truncated_token(tokens(), 2.25), [2.25, 0.5, 1, 0.5, 2, 2.25, 0.25])


def test_masked_token_drops_each_ratio_above_the_cap_and_keeps_small_ones():
    close(masked_token(tokens(), 2.25), [0, 0.5, 1, 0.5, 2, 0, 0.25])


def test_truncated_sequence_caps_the_product_over_the_completion():
    close(truncated_sequence(tokens(), 2.25), [2, 2.25, 0.25, 2, 2.25, 2.25, 0.25])


def test_masked_sequence_drops_completions_whose_product_is_above_the_cap():
    close(masked_sequence(tokens(), 2.25), [2, 0, 0.25, 2, 0, 0, 0.25])


@pytest.mark.parametrize("broken", [-math.inf, math.nan, math.inf])
@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        (truncated_token, [2.25, 0.5, 1, 0.5, 2, 0, 0.25]),
        (masked_token, [0, 0.5, 1, 0.5, 2, 0, 0.25]),
        (truncated_sequence, [2, 1.0, 0.25, 2, 1.0, 0, 0.25]),  # completion 1 without its third row: 0.5 * 2
        (masked_sequence, [2, 1.0, 0.25, 2, 1.0, 0, 0.25]),
    ],
)
def test_a_token_whose_sampler_log_probability_is_not_finite_is_dropped(correction, expected, broken):
    given = tokens()
    given.sampler_logp[5] = broken
    close(correction(given, 2.25), expected)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_equal_policies_give_one(correction):
    close(correction(tokens(q=[1.0] * 7), 2.0), [1.0] * 7)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_factors_carry_no_gradient(correction):
    old = torch.tensor([-1.0, -2.0], requires_grad=True)
    sampler = torch.tensor([-1.5, -1.5], requires_grad=True)
    given = Tokens(old, old, torch.ones(2), torch.zeros(2, dtype=torch.long), sampler)
    assert not correction(given, 2.0).requires_grad


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_long_completion_whose_product_overflows_stays_finite(correction):
    given = tokens(q=[math.e**10] * 5, index=[0] * 5)
    factors = correction(given, math.inf)
    exponent = 20 if "sequence" in correction.__name__ else 10  # the log of the product is clamped to 20
    close(factors, [math.exp(exponent)] * 5)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_without_sampler_log_probabilities_the_error_names_the_flag(correction):
    given = Tokens(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"set model\.algorithm\.correction"):
        correction(given, 2.0)
