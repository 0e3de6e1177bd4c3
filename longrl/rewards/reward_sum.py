"""Rewards of completions: how right an answer is for its kind of question, and the weighted sum of reward functions."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from longrl.io.functions import FunctionOrPath, resolve_function
from longrl.io.pulse import PULSE
from longrl.rewards.answers import multiple_choice, multiple_choice_lenient
from longrl.rewards.batch import BatchReward
from longrl.rewards.box_iou import box_iou, box_iou_lenient, gold_boxes
from longrl.rewards.exact import exact, exact_lenient
from longrl.rewards.failures import Failure, failure_of, log_failures, log_unjudged
from longrl.rewards.frame_choice import frame_indices
from longrl.rewards.math import math as judge_math, math_lenient as judge_math_lenient
from longrl.rewards.numeric import (
    gold_number,
    mean_relative_accuracy,
    mean_relative_accuracy_lenient,
    numeric,
    numeric_lenient,
    regression_accuracy,
    regression_accuracy_lenient,
)
from longrl.rewards.options import parse_options
from longrl.rewards.signatures import ColumnReward, as_reward, name_of
from longrl.rewards.temporal_iou import gold_intervals, temporal_iou, temporal_iou_lenient
from longrl.rewards.text_overlap import (
    check_reference,
    free_form_accuracy,
    free_form_accuracy_lenient,
    transcription_accuracy,
    transcription_accuracy_lenient,
)
from longrl.rewards.user_rewards import TimedReward, is_own
from longrl.types import Completion, Group, Row

logger = logging.getLogger(__name__)

ACCURACY_NAME = "accuracy"
"""The part that dynamic sampling looks at."""

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
    "mra": (mean_relative_accuracy, mean_relative_accuracy_lenient),
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
    return ACCURACY.get(row.task, _no_judge)(completion, row)


def accuracy_lenient(completion: Completion, row: Row) -> float:
    """As `accuracy`, reading the text after the thinking when there is no `<answer>`."""
    return LENIENT_ACCURACY.get(row.task, _no_judge)(completion, row)


def _no_judge(completion: Completion, row: Row) -> float:
    raise ValueError(
        f"row {row.id!r}: accuracy knows the tasks {', '.join(_JUDGES)}, got {row.task!r}; correct the row's task, "
        f"or score it with {OTHER_JUDGES}"
    )


RULE_TASKS = frozenset(_JUDGES)
"""Tasks that `accuracy` judges."""
OTHER_JUDGES = (
    "configs/reward/judge.yaml or text_similarity.yaml, which judge open_ended, or a reward function of its own"
)
for _function in (accuracy, accuracy_lenient):
    vars(_function)["tasks"] = RULE_TASKS  # see `RewardTerm.tasks`


def check_answer(row: Row) -> None:
    """Checks that the ground truth of a row can be judged; for a data module, before anything is trained on it.

    Raises:
        ValueError: an empty answer, a letter outside the options, or no number, interval or box where one is needed.
    """
    if not row.answer.strip():
        raise ValueError(f"row {row.id!r}: the answer must not be empty; correct or drop the row")
    if row.task in ("numeric", "regression", "mra"):
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
    """Factor of the function's value in the sum; negative for a penalty."""
    name: str | None = None
    """The part's name in the logs; the function's own name when None."""
    frames_of: str = "all"
    """Which frames of a generated video the function sees: `all`, `first`, `last` or `every N`."""
    tasks: list[str] | Literal["every"] | None = None
    """The tasks whose answers the function judges: of rows of other tasks it is left out of the sum. `every` says that
    it judges them all. None is what the function says itself by an attribute `tasks`; one that says nothing is called
    for every row, and taken for a judge of the answer if no other term is."""

    def __post_init__(self) -> None:
        frame_indices(1, self.frames_of)
        function = as_reward(resolve_function(self.function, "reward"))
        if not math.isfinite(self.weight):
            raise ValueError(f"the weight of reward {self.function!r} must be a finite number, got {self.weight}")
        object.__setattr__(self, "function", function)
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name_of(function)).lower()  # SoftOverlong -> soft_overlong
        object.__setattr__(self, "name", self.name or name)
        if function is accuracy and self.name != ACCURACY_NAME:
            raise ValueError(
                f"the part of longrl.rewards.accuracy must be named {ACCURACY_NAME!r}, for dynamic sampling looks at "
                f"it, got {self.name!r}; leave `name` out"
            )


