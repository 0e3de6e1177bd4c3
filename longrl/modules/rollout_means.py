"""Means over ranks of what a rollout was: rewards and their parts, lengths, failures."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from longrl.strategies.axis import Axis
from longrl.types import Group, Metrics


def rollout_metrics(groups: Sequence[Group], dp: Axis) -> Metrics:
    """Curves of all that was sampled in a step, selected or not: rewards, parts, lengths, failures.

    Every rank of the axis must call it; one may have no group.
    """
    lengths = []
    is_cut = []
    for group in groups:
        for completion in group.completions:
            lengths.append(completion.num_sampled)
            is_cut.append(completion.finish_reason == "length")
    values = reward_values(groups)
    values["rollout/completion_tokens"] = torch.tensor(lengths)
    values["rollout/cut_off"] = torch.tensor(is_cut)
    return mean_over_ranks(values, dp)


def reward_values(groups: Sequence[Group[Any, Any]]) -> dict[str, Tensor]:
    """Rewards and parts of the completions that could be rewarded, their spread in each group, and who could not be.

    Of a part, [n] values of the n completions that it applies to; of the others [C], and [P] of groups.
    """
    values: dict[str, list[Tensor]] = defaultdict(list)
    for group in groups:
        valid = group.valid
        rewards = group.rewards[valid]
        values["reward/mean"].append(rewards)
        if len(rewards):
            spread = rewards.std(correction=0, keepdim=True)
            values["reward/std_in_group"].append(spread)
        values["rollout/failed_rewards"].append(~valid)
        for name, part in group.reward_parts.items():
            # A part that does not apply is NaN.
            known = part[valid & ~part.isnan()]
            values[f"reward/{name}"].append(known)
    return {name: torch.cat(parts) for name, parts in values.items()}


def mean_over_ranks(values: Mapping[str, Tensor], axis: Axis) -> Metrics:
    """The mean of all ranks' values of each name, nan of none. Every rank of the axis must call it."""
    # 1. Sums and counts: ranks may have different numbers of values.
    local: Metrics = {}
    for name, numbers in values.items():
        local[name] = float(numbers.double().sum())
        local[f"number of {name}"] = len(numbers)
    totals = axis.sum_dict(local)

    # 2. Means of what any rank has.
    means: Metrics = {}
    for name, total in totals.items():
        count = totals.get(f"number of {name}")
        if count is None:
            continue
        means[name] = math.nan
        if count:
            means[name] = total / count
    return means
