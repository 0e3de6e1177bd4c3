"""Baselines of least variance, by hand, against loops, and by the variance itself."""

import math

import pytest
import torch
from hypothesis import given, strategies as st

from longrl.algorithms import Algorithm, Outcomes, group_centered, length_centered, optimal_token_baseline
from longrl.types import SamplingParams


def outcomes(rewards, lengths, valid=None, **options) -> Outcomes:
    rewards = torch.tensor(rewards, dtype=torch.float64)
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else torch.tensor(valid)
    return Outcomes(rewards, valid, torch.tensor(lengths), **options)


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)


# ---- OPO: weighted by lengths ----


def test_the_baseline_is_the_mean_reward_of_a_token():
    # (3 * 1 + 1 * 0) / 4 = 0.75; (2 * 4 + 6 * 0) / 8 = 1
    close(length_centered(outcomes([[1.0, 0.0], [4.0, 0.0]], [3, 1, 2, 6])), [[0.25, -0.75], [3, -1]])


def test_where_all_are_as_long_it_is_the_groups_mean():
    given_ = outcomes([[1.0, 0.0, 0.3], [0.5, 0.5, 2.0]], [4] * 6)
    torch.testing.assert_close(length_centered(given_), group_centered(given_))


def test_completions_that_are_not_valid_or_empty_are_in_no_baseline():
    given_ = outcomes([[1.0, math.nan, 0.0, 7.0]], [3, 5, 1, 0], [[True, False, True, True]])
    close(length_centered(given_), [[0.25, 0, -0.75, 0]])
    assert (length_centered(outcomes([[1.0, 0.0]], [0, 0])) == 0).all()


@pytest.mark.parametrize("reward", [0.1, 1 / 3, -0.7, 1e6])
def test_equal_rewards_get_exact_zeros(reward):
    rewards = torch.tensor([[reward] * 3])  # float32, as all rewards
    given_ = Outcomes(rewards, torch.ones(1, 3, dtype=torch.bool), torch.tensor([7, 1000, 33]))
    assert (length_centered(given_) == 0).all()


# ---- of each token ----


def test_a_tokens_baseline_weighs_returns_by_the_gradients_so_far():
    """Norms 1, 3 and 1, 1, 2: at token 0 the baseline is (1 * 1 + 0 * 1) / 2, at token 1 4 / (4 + 2), then 0 alone."""
    norms = torch.tensor([1.0, 3.0, 1.0, 1.0, 2.0])
    given_ = outcomes([[1.0, 0.0]], [2, 3], gradient_norms=norms)
    close(optimal_token_baseline(given_), [0.5, 1 / 3, -0.5, -2 / 3, 0.0])


def test_equal_norms_and_lengths_give_the_groups_mean():
    given_ = outcomes([[1.0, 0.0, 0.5], [0.0, 3.0, 0.0]], [2] * 6, gradient_norms=torch.ones(12))
    close(optimal_token_baseline(given_), group_centered(given_).flatten().repeat_interleave(2).tolist())


GROUPS = st.lists(
    st.lists(st.tuples(st.sampled_from([0.0, 1.0, 0.5]), st.booleans(), st.integers(0, 3)), min_size=2, max_size=2),
    min_size=1,
    max_size=3,
)


@given(groups=GROUPS, seed=st.integers(0, 99))
def test_baselines_of_tokens_equal_the_loops(groups, seed):
    flat = [one for group in groups for one in group]
    lengths = [length for *_, length in flat]
    norms = torch.rand(sum(lengths), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    penalty = torch.linspace(-1, 1, sum(lengths), dtype=torch.float64)
    given_ = outcomes(
        [[reward for reward, *_ in group] for group in groups],
        lengths,
        [[valid for _, valid, _ in group] for group in groups],
        gradient_norms=norms,
        kl_penalty=penalty,
    )
    parts, costs = norms.split(lengths), penalty.split(lengths)
    expected = []
    for index, (reward, valid, length) in enumerate(flat):
        for t in range(length):
            top = bottom = 0.0
            first = index // 2 * 2
            for other in (first, first + 1):
                if flat[other][1] and lengths[other] > t:
                    energy = float(parts[other][: t + 1].sum())
                    top += energy * (flat[other][0] - float(costs[other][t:].sum()))
                    bottom += energy
            expected.append(reward - float(costs[index][t:].sum()) - top / (bottom + 1e-8) if valid else 0.0)
    actual = optimal_token_baseline(given_)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_the_baseline_is_that_of_least_variance():
    """One token, a policy over 5: the sum over other baselines of E |(r - b) grad log pi|^2 is least at this one."""
    generator = torch.Generator().manual_seed(2)
    logits, rewards = torch.randn(2, 5, dtype=torch.float64, generator=generator)
    pi = logits.softmax(0)
    norms = 1 - 2 * pi + pi.square().sum()
    # a group in which every token occurs as often as the policy draws it
    counts = (pi * 10_000).round().long()
    drawn = torch.repeat_interleave(torch.arange(5), counts)
    given_ = Outcomes(
        rewards[drawn][None],
        torch.ones(1, len(drawn), dtype=torch.bool),
        torch.ones_like(drawn),
        gradient_norms=norms[drawn],
    )
    baseline = (rewards[drawn] - optimal_token_baseline(given_))[0]

    def second_moment(b):
        return (pi * (rewards - b).square() * norms).sum()

    for other in (baseline - 0.05, baseline + 0.05, (pi * rewards).sum()):
        assert second_moment(baseline) < second_moment(other)


def test_norms_are_asked_for_by_name_and_are_of_tokens():
    with pytest.raises(ValueError, match=r"needs the norms of the tokens' gradients, got none; set model\.algorithm"):
        optimal_token_baseline(outcomes([[1.0, 0.0]], [1, 1]))
    algorithm = Algorithm(advantage=optimal_token_baseline)
    algorithm.validate(SamplingParams(2), 1)
    with pytest.raises(ValueError, match=r"needs num_generations >= 2"):
        algorithm.validate(SamplingParams(1), 1)
    with pytest.raises(ValueError, match=r"got optimal_token_baseline as model\.algorithm\.advantage"):
        algorithm.validate_steps(2, 1)
