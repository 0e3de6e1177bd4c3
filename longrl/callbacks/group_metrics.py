"""Curves of the groups of a step: how long completions are, and how many groups there is something to learn from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from longrl.strategies.axis import Axis
from longrl.types import Group, Metrics

LEVELS = (
    "groups_all_wrong",
    "groups_to_25",
    "groups_to_50",
    "groups_to_75",
    "groups_below_100",
    "groups_all_right",
)
"""Bins of the mean accuracy of a group."""
QUANTILES = (0.1, 0.5, 0.9)


def group_metrics(groups: Sequence[Group], dp: Axis) -> Metrics:
    """Curves of all that was sampled in a step, selected or not.

    Every rank of the axis must call it; one may have no group.
    """
    lengths = []
    levels = []
    silent = []
    for group in groups:
        lengths += [completion.num_sampled for completion in group.completions]
        levels.append(accuracy_level(group))
        silent.append(is_silent(group))
    by_rank = dp.gather((lengths, levels, silent))
    all_lengths = []
    all_levels = []
    all_silent = []
    for of_rank in by_rank:
        all_lengths += of_rank[0]
        all_levels += of_rank[1]
        all_silent += of_rank[2]
    values = length_metrics(all_lengths) | level_shares(all_levels)
    values["groups_without_signal"] = math.nan
    if all_silent:
        values["groups_without_signal"] = sum(all_silent) / len(all_silent)
    return {f"rollout/{name}": value for name, value in values.items()}


def length_metrics(lengths: Sequence[int]) -> Metrics:
    """Quantiles of the completions' tokens, between neighbours linear, and the largest; nan of none."""
    tokens = torch.tensor(lengths or [math.nan], dtype=torch.float64)
    values = {"completion_tokens_max": float(tokens.max())}
    for share in QUANTILES:
        name = f"completion_tokens_p{share * 100:.0f}"
        values[name] = float(tokens.quantile(share))
    return values


def level_shares(levels: Sequence[str | None]) -> Metrics:
    """The share of groups in each of `LEVELS`; nothing where no group has an accuracy.

    Args:
        levels: of all groups of all ranks, as `accuracy_level` gives them.
    """
    with_part = [level for level in levels if level is not None]
    if not with_part:
        return {}
    counts = {name: with_part.count(name) for name in LEVELS}
    known = sum(counts.values())
    return {name: count / known if known else math.nan for name, count in counts.items()}


def accuracy_level(group: Group) -> str | None:
    """The one of `LEVELS` that a group is in, `unknown` if no completion is valid; None without a part `accuracy`."""
    accuracy = group.reward_parts.get("accuracy")
    if accuracy is None:
        return None
    known = accuracy[group.valid & ~accuracy.isnan()]
    if not len(known):
        return "unknown"
    mean = float(known.double().mean())
    if mean <= 0:
        return LEVELS[0]
    if mean >= 1:
        return LEVELS[-1]
    return LEVELS[math.ceil(4 * mean)]


def is_silent(group: Group) -> bool:
    """True if the valid rewards of a group are all the same, or there is none: by itself it teaches nothing."""
    rewards: Tensor = group.rewards[group.valid]
    return bool((rewards == rewards[:1]).all())
