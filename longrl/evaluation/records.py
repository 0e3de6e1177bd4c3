"""One JSON line per completion of a question: what was asked, seen, said and scored."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from longrl.rewards.answer_text import answer_text, strict_text, think_answer_format
from longrl.rewards.choice import chosen_option, parse_options
from longrl.rewards.tasks import ACCURACY, accuracy, accuracy_lenient

if TYPE_CHECKING:
    from longrl.rewards.tasks import RewardFn
    from longrl.types import Completion, Group, Row

logger = logging.getLogger(__name__)

CORRECT_FROM = 0.5
"""An answer counts as right from this accuracy on: for temporal IoU, the usual R@0.5."""


def sample_record(group: Group, *, index: int = 0, breakdowns: Sequence[str] = ()) -> dict[str, Any]:
    """One completion of a group as a JSON-able dict.

    Args:
        group: of evaluation; its rewards, if filled, are recorded too.
        index: which completion.
        breakdowns: see `answer_record`.
    """
    prompt = group.prompt
    return {
        **answer_record(
            prompt.row,
            group.completions[index],
            index=index,
            breakdowns=breakdowns,
            rewards={name: float(part[index]) for name, part in group.reward_parts.items()},
            reward=None if group.rewards is None else float(group.rewards[index]),
            scored=group.valid is None or bool(group.valid[index]),
        ),
        "num_prompt_tokens": len(prompt.input_ids),
        "num_frames": sum(map(len, prompt.frame_indices)),
        "timestamps": [list(medium.timestamps) for medium in prompt.media],
        "grid_thw": [list(medium.grid_thw) for medium in prompt.media],
    }


def answer_record(
    row: Row,
    completion: Completion,
    *,
    index: int = 0,
    breakdowns: Sequence[str] = (),
    rewards: Mapping[str, float] | None = None,
    reward: float | None = None,
    scored: bool = True,
) -> dict[str, Any]:
    """What was asked, said and scored, whoever sampled it: the part of a record that every score is made from.

    Args:
        row: the question.
        completion: an answer.
        index: its number among those to the question.
        breakdowns: fields of the row's metadata to score by; a row without one counts as "none" there.
        rewards: part -> value; "accuracy" judges tasks that have no judge of their own.
        reward: their weighted sum.
        scored: False where a reward failed: such a task's answer is then neither right nor wrong, but None.
    """
    rewards = rewards or {}
    judged = rewards.get("accuracy") if scored else None
    return {
        "id": row.id,
        "sample": index,
        "task": row.task,
        "category": row.category,
        "breakdowns": {name: str(row.metadata.get(name, "none")) for name in breakdowns},
        "video": row.videos[0] if row.videos else "",
        "problem": row.problem,
        "answer": row.answer,
        "prediction": completion.text,
        "prediction_answer": answer_text(completion.text),
        "letter": _letter(completion, row),
        **_judged(completion, row, judged),
        "format": bool(think_answer_format(completion, row)),
        "rewards": dict(rewards),
        "reward": reward,
        "finish_reason": completion.finish_reason,
        "num_completion_tokens": len(completion.token_ids),
    }


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


def _letter(completion: Completion, row: Row) -> str | None:
    if row.task != "multiple_choice":
        return None
    return chosen_option(strict_text(completion.text), parse_options(row.problem))


def _judged(completion: Completion, row: Row, by_reward: float | None) -> dict[str, Any]:
    """Accuracy by the task's judge; for a task without one (open_ended) by the rewards."""
    strict, lenient = by_reward, by_reward
    if row.task in ACCURACY:
        strict, lenient = _contained(accuracy, completion, row), _contained(accuracy_lenient, completion, row)
    return {
        "accuracy": strict,
        "correct": None if strict is None else strict >= CORRECT_FROM,
        "correct_lenient": None if lenient is None else lenient >= CORRECT_FROM,
    }


def _contained(judge: RewardFn, completion: Completion, row: Row) -> float:
    try:
        return judge(completion, row)
    except Exception:  # one bad row must not end an evaluation of hours; check_answer finds most of them before
        logger.warning("row %r cannot be judged and counts as wrong", row.id, exc_info=True)
        return 0.0
