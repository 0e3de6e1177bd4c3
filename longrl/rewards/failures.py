"""Completions that a reward gave no value: what is said of them, and what the mistake probably is."""

from __future__ import annotations

import functools
import logging
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from longrl.io.one_line import one_line
from longrl.io.processes import lost_worker_in
from longrl.rewards.signatures import ColumnReward, ComputeScore
from longrl.types import Group

logger = logging.getLogger(__name__)

MAX_ERROR_CHARS = 500
NUM_NAMED = 5
"""Rows that a line names."""

HINTS = {
    r"'Completion' object|(type|got|not) ['\"]?Completion\b": (
        "a reward gets a Completion: its text is completion.text, and the ground truth row.answer"
    ),
    r"'Row' object|(type|got|not) ['\"]?Row\b|KeyError: '(answer|solution|ground_truth|problem|question|prompt)'": (
        "a reward gets a Row: its ground truth is row.answer, the question row.problem, and what else a record says "
        "row.metadata"
    ),
    r"string indices must be integers|'str' object has no attribute '(get|items)'": (
        "completions are texts, unless the function is named as class_path longrl.rewards.ColumnReward with "
        "conversational: true"
    ),
    r"'Tensor' object|(type|got|not) ['\"]?Tensor\b": (
        "for a diffusion model a function gets frames [F, 3, H, W] and the row, so take one for pictures and videos "
        "(configs/reward/colour.yaml and its like) where it was made for texts (think_answer.yaml)"
    ),
    r"required positional argument|unexpected keyword|takes \d+ positional": (
        "a reward is called as (completion, row), of pictures and videos as (frames, row)"
    ),
    r"accuracy knows the tasks": "configs/reward/judge.yaml and text_similarity.yaml judge open-ended answers",
    r"TookTooLong": "give its calls a timeout of their own, or raise rollout.reward.time_limit_s",
    r"CallFailed|refuses every call|ConnectionError|ConnectError": (
        "see that the server of the judge or scorer runs at the url of its endpoint; nothing that it answered is asked "
        "again"
    ),
    r"must be a finite number|float\(\)|could not convert": (
        "a reward returns one finite number for each completion, or None where it does not apply"
    ),
}
"""What an error says -> what was probably meant; the first that fits counts."""


@dataclass(frozen=True)
class Failure:
    """A completion that a reward could not judge."""

    reward: str
    """Name of the part."""
    row_id: str
    error: str
    """Type and message of the exception."""
    place: str
    """File and line of the reward where it was raised."""
    text: str
    """What was to be judged."""

    @property
    def kind(self) -> tuple[str, str, str]:
        """Failures of one kind are one line in the log: the same type of error at the same place."""
        error_type = self.error.partition(":")[0]
        # A loop that never ends is stopped on any of its lines.
        return self.reward, error_type, "" if error_type == "TookTooLong" else self.place

    @property
    def what(self) -> str:
        """The error and where it was raised."""
        return f"{self.error}, in {self.place}" if self.place else self.error

    @property
    def hint(self) -> str:
        """What the mistake probably is; "" where nothing is known."""
        return next((hint for pattern, hint in HINTS.items() if re.search(pattern, self.error)), "")


def failure_of(error: Exception, reward: str, function: object, row_id: str, text: str) -> Failure:
    """What is said of an exception that a reward raised.

    Raises:
        RuntimeError: the exception has nothing to do with the reward: torch tells of a loader worker that died by one
            in whatever the main thread is doing.
    """
    if lost_worker_in(error):
        raise error
    error_text = one_line(f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS])
    return Failure(reward, row_id, error_text, place_in(function, error), text)


def place_in(function: object, error: BaseException) -> str:
    """The last line of the reward's own file that an error passed, or of any behind whoever called it; "" without."""
    _, *frames = traceback.extract_tb(error.__traceback__)
    module = sys.modules.get(module_of(function))
    own_file = getattr(module, "__file__", None)
    own = [frame for frame in frames if frame.filename == own_file]
    return "".join(f"{frame.filename} line {frame.lineno}" for frame in (own or frames)[-1:])


def module_of(function: object) -> str:
    """Name of the module that a function, or the class of a callable object, was written in."""
    while isinstance(function, functools.partial | ColumnReward | ComputeScore):
        function = function.func if isinstance(function, functools.partial) else function.function
    return str(getattr(function, "__module__", None))


def log_failures(failures: Sequence[Failure], num_completions: int) -> None:
    """One line per kind, with how many completions and rows it is about.

    Args:
        failures: of one rollout.
        num_completions: of the rollout.
    """
    for alike in failures_by_kind(failures):
        first = alike[0]
        rows = named_ids(failure.row_id for failure in alike)
        hint = f"; {first.hint}" if first.hint else ""
        logger.warning(
            "reward %r failed on %d of %d completions, of row %s (%s)%s; they are left out of the loss. The first "
            "one's text: %r",
            first.reward, len(alike), num_completions, rows, first.what, hint, first.text[:500],
        )  # fmt: skip


def log_unjudged(groups: Sequence[Group[Any, Any]]) -> None:
    """One line about the completions to which no reward applies."""
    num_completions = 0
    ids = []
    for group in groups:
        applies = [part.isfinite() for part in group.reward_parts.values()]  # [G] each
        num_unjudged = int((~sum(applies[1:], start=applies[0])).sum())
        num_completions += num_unjudged
        if num_unjudged:
            ids.append(group.prompt.id)
    logger.warning(
        "no reward applies to %d completions, of row %s; they are left out of the loss", num_completions, named_ids(ids)
    )


def log_none_judged(values: Sequence[object], server: str) -> None:
    """One line where a server that was asked has judged nothing.

    Args:
        values: of all completions, errors among them.
        server: its model and url.
    """
    errors = [value for value in values if isinstance(value, Exception)]
    if errors and len(errors) == len(values):
        logger.warning(
            "none of %d completions could be judged by %s: nothing is learned from them. The first: %s",
            len(values), server, errors[0],
        )  # fmt: skip


def failures_by_kind(failures: Sequence[Failure]) -> list[list[Failure]]:
    """Failures of one kind together, in the order in which the kinds were met."""
    by_kind: dict[tuple[str, str, str], list[Failure]] = {}
    for failure in failures:
        by_kind.setdefault(failure.kind, []).append(failure)
    return list(by_kind.values())


def named_ids(ids: Iterable[str]) -> str:
    """The first few of several ids, each once."""
    ids = list(dict.fromkeys(ids))
    more = f" and {len(ids) - NUM_NAMED} more" if len(ids) > NUM_NAMED else ""
    return ", ".join(map(repr, ids[:NUM_NAMED])) + more


def hopeless_message(failures: Sequence[Failure], num_completions: int) -> str | None:
    """Why a run whose rewards gave no completion a value must end; None while it may go on.

    A row or two that cannot be judged end no run: several rows must fail, and one reward in one way on all of them.

    Args:
        failures: of all that was sampled so far.
        num_completions: that many were sampled.
    """
    for alike in failures_by_kind(failures):
        first = alike[0]
        if len(alike) < num_completions or len({failure.row_id for failure in alike}) < 2:
            continue
        place = f", in {first.place}" if first.place else ""
        remedy = first.hint or "correct it; one completion and its row are enough to try it by hand"
        return (
            f"reward {first.reward!r} failed on every one of the {num_completions} completions so far, of row "
            f"{named_ids(failure.row_id for failure in alike)}{place}, first with {first.error}; {remedy}"
        )
    return None
