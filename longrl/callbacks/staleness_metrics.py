"""Curves of how old the tokens of a step are, where completions are sampled beside the updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longrl.modules.rollout_means import mean_over_ranks
from longrl.modules.staleness import ages, token_staleness
from longrl.strategies.axis import Axis
from longrl.types import Completion, Group, Metrics


def staleness_metrics(
    groups: Sequence[Group], step: int, steps_per_rollout: int, max_staleness: int, dp: Axis
) -> Metrics:
    """Age of the sampled tokens in rollouts, and completions that several weights have drawn.

    Every rank of the axis must call it, before the update; one may have no group.

    Args:
        groups: that the step trains on.
        step: optimizer steps taken so far.
        steps_per_rollout: optimizer steps of one.
        max_staleness: `rollout.max_staleness`; tokens beyond it, as of groups too many for their step, count with it.
        dp: ranks with other groups.

    Returns:
        `rollout/staleness_mean`, `rollout/staleness_max`, `rollout/staleness_share_D` of tokens, D from 0 to the bound,
        and `rollout/cut_share` of completions; nan of none.
    """
    of_tokens = [torch.zeros(0, dtype=torch.int64)]
    is_cut = []
    for group in groups:
        for completion in group.completions:
            of_tokens.append(token_staleness(completion, group.carried_over, step, steps_per_rollout))
            is_cut.append(is_of_several_weights(completion))
    staleness = torch.cat(of_tokens)  # [N]
    values = {"rollout/staleness_mean": staleness, "rollout/cut_share": torch.tensor(is_cut)}
    for age in ages(max_staleness):
        values[f"rollout/staleness_share_{age}"] = staleness.clamp(max=max_staleness) == age
    oldest = dp.max(int(staleness.max()) if len(staleness) else 0)
    return mean_over_ranks(values, dp) | {"rollout/staleness_max": float(oldest)}


def is_of_several_weights(completion: Completion) -> bool:
    """True if weights changed between two of its tokens."""
    versions = completion.versions
    return versions is not None and bool((versions != versions[:1]).any())
