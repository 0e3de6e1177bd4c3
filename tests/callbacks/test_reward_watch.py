"""Steps without signal are told once in a stretch, with their likely causes."""

import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from longrl.callbacks.reward_watch import RewardWatch
from longrl.modules.rollout_means import mean_over_ranks
from longrl.rewards.failures import Failure
from longrl.strategies.axis import world_axis
from longrl.strategies.parallel import Parallel
from longrl.types import Completion, Group, Prompt, Row
from tests.distributed import run_distributed

NO_TOKENS = torch.zeros(0, dtype=torch.long)


def group(*rewards: float, accuracy: list[float] | None = None, valid: bool = True, **parts: list[float]) -> Group:
    row = Row("q", "?", "1", "numeric")
    answers = [Completion(NO_TOKENS, torch.zeros(0), "", "stop") for _ in rewards]
    made = Group(Prompt("q", NO_TOKENS, NO_TOKENS[None], (), row), answers, torch.tensor(rewards))
    made.valid = torch.full((len(rewards),), valid)
    if accuracy is not None:
        parts["accuracy"] = accuracy
    made.reward_parts = {name: torch.tensor(values) for name, values in parts.items()}
    return made


WRONG, RIGHT, CONTRAST = (
    group(0.0, 0.0, accuracy=[0.0, 0.0], think_answer_format=[0.0, 0.0]),
    group(1.0, 1.0, accuracy=[1.0, 1.0], think_answer_format=[0.0, 0.0]),
    group(1.0, 0.0, accuracy=[1.0, 0.0], think_answer_format=[0.0, 1.0]),
)


def told(steps: list[list[Group]], warn_after: int, caplog) -> list[str]:
    watch = RewardWatch(warn_after)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for groups in steps:
            watch.end_step(
                SimpleNamespace(parallel=Parallel(), has_signal=any(one is CONTRAST for one in groups)), groups
            )
    return [record.getMessage() for record in caplog.records]


def test_a_stretch_without_signal_is_told_once_with_its_causes(caplog):
    (said,) = told([[WRONG, RIGHT], [WRONG, WRONG], [WRONG, group(0.5, 0.5)], [WRONG, WRONG]], 3, caplog)
    assert "in 3 steps in a row no group had a signal" in said
    assert "Of 6 groups: 4 all wrong, 1 all right, 1 equal in reward" in said
    assert "think_answer_format was met by none of 10 completions" in said
    assert "What helps: take easier prompts, or train by SFT first" in said


def test_a_step_with_signal_begins_a_new_stretch(caplog):
    assert told([[WRONG], [WRONG, CONTRAST], [WRONG]], 2, caplog) == []
    assert len(told([[WRONG]] * 2 + [[CONTRAST]] + [[WRONG]] * 3, 2, caplog)) == 2
    assert told([[WRONG]] * 9, 0, caplog) == []


def test_a_form_that_some_met_is_no_cause(caplog):
    met = group(0.5, 0.5, think_answer_format=[1.0, 1.0])
    (said,) = told([[WRONG], [met], [WRONG]], 3, caplog)
    assert "was met by none" not in said


def test_steps_without_any_group_and_failed_ones_are_silent_too(caplog):
    (said,) = told([[], [group(0.0, 0.0, valid=False)]], 2, caplog)
    assert "Of 1 groups: 1 without any reward" in said


def test_a_negative_number_of_steps_is_refused():
    with pytest.raises(
        ValueError, match=r"rollout\.warn_without_signal_after must be at least 0, which is never, got -1"
    ):
        RewardWatch(-1)


# ---- several ranks ----


def judged_on_two_ranks() -> None:
    axis = world_axis()
    parallel = replace(Parallel(), world=axis, dp=axis)
    # 1. Means are of all completions that have the part, however they are dealt.
    values = torch.tensor([1.0, 1.0, 0.0] if axis.rank == 0 else [])
    means = mean_over_ranks({"reward/part": values, "reward/none": torch.zeros(0)}, axis)
    assert means["reward/part"] == pytest.approx(2 / 3)
    assert math.isnan(means["reward/none"])
    # 2. A rank on which everything fails ends nothing, as long as another has a reward.
    failed = Failure("mine", f"q{axis.rank}", "KeyError: 'x'", "mine.py line 3", "")
    watch = RewardWatch(0)
    watch.failures = [failed, failed] if axis.rank == 0 else []
    watch.end_if_hopeless([group(0.0, 0.0, valid=axis.rank == 1)], parallel)
    assert watch.is_rewarded
    # 3. What fails on all ends the run on all: each rank had one row, both together two.
    watch = RewardWatch(0)
    watch.failures = [failed, failed]
    with pytest.raises(ValueError, match="failed on every one of the 4 completions so far, of row 'q0', 'q1'"):
        watch.end_if_hopeless([group(0.0, 0.0, valid=False)], parallel)


def test_two_ranks_judge_as_one():
    run_distributed(judged_on_two_ranks, 2)
