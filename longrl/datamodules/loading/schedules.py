"""Numbers that change with the optimizer step, and of which frames are read by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from longrl.datamodules.loading.row_marks import Budget
from longrl.datamodules.media.sampling import VideoSampling
from longrl.io.number_ranges import LEAST, MOST, check_ranges
from longrl.types import Metrics

FPS_STEP = 0.25
"""A linear frame rate is rounded to it, so that not every step reads other frames, of which none is cached."""


@dataclass(frozen=True)
class Schedule:
    """A number by optimizer step: from each of `steps` on it has, or is on the way from, the value at its place.

    Example:
        `Schedule([0, 200], [32, 64])` is 32 up to step 199 and 64 from step 200 on; with `shape="linear"` it is 48 at
        step 100. Steps are counted from 0, as those that were done.
    """

    steps: list[int] = field(default_factory=list)
    """Where values begin: the first is 0."""
    values: list[float] = field(default_factory=list)
    """The number from each of `steps` on; as many as there are steps."""
    shape: Literal["constant", "linear"] = "constant"
    """Between two of `steps`: the earlier one's value, or a straight line. Behind the last one its value stays."""
    multiple_of: float | None = None
    """A value on a line is rounded down to a multiple of it; None: of frames the temporal patch of the model family, of
    tokens 1, of frames per second a quarter."""

    def __post_init__(self) -> None:
        given = f"steps={list(self.steps)} and values={list(self.values)}"
        where = "in rollout.length_schedule or data.curriculum.video"
        if len(self.steps) != len(self.values) or not self.steps:
            raise ValueError(f"a schedule has as many values as steps, at least one, got {given}; set them {where}")
        if self.steps[0] != 0 or any(after <= before for before, after in pairwise(self.steps)):
            raise ValueError(f"steps of a schedule must begin at 0 and ascend, got {given}; sort them {where}")
        if not all(0 < value < math.inf for value in self.values):
            raise ValueError(f"values of a schedule must be finite and above 0, got {given}; correct them {where}")
        if self.shape not in ("constant", "linear"):
            raise ValueError(f"shape of a schedule must be constant or linear, got {self.shape!r}")
        check_ranges(self, "", multiple_of=(LEAST, MOST))

    def at(self, step: int, multiple_of: float = 1) -> float:
        """The value of a step.

        Args:
            step: optimizer steps that were done.
            multiple_of: what values on a line are rounded down to where the schedule does not say.
        """
        place = max(n for n, start in enumerate(self.steps) if start <= step)
        value = self.values[place]
        if self.shape == "constant":
            return value
        if place + 1 < len(self.steps):
            share = (step - self.steps[place]) / (self.steps[place + 1] - self.steps[place])
            value += share * (self.values[place + 1] - value)
        multiple = self.multiple_of or multiple_of
        # The millionth keeps a whole multiple that the line has missed by a little.
        count = math.floor(value / multiple + 1e-6)
        return count * multiple if count else value

    @property
    def largest(self) -> float:
        """The largest value: the one that a run is planned for."""
        return max(self.values)


def check_length_schedule(schedule: Schedule | None, limit: int) -> None:
    """Raises ValueError unless `rollout.length_schedule` has whole numbers of tokens, at most the run's limit.

    Args:
        schedule: of tokens; None is no schedule.
        limit: `rollout.sampling.max_completion_tokens`, which the run is planned for.
    """
    if schedule is None:
        return
    if any(value != int(value) for value in (*schedule.values, schedule.multiple_of or 1)):
        raise ValueError(f"rollout.length_schedule must have whole numbers, got {schedule.values}; correct them")
    if schedule.largest > limit:
        raise ValueError(
            f"rollout.length_schedule goes up to {schedule.largest:g}, above rollout.sampling.max_completion_tokens="
            f"{limit}, which engine, update and rewards are set up for; raise that to {schedule.largest:g}, or lower "
            "the schedule"
        )


