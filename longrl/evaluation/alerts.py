"""Alerts of runs that go wrong while they go on: what a metric says, its likely cause, and the option to turn.

A rule reads one metric against its own start, its peak or a limit, as medians over `WINDOW` steps, so that the noise of
single steps says nothing. An alert ends only after `WINDOW` calm steps: one that comes and goes is said once.
"""

from __future__ import annotations

import functools
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

WINDOW = 10
"""Steps of the start, of the recent past, and of the calm that ends an alert."""
KEPT = 5 * WINDOW
"""Last values of a metric that are kept."""
REWARD = "reward/mean"
"""Metric of RL alone."""


@dataclass
class Trace:
    """What is kept of a metric: little, whatever the length of the run."""

    start: list[float] = field(default_factory=list)
    """The first `WINDOW` values."""
    recent: list[float] = field(default_factory=list)
    """The last `KEPT` ones."""
    count: int = 0
    """All there were."""
    peak: float = -math.inf
    """The largest median of `WINDOW` values in a row."""

    def add(self, value: float) -> None:
        """Takes in the next value; one that is no finite number is left out."""
        if not math.isfinite(value):
            return
        self.count += 1
        if len(self.start) < WINDOW:
            self.start.append(value)
        self.recent.append(value)
        del self.recent[:-KEPT]
        if len(self.recent) >= WINDOW:
            self.peak = max(self.peak, self.now)

    @property
    def now(self) -> float:
        """Median of the last `WINDOW` values."""
        return statistics.median(self.recent[-WINDOW:])


Measure = Callable[[Trace], float | None]
"""What a rule compares with its limits; None where there are too few values."""


def share_of_start(trace: Trace, floor: float = 1e-6) -> float | None:
    """The metric now over the metric at the start; a start below `floor` counts as that."""
    if trace.count < 2 * WINDOW:
        return None
    return trace.now / max(statistics.median(trace.start), floor)


def drop_from_peak(trace: Trace) -> float | None:
    """How far the metric is below the best it had."""
    return None if trace.count < 2 * WINDOW else trace.peak - trace.now


def level(trace: Trace) -> float | None:
    """The metric now."""
    return None if trace.count < WINDOW else trace.now


def spike(trace: Trace) -> float | None:
    """The last value over the median of those before it."""
    before = trace.recent[:-1]
    if len(before) < 2 * WINDOW:
        return None
    usual = statistics.median(before)
    return trace.recent[-1] / usual if usual > 0 else None


@dataclass(frozen=True)
class Rule:
    """When an alert begins and ends, and what it says."""

    name: str
    columns: str
    """Regular expression of the whole name of a metric; of several in a run the first by the alphabet is read."""
    measure: Measure
    side: Literal["above", "below"]
    """Of `enter`, on which the alert begins."""
    enter: float
    leave: float
    """The alert ends on the other side of it: nearer to what is healthy than `enter`."""
    what: str
    """What the measure is, with its value in place of `{}`."""
    cause: str
    knob: str
    """Options to turn."""
    only_rl: bool = True

    def begins(self, value: float) -> bool:
        """True if a measure is beyond `enter`."""
        return value > self.enter if self.side == "above" else value < self.enter

    def is_calm(self, value: float) -> bool:
        """True if a measure is back on the healthy side of `leave`."""
        return value < self.leave if self.side == "above" else value > self.leave


