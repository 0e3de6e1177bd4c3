"""Pairs of answers in records, in the spellings of the field: which of two answers to a question is preferred.

    {"problem" | "question" | "prompt": TEXT, "chosen": TEXT, "rejected": TEXT}     one's own, RLAIF-V, MMPR (MPO), TRL
    {"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES}                  TRL; without `prompt`, both have it
    {"conversations" | "messages": MESSAGES, "chosen": MESSAGE, "rejected": MESSAGE}    LLaMA-Factory
    {"instruction": TEXT, "input": TEXT, "chosen": TEXT, "rejected": TEXT}              LLaMA-Factory
    {"messages": MESSAGES with the better answer, "rejected_response": TEXT}            ms-swift

Media stand in the fields of any record, or in `image`, `video` and `audio`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longrl.datamodules.rows.conversations import answer_of_message, listed_messages
from longrl.types import Row

CHATS = ("messages", "conversations", "prompt")
"""Fields that may hold the messages before the answers."""
QUESTIONS = ("problem", "question", "prompt", "instruction")
"""Fields that may hold a question as text; the first one there counts."""
RIGHT = ("answer", "solution", "ground_truth", "answer_gt")
"""Fields that say what is right, where a record of a pair does; MMPR has the last."""


def is_pair(record: Mapping[str, Any]) -> bool:
    """True of a record that names an answer which is not preferred, beside one that is."""
    has_rejected = any(record.get(name) is not None for name in ("rejected", "rejected_response"))
    has_chosen = record.get("chosen") is not None
    return has_rejected and (has_chosen or listed_messages(record.get("messages")) is not None)


def plain_pair(record: Mapping[str, Any]) -> dict[str, Any]:
    """The same pair as a `problem` or `messages`, with `chosen` and `rejected` as texts; other fields stay.

    Without a right answer, the better one's own is `answer`, and the task `open_ended` unless it says which.

    Raises:
        ValueError: an answer is no text, or the two follow different messages.
    """
    from longrl.rewards.answers import lenient_text

    # 1. Both answers, and the messages before them.
    chats = [listed_messages(record.get(name)) for name in CHATS]
    messages = next((chat for chat in chats if chat is not None), [])
    if record.get("chosen") is None:
        *messages, last = messages
        chosen = answer_of_message(last)
        rejected, _ = _answer(record, "rejected_response")
    else:
        chosen, before = _answer(record, "chosen")
        rejected, other = _answer(record, "rejected")
        if before != other or (messages and before and messages != before):
            raise ValueError("has a chosen and a rejected answer that follow different messages; correct the record")
        messages = messages or before

    # 2. The record in longrl's own spelling.
    plain = {name: value for name, value in record.items() if name not in (*CHATS, "rejected_response", "problem")}
    if messages:
        plain["messages"] = [{**message, "role": message.get("role") or message["from"]} for message in messages]
    else:
        plain["problem"] = _question(record)
    for kind in ("image", "video", "audio"):
        if record.get(kind) is not None and record.get(f"{kind}s") is None:
            plain[f"{kind}s"] = record[kind]
    right = next((record[name] for name in RIGHT if record.get(name) is not None), None)
    if right is None:
        right = lenient_text(chosen) or chosen
        plain["task"] = record.get("task") or "open_ended"
    return plain | {"chosen": chosen, "rejected": rejected, "answer": right}


def _answer(record: Mapping[str, Any], name: str) -> tuple[str, list[Any]]:
    """The text of an answer, and the messages that stand before it in its own field."""
    value = record.get(name)
    messages = listed_messages(value)
    if isinstance(value, Mapping):
        messages = [value]
    if messages is not None:
        *before, last = messages
        return answer_of_message(last), before
    if not isinstance(value, str):
        raise ValueError(f"has {name!r}, which must be a text or messages, got {value!r:.60}")
    return value, []


def _question(record: Mapping[str, Any]) -> Any:
    """The question of a record whose prompt is no conversation; None without one."""
    question = next((record[name] for name in QUESTIONS if record.get(name) is not None), None)
    if record.get("instruction") is question and record.get("input"):
        return f"{question}\n{record['input']}"
    return question


def pair_row(row: Row) -> Row:
    """The row, if it is a pair that can be learned from.

    Raises:
        ValueError: an answer is missing or empty, or both are the same.
    """
    for name, text in (("chosen", row.response), ("rejected", row.rejected)):
        if text is None or not text.strip():
            state = "is missing" if text is None else "is empty"
            raise ValueError(
                f"row {row.id!r} needs {name!r}, which {state}: data.stage=preference learns from pairs of answers; "
                "correct it, or set data.stage to sft or rl"
            )
    if row.response == row.rejected:
        raise ValueError(f"row {row.id!r} has the same answer as chosen and as rejected; correct it, or leave it out")
    return row
