"""The old policy of DiffusionNFT, which samples and follows the weights that train, and where it is kept."""

from __future__ import annotations

from dataclasses import dataclass

from longrl.io.number_ranges import NOT_NEGATIVE, SHARE, check_ranges

OLD_PREFIX = "old_weights."
"""Where a module keeps its weights in a checkpoint, beside `model.`."""


@dataclass(frozen=True)
class OldPolicySettings:
    """How fast the old policy follows (arXiv:2509.16117, sec. 3.3).

    After each rollout, t optimizer steps into the run,

        old += (1 - d) (weights - old),    d = min(max_decay, max(0, t - flat_steps) * decay_per_step)

    The defaults are the released schedule 1, of PickScore and GenEval; that of OCR is 75, 0.0075 and 0.999. A max_decay
    of 0 is on-policy: samples are drawn by the weights that train.
    """

    flat_steps: int = 0
    """Optimizer steps in which the old policy is the one that trains."""
    decay_per_step: float = 0.001
    """Growth per optimizer step of the share of the old policy that stays after a rollout."""
    max_decay: float = 0.5
    """Largest such share, below 1; 0 samples by the weights that train."""

    def __post_init__(self) -> None:
        where = "model.objective.old."
        check_ranges(self, where, flat_steps=NOT_NEGATIVE, decay_per_step=NOT_NEGATIVE, max_decay=SHARE)
        if self.max_decay == 1:
            raise ValueError("model.objective.old.max_decay must be below 1, or the old policy never moves, got 1")

    def decay_at(self, step: int) -> float:
        """The share of the old policy that stays after the rollout that ended with optimizer step `step`."""
        return min(self.max_decay, max(0, step - self.flat_steps) * self.decay_per_step)
