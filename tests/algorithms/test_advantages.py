"""Advantages against numbers worked out by hand and against loops over Python floats; which groups train."""

import math

import pytest
import torch
from hypothesis import given, strategies as st

from longrl.algorithms import (
    Algorithm,
    InOrder,
    Outcomes,
    batch_normalized,
    drop_uniform,
    greedy_centered,
    group_centered,
    group_centered_batch_normalized,
    group_centered_global_std,
    group_centered_rescaled,
    group_normalized,
    keep_all,
    leave_one_out,
    mask_truncated,
    mask_truncated_loss,
    raw,
    single_rank,
)
from longrl.types import Completion, Group, Prompt, Row

GROUP_FUNCTIONS = [group_normalized, group_centered, group_centered_rescaled, group_centered_global_std, leave_one_out]


def outcomes(rewards, valid=None, lengths=None, **kwargs) -> Outcomes:
    rewards = torch.tensor(rewards, dtype=torch.float32)
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else torch.tensor(valid)
    lengths = torch.full((rewards.numel(),), 2) if lengths is None else torch.tensor(lengths)
    return Outcomes(rewards, valid, lengths, **kwargs)


def close(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=atol)


# ---- by hand ----


def test_the_global_deviation_is_flow_grpos():
    """Figures of the released `PerPromptStatTracker(global_std=True)`: uniform groups get 0."""
    rewards = [[0.2, 0.9, 0.4, 0.5], [1.0, 1.0, 1.0, 1.0], [0.0, 0.3, 0.31, 0.29]]
    expected = [[-0.831101, 1.108135, -0.277034, 0], [0, 0, 0, 0], [-0.623326, 0.207775, 0.235479, 0.180072]]
    close(group_centered_global_std(outcomes(rewards)), expected, atol=2e-6)


def test_the_global_deviation_is_of_the_valid_rewards_of_all_ranks():
    """This rank has rewards 0 and 1 and one that is not valid, another 2, 4 and 6: mean 2.6, squares 23.2 around it."""
    sums = iter([torch.tensor([5.0, 13.0]), torch.tensor(23.2)])
    mine = outcomes([[0.0, 1.0, 9.0]], [[True, True, False]], all_reduce=lambda _: next(sums))
    spread = math.sqrt(23.2 / 5) + 1e-4
    close(group_centered_global_std(mine), [[-0.5 / spread, 0.5 / spread, 0.0]])


def test_group_normalized_divides_by_the_unbiased_deviation_of_the_group():
    # group 1: mean 0.25, deviations (0.75, -0.25, -0.25, -0.25), variance 0.75 / 3 = 0.25, std 0.5
    # group 2: mean 4, deviations (-3, -1, 1, 3), variance 20 / 3
    std = math.sqrt(20 / 3)
    expected = [[1.5, -0.5, -0.5, -0.5], [-3 / std, -1 / std, 1 / std, 3 / std]]
    close(group_normalized(outcomes([[1.0, 0, 0, 0], [1.0, 3, 5, 7]])), expected, atol=1e-5)


def test_eps_is_added_to_the_deviation_not_to_the_variance():
    # std of (0, 1) is sqrt(1/2)
    expected = 0.5 / (math.sqrt(0.5) + 0.25)
    close(group_normalized(outcomes([[0.0, 1.0]]), eps=0.25), [[-expected, expected]])


def test_group_centered_subtracts_the_mean_only():
    close(group_centered(outcomes([[1.0, 0, 0, 0], [1.0, 3, 5, 7]])), [[0.75, -0.25, -0.25, -0.25], [-3, -1, 1, 3]])


def test_gpg_makes_up_for_groups_without_a_signal():
    """Of 8 valid completions 3 are in the group whose rewards differ."""
    valid = [[True, True, True], [True, True, True], [True, True, False]]
    given_ = outcomes([[0.0, 0, 0], [1.0, 0, 0.5], [1.0, 1, 0]], valid)
    close(group_centered_rescaled(given_), [[0, 0, 0], [0.5 * 8 / 3, -0.5 * 8 / 3, 0], [0, 0, 0]])


