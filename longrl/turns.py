"""Turns of a completion: what the policy said, what it was shown in between, and by which calls it asked for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

TurnRole = Literal["assistant", "tool"]


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool, and what became of it."""

    name: str
    """"" where the call could not be read."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Plain values, as JSON has them."""
    error: str | None = None
    """What the policy was told instead of a result; None if the call was answered."""
    seconds: float = 0.0
    """From the call to its answer."""
    span_s: tuple[float, float] | None = None
    """The part of a video that it showed, in seconds; None if it showed none."""
    frame_times: tuple[float, ...] = ()
    """Times of the frames that it showed, in seconds."""


@dataclass(frozen=True)
class Turn:
    """One message of a completion."""

    role: TurnRole
    text: str
    """What was said. A tool's answers have `<image>` and `<video>` where media stand, and lie line after line."""
    num_tokens: int
    """Of the policy the tokens it sampled; of a tool all that it put before the next turn, the template's included."""
    calls: tuple[ToolCall, ...] = ()
    """Of a tool's turn: the calls that it answers, in order."""


def saved_turn(turn: Turn) -> dict[str, Any]:
    """A turn as plain values, as JSON and checkpoints hold them."""
    calls = []
    for call in turn.calls:
        fields = {item.name: getattr(call, item.name) for item in dataclasses.fields(call)}
        calls.append(fields | {"arguments": dict(call.arguments)})
    return {"role": turn.role, "text": turn.text, "num_tokens": turn.num_tokens, "calls": calls}


def restored_turn(saved: Mapping[str, Any]) -> Turn:
    """The inverse of `saved_turn`, also by way of JSON, which makes lists of tuples."""
    calls = []
    for call in saved["calls"]:
        span = call["span_s"]
        times = tuple(call["frame_times"])
        calls.append(ToolCall(**{**call, "frame_times": times, "span_s": None if span is None else (span[0], span[1])}))
    return Turn(saved["role"], saved["text"], saved["num_tokens"], tuple(calls))


def call_text(call: ToolCall) -> str:
    """A call as a reader would write it.

    Example:
        `call_text(ToolCall("zoom", {"time_s": 3.5}))` is "zoom(time_s=3.5)".
    """
    arguments = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
    return f"{call.name or '(unreadable call)'}({arguments})" if call.name or arguments else "(no call)"


def turns_text(turns: Sequence[Turn]) -> str:
    """All turns as one text: what was said, and behind an arrow what came of each call."""
    lines = []
    for turn in turns:
        if turn.role == "assistant":
            lines.append(turn.text)
            continue
        for call in turn.calls:
            count = len(call.frame_times)
            shown = f"{count} frame{'s' * (count != 1)}" if count else "text"
            lines.append(f"-> {call_text(call)}: {f'ERROR {call.error}' if call.error else shown}")
        if not any(call.frame_times for call in turn.calls):
            lines.append(f"<- {turn.text}")
    return "\n".join(lines)
