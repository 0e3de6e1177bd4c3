"""Surrogates: losses and gradients by hand, clipping for both signs of the advantage, completions mixed up."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longrl.algorithms import DualClipped, Tokens, cispo, clipped, reinforce, sequence_clipped

SURROGATES = [clipped, DualClipped(), sequence_clipped, cispo, reinforce]


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


def test_reinforce_has_no_ratio_and_no_clip():
    given_ = tokens([0.1, 10.0], [2.0, -3.0], old=-4.0)
    logp = given_.logp.tolist()
    check(reinforce, given_, [-2 * logp[0], 3 * logp[1]], [-2, 3])


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
    lengths, seed, low, high
):
    generator = torch.Generator().manual_seed(seed)
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    index = index[torch.randperm(len(index), generator=generator)]
    logp, old = torch.randn(2, len(index), dtype=torch.float64, generator=generator) / 2
    advantages, weights = torch.randn(2, len(lengths), dtype=torch.float64, generator=generator)
    logp.requires_grad_()

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
