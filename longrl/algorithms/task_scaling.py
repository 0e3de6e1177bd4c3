"""An advantage that is scaled by task: every kind of answer by the spread that its rewards have had so far."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from longrl.algorithms.advantages import Outcomes, group_centered
from longrl.algorithms.needs import Needs
from longrl.io.number_ranges import LEAST, MOST, check_ranges


@dataclass(frozen=True)
class TaskNormalized:
    """A = (r - mean(r of the group)) / (std of the task's rewards + eps): EMA-GRPO of OneThinker, arXiv:2512.03043.

    std^2 = m2 - m1^2, moving averages of mean reward and mean squared reward over all completions of the row's `task`
    (longrl/modules/task_deviations.py): m = decay * m + (1 - decay) * the rollout's, which begins as the first
    rollout's. So no group is blown up for its rewards hardly differ, and no task for its rewards are small.

    As in the released code a rollout is part of the averages that scale it. There a group with an advantage beyond 5
    falls back to its own deviation; here `advantage_limit: 5.0` holds it at 5.
    """

    decay: float = 0.99
    """Of the averages, per rollout; at least 0 and below 1."""
    least: float = 1e-3
    """Below which no deviation is taken for one; above 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay of TaskNormalized must be at least 0 and below 1, got {self.decay}; 0.99 is usual")
        check_ranges(self, "TaskNormalized.", least=(LEAST, MOST))

    @property
    def needs(self) -> Needs:
        """Groups, and the deviations of their tasks."""
        return Needs(groups=True, task_decay=self.decay)

    def __call__(self, outcomes: Outcomes, eps: float = 1e-6) -> Tensor:
        """The advantages [P, G]."""
        assert outcomes.task_deviations is not None, "the module knows the deviations of tasks: Needs.task_decay"
        deviations = outcomes.task_deviations.double().clamp(min=self.least)[:, None]  # [P, 1]
        return group_centered(outcomes) / (deviations + eps)