def test_gpg_counts_groups_on_all_ranks():
    """This rank has a group of 2 with a signal, another 6 completions, 2 of them in one."""
    sums = iter([torch.tensor([8.0, 4.0])])
    given_ = outcomes([[1.0, 0.0]], all_reduce=lambda _: next(sums))
    close(group_centered_rescaled(given_), [[1.0, -1.0]])


def test_leave_one_out_subtracts_the_mean_of_the_others():
    close(leave_one_out(outcomes([[3.0, 0, 6]])), [[0, -4.5, 4.5]])  # 3 - 3, 0 - 4.5, 6 - 1.5


def test_greedy_centered_subtracts_the_greedy_reward_of_the_prompt():
    given_ = outcomes([[1.0, 0.0], [0.5, 0.0]], baseline=torch.tensor([1.0, 0.25]))
    close(greedy_centered(given_), [[0, -1], [0.25, -0.25]])


def test_greedy_centered_without_greedy_rewards_names_the_flag():
    with pytest.raises(ValueError, match=r"set model\.algorithm\.greedy_baseline"):
        greedy_centered(outcomes([[1.0]]))


def test_raw_is_the_reward():
    close(raw(outcomes([[1.0, -2.0]])), [[1, -2]])


def test_batch_normalized_whitens_over_tokens_so_long_completions_count_for_more():
    # tokens: 0, 4, 4, 4 -> mean 3, variance (9 + 1 + 1 + 1) / 4 = 3
    s = math.sqrt(3)
    close(batch_normalized(outcomes([[0.0], [4.0]], lengths=[1, 3])), [-3 / s, 1 / s, 1 / s, 1 / s])


def test_batch_normalized_charges_each_token_with_the_penalty_still_to_come():
    # completion 1: reward 1 on its last token, penalties .1 .2 .3 -> returns 1-.6, 1-.5, 1-.3; completion 2: 0-.4
    returns = [0.4, 0.5, 0.7, -0.4]
    mean = sum(returns) / 4
    std = math.sqrt(sum((r - mean) ** 2 for r in returns) / 4)
    given_ = outcomes([[1.0, 0.0]], lengths=[3, 1], kl_penalty=torch.tensor([0.1, 0.2, 0.3, 0.4]))
    close(batch_normalized(given_), [(r - mean) / std for r in returns])


def test_group_centered_batch_normalized_whitens_centered_rewards_over_tokens():
    # group 1 centered: .5 (1 token), -.5 (2 tokens); group 2, equal rewards: 0 (1), 0 (1)
    tokens = [0.5, -0.5, -0.5, 0.0, 0.0]
    std = math.sqrt(sum((t + 0.1) ** 2 for t in tokens) / 5)
    given_ = outcomes([[1.0, 0.0], [7.0, 7.0]], lengths=[1, 2, 1, 1])
    close(group_centered_batch_normalized(given_), [(t + 0.1) / std for t in tokens])


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (raw, [[0.4, -0.4]]),
        (group_centered, [[0.4, -0.4]]),
        (leave_one_out, [[0.8, -0.8]]),
        (group_normalized, [[math.sqrt(0.5), -math.sqrt(0.5)]]),
    ],
)
def test_functions_of_the_completion_take_its_whole_penalty_off_the_reward(function, expected):
    given_ = outcomes([[1.0, 0.0]], lengths=[3, 1], kl_penalty=torch.tensor([0.1, 0.2, 0.3, 0.4]))
    close(function(given_), expected, atol=2e-6)


# ---- edges ----


@pytest.mark.parametrize("reward", [0.1, 1 / 3, -0.7, 1e6, 0.0])
@pytest.mark.parametrize("function", GROUP_FUNCTIONS)
@pytest.mark.parametrize("size", [2, 3, 7, 16])
def test_a_group_with_equal_rewards_gets_exact_zeros(function, reward, size):
    assert (function(outcomes([[reward] * size])) == 0).all()


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e6])
@pytest.mark.parametrize("function", [batch_normalized, group_centered_batch_normalized])
def test_a_batch_with_equal_rewards_gets_exact_zeros(function, reward):
    given_ = outcomes([[reward] * 3] * 3, lengths=list(range(9)))
    assert (function(given_) == 0).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e9])
