"""How far the rewards of each task spread, over the rollouts so far: state of a run, the same on all of its ranks.

Letters: P groups of this rank, G completions of each.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longrl.strategies.axis import Axis
from longrl.types import Metrics


@dataclass(frozen=True)
class Moments:
    """Moving averages of a task's rewards and of their squares."""

    mean: float
    square: float

    @property
    def deviation(self) -> float:
        """Square root of the variance, 0 where rounding has made that negative."""
        return math.sqrt(max(self.square - self.mean**2, 0.0))


class TaskDeviations:
    """Deviations of rewards by `Row.task`, from moving averages of two moments (EMA-GRPO, arXiv:2512.03043).

    Args:
        decay: share of the averages that a rollout leaves; None follows nothing.
    """

    def __init__(self, decay: float | None) -> None:
        self.decay = decay
        self.moments: dict[str, Moments] = {}
        """By task."""

    def follow(self, tasks: Sequence[str], rewards: Tensor, valid: Tensor, dp: Axis) -> Tensor | None:
        """Takes a rollout into the averages. Every rank of the axis must call it; one may have no group.

        Args:
            tasks: P of them, of this rank's groups.
            rewards: [P, G] of this rank.
            valid: [P, G] bool, which of them count.
            dp: ranks with other groups.

        Returns:
            [P] float64 deviation of each group's task on the host, this rollout included; None if nothing is followed.
        """
        if self.decay is None:
            return None
        # 1. Sums of the rollout over all ranks, whose tasks may differ.
        local: Metrics = defaultdict(float)
        for task, values, counts in zip(tasks, rewards.cpu().double(), valid.cpu(), strict=True):
            known = values[counts]
            local[f"count {task}"] += len(known)
            local[f"total {task}"] += float(known.sum())
            local[f"square {task}"] += float(known.square().sum())
        sums = dp.sum_dict(local)

        # 2. A task without a valid completion stays as it was; the first rollout of a task is its average.
        for name, count in sums.items():
            kind, _, task = name.partition(" ")
            if kind != "count" or not count:
                continue
            now = Moments(sums[f"total {task}"] / count, sums[f"square {task}"] / count)
            before = self.moments.get(task, now)
            self.moments[task] = Moments(
                self.decay * before.mean + (1 - self.decay) * now.mean,
                self.decay * before.square + (1 - self.decay) * now.square,
            )
        deviations = [self.moments.get(task, Moments(0.0, 0.0)).deviation for task in tasks]
        return torch.tensor(deviations, dtype=torch.float64)

    def metrics(self) -> Metrics:
        """`task_std/TASK` of every task so far."""
        return {f"task_std/{task}": self.moments[task].deviation for task in sorted(self.moments)}

    def state_dict(self) -> dict[str, tuple[float, float]]:
        """Both averages by task, for checkpoints."""
        return {task: (moments.mean, moments.square) for task, moments in self.moments.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """The inverse; checkpoints of runs that followed nothing have none."""
        if self.decay is not None:
            self.moments = {task: Moments(*pair) for task, pair in state.items()}