RULES: tuple[Rule, ...] = (
    Rule(
        "entropy collapse",
        r"train/entropy",
        share_of_start,
        "below",
        0.2,
        0.3,
        "token entropy is {:.2f} of its start",
        "the policy is certain of its answers, so that completions of a group hardly differ",
        "raise model.algorithm.clip_high (DAPO: 0.28) or model.algorithm.kl_coef, or lower model.optimizer.lr",
    ),
    Rule(
        "entropy explosion",
        r"train/entropy",
        functools.partial(share_of_start, floor=0.05),
        "above",
        4.0,
        3.0,
        "token entropy is {:.1f} times its start",
        "updates are too large, or reward noise, and the policy dissolves",
        "lower model.optimizer.lr or model.algorithm.clip_high, or set model.algorithm.kl_coef",
    ),
    Rule(
        "no reward variance",
        r"reward/std_in_group",
        functools.partial(share_of_start, floor=1e-3),
        "below",
        0.1,
        0.2,
        "spread in a group is {:.2f} of its start",
        "prompts are always or never right by now, or the reward no longer tells completions apart",
        "take harder or easier rows in data.train, set model.algorithm.select to longrl.algorithms.drop_uniform, or "
        "raise rollout.sampling.temperature",
    ),
    Rule(
        "length explosion",
        r"rollout/completion_tokens",
        functools.partial(share_of_start, floor=1.0),
        "above",
        3.0,
        2.5,
        "{:.1f} times as long as at the start",
        "length pays, or wrong completions are long and their tokens are punished less (sequence_mean)",
        "add longrl.rewards.SoftOverlong to rollout.reward (configs/reward/dapo.yaml), or set "
        "model.algorithm.token_weights to longrl.algorithms.token_mean",
    ),
    Rule(
        "length shrinkage",
        r"rollout/completion_tokens",
        functools.partial(share_of_start, floor=1.0),
        "below",
        0.33,
        0.45,
        "{:.2f} times as long as at the start",
        "the policy answers without reasoning, for the reward does not need it or punishes length",
        "lower the weight of what punishes length in rollout.reward, or set model.algorithm.kl_coef",
    ),
    Rule(
        "format drop",
        r"reward/\w*format\w*",
        drop_from_peak,
        "above",
        0.2,
        0.1,
        "its rate is {:.2f} below its best",
        "the policy leaves the form that the reward asks for, or completions are cut off before its end",
        "raise the weight of the format in rollout.reward or rollout.sampling.max_completion_tokens, or lower "
        "model.optimizer.lr",
    ),
    Rule(
        "mismatch growth",
        r"train/mismatch_mean",
        functools.partial(share_of_start, floor=0.003),
        "above",
        4.0,
        3.0,
        "{:.1f} times that of the start",
        "engine and trainer compute in other precisions or from other weights, which grows with sharper policies",
        "set model.algorithm.correction to longrl.algorithms.truncated_token, model.algorithm.fp32_lm_head to true, "
        "or compute both in one precision",
    ),
    Rule(
        "gradient spike",
        r"train/grad_norm",
        spike,
        "above",
        10.0,
        3.0,
        "{:.0f} times the usual norm",
        "one batch with extreme ratios, advantages or lengths",
        "set model.max_grad_norm (1.0), lower model.optimizer.lr, or warm up longer (model.optimizer.warmup_steps)",
        only_rl=False,
    ),
    Rule(
        "truncation",
        r"rollout/cut_off",
        level,
        "above",
        0.3,
        0.2,
        "a share of {:.2f} is cut off",
        "completions need more tokens than they may have, or do not end at all",
        "raise rollout.sampling.max_completion_tokens, or punish length in rollout.reward (configs/reward/dapo.yaml)",
    ),
    Rule(
        "failed rewards",
        r"rollout/failed_rewards",
        level,
        "above",
        0.2,
        0.1,
        "a share of {:.2f} has no reward",
        "a reward raises, or its judge does not answer",
        "see the warnings about rewards; look at the reward function or at the judge's endpoint in rollout.reward",
    ),
    Rule(
        "failing tools",
        r"rollout/tool_errors",
        level,
        "above",
        0.5,
        0.4,
        "a share of {:.2f} of the calls is answered with an error",
        "calls are written otherwise than they are read, or the environment fails",
        "see the warnings of rollout.environment, and turns in samples.jsonl; teach calls first, by SFT on traces",
    ),
)


@dataclass(frozen=True)
class Alert:
    """A rule that holds."""

    rule: Rule
    column: str
    step: int
    """Where it began."""
    value: float
    """Of the measure, when it began."""

    @property
    def what(self) -> str:
        """The finding in words."""
        return self.rule.what.format(self.value)

    def __str__(self) -> str:
        rule = self.rule
        return (
            f"{rule.name} at step {self.step} ({self.column}): {self.what}. Likely cause: {rule.cause}. "
            f"What helps: {rule.knob}"
        )