@dataclass(frozen=True)
class RewardPart:
    """A term as it is called."""

    term: RewardTerm
    function: Callable[[Any, Row], Any]
    tasks: frozenset[str] | None
    """Of the rows that it is called for; None is all."""


@dataclass(frozen=True)
class RewardSum:
    """Reward = sum of weight * function(completion, row), each part kept for the logs.

    A function that returns None does not apply to the row: its part is left out of the sum, whose weights stay as they
    are, and of the part's mean. A completion to which none applies is left out of the loss.

    Of a completion that is no text but has `.frames`, a generated picture or video, functions get these frames.
    docs/rewards.md says which forms a function may have, and what becomes of one that fails or hangs.

    Example:
        ```python
        reward = RewardSum([RewardTerm("longrl.rewards.accuracy", 0.9), RewardTerm("my/rewards.py:brevity", 0.1)])
        num_failed = reward.score(groups)   # fills rewards, reward_parts and valid of each group
        ```
    """

    terms: list[RewardTerm]
    """The functions that are summed up, at least one; each with its weight."""
    time_limit_s: float = 60.0
    """Seconds that a function of yours may take for one completion; for all of a rollout together, where it judges them
    so, five times as many. A completion that takes longer counts as failed. 0 is no limit."""

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("a RewardSum needs at least one term, got none; configs/reward/ has examples")
        if len(set(self.names)) < len(self.names):
            raise ValueError(
                f"the parts of a RewardSum must have different names, got {self.names}; set `name` of a term"
            )
        if not 0 <= self.time_limit_s <= 1e9:
            raise ValueError(
                f"rollout.reward.time_limit_s must be at least 0, which is none, got {self.time_limit_s}; 60 is usual"
            )

    @cached_property
    def names(self) -> list[str]:
        """Names of the parts, in order."""
        return [str(term.name) for term in self.terms]

    @cached_property
    def parts(self) -> list[RewardPart]:
        """What is called for each term: functions of the user's own under the time limit."""
        declared = [term_tasks(term) for term in self.terms]
        parts = []
        for term, tasks in zip(self.terms, declared, strict=True):
            function: Any = term.function
            if not is_own(function):
                function = TimedReward(function, self.time_limit_s)
            # `accuracy` raises an error for a task that it does not know, unless it is another's to judge.
            is_only_judge = term.tasks is None and sum(map(bool, declared)) == 1
            limited = None if tasks == "every" or is_only_judge else tasks
            parts.append(RewardPart(term, function, limited))
        return parts

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

    def check_rows(self, rows: Sequence[Row], split: str) -> None:
        """Checks that every row has a judge, before weights are loaded.

        Args:
            rows: of a split whose completions are to be rewarded.
            split: its name, for the message.

        Raises:
            ValueError: no part judges the task of some rows, or a function of TRL asks for a column that they lack.
        """
        for term in self.terms:
            if isinstance(term.function, ColumnReward):
                term.function.check_rows(rows)
        declared = [tasks for tasks in map(term_tasks, self.terms) if tasks]
        if not declared or "every" in declared:
            return
        known = frozenset().union(*declared)
        without: dict[str, list[Row]] = {}
        for row in rows:
            if row.task not in known:
                without.setdefault(row.task, []).append(row)
        for task, of_task in without.items():
            raise ValueError(
                f"{len(of_task)} of {len(rows)} rows of data.{split} have the task {task!r}, which no reward judges, "
                f"first row {of_task[0].id!r}; rollout.reward judges {', '.join(sorted(known))}. Set rollout.reward to "
                f"{OTHER_JUDGES} whose term says `tasks: [{task}]` or `tasks: every`, or correct the rows' task"
            )

    def prepare(self) -> None:
        """Loads the models that rewards ask, before the first rollout rather than after it.

        Raises:
            ValueError: a package or folder is missing.
        """
        for part in self.parts:
            if isinstance(part.function, BatchReward):
                part.function.prepare()

    def score(self, groups: Sequence[Group[Any, Any]], failures: list[Failure] | None = None) -> int:
        """Fills `rewards`, `reward_parts`, `part_weights` and `valid` of every group.

        A function that raises, takes too long or gives no finite number is logged with its samples; such a completion
        gets reward 0 and is not valid, and the other parts keep their values. A part that does not apply is NaN.

        Args:
            groups: with completions.
            failures: gets what failed.

        Returns:
            Number of completions with a failed part, or without any.
        """
        import torch

        # 1. Every part of every completion: infinite after a failure, NaN where it does not apply.
        samples = [(group, completion) for group in groups for completion in group.completions]
        failed: list[Failure] = []
        columns = [_values_of(part, samples, failed) for part in self.parts]
        values = torch.tensor(columns, dtype=torch.float32).reshape(len(self.terms), len(samples))
        values = values.T.contiguous()  # [C, number of terms], C completions of all groups
        if failed:
            log_failures(failed, len(samples))
        if failures is not None:
            failures += failed
        # 2. A completion counts if no part failed, and some applies.
        all_valid = ~values.isinf().any(dim=1) & ~values.isnan().all(dim=1)  # [C]
        values = values.masked_fill(values.isinf(), 0.0)
        weights = torch.tensor([term.weight for term in self.terms])
        start = 0
        for group in groups:
            rows = slice(start, start + len(group.completions))
            start = rows.stop
            parts = values[rows]  # [G, number of terms]
            group.valid = all_valid[rows].clone()
            group.rewards = (parts.nan_to_num(nan=0.0) @ weights).where(group.valid, 0.0)
            group.reward_parts = {name: parts[:, i].clone() for i, name in enumerate(self.names)}
            group.part_weights = {name: term.weight for name, term in zip(self.names, self.terms, strict=True)}
        if values.isnan().all(dim=1).any():
            log_unjudged(groups)
        return int((~all_valid).sum())


