"""Corrections between the engine that sampled and the trainer, by hand."""

import math

import pytest
import torch

from longrl.algorithms import (
    Algorithm,
    CorrectionProduct,
    GeometricMask,
    OffPolicySequenceMask,
    Tokens,
    TwoSidedMask,
    masked_sequence,
    masked_token,
    no_correction,
    truncated_sequence,
    truncated_token,
)

CORRECTIONS = [
    truncated_token, masked_token, truncated_sequence, masked_sequence,
    TwoSidedMask(0.3), TwoSidedMask(0.3, over_completion=True), GeometricMask(), OffPolicySequenceMask(0.1),
    CorrectionProduct([GeometricMask(), truncated_token]),
]  # fmt: skip
RATIOS = [truncated_token, masked_token, truncated_sequence, masked_sequence]

# q = old / sampler per row; completions 4, 1 and 8 with rows mixed up
Q = [4.0, 0.5, 1.0, 0.5, 2.0, 2.5, 0.25]
INDEX = [4, 1, 8, 4, 1, 1, 8]
# products: completion 4: 2.0; completion 1: 2.5; completion 8: 0.25


def sampled(q=Q, index=INDEX) -> Tokens:
    sampler = torch.linspace(-3, -0.5, len(q), dtype=torch.float64)
    old = sampler + torch.tensor(q, dtype=torch.float64).log()
    return Tokens(old.clone().requires_grad_(), old, torch.ones_like(old), torch.tensor(index), sampler)


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_no_correction_is_one_also_without_sampler():
    assert no_correction(sampled(), 2.0).tolist() == [1.0] * 7
    without = Tokens(torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    assert no_correction(without, 2.0).tolist() == [1.0, 1.0]


def test_truncated_token_caps_each_ratio():
    close(truncated_token(sampled(), 2.25), [2.25, 0.5, 1, 0.5, 2, 2.25, 0.25])


def test_masked_token_drops_each_ratio_above_the_cap_and_keeps_small_ones():
    close(masked_token(sampled(), 2.25), [0, 0.5, 1, 0.5, 2, 0, 0.25])


def test_truncated_sequence_caps_the_product_over_the_completion():
    close(truncated_sequence(sampled(), 2.25), [2, 2.25, 0.25, 2, 2.25, 2.25, 0.25])


def test_masked_sequence_drops_completions_whose_product_is_above_the_cap():
    close(masked_sequence(sampled(), 2.25), [2, 0, 0.25, 2, 0, 0, 0.25])


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
    given = sampled()
    given.sampler_logp[5] = broken
    close(correction(given, 2.25), expected)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_equal_policies_give_one(correction):
    close(correction(sampled(q=[1.0] * 7), 2.0), [1.0] * 7)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_factors_carry_no_gradient(correction):
    old = torch.tensor([-1.0, -2.0], requires_grad=True)
    sampler = torch.tensor([-1.5, -1.5], requires_grad=True)
    given = Tokens(old, old, torch.ones(2), torch.zeros(2, dtype=torch.long), sampler)
    assert not correction(given, 2.0).requires_grad


@pytest.mark.parametrize("correction", RATIOS)
def test_a_long_completion_whose_product_overflows_stays_finite(correction):
    given = sampled(q=[math.e**10] * 5, index=[0] * 5)
    factors = correction(given, math.inf)
    exponent = 20 if "sequence" in correction.__name__ else 10  # the log of the product is clamped to 20
    close(factors, [math.exp(exponent)] * 5)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_without_sampler_log_probabilities_the_error_names_the_flag(correction):
    given = Tokens(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"set model\.algorithm\.correction"):
        correction(given, 2.0)


# ---- masks: two-sided, of the geometric mean, and of what has drifted away ----


def test_a_two_sided_mask_drops_ratios_on_both_sides_of_its_range():
    close(TwoSidedMask(low=0.4, high=2.25)(sampled(), 1.0), [0, 0.5, 1, 0.5, 2, 0, 0])


def test_over_completions_it_looks_at_the_product():
    # products: completion 4: 2.0; completion 1: 2.5; completion 8: 0.25
    mask = TwoSidedMask(low=0.4, high=2.25, over_completion=True)
    close(mask(sampled(), 1.0), [2, 0, 0, 2, 0, 0, 0])
    close(TwoSidedMask(low=0.2, high=2.5, over_completion=True)(sampled(), 1.0), [2, 2.5, 0.25, 2, 2.5, 2.5, 0.25])


def test_the_geometric_mask_keeps_completions_whose_mean_ratio_is_in_range():
    # geometric means: completion 4: sqrt(2) = 1.41; completion 1: 2.5^(1/3) = 1.36; completion 8: 0.5
    close(GeometricMask(low=0.6, high=1.38)(sampled(), 1.0), [0, 1, 0, 0, 1, 1, 0])
    close(GeometricMask(low=0.4, high=1.38)(sampled(), 1.0), [0, 1, 1, 0, 1, 1, 1])
    close(GeometricMask(low=0.6, high=1.5)(sampled(), 1.0), [1, 1, 0, 1, 1, 1, 0])


def test_the_length_of_a_completion_is_nothing_to_the_geometric_mask():
    for length in (1, 10, 1000):
        given = sampled(q=[1.02] * length, index=[0] * length)
        assert GeometricMask(0.99, 1.03)(given, 1.0).tolist() == [1.0] * length
        assert GeometricMask(0.99, 1.01)(given, 1.0).tolist() == [0.0] * length


@pytest.mark.parametrize("broken", [-math.inf, math.nan, math.inf])
def test_a_token_the_sampler_did_not_score_is_in_no_mean(broken):
    given = sampled()  # completion 1 without its third row: sqrt(0.5 * 2) = 1
    given.sampler_logp[5] = broken
    close(GeometricMask(low=0.9, high=1.1)(given, 1.0), [0, 1, 0, 0, 1, 0, 0])
    close(TwoSidedMask(low=0.4, high=2.25)(given, 1.0), [0, 0.5, 1, 0.5, 2, 0, 0])


def drifted(advantages, broken=None) -> Tokens:
    """log(sampler / policy) by row; means: completion 0: 0.2, completion 1: 0.2, completion 2: -0.3."""
    gap = torch.tensor([0.5, -0.1, 0.2, -0.3], dtype=torch.float64)
    sampler = torch.tensor([-1.0, -2.0, -3.0, -1.5], dtype=torch.float64)
    policy = (sampler - gap).requires_grad_()
    if broken is not None:
        sampler = sampler.index_fill(0, torch.tensor([broken]), -math.inf)
    old = torch.full_like(sampler, -9.0)  # is not looked at
    return Tokens(policy, old, torch.tensor(advantages, dtype=torch.float64), torch.tensor([0, 0, 1, 2]), sampler)


def test_of_what_has_drifted_away_the_policy_learns_from_good_completions_alone():
    close(OffPolicySequenceMask(0.1)(drifted([-1.0, -1.0, 1.0, -1.0]), 2.0), [0, 0, 1, 1])
    close(OffPolicySequenceMask(0.1)(drifted([1.0, 1.0, -1.0, -1.0]), 2.0), [1, 1, 0, 1])
    close(OffPolicySequenceMask(0.25)(drifted([-1.0] * 4), 2.0), [1, 1, 1, 1])
    close(OffPolicySequenceMask(0.0)(drifted([0.0, 0.0, -1.0, -1.0]), 2.0), [1, 1, 0, 1])
    # without its first row, which is dropped, completion 0 has -0.1
    close(OffPolicySequenceMask(0.1)(drifted([-1.0, -1.0, -1.0, -1.0], broken=0), 2.0), [0, 1, 0, 1])


def test_a_product_of_corrections_masks_and_weighs():
    product = CorrectionProduct([GeometricMask(low=0.4, high=1.38), truncated_token])
    close(product(sampled(), 2.25), [0, 0.5, 1, 0, 2, 2.25, 0.25])
    assert product == CorrectionProduct([GeometricMask(low=0.4, high=1.38), "longrl.algorithms.truncated_token"])
    with pytest.raises(ValueError, match=r"at least one correction, got none; to have none set"):
        CorrectionProduct([])


@pytest.mark.parametrize("bounds", [(1.0, 1.0), (2.0, 1.0), (-0.1, 1.0), (0.5, math.nan), (math.nan, 1.0)])
@pytest.mark.parametrize("mask", [TwoSidedMask, GeometricMask])
def test_a_range_that_lets_nothing_pass_is_refused(mask, bounds):
    with pytest.raises(ValueError, match=r"needs 0 <= low < high, got"):
        mask(*bounds)


def test_masked_tokens_have_no_policy_gradient_but_keep_their_weight():
    given = sampled(q=[1.0, 4.0], index=[0, 1])
    algorithm = Algorithm(correction=TwoSidedMask(0.5, 2.0))
    logp = given.old_logp.clone().requires_grad_()
    weights = torch.full((2,), 0.5, dtype=torch.float64)
    index = given.completion_index
    output = algorithm.loss(logp, given.old_logp, None, given.sampler_logp, given.advantages, weights, index)
    output.loss.backward()
    close(logp.grad, [-0.5, 0.0])
    assert output.metrics["weight_sum"] == 1
    assert output.metrics["correction_mean"] == 0.5