class AlertWatch:
    """Follows the metrics of a run step by step.

    Args:
        ignore: names of rules that are not read.
        rules: all there are.

    Example:
        watch = AlertWatch()
        for step, metrics in enumerate(curve):
            for alert in watch.update(step, metrics):
                logger.warning("%s", alert)

    Raises:
        ValueError: `ignore` has a name that no rule has.
    """

    def __init__(self, ignore: Sequence[str] = (), rules: Sequence[Rule] = RULES) -> None:
        names = [rule.name for rule in rules]
        unknown = sorted(set(ignore).difference(names))
        if unknown:
            raise ValueError(f"there is no alert {', '.join(unknown)} to ignore; there are: {', '.join(names)}")
        self.rules = [rule for rule in rules if rule.name not in ignore]
        self.traces: dict[str, Trace] = {}
        """Of the metrics that rules read, by name."""
        self._active: dict[str, Alert] = {}
        self._calm: dict[str, int] = {}
        """Name of an active rule -> calm steps in a row."""
        self._readers: dict[str, list[Rule]] = {}
        """Rules of a metric, none for most."""

    @property
    def active(self) -> list[Alert]:
        """Those that hold now, the oldest first."""
        return list(self._active.values())

    def reads(self, column: str) -> bool:
        """True if a rule reads a metric of this name."""
        if column not in self._readers:
            self._readers[column] = [rule for rule in self.rules if re.fullmatch(rule.columns, column)]
        return bool(self._readers[column])

    def update(self, step: int, metrics: Mapping[str, float]) -> list[Alert]:
        """Takes in the metrics of a step.

        Returns:
            The alerts that begin with it.
        """
        for column, value in metrics.items():
            if self.reads(column):
                self.traces.setdefault(column, Trace()).add(value)
        begun = []
        taken: set[str] = set()
        for column in sorted(metrics):
            for rule in self._readers.get(column, []):
                if rule.name not in taken:
                    taken.add(rule.name)
                    begun += self._judge(rule, column, step, REWARD in metrics or not rule.only_rl)
        return begun

    def _judge(self, rule: Rule, column: str, step: int, applies: bool) -> list[Alert]:
        value = rule.measure(self.traces[column]) if applies else None
        if value is None:
            return []
        if rule.name not in self._active:
            if not rule.begins(value):
                return []
            self._calm[rule.name] = 0
            self._active[rule.name] = Alert(rule, column, step, value)
            return [self._active[rule.name]]
        self._calm[rule.name] = self._calm[rule.name] + 1 if rule.is_calm(value) else 0
        if self._calm[rule.name] >= WINDOW:
            del self._active[rule.name]
        return []

    def state_dict(self) -> dict[str, Any]:
        """Plain values, some kilobytes."""
        traces = {name: [trace.start, trace.recent, trace.count, trace.peak] for name, trace in self.traces.items()}
        active = {
            alert.rule.name: [alert.column, alert.step, alert.value, self._calm[alert.rule.name]]
            for alert in self.active
        }
        return {"traces": traces, "active": active}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse; alerts of rules that are ignored by now are left out."""
        self.traces = {}
        for name, (start, recent, count, peak) in state["traces"].items():
            self.traces[name] = Trace(list(start), list(recent), count, peak)
        by_name = {rule.name: rule for rule in self.rules}
        self._active, self._calm = {}, {}
        for name, (column, step, value, calm) in state["active"].items():
            if name in by_name:
                self._active[name] = Alert(by_name[name], column, step, value)
                self._calm[name] = calm


def alerts_of(curves: Mapping[str, Mapping[int, float]]) -> list[Alert]:
    """All alerts that a run had, from its curves: column -> step -> value."""
    watch = AlertWatch()
    by_step: dict[int, dict[str, float]] = {}
    for column, points in curves.items():
        if watch.reads(column) or column == REWARD:
            for step, value in points.items():
                by_step.setdefault(step, {})[column] = value
    return [alert for step in sorted(by_step) for alert in watch.update(step, by_step[step])]
