"""Rewards of completions: how right an answer is for its kind of question, and the weighted sum of reward functions."""

from __future__ import annotations

import logging
import math
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from longrl.io.functions import FunctionOrPath, resolve_function
from longrl.rewards.answers import multiple_choice, multiple_choice_lenient
from longrl.rewards.batch import BatchReward
from longrl.rewards.box_iou import box_iou, box_iou_lenient, gold_boxes
from longrl.rewards.exact import exact, exact_lenient
from longrl.rewards.math import math as judge_math, math_lenient as judge_math_lenient
from longrl.rewards.numeric import (
    gold_number,
    numeric,
    numeric_lenient,
    regression_accuracy,
    regression_accuracy_lenient,
)
from longrl.rewards.options import parse_options
from longrl.rewards.temporal_iou import gold_intervals, temporal_iou, temporal_iou_lenient
from longrl.rewards.text_overlap import (
    check_reference,
    free_form_accuracy,
    free_form_accuracy_lenient,
    transcription_accuracy,
    transcription_accuracy_lenient,
)
from longrl.types import Completion, Group, Row

logger = logging.getLogger(__name__)

ACCURACY_NAME = "accuracy"
"""The part that dynamic sampling looks at."""
EVERY = re.compile(r"every ([1-9]\d*)")

# ---- which function judges which kind of answer ----

RewardFn = Callable[[Completion, Row], float]

_JUDGES: dict[str, tuple[RewardFn, RewardFn]] = {
    "multiple_choice": (multiple_choice, multiple_choice_lenient),
    "math": (judge_math, judge_math_lenient),
    "numeric": (numeric, numeric_lenient),
    "exact": (exact, exact_lenient),
    "temporal_iou": (temporal_iou, temporal_iou_lenient),
    "box_iou": (box_iou, box_iou_lenient),
    "regression": (regression_accuracy, regression_accuracy_lenient),
    "ocr": (transcription_accuracy, transcription_accuracy_lenient),
    "free_form": (free_form_accuracy, free_form_accuracy_lenient),
}
"""`Row.task` -> strict and lenient judge. A new kind of answer is one line here."""

OPEN_TASKS = ("open_ended", "free_form")
"""Answers in one's own words: no rule judges the first, and one that counts words the second; `longrl.rewards.judge`
has judges of both."""

ACCURACY = {task: strict for task, (strict, _) in _JUDGES.items()}
"""Strict judges: only an answer in its tag (or box) counts."""

LENIENT_ACCURACY = {task: lenient for task, (_, lenient) in _JUDGES.items()}
"""Judges that read the text after the thinking when there is no `<answer>`."""


def accuracy(completion: Completion, row: Row) -> float:
    """How right the answer is, in [0, 1], judged by the kind of question, `row.task`; only an answer in its tag counts.

    Raises:
        ValueError: no judge for this task, or a ground truth that its judge cannot read.
    """
    return _judge_of(ACCURACY, row)(completion, row)


def accuracy_lenient(completion: Completion, row: Row) -> float:
    """As `accuracy`, reading the text after the thinking when there is no `<answer>`."""
    return _judge_of(LENIENT_ACCURACY, row)(completion, row)


def _judge_of(judges: dict[str, RewardFn], row: Row) -> RewardFn:
    if row.task not in judges:
        raise ValueError(
            f"row {row.id!r}: accuracy knows the tasks {', '.join(judges)}, got {row.task!r}; correct the row's task, "
            "or score it with a reward function of its own"
        )
    return judges[row.task]


