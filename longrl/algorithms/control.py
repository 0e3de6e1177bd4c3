"""Rules of what moves from step to step: coefficients that follow a target, and the reference that follows the policy.

They are pure, as all of an algorithm is; the values themselves are state, of `longrl.modules.coefficients` and
`longrl.modules.trained`, where they are saved and resumed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from longrl.io.number_ranges import COUNT, LEAST, MOST, NOT_NEGATIVE, check_ranges

ABOVE_0 = (LEAST, MOST)
SMALLEST = sys.float_info.min
"""That a coefficient becomes: one of 0 would never rise again."""
MAX_ERROR = 0.2
"""Of a controller's proportional error, either way: the paper's, verl's and TRL's."""


@dataclass(frozen=True)
class KLControl:
    """A KL coefficient that holds the distance to the reference near a target: Ziegler et al., arXiv:1909.08593, 2.2.

        kl_coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * completions / horizon

    after each rollout, as `AdaptiveKLController` of verl and of TRL before 0.14; `kl` is `train/kl_ref`, the mean per
    token under the algorithm's weights (verl's mean; TRL's and the paper's target is of a whole completion's sum). A
    rollout of more completions than the horizon counts as the horizon, so that the coefficient stays above 0.
    """

    target: float
    """Of `train/kl_ref`, nats per token (of a diffusion model in the unit of its estimator); above 0."""
    horizon: int = 10_000
    """Completions in which a distance of 1.2 times the target or more raises the coefficient by about a fifth."""

    def __post_init__(self) -> None:
        check_ranges(self, "model.algorithm.kl_control.", target=ABOVE_0, horizon=COUNT)

    def next(self, coefficient: float, kl: float, num_completions: int) -> float:
        """The coefficient of the next rollout."""
        error = min(max(kl / self.target - 1, -MAX_ERROR), MAX_ERROR)
        moved = coefficient * (1 + error * min(num_completions / self.horizon, 1.0))
        return min(max(moved, SMALLEST), MOST)


@dataclass(frozen=True)
class EntropyControl:
    """An entropy bonus that is there while entropy is at its target or below: Skywork-OR1, arXiv:2505.22312 (MAGIC).

        c += step if entropy <= target else -step      within [lowest, highest]
        entropy_coef = c if entropy <= target else 0

    after each rollout, `entropy` being `train/entropy`; c begins as the algorithm's `entropy_coef`, which the first
    rollout has. So in the released code and in TRL (`use_adaptive_entropy`), whose defaults these are.
    """

    target: float
    """Of `train/entropy`, nats per token; above 0. The paper has 0.2: a little below what the policy begins with."""
    step: float = 0.005
    """How far the bonus moves after a rollout; above 0."""
    lowest: float = 0.0
    """Least coefficient of the bonus."""
    highest: float = 1.0
    """Largest coefficient of the bonus; above 0."""

    def __post_init__(self) -> None:
        where = "model.algorithm.entropy_control."
        check_ranges(self, where, target=ABOVE_0, step=ABOVE_0, lowest=NOT_NEGATIVE, highest=ABOVE_0)
        if self.lowest > self.highest:
            raise ValueError(
                f"{where}lowest must not be above highest, got {self.lowest} and {self.highest}; 0 and 1 are usual"
            )

    def next(self, coefficient: float, entropy: float) -> float:
        """The c of the next rollout."""
        moved = coefficient + (self.step if entropy <= self.target else -self.step)
        return min(max(moved, self.lowest), self.highest)

    def applies(self, entropy: float) -> bool:
        """True if the next rollout has the bonus."""
        return entropy <= self.target


@dataclass(frozen=True)
class MovingReference:
    """A reference policy that follows the policy: Trust Region alignment, arXiv:2404.09656, sec. 3.

        reference = (1 - alpha) * reference + alpha * policy        after every `every_n_steps`-th optimizer step

    The paper's soft update is alpha below 1 at every step, its hard update alpha 1 every so many; the defaults are
    those of `ref_model_mixup_alpha` and `ref_model_sync_steps` in TRL, which has this rule.
    """

    alpha: float = 0.6
    """Share of the policy's weights, above 0 and at most 1."""
    every_n_steps: int = 512
    """Optimizer steps from one update to the next."""

    def __post_init__(self) -> None:
        check_ranges(self, "model.algorithm.moving_reference.", alpha=(LEAST, 1), every_n_steps=COUNT)

    def decay_at(self, step: int) -> float | None:
        """The share of the reference that stays after optimizer step `step`; None if the step changes nothing."""
        if step % self.every_n_steps:
            return None
        return 1 - self.alpha