@pytest.mark.parametrize("function", [*GROUP_FUNCTIONS, raw, greedy_centered])
def test_invalid_completions_get_zero_and_change_no_other(function, poison):
    kwargs = {"baseline": torch.tensor([0.25])}
    with_invalid = outcomes([[1.0, poison, 0.0, 0.5]], [[True, False, True, True]], **kwargs)
    kl_penalty = torch.tensor([0.0, 0.0, poison, poison, 0.0, 0.0, 0.0, 0.0])
    with_penalty = outcomes([[1.0, poison, 0, 0.5]], [[True, False, True, True]], kl_penalty=kl_penalty, **kwargs)
    without = function(outcomes([[1.0, 0.0, 0.5]], **kwargs))
    for given_ in (with_invalid, with_penalty):
        advantages = function(given_)
        assert advantages[0, 1] == 0
        torch.testing.assert_close(advantages[:, [0, 2, 3]], without)


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e9])
@pytest.mark.parametrize("function", [batch_normalized, group_centered_batch_normalized])
def test_tokens_of_invalid_completions_enter_no_whitening(function, poison):
    kl_penalty = torch.tensor([0.1, poison, poison, 0.2, 0.3])
    given_ = outcomes([[1.0, poison, 0.0]], [[True, False, True]], lengths=[1, 2, 2], kl_penalty=kl_penalty)
    alone = outcomes([[1.0, 0.0]], lengths=[1, 2], kl_penalty=torch.tensor([0.1, 0.2, 0.3]))
    advantages = function(given_)
    assert advantages[1:3].tolist() == [0, 0]
    torch.testing.assert_close(advantages[[0, 3, 4]], function(alone))


@pytest.mark.parametrize("function", GROUP_FUNCTIONS)
def test_a_group_with_one_valid_completion_gets_zeros(function):
    assert (function(outcomes([[1.0, 5.0, 3.0]], [[False, True, False]])) == 0).all()


@pytest.mark.parametrize("function", [*GROUP_FUNCTIONS, raw, batch_normalized, group_centered_batch_normalized])
def test_without_any_valid_completion_all_is_zero(function):
    advantages = function(outcomes([[1.0, math.nan]], [[False, False]]))
    assert (advantages == 0).all()
    assert advantages.numel() in (2, 4)


@pytest.mark.parametrize("function", [batch_normalized, group_centered_batch_normalized])
def test_a_rollout_of_empty_completions_has_no_tokens(function):
    assert function(outcomes([[1.0, 0.0]], lengths=[0, 0])).shape == (0,)


# ---- against loops ----

ROLLOUTS = st.integers(1, 4).flatmap(
    lambda size: st.lists(
        st.lists(
            st.tuples(st.sampled_from([0.0, 0.1, 1.0, -0.5, 0.9]), st.booleans(), st.integers(0, 3)),
            min_size=size,
            max_size=size,
        ),
        min_size=1,
        max_size=4,
    )
)