@dataclass(frozen=True)
class VideoSchedule:
    """Which frames of a video a training row is shown, by optimizer step; at most those of `data.video`.

    Example:
        `VideoSchedule(max_frames=Schedule([0, 300], [32, 128], shape="linear"))`
    """

    max_frames: Schedule | None = None
    """In place of `data.video.max_frames`, where that gives the largest number."""
    num_frames: Schedule | None = None
    """In place of `data.video.num_frames`."""
    fps: Schedule | None = None
    """In place of `data.video.fps`."""

    def schedules(self) -> dict[str, Schedule]:
        """Those that are set, by the option of `VideoSampling` whose place they take."""
        found = {"max_frames": self.max_frames, "num_frames": self.num_frames, "fps": self.fps}
        return {name: schedule for name, schedule in found.items() if schedule is not None}

    def budget(self, step: int, frames_multiple: int = 1) -> Budget:
        """Options and their values at a step.

        Args:
            step: optimizer steps that were done.
            frames_multiple: that numbers of frames on a line are rounded down to.
        """
        budget: list[tuple[str, float]] = []
        for name, schedule in self.schedules().items():
            if name == "fps":
                budget.append((name, schedule.at(step, FPS_STEP)))
            else:
                budget.append((name, int(schedule.at(step, frames_multiple))))
        return tuple(budget)

    def check(self, video: VideoSampling, frames_multiple: int = 1) -> None:
        """Raises ValueError where a step would read more than `data.video` says, or what that cannot be.

        Args:
            video: the options `data.video`.
            frames_multiple: as of `budget`.
        """
        schedules = self.schedules()
        if not schedules:
            raise ValueError("data.curriculum.video has no schedule; give it max_frames, num_frames or fps")
        for name, schedule in schedules.items():
            most = getattr(video, name)
            if most is None:
                raise ValueError(f"data.curriculum.video.{name} takes the place of data.video.{name}, which is not set")
            if schedule.largest > most:
                raise ValueError(
                    f"data.curriculum.video.{name} goes up to {schedule.largest:g}, above data.video.{name}={most}, "
                    f"which memory is planned for; raise that to {schedule.largest:g}, or lower the schedule"
                )
            if name != "fps" and any(value != int(value) for value in (*schedule.values, schedule.multiple_of or 1)):
                raise ValueError(f"data.curriculum.video.{name} must have whole numbers, got {schedule.values}")
        for step in sorted({step for schedule in schedules.values() for step in schedule.steps}):
            try:
                replace(video, **dict(self.budget(step, frames_multiple)))  # type: ignore[arg-type]
            except ValueError as error:
                raise ValueError(f"data.curriculum.video at step {step}: {error}") from error


class StepBudgets:
    """The frames that are read in the step that is being made, and in those for which workers render ahead.

    Args:
        schedule: by step.
        frames_multiple: that numbers of frames on a line are rounded down to.
        step: says how many optimizer steps were done, whenever it is asked.
        steps_per_batch: says how many a batch takes.
        prompts_per_batch: of this rank.
    """

    def __init__(
        self,
        schedule: VideoSchedule,
        frames_multiple: int,
        step: Callable[[], int],
        steps_per_batch: Callable[[], int],
        prompts_per_batch: int,
    ) -> None:
        self._schedule = schedule
        self._frames_multiple = frames_multiple
        self._step = step
        self._steps_per_batch = steps_per_batch
        self._prompts_per_batch = prompts_per_batch
        self._start = 0
        """Where the stream stood when the step that is being made began to draw."""
        self._last_step = -1

    def begin(self, position: int) -> Budget:
        """The budget of what is drawn now, at a position of the stream."""
        step = self._step()
        if step != self._last_step or position < self._start:
            self._last_step, self._start = step, position
        return self._schedule.budget(step, self._frames_multiple)

    def expected(self, position: int) -> Iterator[Budget]:
        """The budgets that prompts from a position on will have, as far as is known when each one is asked for.

        Steps that draw further prompts, or other steps than were expected, make it wrong: the stream compares.
        """
        while True:
            batches = max(0, position - self._start) // self._prompts_per_batch
            step = self._last_step + batches * self._steps_per_batch()
            yield self._schedule.budget(step, self._frames_multiple)
            position += 1


def budget_metrics(budget: Budget) -> Metrics:
    """What a step reads, as metrics."""
    return {f"data/{name}": float(value) for name, value in budget}