def term_tasks(term: RewardTerm) -> frozenset[str] | Literal["every"] | None:
    """The tasks whose answers a term judges, as its config or its function says; None where neither does."""
    tasks = getattr(term.function, "tasks", None) if term.tasks is None else term.tasks
    if tasks is None:
        # What dynamic sampling looks at is the judgement of the answer.
        return "every" if term.name == ACCURACY_NAME else None
    return tasks if tasks == "every" else frozenset(tasks)


def _values_of(
    part: RewardPart, samples: Sequence[tuple[Group[Any, Any], Any]], failures: list[Failure]
) -> list[float]:
    """One part of all completions: infinite after a failure, NaN where it does not apply."""
    term, function = part.term, part.function
    values = [math.nan] * len(samples)
    # 1. What the function gets: a completion of text as it is, of any other kind its frames.
    judged = []
    for position, (group, completion) in enumerate(samples):
        if part.tasks is not None and group.prompt.row.task not in part.tasks:
            continue
        if not isinstance(completion, Completion):
            frames = completion.frames
            sample = frames[frame_indices(len(frames), term.frames_of)]
        elif term.frames_of == "all":
            sample = completion
        else:
            raise ValueError(
                f"frames_of={term.frames_of!r} of reward {term.name!r} chooses frames of pictures and videos, but "
                "the completions are text; leave frames_of out"
            )
        judged.append((position, sample, group.prompt.row))
    # 2. Some judge all together.
    results: Sequence[Any] = ()
    if isinstance(function, BatchReward):
        function.prepare()
        try:
            results = function.score_all([sample for _, sample, _ in judged], [row for _, _, row in judged])
        except Exception as error:
            results = [error] * len(judged)
    # 3. A finite number of each, None, or an error.
    for number, (position, sample, row) in enumerate(judged):
        PULSE.sample = row.id
        PULSE.beats += 1
        try:
            result = results[number] if isinstance(function, BatchReward) else function(sample, row)
            if isinstance(result, Exception):
                raise result
            if result is None:
                continue
            values[position] = float(result)
            if not abs(values[position]) < 1e30:  # finite, in float32 too
                raise ValueError(f"a reward must be a finite number, got {values[position]}")
        except Exception as error:
            text = sample.text if isinstance(sample, Completion) else f"({len(sample)} frames)"
            failures.append(failure_of(error, str(term.name), term.function, row.id, text))
            values[position] = math.inf
    PULSE.sample = ""
    return values
