"""What a plan of asynchronous rollouts starts from: lengths and seconds, measured in a run's folder or given."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from longrl.evaluation.curves import Metrics
from longrl.evaluation.run_records import read_run
from longrl.evaluation.timeline import FILE, StepTimeline, read_timeline
from longrl.io.text_files import read_utf8

LAST_STEPS = 100
"""Of a run that are read."""
QUANTILES = {
    0.1: "rollout/completion_tokens_p10",
    0.5: "rollout/completion_tokens_p50",
    0.9: "rollout/completion_tokens_p90",
    1.0: "rollout/completion_tokens_max",
}
BEFORE_UPDATE = ("data", "encode", "reward")
"""Phases between a rollout's end and the next one's start at k = 1."""


@dataclass(frozen=True)
class Measured:
    """What is known; None is not."""

    groups: Sequence[Sequence[int]] = ()
    """Lengths of completions, by group."""
    groups_per_step: int | None = None
    token_s: float | None = None
    request_s: float | None = None
    """Seconds of a decoding step, and more of them for each completion in it."""
    update_s: float | None = None
    other_s: float | None = None
    sync_s: float | None = None
    """Medians of steps, as `Workload` has them."""
    prompt_tokens: float | None = None
    most_requests: float = 0.0
    """That were under way at once, where they were counted."""
    notes: Sequence[str] = field(default_factory=list)
    """What was assumed, for people."""


def read_lengths(path: str | Path, num_generations: int) -> list[list[int]]:
    """Lengths from a file.

    Args:
        path: JSON, a list of groups or of numbers; or text: numbers between blanks or commas, of which a line of
            several is a group.
        num_generations: completions of a group, where numbers are not in groups; it is cut off at the last whole one.

    Raises:
        ValueError: it holds something else, or nothing.
    """
    text = read_utf8(path)
    mistake = ValueError(
        f"--lengths={path} must hold lengths of completions: numbers of at least 1, one a line or a group a line, or a "
        "JSON list of them"
    )
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [line.replace(",", " ").split() for line in text.splitlines() if line.strip()]
        groups = [[int(length) for length in (row if isinstance(row, list) else [row])] for row in rows]
    except (TypeError, ValueError, RecursionError):
        raise mistake from None
    if not groups or not all(groups) or min(map(min, groups)) < 1:
        raise mistake
    if max(map(len, groups)) > 1:
        return groups
    flat = [row[0] for row in groups]
    size = min(num_generations, len(flat))
    return [flat[start : start + size] for start in range(0, len(flat) - size + 1, size)]


def measured_run(folder: str | Path) -> Measured:
    """What a run of RL says of its lengths and seconds.

    Args:
        folder: `run_dir` of the run; `timeline.jsonl` has each completion's length. A run from before there was such a
            file has their quantiles in `metrics.csv`, from which lengths are drawn.

    Raises:
        ValueError: it is no run of RL, or has logged too little.
    """
    record = read_run(folder, num_samples=0)
    if not record.metrics:
        raise ValueError(f"{folder} holds no metrics.csv; name the run_dir of a training run, or lengths by --lengths")
    if "rollout/groups_kept" not in record.metrics:
        raise ValueError(f"{folder} is no run of RL: it has no rollouts that could be asynchronous")
    staleness = _staleness_of(record.settings)
    steps = [step for step in read_timeline(folder) if any(step.lengths)][-LAST_STEPS:]
    if steps:
        return _from_timeline(steps, staleness)
    return _from_metrics(folder, record.metrics, record.settings, staleness)


def _staleness_of(settings: Mapping[str, str]) -> int:
    """The run's own k."""
    text = settings.get("rollout.max_staleness", "0")
    if settings.get("rollout.overlap") == "true":
        return 1
    return int(text) if text.isdecimal() else 0


# ---- from the timeline ----


