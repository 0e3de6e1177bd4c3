"""Signs of rollouts that are too little or too much beside the update: what alerts read, made from several metrics."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

SOURCES = (
    "time/step",
    "time/generate",
    "rollout/completion_tokens",
    "rollout/completion_tokens_max",
    "rollout/asked_again",
    "rollout/dropped",
    "rollout/prompts_drawn",
    "rollout/engine_busy",
    "rollout/staleness_share_1",
)
OF_STALENESS = re.compile(r"train/mismatch_mean_staleness_(\d+)")
"""Its metrics are sources too."""
LOST_PROMPTS = "prompts given up"
"""Prompts asked again or dropped, as a share of those that were sampled."""
ENGINE_BUSY = "engine busy beside the update"
"""`rollout/engine_busy` of a run with `rollout.max_staleness` above 0."""
WAIT_FOR_TAILS = "wait for the longest completions"
"""Share of a step in which the trainer waits while completions of mean length have ended; of max_staleness 0."""
STALE_MISMATCH = "mismatch of the oldest tokens"
"""Mismatch of engine and trainer at the oldest tokens over that at the newest ones."""
LEAST_MISMATCH = 0.005
"""Nats: one below counts as that, so that rounding grows to nothing."""


def is_source(column: str) -> bool:
    """True of a metric that a sign is made from."""
    return column in SOURCES or OF_STALENESS.fullmatch(column) is not None


def async_signs(metrics: Mapping[str, float]) -> dict[str, float]:
    """The signs that a step's metrics allow, by name; not a number where a metric is none."""
    signs: dict[str, float] = {}
    is_ahead = "rollout/staleness_share_1" in metrics
    if "rollout/dropped" in metrics and metrics.get("rollout/prompts_drawn"):
        lost = metrics["rollout/dropped"] + metrics.get("rollout/asked_again", 0.0)
        signs[LOST_PROMPTS] = lost / metrics["rollout/prompts_drawn"]
    if is_ahead and "rollout/engine_busy" in metrics:
        signs[ENGINE_BUSY] = metrics["rollout/engine_busy"]
    needed = ("time/generate", "rollout/completion_tokens", "rollout/completion_tokens_max", "time/step")
    if not is_ahead and all(metrics.get(name) for name in needed):
        waits, mean, longest, step = (metrics[name] for name in needed)
        signs[WAIT_FOR_TAILS] = waits / step * (1 - mean / longest)
    by_age = {int(found[1]): name for name in metrics if (found := OF_STALENESS.fullmatch(name))}
    known = sorted(age for age, name in by_age.items() if math.isfinite(metrics[name]))
    if len(known) > 1:
        newest, oldest = metrics[by_age[known[0]]], metrics[by_age[known[-1]]]
        signs[STALE_MISMATCH] = oldest / max(newest, LEAST_MISMATCH)
    return signs
