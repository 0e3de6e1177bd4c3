"""Advantages from the parts of a reward, by hand and over ranks."""

import math
from dataclasses import replace

import pytest
import torch

from longrl.algorithms import Algorithm, Outcomes, group_normalized, part_normalized, single_rank
from longrl.types import SamplingParams

NAN = math.nan


def outcomes(parts, weights, valid=None, **options) -> Outcomes:
    """Of parts {name: [P, G]} and weights {name: weight}."""
    values = {name: torch.tensor(of_part) for name, of_part in parts.items()}
    rewards = torch.stack([weights[name] * part.nan_to_num(0.0) for name, part in values.items()]).sum(0)
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else torch.tensor(valid)
    of_groups = {name: torch.full((len(rewards),), weight).double() for name, weight in weights.items()}
    lengths = torch.full((rewards.numel(),), 2)
    return Outcomes(rewards, valid, lengths, parts=values, part_weights=of_groups, **options)


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_every_part_is_normalised_in_its_group_and_the_sum_over_the_batch_by_hand():
    """Accuracy 1 and 0 is +-1 / sqrt(2), whatever the spread: so is a format of 0.1 and 0; group 2 has equal ones."""
    given = outcomes(
        {"accuracy": [[1.0, 0.0], [1.0, 1.0]], "format": [[0.1, 0.0], [0.2, 0.2]]}, {"accuracy": 1.0, "format": 0.5}
    )
    high, low = 0.5 / (math.sqrt(0.5) + 1e-4), 0.05 / (math.sqrt(0.005) + 1e-4)
    total = high + 0.5 * low
    std = math.sqrt(2 * total**2 / 3)
    close(part_normalized(given), [[total / (std + 1e-4), -total / (std + 1e-4)], [0.0, 0.0]])


def test_answers_that_one_sum_makes_equal_stay_apart():
    """Right but unreadable, wrong but well written: reward 1 each."""
    given = outcomes({"accuracy": [[1.0, 0.0, 0.0]], "format": [[0.0, 1.0, 0.0]]}, {"accuracy": 1.0, "format": 1.0})
    by_sum, by_part = group_normalized(given)[0], part_normalized(given)[0]
    assert by_sum[0] == by_sum[1]
    assert by_part[0] == pytest.approx(by_part[1])
    weighted = outcomes({"accuracy": [[0.5, 0.0, 0.0]], "format": [[0.0, 1.0, 0.0]]}, {"accuracy": 2.0, "format": 1.0})
    by_sum, by_part = group_normalized(weighted)[0], part_normalized(weighted)[0]
    assert by_sum[0] == by_sum[1]
    assert by_part[0] > by_part[1]


def test_a_part_that_does_not_apply_counts_nothing_and_is_in_no_mean():
    alone = outcomes({"accuracy": [[1.0, 0.0, 0.0]]}, {"accuracy": 1.0})
    beside = outcomes({"accuracy": [[1.0, 0.0, 0.0]], "box": [[NAN, NAN, NAN]]}, {"accuracy": 1.0, "box": 5.0})
    torch.testing.assert_close(part_normalized(beside), part_normalized(alone))
    for_two = outcomes({"box": [[0.2, 0.4, NAN]]}, {"box": 1.0})
    assert part_normalized(for_two)[0, 2] == 0
    once = outcomes({"box": [[0.2, NAN, NAN]]}, {"box": 1.0})
    assert (part_normalized(once) == 0).all()


def test_a_group_with_equal_parts_gets_exact_zeros_beside_others():
    given = outcomes(
        {"accuracy": [[0.1] * 3, [0.1, 0.7, 0.3]], "format": [[1 / 3] * 3] * 2}, {"accuracy": 1.0, "format": 0.1}
    )
    advantages = part_normalized(given)
    assert (advantages[0] == 0).all()
    assert (advantages[1] != 0).all()


@pytest.mark.parametrize("poison", [NAN, math.inf, 1e9])
def test_invalid_completions_get_zero_and_change_no_other(poison):
    parts = {"accuracy": [[1.0, poison, 0.0, 0.5]], "format": [[0.0, poison, 1.0, 1.0]]}
    weights = {"accuracy": 1.0, "format": 0.5}
    advantages = part_normalized(outcomes(parts, weights, [[True, False, True, True]]))
    without = {name: [[group[0], *group[2:]] for group in values] for name, values in parts.items()}
    assert advantages[0, 1] == 0
    torch.testing.assert_close(advantages[:, [0, 2, 3]], part_normalized(outcomes(without, weights)))


def test_ranks_normalise_together_and_one_may_have_no_group(over_ranks):
    generator = torch.Generator().manual_seed(5)
    values = torch.rand(2, 5, 3, generator=generator)
    values[1, 2] = NAN
    valid = torch.rand(5, 3, generator=generator) > 0.2

    def run(rows, all_reduce):
        parts = {"accuracy": values[0, rows], "format": values[1, rows]}
        weights = {name: torch.full((len(valid[rows]),), 0.3).double() for name in parts}
        if not len(valid[rows]):
            parts, weights = {}, {}
        rewards = 0.3 * values[:, rows].nan_to_num(0.0).sum(0)
        lengths = torch.ones(rewards.numel(), dtype=torch.long)
        return part_normalized(
            Outcomes(rewards, valid[rows], lengths, parts=parts, part_weights=weights, all_reduce=all_reduce)
        )

    whole = run(slice(0, 5), single_rank)
    parts = over_ranks(run, [slice(0, 1), slice(1, 4), slice(4, 4), slice(4, 5)])
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)


def test_a_reward_that_is_not_the_sum_of_its_parts_is_an_error_on_every_rank(over_ranks):
    def run(bonus, all_reduce):
        given = outcomes({"accuracy": [[1.0, 0.0]]}, {"accuracy": 0.1}, all_reduce=all_reduce)
        with pytest.raises(
            ValueError, match=r"rewards of 2 of 4 completions are not the sum.*set model\.algorithm\.adv"
        ):
            part_normalized(replace(given, rewards=given.rewards + bonus))

    over_ranks(run, [0.0, 0.5])
    with pytest.raises(ValueError, match=r"rewards of 2 of 2 completions are not the sum"):
        part_normalized(Outcomes(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), torch.ones(2).long()))


def test_large_parts_that_cancel_each_other_out_are_still_the_reward():
    """In float32 what is left of them is rounded by their size, not by its own."""
    given = outcomes({"gain": [[54321.678, 0.7]], "cost": [[54321.0, 0.1]]}, {"gain": 0.3, "cost": -0.3})
    exact = 0.3 * (54321.678 - 54321.0)
    assert abs(float(given.rewards[0, 0]) - exact) > 2e-4 * (1 + exact)
    assert part_normalized(given).isfinite().all()


def test_a_kl_penalty_is_no_part_of_the_reward():
    for options in ({"kl_coef": 0.1}, {"kl_placement": "reward"}):
        Algorithm(advantage=part_normalized, **options).validate(SamplingParams(2), 1)
    with pytest.raises(ValueError, match=r"KL penalty is none, got kl_placement=reward; set .*kl_placement to loss"):
        Algorithm(advantage=part_normalized, kl_coef=0.1, kl_placement="reward").validate(SamplingParams(2), 1)