def _from_timeline(steps: Sequence[StepTimeline], staleness: int) -> Measured:
    pairs = [pair for pair in _engine_work(steps, staleness) if pair.seconds > 0]
    token_s, request_s, notes = decoding_seconds(pairs)
    by_phase = [_phase_seconds(step) for step in steps]
    other = [math.fsum(seconds.get(name, 0.0) for name in BEFORE_UPDATE) for seconds in by_phase]
    sync = [seconds.get("sync", 0.0) for seconds in by_phase]
    update = [
        step.seconds - seconds.get("generate", 0.0) - before - synced
        for step, seconds, before, synced in zip(steps, by_phase, other, sync, strict=True)
    ]
    return Measured(
        [[max(1, length) for length in group] for step in steps for group in step.lengths if group],
        round(statistics.median(len(step.lengths) * step.ranks for step in steps)),
        token_s,
        request_s,
        statistics.median(update),
        statistics.median(other),
        statistics.median(sync),
        statistics.median(step.prompt_tokens for step in steps),
        max((requests for step in steps if step.is_counted for _, _, requests in step.engine), default=0.0),
        notes,
    )


def _phase_seconds(step: StepTimeline) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for phase, start, stop in step.trainer:
        seconds[phase] = seconds.get(phase, 0.0) + stop - start
    return seconds


@dataclass(frozen=True)
class EngineWork:
    """What an engine did in a step."""

    seconds: float
    depth: float
    """Decoding steps: the longest completion where all begin together."""
    tokens: float
    """Of all completions."""


def _engine_work(steps: Sequence[StepTimeline], staleness: int) -> list[EngineWork]:
    """Of each step, where it can be told; `staleness` is the run's k."""
    found = []
    for before, step in zip([None, *steps], steps, strict=False):
        lengths = [length for group in step.lengths for length in group]
        if not lengths:
            continue
        tokens = float(sum(lengths) * step.ranks)
        busy_s = step.engine_busy * step.seconds
        if step.is_counted:
            requests = math.fsum((stop - start) * count for start, stop, count in step.engine)
            if requests:
                found.append(EngineWork(busy_s, tokens * busy_s / requests, tokens))
        elif staleness == 0:
            found.append(EngineWork(busy_s, max(lengths), tokens))
        elif before is not None and before.engine and step.engine:
            # Sampled from the last start of the engine in the step before to its first stop in this one.
            seconds = before.engine[-1][1] - before.engine[-1][0]
            if before.engine[-1][1] > 0.999 * before.seconds:
                seconds += step.engine[0][1] - step.engine[0][0]
            found.append(EngineWork(seconds, max(lengths), tokens))
    return found


def decoding_seconds(pairs: Sequence[EngineWork]) -> tuple[float | None, float | None, list[str]]:
    """Seconds of a decoding step and of each completion in it, by least squares, neither below 0.

    A rollout of n(t) completions under way takes sum_t (token_s + request_s n(t)) = token_s depth + request_s tokens.

    Returns:
        Both, None of nothing, and notes.
    """
    if not pairs:
        return None, None, []
    depths, tokens, seconds = ([getattr(pair, name) for pair in pairs] for name in ("depth", "tokens", "seconds"))
    dd, tt, dt = _dot(depths, depths), _dot(tokens, tokens), _dot(depths, tokens)
    ds, ts = _dot(depths, seconds), _dot(tokens, seconds)
    determinant = dd * tt - dt * dt
    if len(pairs) < 3 or determinant <= 1e-6 * dd * tt:
        note = "lengths vary too little to tell what further completions cost a decoding step: taken as nothing"
        return ds / dd, 0.0, [note]
    token_s = (ds * tt - ts * dt) / determinant
    request_s = (ts * dd - ds * dt) / determinant
    if token_s < 0:
        return 0.0, ts / tt, []
    if request_s < 0:
        return ds / dd, 0.0, []
    return token_s, request_s, []


def _dot(left: Iterable[float], right: Iterable[float]) -> float:
    return math.fsum(one * other for one, other in zip(left, right, strict=True))


# ---- from metrics.csv ----


