"""Losses, KL estimates and weights of tokens, by hand and as expectations."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st

from longrl.algorithms import (
    Algorithm,
    BoundedK3,
    Constant,
    DualClipped,
    SequenceDualClipped,
    SoftGated,
    StaleClipped,
    Tokens,
    cispo,
    clipped,
    geometric_clipped,
    k1,
    k2,
    k3,
    k3_unbiased,
    raw,
    reinforce,
    sequence_clipped,
    sequence_mean,
    token_mean,
)

# ---- surrogates: clipping for both signs of the advantage, completions mixed up ----


SURROGATES = [
    clipped, DualClipped(), sequence_clipped, cispo, reinforce,
    SoftGated(), StaleClipped(0.5, 0.5), SequenceDualClipped(), geometric_clipped,
]  # fmt: skip


def tokens(ratios, advantages, index=None, old=-1.0) -> Tokens:
    ratios = torch.tensor(ratios, dtype=torch.float64)
    old_logp = torch.full_like(ratios, old)
    index = torch.arange(len(ratios)) if index is None else torch.tensor(index)
    logp = (old_logp + ratios.log()).requires_grad_()
    return Tokens(logp, old_logp, torch.tensor(advantages, dtype=torch.float64), index)


def check(surrogate, given_, losses, gradients, low=0.2, high=0.3, clipped_low=(), clipped_high=()):
    output = surrogate(given_, low, high)
    torch.testing.assert_close(output.loss, torch.tensor(losses, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(output.loss.sum(), given_.logp)
    torch.testing.assert_close(gradient, torch.tensor(gradients, dtype=torch.float64))
    assert output.clipped_low.nonzero().flatten().tolist() == list(clipped_low)
    assert output.clipped_high.nonzero().flatten().tolist() == list(clipped_high)


def test_clipped_takes_the_lower_objective_for_both_signs():
    # the gradient of rho with respect to log policy is rho
    check(
        clipped,
        tokens([1.0, 0.5, 2.0, 1.0, 0.5, 2.0, 1.25, 0.75], [2.0, 2, 2, -2, -2, -2, 2, -2]),
        losses=[-2, -1, -2.6, 2, 1.6, 4, -2.5, 1.6],
        gradients=[-2, -1, 0, 2, 0, 4, -2.5, 0],
        clipped_low=[4, 7],
        clipped_high=[2],
    )


def test_dual_clip_bounds_the_loss_of_bad_tokens_only():
    check(
        DualClipped(bound=3.0),
        tokens([4.0, 4.0, 2.0, 0.5, 0.5, 10.0], [2.0, -2, -2, -2, 2, -1]),
        losses=[-2.6, 6, 4, 1.6, -1, 3],
        gradients=[0, 0, 4, 0, -1, 0],
        clipped_low=[3],
        clipped_high=[0, 1, 5],
    )


@pytest.mark.parametrize("bound", [1.0, 0.5, math.nan])
def test_a_dual_clip_bound_of_one_or_less_is_refused(bound):
    with pytest.raises(ValueError, match="must be above 1"):
        DualClipped(bound)


def test_cispo_clamps_the_weight_on_both_sides_and_keeps_every_gradient():
    given_ = tokens([1.0, 0.5, 2.0, 0.5, 2.0], [2.0, 2, 2, -2, -2], old=-3.0)
    weights = [1.0, 0.8, 1.3, 0.8, 1.3]
    gradients = [-w * a for w, a in zip(weights, [2, 2, 2, -2, -2], strict=True)]
    losses = [g * logp for g, logp in zip(gradients, given_.logp.tolist(), strict=True)]
    check(cispo, given_, losses, gradients, clipped_low=[1, 3], clipped_high=[2, 4])


def test_cispo_with_clip_low_one_has_no_lower_bound():
    given_ = tokens([1e-3, 0.5, 7.0], [2.0, -2, 1])
    gradients = [-2e-3, 1.0, -5.0]
    losses = [g * logp for g, logp in zip(gradients, given_.logp.tolist(), strict=True)]
    check(cispo, given_, losses, gradients, low=1.0, high=4.0, clipped_high=[2])


@pytest.mark.parametrize("clip_high", [0.3, 3.0])
def test_on_its_own_samples_reinforce_has_no_factor_at_all(clip_high):
    given_ = tokens([1.0, 1.0], [2.0, -3.0], old=-4.0)
    check(reinforce, given_, [8, -12], [-2, 3], high=clip_high)


def test_reinforce_weighs_samples_of_other_weights_by_their_truncated_ratio():
    given_ = tokens([0.1, 1.5, 10.0], [2.0, 1.0, -3.0], old=-4.0)
    logp = given_.logp.tolist()
    gradients = [-0.2, -1.5, 6.0]
    losses = [gradient * value for gradient, value in zip(gradients, logp, strict=True)]
    check(reinforce, given_, losses, gradients, high=1.0, clipped_high=[2])


def test_importance_weights_make_the_expected_gradient_that_of_own_samples():
    """Over a whole vocabulary, tokens drawn from an older policy."""
    logits, old = distributions()
    advantages = torch.linspace(-1, 2, 7, dtype=torch.float64)
    logp = logits.log_softmax(0)
    own = (logp.detach().exp() * -advantages * logp).sum()
    stale = (old.exp() * reinforce(Tokens(logp, old, advantages, torch.arange(7)), 0.2, 1e9).loss).sum()
    (expected,) = torch.autograd.grad(own, logits, retain_graph=True)
    (actual,) = torch.autograd.grad(stale, logits)
    torch.testing.assert_close(actual, expected)


RATIOS = [0.5, 1.0, 1.25, 2.0, 4.0, 10.0]


@pytest.mark.parametrize("delta", [1.3, 3.0])
def test_the_delta_of_trl_above_the_clip_is_the_bound_of_the_dual_clip(delta):
    """Its formula, -min(min(rho, delta) A, clip(rho, 0.8, 1.3) A), by hand for both signs."""
    for sign in (2.0, -2.0):
        losses = [-min(min(rho, delta) * sign, min(max(rho, 0.8), 1.3) * sign) for rho in RATIOS]
        output = DualClipped(delta)(tokens(RATIOS, [sign] * len(RATIOS)), 0.2, 0.3)
        torch.testing.assert_close(output.loss, torch.tensor(losses, dtype=torch.float64))


# ---- SAPO, and another range for old tokens ----


def test_the_soft_gate_has_slope_one_at_its_own_samples_and_closes_to_both_sides():
    """Value 4 / tau * sigmoid(tau (rho - 1)) and slope 4 p (1 - p), times A, by hand."""
    ratios = [1.0, 0.5, 2.0, 1.0, 0.5, 2.0]
    losses, gradients = [], []
    for rho, a in zip(ratios, [2.0] * 3 + [-2.0] * 3, strict=True):
        tau = 1.0 if a > 0 else 1.5
        p = 1 / (1 + math.exp(-tau * (rho - 1)))
        losses.append(-4 / tau * p * a)
        gradients.append(-4 * p * (1 - p) * a * rho)  # d rho / d log policy = rho
    assert gradients[0] == -2
    assert gradients[3] == 2
    check(SoftGated(1.0, 1.5), tokens(ratios, [2.0] * 3 + [-2.0] * 3), losses, gradients)


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan, math.inf])
def test_a_gate_without_a_temperature_is_refused(tau):
    with pytest.raises(ValueError, match=r"SoftGated\.tau_negative must be at least 0\.001"):
        SoftGated(tau_negative=tau)


STALE = [True, False, True, False, True, False]


def test_old_tokens_have_a_clip_range_of_their_own():
    """1.5 is within 0.5 to 2 of old tokens and above 1.3 of fresh ones; 0.6 likewise below."""
    given_ = tokens([1.5, 1.5, 4.0, 0.6, 0.6, 0.6], [1.0, 1, 1, -1, -1, 1])
    given_ = replace(given_, stale=torch.tensor(STALE))
    check(
        StaleClipped(stale_low=0.5, stale_high=1.0),
        given_,
        losses=[-1.5, -1.3, -2, 0.8, 0.6, -0.6],
        gradients=[-1.5, 0, 0, 0, 0.6, -0.6],
        clipped_low=[3],
        clipped_high=[1, 2],
    )


@pytest.mark.parametrize("surrogate", [cispo, reinforce, DualClipped(), sequence_clipped, geometric_clipped])
def test_any_surrogate_reads_a_range_of_each_token(surrogate):
    """One completion of old tokens, one of fresh ones: each as alone under its range."""
    ratios, advantages = [2.0, 0.4, 2.5, 0.4], [1.0, 1.0, -1.0, -1.0]
    both = replace(tokens(ratios, advantages, [0, 0, 1, 1]), stale=torch.tensor([True, True, False, False]))
    found = StaleClipped(0.7, 3.0, surrogate)(both, 0.2, 0.3)
    for rows, low, high in [(slice(0, 2), 0.7, 3.0), (slice(2, 4), 0.2, 0.3)]:
        alone = surrogate(tokens(ratios[rows], advantages[rows], [0, 0]), low, high)
        torch.testing.assert_close(found.loss[rows], alone.loss)
        assert torch.equal(found.clipped_low[rows], alone.clipped_low)
        assert torch.equal(found.clipped_high[rows], alone.clipped_high)


def test_a_step_without_old_tokens_is_that_of_the_surrogate():
    given_ = tokens([1.5, 0.6], [1.0, -1.0])
    assert torch.equal(StaleClipped(9.0, 9.0)(given_, 0.2, 0.3).loss, clipped(given_, 0.2, 0.3).loss)


# ---- GSPO ----


def test_the_sequence_ratio_is_the_geometric_mean_over_the_completion_whatever_the_order_of_rows():
    # completion 7: ratios 2 and 1/2 -> s = 1; completion 3: 2 and 2 -> 2, clipped for A > 0;
    # completion 5: 1/2, 1/2, 1/4 -> 2^(-4/3) = 0.397, clipped for A < 0; completion 9: 4 alone -> 4
    s5 = 2 ** (-4 / 3)
    assert s5 < 0.8
    check(
        sequence_clipped,
        tokens([2.0, 2.0, 0.5, 0.5, 0.5, 2.0, 0.25, 4.0], [1.0, 3, -1, -1, 1, 3, -1, -2], [7, 3, 5, 5, 7, 3, 5, 9]),
        losses=[-1, -3.9, 0.8, 0.8, -1, -3.9, 0.8, 8],
        gradients=[-1, 0, 0, 0, -1, 0, 0, 8],
        clipped_low=[2, 3, 6],
        clipped_high=[1, 5],
    )


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    low=st.sampled_from([0.1, 0.3, 1.0]),
    high=st.sampled_from([0.1, 0.4, 5.0]),
)
def test_the_stop_gradient_form_equals_plain_gspo_where_completions_share_advantage_and_weight(
    scattered_completions, lengths, seed, low, high
):
    index, logp, old, advantages, weights = scattered_completions(lengths, seed)

    plain = torch.zeros((), dtype=torch.float64)  # eq. 5: sum over completions of weight * |y| * -min(s A, clip(s) A)
    for i, length in enumerate(lengths):
        s = ((logp - old)[index == i].sum() / length).exp()
        objective = torch.minimum(s * advantages[i], s.clamp(1 - low, 1 + high) * advantages[i])
        plain = plain - weights[i] * length * objective
    form = sequence_clipped(Tokens(logp, old, advantages[index], index), low, high)
    value = (weights[index] * form.loss).sum()

    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(torch.autograd.grad(value, logp), torch.autograd.grad(plain, logp))


# ---- all of them ----


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_on_the_first_update_every_gradient_is_that_of_reinforce(surrogate):
    given_ = tokens([1.0] * 6, [2.0, -1, 0.5, 3, -4, 0], [0, 1, 1, 0, 2, 2])
    output = surrogate(given_, 0.2, 0.2)
    (gradient,) = torch.autograd.grad(output.loss.sum(), given_.logp)
    torch.testing.assert_close(gradient, -given_.advantages)
    assert not (output.clipped_low | output.clipped_high).any()


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("distance", [-1e4, 1e4])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_ratios_beyond_exp_20_stay_finite(surrogate, distance, advantage):
    logp = torch.tensor([distance], requires_grad=True)
    given_ = Tokens(logp, torch.zeros(1), torch.tensor([advantage]), torch.zeros(1, dtype=torch.long))
    output = surrogate(given_, 0.2, 0.2)
    output.loss.sum().backward()
    assert output.loss.isfinite().all()
    assert logp.grad.isfinite().all()
    torch.testing.assert_close(given_.ratio.item(), math.exp(math.copysign(20, distance)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_micro_batch_without_rows_gives_no_losses(surrogate):
    empty = torch.zeros(0, requires_grad=True)
    output = surrogate(Tokens(empty, empty.detach(), empty.detach(), torch.zeros(0, dtype=torch.long)), 0.2, 0.2)
    assert output.loss.shape == output.clipped_low.shape == output.clipped_high.shape == (0,)
    output.loss.sum().backward()


# ---- KL estimators: values, gradients, and expectations over a whole vocabulary ----


DIFFERENCES = [-2.0, -0.5, 0.0, 0.5, 2.0]


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [
        (k1, lambda x: x, lambda x: 1.0),
        (k2, lambda x: x * x / 2, lambda x: x),
        (k3, lambda x: math.exp(-x) - 1 + x, lambda x: 1 - math.exp(-x)),
    ],
)
def test_values_and_gradients_are_those_of_the_formulas(estimator, value, gradient):
    ref = torch.tensor([-1.0, -0.1, -3.0, -2.0, -5.0], dtype=torch.float64)
    logp = (ref + torch.tensor(DIFFERENCES, dtype=torch.float64)).requires_grad_()
    estimate = estimator(logp, ref)
    torch.testing.assert_close(estimate, torch.tensor([value(x) for x in DIFFERENCES], dtype=torch.float64))
    estimate.sum().backward()
    torch.testing.assert_close(logp.grad, torch.tensor([gradient(x) for x in DIFFERENCES], dtype=torch.float64))


def distributions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, dtype=torch.float64, generator=generator)
    return logits[0].clone().requires_grad_(), logits[1].log_softmax(0)


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_unbiased(estimator):
    logits, ref = distributions()
    logp = logits.log_softmax(0).detach()
    exact = (logp.exp() * (logp - ref)).sum()
    torch.testing.assert_close((logp.exp() * estimator(logp, ref)).sum(), exact)


@pytest.mark.parametrize(
    ("estimator", "divergence"),
    [
        (k1, lambda logp, ref: 0 * logp.sum()),
        (k2, lambda logp, ref: (logp.exp() * (logp - ref)).sum()),  # KL(policy || reference)
        (k3, lambda logp, ref: (ref.exp() * (ref - logp)).sum()),  # KL(reference || policy)
    ],
)
def test_expected_gradients_in_the_loss_are_what_the_docstrings_say(estimator, divergence):
    logits, ref = distributions()
    logp = logits.log_softmax(0)
    sampled = (logp.detach().exp() * estimator(logp, ref)).sum()  # expectation over tokens drawn from the policy
    (actual,) = torch.autograd.grad(sampled, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(divergence(logp, ref), logits)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", [k1, k2, k3])
@pytest.mark.parametrize("distance", [-1e4, 1e4])
def test_far_apart_policies_give_finite_values_and_gradients(estimator, distance):
    logp = torch.tensor([distance], requires_grad=True)
    estimate = estimator(logp, torch.zeros(1))
    torch.testing.assert_close(estimate, estimator(torch.tensor([math.copysign(20.0, distance)]), torch.zeros(1)))
    estimate.sum().backward()
    assert logp.grad.item() == 0


BOUNDED = {-0.9: 0.559603, -2.0: 4.389056, -2.7: 10.0, 11.5: 10.0, 10.5: 9.500028}


def test_the_bounded_k3_stops_at_its_limit_and_has_no_gradient_there():
    logp = torch.tensor(list(BOUNDED), dtype=torch.float64, requires_grad=True)
    estimate = BoundedK3()(logp, torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(estimate, torch.tensor(list(BOUNDED.values()), dtype=torch.float64), rtol=0, atol=1e-6)
    estimate.sum().backward()
    gradients = [1 - math.exp(0.9), 1 - math.exp(2.0), 0, 0, 1 - math.exp(-10.5)]
    torch.testing.assert_close(logp.grad, torch.tensor(gradients, dtype=torch.float64))
    with pytest.raises(ValueError, match="the limit of BoundedK3 must be above 0, got 0"):
        BoundedK3(0)


def kl_in_the_loss(estimator, logp, old, ref, weights):
    zeros = torch.zeros_like(old)
    return Algorithm(kl=estimator, kl_coef=1.0).loss(logp, old, ref, None, zeros, weights, torch.arange(len(old)))


def test_the_unbiased_k3_is_multiplied_by_the_ratio_by_hand():
    """rho * (exp(-x) - 1 + x), whose gradient is rho * x: at rho 2 and x 1, at rho 0.5 and x -1, at rho 1 and x 0.5."""
    logp = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.0 - math.log(2), -2.0 + math.log(2), -0.5], dtype=torch.float64)
    ref = torch.tensor([-2.0, -1.0, -1.0], dtype=torch.float64)
    output = kl_in_the_loss(k3_unbiased, logp, old, ref, torch.ones(3, dtype=torch.float64))
    expected = 2 * math.exp(-1) + 0.5 * (math.e - 2) + math.exp(-0.5) - 0.5
    torch.testing.assert_close(output.loss.item(), expected)
    torch.testing.assert_close(output.metrics["kl_ref"].item(), expected)
    output.loss.backward()
    torch.testing.assert_close(logp.grad, torch.tensor([2.0, -0.5, 0.5], dtype=torch.float64))


def test_the_unbiased_k3_has_value_and_gradient_of_the_divergence_whoever_drew_the_tokens():
    logits, ref = distributions()
    logp = logits.log_softmax(0)
    old = torch.linspace(-1, 1, 7, dtype=torch.float64).log_softmax(0)
    divergence = (logp.exp() * (logp - ref)).sum()
    for drawn_by in (old, logp.detach()):
        estimate = kl_in_the_loss(k3_unbiased, logp, drawn_by, ref, drawn_by.exp()).loss
        torch.testing.assert_close(estimate, divergence)
        (actual,) = torch.autograd.grad(estimate, logits, retain_graph=True)
        (expected,) = torch.autograd.grad(divergence, logits, retain_graph=True)
        torch.testing.assert_close(actual, expected)


# ---- token weights: sums to one over ranks and mini-batches, nothing to weigh ----


RULES = [sequence_mean, token_mean, Constant(10)]
COMPLETIONS = st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=12)


def weights(rule, lengths, valid=None, **kwargs):
    valid = [True] * len(lengths) if valid is None else valid
    return rule(torch.tensor(lengths, dtype=torch.long), torch.tensor(valid, dtype=torch.bool), **kwargs)


def test_sequence_mean_gives_every_completion_the_same_share():
    torch.testing.assert_close(weights(sequence_mean, [1, 2, 5]), torch.tensor([1 / 3, 1 / 6, 1 / 15]))


def test_token_mean_gives_every_token_the_same_share():
    torch.testing.assert_close(weights(token_mean, [1, 2, 5]), torch.tensor([1 / 8, 1 / 8, 1 / 8]))


def test_constant_divides_by_completions_and_limit():
    torch.testing.assert_close(weights(Constant(10), [1, 2, 5]), torch.tensor([1 / 30, 1 / 30, 1 / 30]))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (sequence_mean, [1 / 2, 0, 0, 1 / 8]),
        (token_mean, [1 / 5, 0, 0, 1 / 5]),
        (Constant(10), [1 / 20, 0, 0, 1 / 20]),
    ],
)
def test_invalid_and_empty_completions_weigh_nothing_and_are_counted_nowhere(rule, expected):
    actual = weights(rule, [1, 2, 0, 4], [True, False, True, True])
    torch.testing.assert_close(actual, torch.tensor(expected))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("lengths", "valid"), [([3, 4], [False, False]), ([0, 0], [True, True]), ([], [])])
def test_without_anything_to_weigh_all_is_zero(rule, lengths, valid):
    actual = weights(rule, lengths, valid)
    assert actual.tolist() == [0.0] * len(lengths)
    assert actual.dtype == torch.float32


@pytest.mark.parametrize("rule", RULES[:2])
@given(completions=COMPLETIONS)
def test_weights_of_all_tokens_add_up_to_one(rule, completions):
    lengths, valid = [n for n, _ in completions], [v for _, v in completions]
    total = (weights(rule, lengths, valid) * torch.tensor(lengths)).sum()
    anything = any(n and v for n, v in completions)
    torch.testing.assert_close(total, torch.tensor(1.0 if anything else 0.0))


@given(completions=COMPLETIONS)
def test_weights_of_constant_add_up_to_mean_length_over_limit(completions):
    lengths, valid = [n for n, _ in completions], [v for _, v in completions]
    counted = [n for n, v in completions if n and v]
    total = (weights(Constant(10), lengths, valid) * torch.tensor(lengths)).sum()
    torch.testing.assert_close(total, torch.tensor(sum(counted) / max(len(counted), 1) / 10))


@pytest.mark.parametrize("rule", RULES)
def test_ranks_share_one_sum(rule, over_ranks):
    lengths, valid = [1, 2, 0, 4, 9, 3], [True, True, True, False, True, True]
    whole = weights(rule, lengths, valid)

    def run(part, all_reduce):
        return weights(rule, lengths[part], valid[part], all_reduce=all_reduce)

    parts = over_ranks(run, [slice(0, 1), slice(1, 4), slice(4, 6)])
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)


def test_a_completion_longer_than_the_limit_of_constant_is_an_error():
    with pytest.raises(ValueError, match=r"11 tokens, above the 10 .*token_weights\.init_args\.max_completion_tokens"):
        weights(Constant(10), [3, 11])


def test_constant_needs_a_positive_limit():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Constant(0)


# ---- advantages ----


def test_advantages_are_held_within_their_limit():
    algorithm = Algorithm(advantage=raw, advantage_limit=5.0)
    rewards, valid = torch.tensor([[9.0, -7.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool)
    assert algorithm.token_advantages(rewards, valid, torch.tensor([1, 2, 1])).tolist() == [5, -5, -5, 2]
    with pytest.raises(ValueError, match="advantage_limit must be above 0"):
        Algorithm(advantage_limit=0)
