"""Lengths of completions and levels of groups, by hand."""

import math

import pytest
import torch

from longrl.callbacks.group_metrics import LEVELS, accuracy_level, group_metrics, is_silent, length_metrics
from longrl.strategies.axis import SINGLE_RANK
from longrl.types import Completion, Group, Prompt, Row

PROMPT = Prompt("1", torch.zeros(1), torch.zeros(1, 1), (), Row("1", "", ""))


def group(rewards, accuracy=None, valid=None, lengths=None):
    count = len(rewards)
    completions = [Completion(torch.zeros(n), torch.zeros(n), "", "stop") for n in lengths or [1] * count]
    parts = {} if accuracy is None else {"accuracy": torch.tensor(accuracy)}
    mask = torch.tensor(valid if valid is not None else [True] * count)
    return Group(PROMPT, completions, torch.tensor(rewards), parts, mask)


@pytest.mark.parametrize(
    ("accuracy", "level"),
    [
        ([0.0, 0.0, 0.0, 0.0], "groups_all_wrong"),
        ([1.0, 0.0, 0.0, 0.0], "groups_to_25"),
        ([1.0, 1.0, 0.0, 0.0], "groups_to_50"),
        ([1.0, 1.0, 0.5, 0.0], "groups_to_75"),
        ([1.0, 1.0, 1.0, 0.0], "groups_to_75"),
        ([1.0, 1.0, 1.0, 0.9], "groups_below_100"),
        ([1.0, 1.0, 1.0, 1.0], "groups_all_right"),
        ([1.0, 1.0, math.nan, math.nan], "groups_all_right"),
        ([math.nan] * 4, "unknown"),
    ],
)
def test_a_group_is_in_the_bin_of_its_mean_accuracy(accuracy, level):
    assert accuracy_level(group([0.0] * 4, accuracy)) == level


def test_completions_without_reward_do_not_count():
    assert accuracy_level(group([0.0, 1.0], [0.0, 1.0], [False, True])) == "groups_all_right"
    assert accuracy_level(group([0.0, 1.0], [0.0, 1.0], [False, False])) == "unknown"
    assert is_silent(group([0.0, 1.0], valid=[False, True]))
    assert is_silent(group([0.0, 1.0], valid=[False, False]))
    assert is_silent(group([0.5, 0.5]))
    assert not is_silent(group([0.0, 1.0]))


def test_quantiles_lie_between_neighbours():
    """0, 10 .. 100: the tenth, half and nine tenths are numbers of the list."""
    found = length_metrics(list(range(0, 101, 10)))
    assert found == {
        "completion_tokens_max": 100.0,
        "completion_tokens_p10": 10.0,
        "completion_tokens_p50": 50.0,
        "completion_tokens_p90": 90.0,
    }
    assert length_metrics([1, 2])["completion_tokens_p50"] == 1.5
    assert all(map(math.isnan, length_metrics([]).values()))


class TwoRanks:
    """The other rank has one group more."""

    def __init__(self, other):
        self.other = other

    def gather(self, item):
        lengths, levels, silent = [[len(c.token_ids) for c in self.other.completions]], [], []
        levels.append(accuracy_level(self.other))
        silent.append(is_silent(self.other))
        return [item, (lengths[0], levels, silent)]


def test_shares_are_of_the_groups_of_all_ranks():
    groups = [group([1.0, 1.0], [1.0, 1.0], lengths=[3, 5]), group([0.0, 1.0], [0.0, 1.0], lengths=[7, 9])]
    other = group([0.0, 0.0], [0.0, 0.0], lengths=[11, 13])
    found = group_metrics(groups, TwoRanks(other))
    assert found["rollout/groups_all_right"] == pytest.approx(1 / 3)
    assert found["rollout/groups_to_50"] == pytest.approx(1 / 3)
    assert found["rollout/groups_all_wrong"] == pytest.approx(1 / 3)
    assert sum(found[f"rollout/{name}"] for name in LEVELS) == pytest.approx(1.0)
    assert found["rollout/groups_without_signal"] == pytest.approx(2 / 3)
    assert found["rollout/completion_tokens_max"] == 13.0
    assert found["rollout/completion_tokens_p50"] == 8.0


def test_without_a_part_accuracy_there_are_no_levels_and_without_a_valid_one_they_are_nan():
    assert not {f"rollout/{name}" for name in LEVELS} & group_metrics([group([0.0, 1.0])], SINGLE_RANK).keys()
    unknown = group_metrics([group([0.0, 1.0], [0.0, 1.0], [False, False])], SINGLE_RANK)
    assert all(math.isnan(unknown[f"rollout/{name}"]) for name in LEVELS)