def reference(name: str, groups: list, penalties: list[float]) -> list[float]:
    """Advantages per token, by loops; a group is a list of (reward, valid, length)."""
    start, per_token, ok, all_scores = 0, [], [], []
    for group in groups:
        returns = []  # [G][t]
        for reward, valid, length in group:
            mine = penalties[start : start + length] if valid else [0.0] * length
            start += length
            to_go = [reward - sum(mine[t:]) for t in range(length)]
            returns.append((reward - sum(mine), to_go))
        scores = [score for (score, _), (_, valid, _) in zip(returns, group, strict=True) if valid]
        all_scores += scores
        mean = sum(scores) / len(scores) if scores else 0.0
        spread = math.sqrt(sum((s - mean) ** 2 for s in scores) / (len(scores) - 1)) if len(scores) > 1 else 0.0
        for (score, to_go), (_, valid, length) in zip(returns, group, strict=True):
            others = len(scores) - 1
            value = {
                "group_centered": [score - mean] * length,
                "group_normalized": [(score - mean) / (spread + 1e-6)] * length,
                "group_centered_global_std": [score - mean] * length,
                "group_centered_rescaled": [score - mean] * length,
                "leave_one_out": [score - (sum(scores) - score) / others if others > 0 else 0.0] * length,
                "raw": [score] * length,
                "batch_normalized": to_go,
                "group_centered_batch_normalized": [score - mean] * length,
            }[name]
            per_token += value if valid else [0.0] * length
            ok += [valid] * length
    if "global" in name:
        mean = sum(all_scores) / max(len(all_scores), 1)
        spread = math.sqrt(sum((s - mean) ** 2 for s in all_scores) / max(len(all_scores), 1))
        per_token = [value / (spread + 1e-4) for value in per_token]
    if "rescaled" in name:
        contrasting = 0
        for group in groups:
            scores = all_scores[: sum(valid for _, valid, _ in group)]
            all_scores = all_scores[len(scores) :] + scores
            contrasting += len(scores) * (len(set(scores)) > 1)
        per_token = [value * len(all_scores) / max(contrasting, 1) for value in per_token]
    if "batch" in name:
        kept = [v for v, valid in zip(per_token, ok, strict=True) if valid]
        mean = sum(kept) / max(len(kept), 1)
        std = math.sqrt(sum((v - mean) ** 2 for v in kept) / max(len(kept), 1))
        per_token = [(v - mean) / (std + 1e-8) if valid else 0.0 for v, valid in zip(per_token, ok, strict=True)]
    return per_token


@pytest.mark.parametrize(
    "function", [*GROUP_FUNCTIONS, raw, batch_normalized, group_centered_batch_normalized], ids=lambda f: f.__name__
)
@given(groups=ROLLOUTS, seed=st.integers(0, 99), in_reward=st.booleans())
def test_advantages_per_token_equal_the_loops(function, groups, seed, in_reward):
    rewards = torch.tensor([[r for r, _, _ in group] for group in groups], dtype=torch.float64)
    valid = torch.tensor([[v for _, v, _ in group] for group in groups])
    lengths = torch.tensor([n for group in groups for _, _, n in group])
    # eighths: exact sums, so that equal returns are equal in both orders of summation
    kl = torch.randint(-8, 9, (int(lengths.sum()),), generator=torch.Generator().manual_seed(seed)).double() / 8
    algorithm = Algorithm(advantage=function, kl_coef=0.5 if in_reward else 0.0, kl_placement="reward")
    actual = algorithm.token_advantages(rewards, valid, lengths, kl=kl if in_reward else None)
    penalties = (0.5 * kl if in_reward else 0 * kl).tolist()
    # atol: eps divides rounding errors of returns that are equal but for them
    close(actual, reference(function.__name__, groups, penalties), atol=1e-6)


# ---- over ranks ----


@pytest.mark.parametrize("function", [batch_normalized, group_centered_batch_normalized])
def test_whitening_over_ranks_equals_whitening_of_the_whole_batch(function, over_ranks):
    generator = torch.Generator().manual_seed(3)
    rewards = torch.rand(5, 3, generator=generator)
    valid = torch.rand(5, 3, generator=generator) > 0.2
    lengths = torch.randint(0, 4, (15,), generator=generator)
    whole = function(Outcomes(rewards, valid, lengths))

    def run(rows, all_reduce):
        mine = lengths.view(5, 3)[rows].flatten()
        return function(Outcomes(rewards[rows], valid[rows], mine, all_reduce=all_reduce))

    parts = [slice(0, 1), slice(1, 4), slice(4, 5)]
    torch.testing.assert_close(torch.cat(over_ranks(run, parts)), whole, rtol=1e-12, atol=1e-12)
    each_alone = torch.cat([run(rows, single_rank) for rows in parts])
    assert not torch.allclose(each_alone, whole, atol=0.01)


# ---- which groups train ----


