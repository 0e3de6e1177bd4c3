"""Token weights: by hand, sums to one over ranks and mini-batches, nothing to weigh."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longrl.algorithms import Constant, sequence_mean, token_mean

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
