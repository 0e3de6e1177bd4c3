"""Synthetic traces: worked answers that look where the evidence is, from records that say when that is.

They need no model, so they teach the form of calls and of answers behind them; when to look is left to RL.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from longrl.datamodules.rows.question_rows import longvideo_reason_row
from longrl.environments.environment import Environment
from longrl.environments.traces import record_trace

THOUGHT = "What is asked about may be on show between {start_s:g} and {end_s:g} s, so I look there again."
SEEN = "I have seen that part now."
Record = dict[str, Any]


def evidence_of(record: Record) -> tuple[float, float]:
    """The seconds between which what a record asks about is on show: `metadata`'s `evidence_s`, else its `span_s`.

    Raises:
        ValueError: it has neither.
    """
    metadata = record.get("metadata") or {}
    span = metadata.get("evidence_s") or metadata.get("span_s")
    if not span:
        raise ValueError(f"a synthetic trace needs metadata['evidence_s'] of a record, got {sorted(metadata)}")
    return float(span[0]), float(span[1])


def crop_call(start_s: float, end_s: float) -> str:
    """A call of `crop_video` as a turn has it."""
    call = {"name": "crop_video", "arguments": {"start_s": start_s, "end_s": end_s}}
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def evidence_trace(
    record: Record,
    environment: Environment,
    media_root: str | None = None,
    *,
    span_s: tuple[float, float] | None = None,
    thoughts: Sequence[str] = (THOUGHT, SEEN),
) -> Record:
    """A record with a `trace`: a look at the evidence, what is on show there, and the right answer.

    Args:
        record: a question about one video in the LongVideo-Reason schema (`longvideo_reason_row`).
        environment: answers the call, as it will in rollouts.
        media_root: where the record's paths start.
        span_s: what is looked at instead of the evidence.
        thoughts: before the call and before the answer; `{start_s:g}` and `{end_s:g}` are the span's.

    Raises:
        ValueError: the record cannot be read, says no evidence, or the environment refuses the call.
    """
    row = longvideo_reason_row(record, 0, media_root)
    start_s, end_s = span_s or evidence_of(record)
    before, after = (f"<think>{one.format(start_s=start_s, end_s=end_s)}</think>" for one in thoughts)
    turns = [f"{before}\n{crop_call(start_s, end_s)}", f"{after}<answer>{row.answer}</answer>"]
    trace = record_trace(environment, row, turns, media_root)
    return {**record, "trace": trace, "tools": list(environment.tools)}
