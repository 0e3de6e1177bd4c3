"""What trainer and engine did in each step, and when: rows of `timeline.jsonl`, their shares, and how they are read."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longrl.io.jsonl import parse_json

FILE = "timeline.jsonl"
"""In the run's folder: a line for each step."""
WAITS = "generate"
"""The phase in which the trainer waits for completions, or makes them itself."""
MAX_SPANS = 200
"""Of a lane that are written of a step."""

Span = tuple[float, float]
"""Start and stop, seconds."""


@dataclass(frozen=True)
class StepTimeline:
    """One step of rank 0, its seconds from the end of the step before."""

    step: int
    """Optimizer steps when it ended."""
    seconds: float
    trainer: Sequence[tuple[str, float, float]]
    """Phase, start and stop; what lies between is the step's own."""
    engine: Sequence[tuple[float, float, float]]
    """Start, stop and the mean number of requests under way; between them it is idle."""
    trainer_busy: float
    """Share of the time in which the trainer did not wait for completions."""
    engine_busy: float
    """Share of the time in which a request was under way."""
    both_idle: float
    """Share of the time in which the trainer waited and the engine had nothing to do."""
    is_counted: bool = False
    """True if the number of requests is known: else 1 stands for a whole rollout."""
    ranks: int = 1
    """That have other prompts: what follows are those of the first."""
    lengths: Sequence[Sequence[int]] = ()
    """Tokens sampled of each completion of the step, by group."""
    prompt_tokens: float = 0.0
    """Mean of the prompts."""


