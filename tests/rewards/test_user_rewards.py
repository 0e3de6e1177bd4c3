"""Rewards of a user's own: under a time limit, async or not, one by one or together, whatever number they return."""

import asyncio
import functools
import logging
import sys
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from longrl.rewards import RewardSum, RewardTerm
from longrl.rewards.batch import BatchReward, SampleReward
from longrl.rewards.reward_sum import accuracy
from longrl.rewards.user_rewards import TimedReward
from longrl.types import Completion, Group, Prompt, Row
from tests.rewards.test_failures import group

ROWS = (Row("q1", "?", "1", "numeric"), Row("q2", "?", "2", "numeric"))
LIMIT_S = 0.1


def scored(function, *groups: Group, time_limit_s: float = LIMIT_S) -> tuple[list[list[bool]], list[list[float]]]:
    """Valid and rewards of each group; the tests of a hang are over at once, or fail."""
    RewardSum([RewardTerm(function, name="mine")], time_limit_s).score(groups)
    return [one.valid.tolist() for one in groups], [one.rewards.tolist() for one in groups]


def hangs_on_bare(completion: Completion, row: Row) -> float:
    if completion.text == "hang":
        time.sleep(600)
    return 1.0


async def awaits_on_bare(completion: Completion, row: Row) -> float:
    if completion.text == "hang":
        await asyncio.sleep(600)
    return 1.0


class OneByOne(SampleReward[Completion]):
    def score_one(self, completion: Completion, row: Row) -> float:
        return hangs_on_bare(completion, row)


class Called:
    def __call__(self, completion: Completion, row: Row) -> float:
        return hangs_on_bare(completion, row)


@pytest.mark.parametrize(
    "function", [hangs_on_bare, awaits_on_bare, OneByOne(), Called(), functools.partial(hangs_on_bare)]
)
def test_a_hang_costs_its_completion_and_is_named_with_reward_and_row(function, caplog):
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        valid, rewards = scored(function, group(ROWS[0], "a", "hang", "b"), group(ROWS[1], "c"))
    assert (valid, rewards) == ([[True, False, True], [True]], [[1.0, 0.0, 1.0], [1.0]])
    (record,) = caplog.records
    said = record.getMessage()
    assert "reward 'mine' failed on 1 of 4 completions, of row 'q1'" in said
    assert "TookTooLong: no value within 0.1 s (rollout.reward.time_limit_s=0.1), in " in said
    assert f"{__file__} line" in said
    assert time.monotonic() - started < 5
    assert threading.active_count() == len(threading.enumerate())


def test_a_row_that_hangs_twice_is_not_tried_again_in_this_rollout():
    calls = []

    def hangs(completion, row):
        calls.append(row.id)
        if row.id == "q1":
            time.sleep(600)
        return 1.0

    valid, _ = scored(hangs, group(ROWS[0], *"abcdefgh"), group(ROWS[1], *"ab"))
    assert valid == [[False] * 8, [True, True]]
    assert calls == ["q1", "q1", "q2", "q2"]


def test_after_so_many_seconds_none_is_tried(monkeypatch):
    monkeypatch.setattr("longrl.rewards.user_rewards.MAX_HUNG_S", 2 * LIMIT_S)
    calls = []

    def hangs(completion, row):
        calls.append(row.id)
        time.sleep(600)

    scored(hangs, *(group(Row(str(number), "?", "1"), "a") for number in range(9)))
    assert calls == ["0", "1", "2"]


class Together(BatchReward[Completion]):
    def __init__(self, values=None) -> None:
        self.values = values

    def score_all(self, completions, rows):
        return time.sleep(600) if self.values is None else self.values


def hangs_in_columns(completions, **columns):
    time.sleep(600)


@pytest.mark.parametrize("function", [Together(), hangs_in_columns])
def test_what_judges_a_rollout_together_may_take_five_times_as_long(function, caplog):
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        valid, _ = scored(function, group(ROWS[0], *"abcdef"))
    assert valid == [[False] * 6]
    assert "no value within 0.5 s" in caplog.text
    assert 0.5 <= time.monotonic() - started < 5