def check_answer(row: Row) -> None:
    """Checks that the ground truth of a row can be judged; for a data module, before anything is trained on it.

    Raises:
        ValueError: an empty answer, a letter outside the options, or no number, interval or box where one is needed.
    """
    if not row.answer.strip():
        raise ValueError(f"row {row.id!r}: the answer must not be empty; correct or drop the row")
    if row.task in ("numeric", "regression"):
        gold_number(row)
    if row.task == "box_iou":
        gold_boxes(row)
    if row.task == "free_form":
        check_reference(row)
    if row.task == "temporal_iou":
        gold_intervals(row)
    if row.task != "multiple_choice":
        return
    options = parse_options(row.problem)
    if not options:
        raise ValueError(
            f"row {row.id!r}: a multiple_choice problem must list its options from A on, found none in "
            f"{row.problem[-200:]!r}; write each on its own line as 'A. text' or '1. text', or set another task"
        )
    if row.answer.strip().upper() not in options:
        raise ValueError(
            f"row {row.id!r}: the answer must be one of the options {', '.join(options)}, got {row.answer!r}; "
            "correct the row, or set another task"
        )


# ---- the sum ----


@dataclass(frozen=True)
class RewardTerm:
    """One reward function and its weight.

    Example:
        `RewardTerm("longrl.rewards.accuracy", weight=0.9)`, `RewardTerm("my/rewards.py:brevity", name="brevity")`;
        in YAML a function with settings is `function: {class_path: longrl.rewards.SoftOverlong, init_args: {...}}`.
        Of pictures and videos: `RewardTerm("longrl.diffusion.rewards.generation.compressibility", frames_of="first")`.
    """

    function: FunctionOrPath[Callable[[Any, Row], Any]]
    """A function, or where it is: an import path, or `file.py:function` from the working folder. It gets a `Completion`
    of text, or the frames of a generated picture or video, [F, 3, H, W] uint8 RGB, and the `Row` it was made for."""
    weight: float = 1.0
    name: str | None = None
    """The part's name in the logs; the function's own name when None."""
    frames_of: str = "all"
    """Which frames of a generated video the function sees: `all`, `first`, `last` or `every N`."""

    def __post_init__(self) -> None:
        frame_indices(1, self.frames_of)
        function = resolve_function(self.function, "reward")
        if not math.isfinite(self.weight):
            raise ValueError(f"the weight of reward {self.function!r} must be a finite number, got {self.weight}")
        object.__setattr__(self, "function", function)
        name = getattr(function, "__name__", None) or type(function).__name__
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()  # SoftOverlong -> soft_overlong
        object.__setattr__(self, "name", self.name or name)
        if function is accuracy and self.name != ACCURACY_NAME:
            raise ValueError(
                f"the part of longrl.rewards.accuracy must be named {ACCURACY_NAME!r}, for dynamic sampling looks at "
                f"it, got {self.name!r}; leave `name` out"
            )


@dataclass(frozen=True)
class RewardSum:
    """Reward = sum of weight * function(completion, row), each part kept for the logs.

    Of a completion that is no text but has `.frames`, a generated picture or video, functions get these frames.

    Example:
        ```python
        reward = RewardSum([RewardTerm("longrl.rewards.accuracy", 0.9), RewardTerm("my/rewards.py:brevity", 0.1)])
        num_failed = reward.score(groups)   # fills rewards, reward_parts and valid of each group
        ```
    """

    terms: list[RewardTerm]

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("a RewardSum needs at least one term, got none; configs/reward/ has examples")
        if len(set(self.names)) < len(self.names):
            raise ValueError(
                f"the parts of a RewardSum must have different names, got {self.names}; set `name` of a term"
            )

    @cached_property
    def names(self) -> list[str]:
        """Names of the parts, in order."""
        return [str(term.name) for term in self.terms]

    def validate(self, max_completion_tokens: int) -> None:
        """Warns of parts that were set up for another `max_completion_tokens` than the run's."""
        for term in self.terms:
            limit = getattr(term.function, "max_completion_tokens", max_completion_tokens)
            if limit != max_completion_tokens:
                logger.warning(
                    "reward %r was set up for at most %d tokens, but completions have at most %d; set its "
                    "max_completion_tokens to that",
                    term.name, limit, max_completion_tokens,
                )  # fmt: skip

    def prepare(self) -> None:
        """Loads the models that rewards ask, before the first rollout rather than after it.

        Raises:
            ValueError: a package or folder is missing.
        """
        for term in self.terms:
            if isinstance(term.function, BatchReward):
                term.function.prepare()

    def score(self, groups: Sequence[Group[Any, Any]], errors: list[str] | None = None) -> int:
        """Fills `rewards`, `reward_parts` and `valid` of every group.

        A function that raises, or whose value is not a finite number, is logged with its sample; that completion gets
        reward 0 and is not valid, and the other parts keep their values.

        Args:
            groups: with completions.
            errors: gets a line about each failure.

        Returns:
            Number of completions with a failed part.
        """
        import torch

        errors = [] if errors is None else errors
        # 1. Every part of every completion; NaN after a failure.
        samples = [(group, completion) for group in groups for completion in group.completions]
        columns = [_values_of(term, samples, errors) for term in self.terms]
        values = torch.tensor(columns, dtype=torch.float32).reshape(len(self.terms), len(samples))
        values = values.T.contiguous()  # [C, number of terms], C completions of all groups
        # 2. A completion counts if all its parts do.
        all_valid = values.isfinite().all(dim=1)  # [C]
        weights = torch.tensor([term.weight for term in self.terms])
        start = 0
        for group in groups:
            rows = slice(start, start + len(group.completions))
            start = rows.stop
            parts = values[rows].nan_to_num(nan=0.0)  # [G, number of terms]
            group.valid = all_valid[rows].clone()
            group.rewards = (parts @ weights).where(group.valid, 0.0)
            group.reward_parts = {name: parts[:, i].clone() for i, name in enumerate(self.names)}
        return int((~all_valid).sum())


