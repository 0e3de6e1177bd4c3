"""Means over many batches: what could not be rewarded counts nowhere."""

import math

import torch

from longrl.modules.metric_means import MetricMeans
from longrl.strategies.axis import SINGLE_RANK
from longrl.types import Completion, Group, Prompt, Row


def group(rewards, valid):
    row = Row("q", "?", "B", category="temporal")
    prompt = Prompt("q", torch.zeros(1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), (), row)
    answers = [Completion(torch.zeros(1), torch.zeros(1), "", "stop")] * len(rewards)
    return Group(prompt, answers, torch.tensor(rewards), {"accuracy": torch.tensor(rewards)}, torch.tensor(valid))


def test_failed_rewards_are_left_out():
    means = MetricMeans()
    means.add_rewards(group([1.0, 0.0, 0.0], [True, False, True]), "val", by_category=True)
    means.add_rewards(group([1.0, 1.0, 0.0], [True, True, False]), "val", by_category=False)
    found = means.collect(SINGLE_RANK)
    assert found["val/reward"] == found["val/accuracy"] == 0.75
    assert found["val/accuracy/temporal"] == 0.5
    assert means.collect(SINGLE_RANK) == {}


def test_without_any_there_is_no_number():
    means = MetricMeans()
    means.add_rewards(group([0.0], [False]), "val", by_category=False)
    assert math.isnan(means.collect(SINGLE_RANK)["val/accuracy"])
