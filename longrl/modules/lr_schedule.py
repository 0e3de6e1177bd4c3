"""Learning-rate schedules: the rate of an optimizer step as a share of the highest rate."""

from __future__ import annotations

import functools
import math
from typing import Literal

from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer

Schedule = Literal["constant", "linear", "cosine"]


def lr_scheduler(schedule: Schedule, optimizer: Optimizer, warmup_steps: int, total_steps: int | None) -> LambdaLR:
    """The scheduler that `transformers.get_scheduler` makes, also for its checkpoints.

    Made here, for importing it brings in transformers' trainer, peft, bitsandbytes and torch's compiler: a third of the
    time that a run takes to start.
    """
    share = functools.partial(lr_share, schedule=schedule, warmup_steps=warmup_steps, total_steps=total_steps or 0)
    return LambdaLR(optimizer, share)


def lr_share(step: int, *, schedule: Schedule, warmup_steps: int, total_steps: int) -> float:
    """Share of the highest rate: grows from 0 over the warm-up, then stays, or falls to 0 at `total_steps`.

    Args:
        step: optimizer steps taken.
        schedule: "linear" falls in a line, "cosine" in half a wave.
        warmup_steps: the first ones.
        total_steps: of the whole schedule; a constant one has no end.
    """
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "constant":
        return 1.0
    length = max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return max(0.0, (total_steps - step) / length)
    progress = (step - warmup_steps) / length
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
