"""What training runs left in their folders, for a page that shows one of them or compares several.

A run may have been killed at any moment, or go on: torn lines, missing files and odd numbers are passed over.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from longrl.evaluation.alerts import Alert, alerts_of
from longrl.evaluation.curves import Metrics, find_metrics, read_metrics
from longrl.io.plain_yaml import load_yaml

LAST = 10
"""Points whose mean is a final value."""
TAIL_BYTES = 1 << 19
"""Of samples.jsonl, which grows with the run."""
OF_THE_FOLDER = ("run_dir", "ckpt_path", "trainer.default_root_dir", "checkpoint.dirpath")
"""Settings that differ because the folders do."""
MAX_CELL = 300
"""Characters of a setting that are shown."""


@dataclass(frozen=True)
class RunRecord:
    """One run."""

    name: str
    folder: Path
    metrics: Metrics
    """Column -> step -> value."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Dotted name of each setting of config.yaml -> value as text."""
    samples: Sequence[Mapping[str, Any]] = ()
    """Of samples.jsonl, the last ones."""

    @property
    def alerts(self) -> list[Alert]:
        """All alerts it had."""
        return alerts_of(self.metrics)

    @property
    def num_steps(self) -> int:
        """The last step that logged something; 0 without one."""
        return max((max(points) for points in self.metrics.values() if points), default=0)


def read_run(folder: str | Path, name: str | None = None, num_samples: int = 3) -> RunRecord:
    """Reads a run's folder.

    Args:
        folder: `run_dir` of the run.
        name: on the page; that of the folder when left out.
        num_samples: so many of the last completions.
    """
    folder = Path(folder)
    metrics = read_metrics(find_metrics(folder))
    settings = read_settings(folder / "config.yaml")
    samples = last_samples(folder / "samples.jsonl", num_samples)
    return RunRecord(name or folder.resolve().name, folder, metrics, settings, samples)


def short_names(folders: Sequence[str | Path]) -> list[str]:
    """As few last parts of each path as tell them apart."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts), default=1)):
        names = ["/".join(path[-count:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(path) for path in parts]


def read_settings(path: Path) -> dict[str, str]:
    """The settings of a config.yaml; none where it is missing, no YAML, or aliases make it endless."""
    try:
        values = load_yaml(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, yaml.YAMLError):
        return {}
    return _flattened(values, "") if isinstance(values, dict) else {}


def _flattened(value: Any, name: str) -> dict[str, str]:
    if isinstance(value, dict) and value:
        found: dict[str, str] = {}
        for key, below in value.items():
            found |= _flattened(below, f"{name}.{key}" if name else str(key))
        return found
    return {name: value if isinstance(value, str) else json.dumps(value, default=str)}


def last_samples(path: Path, count: int) -> list[dict[str, Any]]:
    """The last completions that a run wrote down; a line that is torn is left out."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    samples = []
    for line in lines:
        try:
            sample = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(sample, dict) and "completion" in sample:
            samples.append(sample)
    return samples[-count:]


def differences(runs: Sequence[RunRecord]) -> list[list[str]]:
    """Settings that are not the same in all runs: name, and the value of each, "-" where it has none."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = []
    for name in sorted(names):
        values = [run.settings.get(name, "-") for run in runs]
        if name not in OF_THE_FOLDER and len(set(values)) > 1:
            rows.append([name, *(value if len(value) <= MAX_CELL else f"{value[:MAX_CELL]}..." for value in values)])
    return rows


def final_value(points: Mapping[int, float]) -> float:
    """Mean of the last values of a metric; nan of none."""
    last = list(points.values())[-LAST:]
    return math.fsum(last) / len(last) if last else math.nan


def seconds_per_step(metrics: Metrics) -> float:
    """Median of a step's seconds: `time/step`, or the sum of all phases where a run has no such column; else nan."""
    points = metrics.get("time/step") or phase_sums(metrics, [name for name in metrics if name.startswith("time/")])
    return statistics.median(points.values()) if points else math.nan


def phase_sums(metrics: Metrics, columns: Sequence[str]) -> dict[int, float]:
    """Step -> sum of some columns, of those that have the step."""
    steps = sorted({step for name in columns for step in metrics.get(name, {})})
    return {step: math.fsum(metrics[name].get(step, 0.0) for name in columns if name in metrics) for step in steps}
