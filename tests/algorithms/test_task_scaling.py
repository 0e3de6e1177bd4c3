"""Advantages scaled by task: figures of OneThinker's released code, by hand, and over ranks."""

import dataclasses

import pytest
import torch

from longrl.algorithms import Algorithm, Outcomes, TaskNormalized
from longrl.modules.task_deviations import TaskDeviations
from longrl.strategies.axis import SINGLE_RANK

ROLLOUTS = [
    (["math", "ocr", "math"], [[1.0, 0.0, 0.5], [0.1, 0.2, 0.1], [0.0, 1.0, 1.0]]),
    (["math", "ocr", "ocr"], [[1.0, 1.0, 0.0], [0.3, 0.1, 0.2], [0.2, 0.2, 0.2]]),
]
RELEASED = [
    [[1.114169, -1.114169, 0.0], [-0.707092, 1.414184, -0.707092], [-1.485559, 0.74278, 0.74278]],
    [[0.737835, 0.737835, -1.47567], [1.912694, -1.912694, 0.0], [0.0, 0.0, 0.0]],
]
"""`compute_ema_grpo_outcome_advantage` of the released EasyR1 with a decay of 0.9, rollout after rollout."""


def follow(tracked, tasks, rewards, valid=None, axis=SINGLE_RANK):
    values = torch.tensor(rewards).view(len(tasks), 3)
    mask = torch.ones_like(values, dtype=torch.bool) if valid is None else torch.tensor(valid)
    return tracked.follow(tasks, values, mask, axis)


def advantages(algorithm, rewards, deviations, valid=None):
    values = torch.tensor(rewards)
    mask = torch.ones_like(values, dtype=torch.bool) if valid is None else torch.tensor(valid)
    lengths = torch.ones(values.numel(), dtype=torch.int64)
    return algorithm.token_advantages(values, mask, lengths, task_deviations=deviations).view_as(values)


def test_two_rollouts_are_those_of_the_released_code():
    algorithm = Algorithm(advantage=TaskNormalized(decay=0.9))
    tracked = TaskDeviations(algorithm.task_decay)
    for (tasks, rewards), wanted in zip(ROLLOUTS, RELEASED, strict=True):
        found = advantages(algorithm, rewards, follow(tracked, tasks, rewards))
        torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=2e-6)


def test_what_is_not_valid_is_in_no_average_and_a_task_without_spread_has_the_least():
    """By hand: of [1, 0, 9] the last is masked, so m1 = 0.5, m2 = 0.5, std 0.5; of [2, 2, 2] there is no spread."""
    rewards = [[1.0, 0.0, 9.0], [2.0, 2.0, 2.0]]
    valid = [[True, True, False], [True] * 3]
    tracked = TaskDeviations(0.99)
    deviations = follow(tracked, ["math", "ocr"], rewards, valid)
    assert deviations.tolist() == pytest.approx([0.5, 0.0])
    found = advantages(Algorithm(advantage=TaskNormalized()), rewards, deviations, valid)
    torch.testing.assert_close(found, torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]), rtol=0, atol=1e-5)
    assert tracked.metrics() == pytest.approx({"task_std/math": 0.5, "task_std/ocr": 0.0})


def test_averages_are_those_of_all_ranks():
    """Sums of two ranks, one of which has no group of one task, and another none at all."""
    tasks, rewards = ROLLOUTS[0]
    whole = TaskDeviations(0.9)
    follow(whole, tasks, rewards)
    parts = [(tasks[:2], rewards[:2]), (tasks[2:], rewards[2:]), ([], [])]
    summed = dict.fromkeys((f"{kind} {task}" for kind in ("count", "total", "square") for task in set(tasks)), 0.0)

    class Adds:
        def sum_dict(self, values):
            for name, value in values.items():
                summed[name] += value
            return summed

    last = None
    for part in parts:
        last = TaskDeviations(0.9)
        assert follow(last, *part, axis=Adds()).shape == (len(part[0]),)
    for task in set(tasks):
        assert last.moments[task].deviation == pytest.approx(whole.moments[task].deviation, rel=1e-12)


def test_state_goes_on_and_nothing_is_followed_without_a_need():
    tracked = TaskDeviations(0.9)
    follow(tracked, *ROLLOUTS[0])
    resumed = TaskDeviations(0.9)
    resumed.load_state_dict(tracked.state_dict())
    assert torch.equal(follow(tracked, *ROLLOUTS[1]), follow(resumed, *ROLLOUTS[1]))
    assert Algorithm().task_decay is None
    assert follow(TaskDeviations(None), *ROLLOUTS[1]) is None
    assert TaskDeviations(None).state_dict() == {}


def test_fewer_than_two_completions_are_refused():
    outcomes = Outcomes(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), torch.ones(2, dtype=torch.int64))
    assert TaskNormalized().needs.groups
    with pytest.raises(ValueError, match=r"decay of TaskNormalized must be .* got 1\.0"):
        TaskNormalized(decay=1.0)
    known = dataclasses.replace(outcomes, task_deviations=torch.ones(1, dtype=torch.float64))
    assert TaskNormalized()(known).tolist() == [[0.0, 0.0]]
