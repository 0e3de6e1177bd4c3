"""Rewards for the length of a completion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from longrl.io.number_ranges import COUNT, FINITE, check_ranges
from longrl.rewards.reward_sum import RULE_TASKS, accuracy
from longrl.types import Completion, Row


@dataclass(frozen=True)
class SoftOverlong:
    """Soft overlong punishment (DAPO, arXiv:2503.14476, eq. 13): 0, then linearly down to -1 in the last tokens.

    With M = max_completion_tokens, C = buffer_tokens and y the completion:
        0                     if |y| <= M - C
        (M - C - |y|) / C     if M - C < |y| <= M
        -1                    if |y| > M

    Example:
        `SoftOverlong(max_completion_tokens=1024, buffer_tokens=256)`; a completion of 896 tokens gets -0.5.
    """

    max_completion_tokens: int
    """The sampling limit of the run."""
    buffer_tokens: int
    """Length of the last stretch, in which the punishment grows."""

    def __post_init__(self) -> None:
        if not 0 < self.buffer_tokens <= self.max_completion_tokens:
            raise ValueError(
                "buffer_tokens must lie in 1..max_completion_tokens, "
                f"got {self.buffer_tokens} with max_completion_tokens={self.max_completion_tokens}"
            )

    def __call__(self, completion: Completion, row: Row) -> float:
        """Punishment of one completion, in [-1, 0]."""
        over = completion.num_sampled - (self.max_completion_tokens - self.buffer_tokens)
        return -min(max(over / self.buffer_tokens, 0.0), 1.0)


@dataclass(frozen=True)
class CosineLength:
    """Cosine length reward (Yeo et al., arXiv:2502.03373, app. C.1): short is better when right, long when wrong.

    reward = full + (short - full) * (1 + cos(pi * |y| / M)) / 2, with M = max_completion_tokens, `short` the value of
    an empty completion and `full` what one of M tokens comes near; a completion of M tokens, or cut off, gets
    `exceeded`, be it right or wrong. The authors' code begins that 16 tokens earlier, and takes a penalty for repeated
    n-grams off wrong completions, which is not in here. Its values are 2 to 1 (right), -10 to 0 (wrong) and -10
    (exceeded); here halves of the former and tenths of the others, so that all lie in [-1, 1]: beside a right answer a
    wrong one counts a fifth of what it does there.
    """

    tasks: ClassVar[frozenset[str]] = RULE_TASKS
    max_completion_tokens: int
    right_short: float = 1.0
    right_full: float = 0.5
    wrong_short: float = -1.0
    wrong_full: float = 0.0
    exceeded: float = -1.0

    def __post_init__(self) -> None:
        values = dict.fromkeys(("right_short", "right_full", "wrong_short", "wrong_full", "exceeded"), FINITE)
        check_ranges(self, "CosineLength: ", max_completion_tokens=COUNT, **values)

    def __call__(self, completion: Completion, row: Row) -> float:
        """Reward of one completion; it is right when `accuracy` is at least 0.5."""
        num_tokens = completion.num_sampled
        if num_tokens >= self.max_completion_tokens or completion.finish_reason == "length":
            return self.exceeded
        right = accuracy(completion, row) >= 0.5
        short, full = (self.right_short, self.right_full) if right else (self.wrong_short, self.wrong_full)
        return full + (short - full) * (1 + math.cos(math.pi * num_tokens / self.max_completion_tokens)) / 2
