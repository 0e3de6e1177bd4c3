"""What the curves show of the groups that were sampled in a step, selected or not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from longrl.types import Group


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Rewards, parts, lengths and failures of a step's completions."""
    if not groups:  # a run that goes on with more ranks than groups were waiting
        return {}
    lengths: list[float] = []
    num_cut = 0
    for group in groups:
        for completion in group.completions:
            lengths.append(float(len(completion.token_ids)))
            num_cut += completion.finish_reason == "length"
    return reward_metrics(groups) | {
        "rollout/completion_tokens": float(torch.tensor(lengths).mean()),
        "rollout/cut_off": num_cut / len(lengths),
    }


def reward_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Rewards and parts, means over the completions that could be rewarded (nan if none), and the others' share."""
    all_rewards: list[Tensor] = []
    all_valid: list[Tensor] = []
    spreads: list[Tensor] = []
    for group in groups:
        assert group.rewards is not None
        assert group.valid is not None
        all_rewards.append(group.rewards)
        all_valid.append(group.valid)
        if group.valid.any():
            spreads.append(group.rewards[group.valid].std(correction=0))
    valid = torch.cat(all_valid)  # [P * G]
    metrics = {
        "reward/mean": float(torch.cat(all_rewards)[valid].mean()),
        "reward/std_in_group": float(torch.stack(spreads).mean()) if spreads else math.nan,
        "rollout/failed_rewards": float((~valid).float().mean()),
    }
    for name in groups[0].reward_parts:
        values = torch.cat([group.reward_parts[name] for group in groups])  # [P * G]
        metrics[f"reward/{name}"] = float(values[valid].mean())
    return metrics