def frame_indices(num_frames: int, frames_of: str) -> list[int]:
    """Indices of the frames of a generated video that a reward sees, the same ones whenever it looks.

    Args:
        num_frames: F of the video; a picture has one.
        frames_of: `all`, `first`, `last`, or `every N`: frames 0, N, 2N and so on.

    Raises:
        ValueError: another choice.

    Example:
        `frame_indices(10, "every 4")` is `[0, 4, 8]`.
    """
    if frames_of in ("first", "last"):
        return [0 if frames_of == "first" else num_frames - 1]
    every = EVERY.fullmatch(frames_of)
    if not every and frames_of != "all":
        raise ValueError(f"frames_of of a reward must be all, first, last or 'every N' with N >= 1, got {frames_of!r}")
    return list(range(0, num_frames, int(every[1]) if every else 1))


def _values_of(term: RewardTerm, samples: Sequence[tuple[Group[Any, Any], Any]], errors: list[str]) -> list[float]:
    """One part of all completions; NaN after a failure, which is logged and kept."""
    function = term.function
    # 1. What the function gets: a completion of text as it is, of any other kind its frames.
    judged = []
    for _, completion in samples:
        if not isinstance(completion, Completion):
            frames = completion.frames
            judged.append(frames[frame_indices(len(frames), term.frames_of)])
        elif term.frames_of == "all":
            judged.append(completion)
        else:
            raise ValueError(
                f"frames_of={term.frames_of!r} of reward {term.name!r} chooses frames of pictures and videos, but the "
                "completions are text; leave frames_of out"
            )
    # 2. Some judge all together.
    results: Sequence[Any] = ()
    if isinstance(function, BatchReward):
        function.prepare()
        try:
            results = function.score_all(judged, [group.prompt.row for group, _ in samples])
        except Exception as error:
            results = [error] * len(samples)
    # 3. A finite number of each, or an error.
    values = []
    for i, (group, completion) in enumerate(samples):
        try:
            result = results[i] if isinstance(function, BatchReward) else function(judged[i], group.prompt.row)
            if isinstance(result, Exception):
                raise result
            value = float(result)
            if not abs(value) < 1e30:  # finite, in float32 too
                raise ValueError(f"a reward must be a finite number, got {value}")
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = completion.text if isinstance(completion, Completion) else f"({len(completion.frames)} frames)"
            logger.warning(
                "reward %r failed on prompt %r (%s: %s, in %s line %d); the completion is left out of the loss. "
                "Its text: %r",
                term.name, group.prompt.id, type(error).__name__, error, frame.filename, frame.lineno, text,
            )  # fmt: skip
            value = math.nan
        values.append(value)
    return values
