"""Surrogates of whole completions, by hand and against the plain formulas."""

import math

import pytest
import torch
from hypothesis import given, strategies as st

from longrl.algorithms import SequenceDualClipped, Tokens, geometric_clipped, sequence_clipped
from tests.algorithms.test_losses import check, tokens

# completion 0: ratios 4, 4; completion 1: 2, 2; completion 2: 1/2, 1/2; completion 3: 4 alone
RATIOS = [4.0, 4.0, 2.0, 2.0, 0.5, 0.5, 4.0]
INDEX = [0, 0, 1, 1, 2, 2, 3]


def test_the_dual_clip_of_gspo_takes_the_gradient_of_bad_completions_far_too_high():
    check(
        SequenceDualClipped(bound=3.0),
        tokens(RATIOS, [-1.0, -1, -1, -1, -1, -1, 2], INDEX),
        losses=[3, 3, 2, 2, 0.8, 0.8, -2.6],
        gradients=[0, 0, 2, 2, 0, 0, 0],
        clipped_low=[4, 5],
        clipped_high=[0, 1, 6],
    )


def test_without_a_bound_it_is_gspo_up_to_the_limit_of_its_ratio():
    given_ = tokens(RATIOS, [-1.0, -1, -1, -1, 1, 1, 2], INDEX)
    free = SequenceDualClipped(bound=None)(given_, 0.2, 0.3)
    torch.testing.assert_close(free.loss, sequence_clipped(given_, 0.2, 0.3).loss)
    # log 4 = 1.39 is held at 1, and has no gradient there
    check(
        SequenceDualClipped(bound=None, max_log_ratio=1.0),
        given_,
        losses=[math.e, math.e, 2, 2, -0.5, -0.5, -2.6],
        gradients=[0, 0, 2, 2, -0.5, -0.5, 0],
        clipped_high=[6],
    )


@pytest.mark.parametrize("bound", [1.0, 0.5, math.nan])
def test_a_bound_of_one_or_less_is_refused(bound):
    with pytest.raises(ValueError, match=r"SequenceDualClipped must be above 1, or null for none, got"):
        SequenceDualClipped(bound)


def test_gmpo_clips_the_tokens_and_then_takes_their_geometric_mean():
    # completion 0, A = 1: logs 1 (held at 0.5) and -1, exp(-0.25); completion 1, A = -1: 1 and -1 (at -0.5), exp(0.25)
    e = math.exp(0.25)
    check(
        geometric_clipped,
        tokens([math.e, 1 / math.e, math.e, 1 / math.e], [1.0, 1, -1, -1], [0, 0, 1, 1]),
        losses=[-1 / e, -1 / e, e, e],
        gradients=[0, -1 / e, e, 0],
        low=0.5,
        high=0.5,
        clipped_low=[3],
        clipped_high=[0],
    )


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    low=st.sampled_from([0.1, 0.4]),
    high=st.sampled_from([0.1, 0.4, 5.0]),
)
def test_the_stop_gradient_form_equals_plain_gmpo_where_completions_share_advantage_and_weight(
    scattered_completions, lengths, seed, low, high
):
    """Sum over completions of w * |y| * -A * exp(mean(sign * min(sign * x, sign * clip(x)))), x = log rho."""
    index, logp, old, advantages, weights = scattered_completions(lengths, seed)

    plain = torch.zeros((), dtype=torch.float64)
    for i, length in enumerate(lengths):
        x = (logp - old)[index == i]
        sign = advantages[i].sign()
        bounded = sign * torch.minimum(sign * x, sign * x.clamp(-low, high))
        plain = plain - weights[i] * length * advantages[i] * (bounded.sum() / length).exp()
    form = geometric_clipped(Tokens(logp, old, advantages[index], index), low, high)
    value = (weights[index] * form.loss).sum()

    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(torch.autograd.grad(value, logp), torch.autograd.grad(plain, logp))
