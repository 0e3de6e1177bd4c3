"""Curves of what completions asked an environment for, and what they were shown."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longrl.modules.rollout_means import mean_over_ranks
from longrl.rewards.tool_use import calls_of
from longrl.strategies.parallel import Parallel
from longrl.types import Group, Metrics


def turn_metrics(groups: Sequence[Group], num_encoded: int, parallel: Parallel) -> Metrics:
    """Curves of all that was sampled in a step, selected or not. Every rank of the run must call it.

    Args:
        groups: of the sequence-parallel group.
        num_encoded: media items that this rank's environments had encoded.
        parallel: the ranks.
    """
    completions = [completion for group in groups for completion in group.completions]
    calls = [call for completion in completions for call in calls_of(completion)]
    values = {
        "rollout/tool_calls": [len(calls_of(completion)) for completion in completions],
        "rollout/turns": [sum(turn.role == "assistant" for turn in completion.turns) for completion in completions],
        "rollout/observed_tokens": [len(one.token_ids) - one.num_sampled for one in completions],
        "throughput/tool_s": [sum(call.seconds for call in calls_of(completion)) for completion in completions],
        "rollout/tool_errors": [call.error is not None for call in calls],
        "rollout/groups_with_tools": [any(calls_of(one) for one in group.completions) for group in groups],
    }
    tensors = {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in values.items()}
    # Ranks that share prompts have the same groups, but each has asked environments for its own completions.
    encoded = parallel.world.sum_dict({"throughput/media_shown_encoded": float(num_encoded)})
    return mean_over_ranks(tensors, parallel.dp) | encoded
