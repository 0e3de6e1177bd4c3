"""Rewards that a user brings: any function or `BatchReward`, called under a time limit; an async one, all at once."""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from longrl.chat.event_loop import run_async
from longrl.io.pulse import PULSE
from longrl.rewards.batch import BatchReward, SampleReward
from longrl.rewards.failures import module_of
from longrl.rewards.time_limit import TimeIsUp, call_within
from longrl.types import Row

MAX_HANGS_OF_ROW = 2
"""After so many completions of a row that took too long, its others are not tried in this rollout."""
MAX_HUNG_S = 300.0
"""After so many seconds lost in a rollout none is: other ranks wait, and give up after `timeout_s`."""
LIMITS_OF_BATCH = 5
"""Judging all completions together may take so many times as long as judging one."""

Value = float | Exception | None


class TookTooLong(TimeoutError):
    """A reward was stopped."""


@dataclass(frozen=True)
class TimedReward(BatchReward[Any]):
    """A user's reward under a time limit."""

    reward: Callable[..., Any]
    """A function, or a `BatchReward`."""
    time_limit_s: float
    """Of judging one completion; 0 is none."""

    def prepare(self) -> None:
        """See `BatchReward.prepare`."""
        if isinstance(self.reward, BatchReward):
            self.reward.prepare()

    def score_all(self, completions: Sequence[Any], rows: Sequence[Row]) -> list[Value]:
        """See `BatchReward.score_all`; what took too long is a `TookTooLong`."""
        if is_async(self.reward):
            return self._score_together(self._await_all, completions, rows)
        if isinstance(self.reward, SampleReward):
            return self._score_one_by_one(self.reward.score_one, completions, rows)
        if isinstance(self.reward, BatchReward):
            return self._score_together(self.reward.score_all, completions, rows)
        return self._score_one_by_one(self.reward, completions, rows)

    def _score_one_by_one(
        self, judge: Callable[..., Any], completions: Sequence[Any], rows: Sequence[Row]
    ) -> list[Value]:
        values: list[Value] = []
        num_hangs: Counter[str] = Counter()
        for completion, row in zip(completions, rows, strict=True):
            PULSE.sample = row.id
            PULSE.beats += 1
            if num_hangs[row.id] >= MAX_HANGS_OF_ROW or num_hangs.total() * self.time_limit_s > MAX_HUNG_S:
                values.append(TookTooLong(f"not tried, for it took too long {num_hangs.total()} times in this rollout"))
                continue
            try:
                values.append(_call_within(self.time_limit_s, judge, completion, row))
            except TimeIsUp as stop:
                num_hangs[row.id] += 1
                values.append(self._took_too_long(self.time_limit_s, stop))
            except Exception as error:  # whatever somebody's function raises is this completion's alone
                values.append(error)
        return values

    def _score_together(
        self, judge: Callable[..., Sequence[Value]], completions: Sequence[Any], rows: Sequence[Row]
    ) -> list[Value]:
        if not completions:
            return []
        seconds = self.time_limit_s * min(len(completions), LIMITS_OF_BATCH)
        try:
            values = list(_call_within(seconds, judge, completions, rows))
        except TimeIsUp as stop:
            return [self._took_too_long(seconds, stop)] * len(completions)
        if len(values) != len(completions):
            raise ValueError(
                f"score_all must return a value of each of the {len(completions)} completions, got {len(values)}"
            )
        return values

    def _await_all(self, completions: Sequence[Any], rows: Sequence[Row]) -> list[Value]:
        async def await_one(completion: Any, row: Row) -> Any:
            try:
                async with asyncio.timeout(self.time_limit_s or None) as limit:
                    return await self.reward(completion, row)
            except Exception as error:
                if not limit.expired():
                    return error
                return self._took_too_long(self.time_limit_s, error.__cause__ or error)  # the cause knows the line

        async def gather() -> list[Value]:
            return await asyncio.gather(*map(await_one, completions, rows))

        return run_async(gather)

    def _took_too_long(self, seconds: float, stop: BaseException) -> TookTooLong:
        error = TookTooLong(f"no value within {seconds:g} s (rollout.reward.time_limit_s={self.time_limit_s:g})")
        return error.with_traceback(stop.__traceback__)


def _call_within(seconds: float, judge: Callable[..., Any], *args: Any) -> Any:
    """As `call_within`; a reward that ends the program, as a script would, has failed."""
    try:
        return call_within(seconds, judge, *args)
    except SystemExit as stop:
        raise RuntimeError(f"it called sys.exit({stop.code!r})").with_traceback(stop.__traceback__) from None


def is_async(function: object) -> bool:
    """True for a coroutine function, and an object that is called as one."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def is_own(function: object) -> bool:
    """True for what this package brings, which bounds its own time."""
    return module_of(function).startswith("longrl.")