# ---- intervals ----


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time as spans that neither meet nor overlap, in order."""
    joined: list[Span] = []
    for start, stop in sorted(spans):
        if stop <= start:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((start, stop))
    return joined


def without(spans: Iterable[Span], taken: Iterable[Span]) -> list[Span]:
    """What spans have outside of others."""
    left = union(spans)
    for start, stop in union(taken):
        cut = []
        for first, last in left:
            cut += [(first, min(last, start)), (max(first, stop), last)]
        left = [(first, last) for first, last in cut if last > first]
    return left


def total(spans: Iterable[Span]) -> float:
    """Seconds of spans that do not overlap."""
    return math.fsum(stop - start for start, stop in spans)


def exclusive_phases(phases: Sequence[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """Phases without those within them, in the order of time.

    Args:
        phases: name, start and stop; one within another stands before it.
    """
    taken: list[Span] = []
    found = []
    for name, start, stop in phases:
        found += [(name, first, last) for first, last in without([(start, stop)], taken)]
        taken = union([*taken, (start, stop)])
    return sorted(found, key=lambda span: span[1])


# ---- a step ----


def step_timeline(
    step: int,
    seconds: float,
    phases: Sequence[tuple[str, float, float]],
    engine: Sequence[tuple[float, float, float]] | None,
    rollouts: Sequence[Span] = (),
    **known: Any,
) -> StepTimeline:
    """The timeline of a step.

    Args:
        step: its number.
        seconds: how long it took; all times are counted from its start, and what lies outside is left out.
        phases: name, start and stop of the trainer's, one within another before it.
        engine: start, stop and number of requests under way; None where nobody counts them. Then the engine is busy
            in `rollouts`, and where the trainer waits for completions.
        rollouts: start and stop of those beside the trainer.
        known: further fields.
    """
    clipped = [(name, *_clipped((start, stop), seconds)) for name, start, stop in phases]
    trainer = exclusive_phases([span for span in clipped if span[2] > span[1]])
    waits = union([(start, stop) for name, start, stop in trainer if name == WAITS])
    if engine is None:
        busy = union([*waits, *(_clipped(span, seconds) for span in rollouts)])
        lane = [(start, stop, 1.0) for start, stop in busy]
    else:
        lane = [(*_clipped((start, stop), seconds), requests) for start, stop, requests in engine if requests]
        lane = [span for span in lane if span[1] > span[0]]
        busy = union([(start, stop) for start, stop, _ in lane])
    idle = without(waits, busy)
    return StepTimeline(
        step,
        seconds,
        merged_phases(trainer, seconds),
        merged_requests(lane, seconds),
        1 - total(waits) / seconds if seconds else 1.0,
        total(busy) / seconds if seconds else 0.0,
        total(idle) / seconds if seconds else 0.0,
        is_counted=engine is not None,
        **known,
    )


def _clipped(span: Span, seconds: float) -> Span:
    return max(span[0], 0.0), min(span[1], seconds)


def merged_phases(spans: Sequence[tuple[str, float, float]], seconds: float) -> list[tuple[str, float, float]]:
    """Neighbours of one name as one span; of more than `MAX_SPANS` the longest."""
    merged: list[tuple[str, float, float]] = []
    for name, start, stop in spans:
        if merged and merged[-1][0] == name and start - merged[-1][2] < seconds / 1000:
            merged[-1] = (name, merged[-1][1], stop)
        else:
            merged.append((name, start, stop))
    longest = sorted(merged, key=lambda span: span[1] - span[2])[:MAX_SPANS]
    return sorted(longest, key=lambda span: span[1])


def merged_requests(spans: Sequence[tuple[float, float, float]], seconds: float) -> list[tuple[float, float, float]]:
    """The spans, or of more than `MAX_SPANS` the means over equal parts of the step."""
    if len(spans) <= MAX_SPANS:
        return list(spans)
    width = seconds / MAX_SPANS
    sums = [0.0] * MAX_SPANS
    for start, stop, requests in spans:
        for part in range(int(start / width), min(math.ceil(stop / width), MAX_SPANS)):
            inside = min(stop, (part + 1) * width) - max(start, part * width)
            sums[part] += max(0.0, inside) * requests
    return [(part * width, (part + 1) * width, work / width) for part, work in enumerate(sums) if work]


# ---- shares of several steps ----


@dataclass(frozen=True)
class BusyShares:
    """How busy both sides were over several steps, each by its seconds."""

    trainer: float
    engine: float
    both_idle: float
    seconds: float
    """Of all steps."""


def busy_shares(steps: Sequence[StepTimeline]) -> BusyShares:
    """Means over the time of steps; nan of none."""
    seconds = math.fsum(step.seconds for step in steps)
    if not seconds:
        return BusyShares(math.nan, math.nan, math.nan, 0.0)

    def mean(name: str) -> float:
        return math.fsum(step.seconds * getattr(step, name) for step in steps) / seconds

    return BusyShares(mean("trainer_busy"), mean("engine_busy"), mean("both_idle"), seconds)


# ---- the file ----


def timeline_line(timeline: StepTimeline) -> str:
    """A line of the file, without its end; times to a tenth of a millisecond."""
    return json.dumps(_rounded(asdict(timeline)), separators=(",", ":"))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


def read_timeline(folder: str | Path) -> list[StepTimeline]:
    """The steps of a run's folder in order, one that was repeated as it was the last time; no file is no step.

    Lines that are torn or of another form are passed over: the run may have been killed, or go on.
    """
    path = Path(folder, FILE)
    if not path.is_file():
        return []
    found: dict[int, StepTimeline] = {}
    with path.open("rb") as file:
        for line in file:
            timeline = _parsed(line)
            if timeline is not None:
                found.pop(timeline.step, None)
                found[timeline.step] = timeline
    return [found[step] for step in sorted(found)]


def _parsed(line: bytes) -> StepTimeline | None:
    try:
        values = parse_json(line)
        timeline = StepTimeline(**values)
        numbers = [timeline.seconds, timeline.trainer_busy, timeline.engine_busy, timeline.both_idle]
        numbers += itertools.chain.from_iterable(span[1:] for span in timeline.trainer)
        numbers += itertools.chain.from_iterable(timeline.engine)
        numbers += itertools.chain.from_iterable(timeline.lengths)
        is_whole = all(math.isfinite(number) for number in [*numbers, timeline.step, timeline.prompt_tokens])
    except (TypeError, ValueError):
        return None
    has_form = all(len(span) == 3 for span in [*timeline.trainer, *timeline.engine])
    has_form &= all(isinstance(name, str) for name, *_ in timeline.trainer) and isinstance(timeline.ranks, int)
    return timeline if is_whole and has_form and timeline.seconds > 0 else None
