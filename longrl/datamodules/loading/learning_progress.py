"""Shares of the sources of a mix by what is being learned from them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrl.io.number_ranges import LEAST, check_ranges
from longrl.types import Metrics


@dataclass(frozen=True)
class LearningProgress:
    """Weighs sources by how fast their mean reward changes: what is being learned, or forgotten, comes more often.

    The progress of a source is the absolute difference between the mean rewards of its last `window` groups and of the
    `window` before (the absolute slope of arXiv:1707.00183; a signal of progress in the sense of arXiv:1704.03003).
    Until every source has two windows, the shares are those of the sources' own weights, or equal.
    """

    window: int = 32
    """Groups of a source whose rewards are averaged."""
    floor: float = 0.2
    """Part of the draws that the sources' own weights share out whatever is learned, so that none is forgotten."""

    def __post_init__(self) -> None:
        check_ranges(self, "data.curriculum.learning_progress.", window=(1, 1e6), floor=(LEAST, 1))


class SourceProgress:
    """The last rewards of every source, and the shares that follow from them.

    Args:
        rule: how.
        names: of the sources, as metrics have them.
        weights: of the sources, before anything is known and for the floor; they add up to 1.
    """

    def __init__(self, rule: LearningProgress, names: Sequence[str], weights: Sequence[float]) -> None:
        self.rule = rule
        self.names = list(names)
        self.base = list(weights)
        self._rewards: list[list[float]] = [[] for _ in names]
        """Mean rewards of the last groups of each source, two windows at most."""

    def observe(self, source: int, reward: float) -> None:
        """Takes the mean reward of a group."""
        rewards = self._rewards[source]
        rewards.append(reward)
        del rewards[: -2 * self.rule.window]

    def progress(self) -> list[float]:
        """Of every source; NaN where there are no two windows yet."""
        window = self.rule.window
        found = []
        for rewards in self._rewards:
            change = math.nan
            if len(rewards) == 2 * window:
                change = abs(math.fsum(rewards[window:]) - math.fsum(rewards[:window])) / window
            found.append(change)
        return found

    def weights(self) -> list[float]:
        """Share of each source in what is drawn next; they add up to 1."""
        progress = self.progress()
        total = sum(progress)
        if math.isnan(total) or total == 0:
            return self.base
        floor = self.rule.floor
        return [floor * base + (1 - floor) * one / total for base, one in zip(self.base, progress, strict=True)]

    def metrics(self) -> Metrics:
        """Share and progress of each source."""
        found: Metrics = {}
        for name, weight, progress in zip(self.names, self.weights(), self.progress(), strict=True):
            found[f"data/weight_{name}"] = weight
            found[f"data/progress_{name}"] = progress
        return found

    def state_dict(self) -> dict[str, Any]:
        """What the shares follow from, as plain values."""
        return {"rewards": [list(rewards) for rewards in self._rewards]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the state was saved; of a window that is smaller now, with its last rewards."""
        self._rewards = [list(rewards)[-2 * self.rule.window :] for rewards in state["rewards"]]


def source_names(sources: Sequence[str]) -> list[str]:
    """Names of sources in metrics: that of the file, or the hub id; a second one of the same name is numbered.

    Example:
        `source_names(["a/train.jsonl", "b/train.jsonl", "owner/set:test"])` is ["train", "train_2", "owner_set_test"].
    """
    names: list[str] = []
    for source in sources:
        plain = Path(source).stem if Path(source).suffix else source
        name = re.sub(r"\W+", "_", plain).strip("_")
        taken = sum(known == name or known.startswith(f"{name}_") for known in names)
        names.append(f"{name}_{taken + 1}" if name in names else name)
    return names
