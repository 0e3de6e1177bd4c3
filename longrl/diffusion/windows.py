"""Which denoising steps of a rollout draw noise and are trained? The others follow the ODE and cost no training.

A window is `(number of steps, number of the rollout, seed) -> range`. The last step is in none by default: what noise
it put into the picture, no step would take out again.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from longrl.io.number_ranges import COUNT, check_ranges

Window = Callable[[int, int, int], Any]  # -> range


def all_steps(num_steps: int, rollout: int, seed: int) -> range:
    """All but the last: Flow-GRPO (arXiv:2505.05470), whose code trains the first 99% of the steps."""
    return range(num_steps - 1)


@dataclass(frozen=True)
class RandomWindow:
    """`size` neighbouring steps, drawn anew for every rollout: Flow-GRPO-Fast (code of arXiv:2505.05470).

    All samples of a rollout have the same window, so that a group compares like with like.
    """

    size: int = 2
    end: int | None = None
    """The window lies before this step; None is before the last. Flow-GRPO-Fast ends in the middle of the schedule."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size of RandomWindow must be at least 1, got {self.size}; 1 or 2 is usual")
        check_ranges(self, "RandomWindow: ", end=COUNT)

    def __call__(self, num_steps: int, rollout: int, seed: int) -> range:
        """The window of a rollout."""
        end = num_steps - 1 if self.end is None else self.end
        _check_window(self.size, end, num_steps)
        start = random.Random(f"{seed}/{rollout}").randint(0, end - self.size)
        return range(start, start + self.size)


@dataclass(frozen=True)
class SlidingWindow:
    """`size` neighbouring steps that move towards the end as training goes on: MixGRPO (arXiv:2507.21802), sec. 3.2.

    The early steps, which decide what is in a picture, come first. Behind the last window it begins anew.
    """

    size: int = 4
    stride: int = 1
    """Steps it moves by."""
    every: int = 25
    """Rollouts it stays."""

    def __post_init__(self) -> None:
        if min(self.size, self.stride, self.every) < 1:
            raise ValueError(
                "size, stride and every of SlidingWindow must be at least 1, "
                f"got {self.size}, {self.stride} and {self.every}; the paper has 4, 1 and 25"
            )

    def __call__(self, num_steps: int, rollout: int, seed: int) -> range:
        """The window of a rollout."""
        _check_window(self.size, num_steps - 1, num_steps)
        num_starts = (num_steps - 1 - self.size) // self.stride + 1
        start = rollout // self.every % num_starts * self.stride
        return range(start, start + self.size)


def _check_window(size: int, end: int, num_steps: int) -> None:
    if not size <= end < num_steps:
        raise ValueError(
            f"a window of {size} steps that ends before step {end} does not fit {num_steps} denoising steps, of which "
            "the last draws nothing; raise rollout.sampling.num_steps, or lower the window's size"
        )