def _from_metrics(folder: str | Path, metrics: Metrics, settings: Mapping[str, str], staleness: int) -> Measured:
    missing = [name for name in (*QUANTILES.values(), "time/step", "time/generate") if name not in metrics]
    if missing:
        raise ValueError(
            f"{folder} has neither a {FILE} nor {missing[0]} in its metrics; add "
            "longrl.callbacks.throughput.Throughput to trainer.callbacks and train some steps, or name lengths by "
            "--lengths"
        )
    if staleness:
        raise ValueError(
            f"{folder} has no {FILE} and was sampled during updates, so that its metrics do not tell how long the "
            "engine took; train some steps anew, or name lengths by --lengths"
        )
    num_generations = int(settings.get("rollout.sampling.num_generations", "8"))
    sizes = _last(metrics, "rollout/prompts_drawn")
    rounds = _last(metrics, "rollout/resample_rounds") or [0.0] * len(sizes)
    count = max(1, round(statistics.median(size / (1 + extra) for size, extra in zip(sizes, rounds, strict=False))))
    draw = random.Random(0)
    groups: list[list[int]] = []
    pairs = []
    seconds = metrics["time/generate"]
    steps = [step for step in metrics["time/step"] if all(step in metrics[name] for name in QUANTILES.values())]
    for step in steps[-LAST_STEPS:]:
        points = {share: metrics[name][step] for share, name in QUANTILES.items()}
        lengths = quantile_lengths(points, count * num_generations)
        draw.shuffle(lengths)
        groups += [lengths[start : start + num_generations] for start in range(0, len(lengths), num_generations)]
        pairs.append(EngineWork(seconds.get(step, 0.0), max(lengths), sum(lengths)))
    token_s, request_s, notes = decoding_seconds(pairs)
    other = math.fsum(_median(metrics, f"time/{name}") for name in BEFORE_UPDATE)
    sync = _median(metrics, "time/sync")
    update = _median(metrics, "time/step") - _median(metrics, "time/generate") - other - sync
    notes = [*notes, f"there is no {FILE}: lengths are drawn from the quantiles in metrics.csv"]
    return Measured(groups, count, token_s, request_s, max(update, 0.0), other, sync, notes=notes)


def quantile_lengths(points: Mapping[float, float], count: int) -> list[int]:
    """So many lengths with given quantiles, linear between them; the shortest is half of the first quantile.

    Args:
        points: share -> length, the last share 1.
        count: of the lengths; the longest is that of share 1.
    """
    shares = [0.0, *points]
    values = [next(iter(points.values())) / 2, *points.values()]
    lengths = []
    for index in range(count):
        share = (index + 1) / count
        right = next(place for place, known in enumerate(shares) if known >= share - 1e-9)
        left = max(0, right - 1)
        part = (share - shares[left]) / (shares[right] - shares[left]) if right else 0.0
        lengths.append(max(1, round(values[left] + part * (values[right] - values[left]))))
    return lengths


def _last(metrics: Metrics, name: str) -> list[float]:
    return list(metrics.get(name, {}).values())[-LAST_STEPS:]


def _median(metrics: Metrics, name: str) -> float:
    values = _last(metrics, name)
    return statistics.median(values) if values else 0.0


# ---- given numbers ----


def with_given(measured: Measured, given: Mapping[str, Any]) -> Measured:
    """The same with what was given in the place of what was measured; None is nothing given."""
    return replace(measured, **{name: value for name, value in given.items() if value is not None})


def check_known(measured: Measured, where: Callable[[str], str]) -> None:
    """Raises ValueError if something that a plan needs is neither measured nor given.

    Args:
        measured: all that is known.
        where: says of a name how it is given.
    """
    needed = ("groups_per_step", "token_s", "update_s")
    missing = [where(name) for name in needed if getattr(measured, name) is None]
    if not measured.groups:
        missing.insert(0, "RUN or --lengths")
    if missing:
        raise ValueError(f"a plan of asynchronous rollouts needs {', '.join(missing)}; give what is missing")
