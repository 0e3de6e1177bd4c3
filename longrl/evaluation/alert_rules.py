"""When an alert of a run begins and ends: each rule reads one metric, and says its likely cause and the option to turn.

A rule reads its metric against its own start, its peak or a limit, as medians over `WINDOW` steps, so that the noise of
single steps says nothing.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from longrl.evaluation.async_signs import ENGINE_BUSY, LOST_PROMPTS, STALE_MISMATCH, WAIT_FOR_TAILS

WINDOW = 10
"""Steps of the start, of the recent past, and of the calm that ends an alert."""
KEPT = 5 * WINDOW
"""Last values of a metric that are kept."""


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
    Rule(
        "prompts given up",
        LOST_PROMPTS,
        level,
        "above",
        0.1,
        0.05,
        "a share of {:.2f} is asked again or dropped, for it did not end in time",
        "long completions take more than max_staleness steps, so that training sees too few of them",
        "raise rollout.max_staleness, lower rollout.sampling.max_completion_tokens, or give the engine more devices",
    ),
    Rule(
        "idle engine",
        ENGINE_BUSY,
        level,
        "below",
        0.5,
        0.6,
        "it is busy for a share of {:.2f} of the time, though it may sample ahead",
        "the trainer is slower than the engine: finished groups wait and grow old",
        "lower rollout.max_staleness, or give the trainer some of the engine's devices",
    ),
    Rule(
        "idle trainer",
        WAIT_FOR_TAILS,
        level,
        "above",
        0.5,
        0.4,
        "a share of {:.2f} of a step goes by until the longest completions have ended",
        "lengths have a long tail, and the update waits for its end",
        "see by python -m longrl plan --async RUN whether rollout.max_staleness above 0 pays, with an engine on "
        "devices of its own",
    ),
    Rule(
        "stale mismatch",
        STALE_MISMATCH,
        level,
        "above",
        5.0,
        4.0,
        "the oldest tokens have {:.1f} times that of the newest ones",
        "the policy changes faster than its old tokens can be corrected",
        "lower rollout.max_staleness or model.optimizer.lr; with model.algorithm.decoupled and one update per rollout "
        "nothing is clipped: set it to false",
    ),
)
