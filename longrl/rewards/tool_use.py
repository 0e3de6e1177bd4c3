"""Rewards that look at the turns of a completion: were tools used, were calls well formed, was the right part shown?

Of a completion that was sampled without an environment they say None: they do not apply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longrl.rewards.temporal_iou import interval_iou
from longrl.rewards.time_intervals import Interval, parse_intervals
from longrl.turns import ToolCall
from longrl.types import Completion, Row


def calls_of(completion: Completion) -> list[ToolCall]:
    """All calls of a completion, in order; those that could not be read are among them."""
    return [call for turn in completion.turns for call in turn.calls]


def used_tools(completion: Completion, row: Row) -> float | None:
    """1.0 if a call was answered without an error, else 0.0."""
    if not completion.turns:
        return None
    return float(any(call.error is None for call in calls_of(completion)))


def well_formed_calls(completion: Completion, row: Row) -> float | None:
    """Share of the calls that were answered without an error; 1.0 without a call, for none is wrong.

    A call in the last turn, which nothing answers, is none.
    """
    if not completion.turns:
        return None
    calls = calls_of(completion)
    return sum(call.error is None for call in calls) / len(calls) if calls else 1.0


@dataclass(frozen=True)
class Grounding:
    """Intersection over union of what the last answered call showed of a video and the part that the answer is in.

    In [0, 1] (temporal IoU, as of `temporal_iou`); 0.0 where no call showed a part of a video. The true part is
    `row.metadata[key]`, two seconds or a list of such pairs, else the interval in `row.answer` of a row whose task is
    `temporal_iou`. Rows without either: None.

    Example:
        A crop of 10 to 20 s where the answer is in 15 to 25 s: 5 / 15.
    """

    key: str = "evidence_s"
    """Not `span_s`, which is the part of a video that a row is about, and all that it shows."""
    tools: tuple[str, ...] = ()
    """Names of the tools whose calls count; () are all that show a part of a video."""
    widest_s: float | None = None
    """Calls that show more seconds than this count as none; None is no limit."""

    def __post_init__(self) -> None:
        if self.widest_s is not None and not self.widest_s > 0:
            raise ValueError(f"widest_s of Grounding must be above 0, got {self.widest_s}; leave it out")

    def __call__(self, completion: Completion, row: Row) -> float | None:
        """The overlap of one completion.

        Raises:
            ValueError: the row's metadata hold no seconds.
        """
        gold = self._gold(row)
        if not completion.turns or gold is None:
            return None
        answered = [call for call in calls_of(completion) if call.error is None]
        counted = [call for call in answered if not self.tools or call.name in self.tools]
        spans = [call.span_s for call in counted if call.span_s is not None]
        if not spans:
            return 0.0
        start_s, stop_s = spans[-1]
        if self.widest_s is not None and stop_s - start_s > self.widest_s:
            return 0.0
        return interval_iou([Interval(start_s, stop_s)], gold)

    def _gold(self, row: Row) -> list[Interval] | None:
        """The true part; None where the row says nothing."""
        given: Any = row.metadata.get(self.key)
        if given is None:
            found = parse_intervals(row.answer) if row.task == "temporal_iou" else []
            return found or None
        try:
            if isinstance(given, str):
                raise TypeError("a text")
            pairs = given if isinstance(given[0], list | tuple) else [given]
            gold = [Interval(float(start_s), float(stop_s)) for start_s, stop_s in pairs]
        except (TypeError, ValueError, LookupError):
            gold = []
        if not gold or not all(0 <= part.start_s < part.stop_s for part in gold):
            raise ValueError(
                f"row {row.id!r}: metadata[{self.key!r}] must be two increasing seconds, or a list of such pairs, got "
                f"{given!r}; correct it"
            )
        return gold
