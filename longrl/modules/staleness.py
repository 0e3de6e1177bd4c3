"""How old tokens are: the weights that drew them against those that train on them.

Letters: n sampled tokens of a completion, N those of a rollout.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from longrl.strategies.axis import Axis
from longrl.types import Metrics


def token_staleness(completion: Any, carried_over: bool, step: int, steps_per_rollout: int) -> Tensor:
    """[n] int64 age of each token's weights in rollouts, 0 of those that train: ceil((step - version) / steps).

    Args:
        completion: or another sample, which says no versions: then its group's flag counts, as one rollout.
        carried_over: `Group.carried_over`.
        step: optimizer steps taken before this update.
        steps_per_rollout: optimizer steps of one.
    """
    num_tokens = len(completion.logprobs)
    versions: Tensor | None = getattr(completion, "versions", None)
    if versions is None:
        return torch.full((num_tokens,), int(carried_over), dtype=torch.int64)
    assert len(versions) == num_tokens, "every sampled token has a version"
    steps = step - versions  # [n]
    assert not (steps < 0).any(), "no token is of weights that are yet to come"
    return (steps + steps_per_rollout - 1).div(steps_per_rollout, rounding_mode="floor")


def ages(max_staleness: int) -> range:
    """The ages that metrics tell apart, 0 to the bound; what is older counts with the last."""
    return range(max_staleness + 1)


def mismatch_by_staleness(distance: Tensor, staleness: Tensor, max_staleness: int, world: Axis) -> Metrics:
    """`mean_staleness_D`: mean distance of the tokens that are D rollouts old, nan of none.

    Args:
        distance: [N] engine against trainer in a token's log-probability, not finite where nobody knows.
        staleness: [N] in rollouts.
        max_staleness: see `ages`.
        world: ranks whose tokens count together; all must call it.
    """
    known = distance.isfinite()
    distance = distance[known].double()
    staleness = staleness[known].clamp(max=max_staleness)
    local: Metrics = {}
    for age in ages(max_staleness):
        of_age = distance[staleness == age]
        local[f"total {age}"] = float(of_age.sum())
        local[f"count {age}"] = float(len(of_age))
    sums = world.sum_dict(local)
    return {
        f"mean_staleness_{age}": sums[f"total {age}"] / (sums[f"count {age}"] or math.nan)
        for age in ages(max_staleness)
    }