def test_no_limit_is_no_limit_and_a_wrong_one_is_refused():
    assert scored(lambda completion, row: time.sleep(0.15) or 1.0, group(ROWS[0], "a"), time_limit_s=0)[0] == [[True]]
    with pytest.raises(ValueError, match=r"rollout\.reward\.time_limit_s must be at least 0, which is none, got -1"):
        RewardSum([RewardTerm(accuracy)], -1)


def test_async_rewards_of_a_rollout_wait_together():
    under_way = []

    async def waits(completion, row):
        under_way.append(completion.text)
        while len(under_way) < 4:  # each waits for the others
            await asyncio.sleep(0.01)
        return 1.0

    assert scored(waits, group(ROWS[0], "a", "b"), group(ROWS[1], "c", "d"), time_limit_s=10)[0] == [[True] * 2] * 2


def test_an_error_of_one_async_call_is_its_own():
    async def judge(completion, row):
        if completion.text == "a":
            raise TimeoutError("the server said nothing")  # not ours
        return 1.0

    assert scored(judge, group(ROWS[0], "a", "b"))[0] == [[False, True]]


def test_too_few_values_are_named(caplog):
    assert scored(Together([1.0]), group(ROWS[0], "a", "b"))[0] == [[False, False]]
    assert "a value of each of the 2 completions, got 1" in caplog.text


@pytest.mark.parametrize(
    "value",
    [1, True, 1.0, "1", np.float32(1), np.int64(1), np.bool_(True), np.array(1.0), torch.tensor(1), torch.tensor([1.0]),
     torch.tensor(True)],
    ids=repr,
)  # fmt: skip
def test_any_number_is_a_reward(value):
    assert scored(lambda completion, row: value, group(ROWS[0], "a"))[1] == [[1.0]]


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), np.nan, torch.tensor(torch.inf), 1e31])
def test_what_is_not_finite_is_named(value, caplog):
    assert scored(lambda completion, row: value, group(ROWS[0], "a", "b"))[0] == [[False, False]]
    assert (
        "reward 'mine' failed on 2 of 2 completions, of row 'q1' (ValueError: a reward must be a finite" in caplog.text
    )


# ---- names ----


@dataclass(frozen=True)
class ShorterThan:
    limit: int

    def __call__(self, completion: Completion, row: Row) -> float:
        return float(len(completion.text) < self.limit)


def shorter_than(limit: int, completion: Completion, row: Row) -> float:
    return float(len(completion.text) < limit)


def test_a_reward_that_ends_the_program_has_failed(caplog):
    def leaving(completion, row):
        sys.exit("no model there")

    assert scored(leaving, group(ROWS[0], "a", "b"))[0] == [[False, False]]
    assert "it called sys.exit('no model there')" in caplog.text
    assert "test_user_rewards.py" in caplog.text


def test_a_partial_has_its_functions_name_and_two_need_names():
    five, nine = (functools.partial(shorter_than, limit) for limit in (5, 9))
    assert RewardTerm(five).name == "shorter_than"
    assert RewardTerm(ShorterThan(5)).name == "shorter_than"
    with pytest.raises(ValueError, match=r"different names, got \['shorter_than', 'shorter_than'\]; set `name`"):
        RewardSum([RewardTerm(five), RewardTerm(nine)])
    both = RewardSum([RewardTerm(five, name="five"), RewardTerm(nine, name="nine")])
    answers = group(ROWS[0], "1234567")
    both.score([answers])
    assert {name: part.tolist() for name, part in answers.reward_parts.items()} == {"five": [0.0], "nine": [1.0]}


def test_longrls_own_functions_are_called_as_they_are():
    own, users = RewardSum([RewardTerm(accuracy), RewardTerm(hangs_on_bare)]).parts
    assert own.function is accuracy
    assert users.function == TimedReward(hangs_on_bare, 60.0)


def test_flow_rewards_run_under_the_limit_too():
    @dataclass
    class Picture:
        frames: torch.Tensor

    def redness(frames, row):
        if frames.max() == 0:
            time.sleep(600)
        return float(frames[:, 0].double().mean())

    row = Row("p", "a red square", "")
    pictures = [Picture(torch.full((1, 3, 2, 2), level, dtype=torch.uint8)) for level in (3, 0)]
    made = Group(Prompt("p", torch.zeros(0), torch.zeros(1, 0), (), row), pictures)
    assert scored(redness, made) == ([[True, False]], [[3.0, 0.0]])