def group(rewards, accuracy=None, valid=None, finish=None) -> Group:
    prompt = Prompt(
        "p",
        torch.zeros(1, dtype=torch.long),
        torch.zeros(1, 1, dtype=torch.long),
        (),
        Row(id="p", problem="", answer=""),
    )
    finish = finish or ["stop"] * len(rewards)
    completions = [Completion(torch.zeros(1, dtype=torch.long), torch.zeros(1), "", reason) for reason in finish]
    parts = {"format": torch.zeros(len(rewards))}
    if accuracy is not None:
        parts["accuracy"] = torch.tensor(accuracy)
    return Group(
        prompt,
        completions,
        torch.tensor(rewards),
        parts,
        None if valid is None else torch.tensor(valid, dtype=torch.bool),
    )


def test_keep_all_keeps_all():
    groups = [group([1.0, 1.0]), group([0.0, 1.0])]
    assert keep_all(groups) == groups


def test_drop_uniform_drops_groups_all_right_or_all_wrong_and_keeps_order_and_identity():
    all_right, mixed, all_wrong, mixed_too = (group(r) for r in ([1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.5, 0.0]))
    kept = drop_uniform([all_right, mixed, all_wrong, mixed_too])
    assert len(kept) == 2
    assert kept[0] is mixed
    assert kept[1] is mixed_too


def test_drop_uniform_looks_at_accuracy_not_at_the_blended_reward():
    wrong_but_some_well_formed = group([0.1, 0.0], accuracy=[0.0, 0.0])
    mixed_with_equal_rewards = group([0.5, 0.5], accuracy=[0.0, 1.0])
    kept = drop_uniform([wrong_but_some_well_formed, mixed_with_equal_rewards])
    assert len(kept) == 1
    assert kept[0] is mixed_with_equal_rewards


def test_drop_uniform_looks_at_valid_completions_only():
    assert drop_uniform([group([1.0, 1.0, 0.0], valid=[True, True, False])]) == []
    assert len(drop_uniform([group([1.0, 1.0, 0.0], valid=[True, False, True])])) == 1
    assert drop_uniform([group([1.0, 0.0], valid=[False, False])]) == []
    assert drop_uniform([group([1.0, 0.0], valid=[True, False])]) == []


def test_mask_truncated_makes_cut_off_completions_invalid_and_leaves_its_argument_alone():
    before = [
        group([1.0, 0.0, 1.0], valid=[True, True, False], finish=["stop", "length", "stop"]),
        group([1.0, 0.0], finish=["length", "length"]),
    ]
    after = mask_truncated(before)
    assert [g.valid.tolist() for g in after] == [[True, False, False], [False, False]]
    assert before[0].valid.tolist() == [True, True, False]
    assert before[1].valid is None
    assert after[0].completions is before[0].completions


def test_mask_truncated_loss_leaves_rewards_in_their_group():
    before = [
        group([1.0, 0.0, 1.0], valid=[True, True, False], finish=["stop", "length", "stop"]),
        group([1.0, 0.0], finish=["length", "length"]),
    ]
    after = mask_truncated_loss(before)
    assert [g.valid for g in after] == [g.valid for g in before]
    assert [g.in_loss.tolist() for g in after] == [[True, False, False], [False, False]]
    assert before[0].in_loss is None
    contrast = group([1.0, 1.0, 0.0], finish=["stop", "stop", "length"])
    assert len(InOrder([mask_truncated_loss, drop_uniform])([contrast])) == 1


def test_in_order_looks_for_contrast_among_what_was_not_cut_off():
    only_cut_off_differs = group([1.0, 1.0, 0.0], finish=["stop", "stop", "length"])
    contrast = group([1.0, 0.0, 0.0], finish=["stop", "stop", "length"])
    kept = InOrder([mask_truncated, drop_uniform])([only_cut_off_differs, contrast])
    assert [g.valid.tolist() for g in kept] == [[True, True, False]]
    assert len(InOrder([drop_uniform, mask_truncated])([only_cut_off_differs, contrast])) == 2
