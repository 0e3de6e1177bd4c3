"""Alerts of runs that go wrong while they go on: what a metric says, its likely cause, and the option to turn.

An alert ends only after `WINDOW` calm steps: one that comes and goes is said once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longrl.evaluation.alert_rules import RULES, WINDOW, Rule, Trace
from longrl.evaluation.async_signs import async_signs, is_source

REWARD = "reward/mean"
"""Metric of RL alone."""


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
        """True if a rule reads a metric of this name, by itself or with others."""
        return is_source(column) or bool(self._rules_of(column))

    def _rules_of(self, column: str) -> list[Rule]:
        if column not in self._readers:
            self._readers[column] = [rule for rule in self.rules if re.fullmatch(rule.columns, column)]
        return self._readers[column]

    def update(self, step: int, metrics: Mapping[str, float]) -> list[Alert]:
        """Takes in the metrics of a step.

        Returns:
            The alerts that begin with it.
        """
        metrics = {**metrics, **async_signs(metrics)}
        for column, value in metrics.items():
            if self._rules_of(column):
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
