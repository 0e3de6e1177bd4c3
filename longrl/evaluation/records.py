"""Records of completions: what was asked, said and scored, which every score is made from."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from longrl.io.processes import lost_worker_in
from longrl.rewards.answers import answer_text, strict_text, think_answer_format
from longrl.rewards.option_choice import chosen_option
from longrl.rewards.options import parse_options
from longrl.rewards.reward_sum import ACCURACY, OPEN_TASKS, RewardFn, accuracy, accuracy_lenient
from longrl.rewards.time_limit import TimeIsUp, call_within
from longrl.types import Completion, Group, Row

logger = logging.getLogger(__name__)

Record = dict[str, Any]
CORRECT_FROM = 0.5
"""An answer counts as right from this accuracy on: for temporal IoU, the usual R@0.5."""
MAX_SCORING_S = 10.0
"""Seconds for reading or judging one answer: answers are on disk, so one that hangs would do so in every run."""


def group_records(
    row: Row, group: Group[Any, Completion], breakdowns: Sequence[str] = (), rule: RewardFn | None = None
) -> list[Record]:
    """One record for each completion of a group, whoever sampled it.

    Args:
        row: the question.
        group: its answers; rewards, if filled, are recorded too. "accuracy" among their parts judges open answers, if
            it is there; where a reward failed, such an answer is neither right nor wrong, but None.
        breakdowns: fields of the row's metadata to score by; a row without one counts as "none" there.
        rule: a published protocol's own scoring, a second score in [0, 1]: `accuracy_by_rule`, which records without a
            rule do not have.
    """
    records = []
    for index, completion in enumerate(group.completions):
        parts = {name: float(part[index]) for name, part in group.reward_parts.items()}
        rewards = {name: value for name, value in parts.items() if not math.isnan(value)}  # without what does not apply
        is_scored = group.valid is None or bool(group.valid[index])
        strict = lenient = rewards.get("accuracy") if is_scored else None
        if row.task in ACCURACY and not (row.task in OPEN_TASKS and strict is not None):
            strict, lenient = _judge(accuracy, completion, row), _judge(accuracy_lenient, completion, row)
        letter = None
        if row.task == "multiple_choice":
            letter = _read(lambda text: chosen_option(strict_text(text), parse_options(row.problem)), completion, row)
        records.append(
            {
                "id": row.id,
                "sample": index,
                "task": row.task,
                "category": row.category,
                "breakdowns": {name: field_value(row, name) for name in breakdowns},
                "video": video_name(row),
                "answer": row.answer,
                "prediction": completion.text,
                "prediction_answer": _read(answer_text, completion, row) or "",
                "letter": letter,
                "accuracy": strict,
                "accuracy_lenient": lenient,
                "correct": None if strict is None else strict >= CORRECT_FROM,
                "correct_lenient": None if lenient is None else lenient >= CORRECT_FROM,
                "correct_by_rule": None,
                "format": bool(_judge(think_answer_format, completion, row)),
                "rewards": rewards,
                "reward": None if group.rewards is None else float(group.rewards[index]),
                "finish_reason": completion.finish_reason,
            }
        )
        if rule is not None:
            value = _judge(rule, completion, row)
            records[-1] |= {"correct_by_rule": value >= CORRECT_FROM, "accuracy_by_rule": value}
    return records


def field_value(row: Row, name: str) -> str | list[str]:
    """What a row's metadata says under a name, "none" where nothing is; a list where it says several things."""
    value = row.metadata.get(name, "none")
    return [str(one) for one in value] if isinstance(value, list | tuple) and value else str(value)


def video_name(row: Row) -> str:
    """A name of the row's video that is the same on every machine: `video_id` of the metadata, or the file's.

    "" without a video. Questions about one video make one cluster.
    """
    video_id = row.metadata.get("video_id")
    if video_id is not None:
        return str(video_id)
    return Path(row.videos[0]).name if row.videos else ""


def check_breakdowns(rows: Sequence[Row], breakdowns: Sequence[str]) -> None:
    """Warns of breakdowns that some rows do not have; raises ValueError for one that none has."""
    for name in breakdowns:
        num_without = sum(name not in row.metadata for row in rows)
        if num_without == len(rows):
            known = ", ".join(sorted({key for row in rows for key in row.metadata})) or "none"
            raise ValueError(
                f"--breakdowns names {name!r}, which no row has in its metadata; name some of what is there: {known}"
            )
        if num_without:
            logger.warning("%d of %d rows have no %r and count as 'none' there", num_without, len(rows), name)


def _judge(judge: RewardFn, completion: Completion, row: Row) -> float:
    try:
        return call_within(MAX_SCORING_S, judge, completion, row)
    except TimeIsUp:
        logger.warning("row %r takes more than %g s to judge and counts as wrong", row.id, MAX_SCORING_S)
        return 0.0
    # One bad row must not end an evaluation of hours; `check_answer` finds most of them before.
    except Exception as error:
        if lost_worker_in(error):
            raise
        logger.warning("row %r cannot be judged and counts as wrong", row.id, exc_info=True)
        return 0.0


def _read(reader: Callable[[str], str | None], completion: Completion, row: Row) -> str | None:
    """What a reader makes of an answer; None of one that it fails at or takes too long for."""
    try:
        return call_within(MAX_SCORING_S, reader, completion.text)
    except (Exception, TimeIsUp) as error:
        if lost_worker_in(error):
            raise
        logger.warning("an answer to row %r cannot be read", row.id, exc_info=True)
        return None
