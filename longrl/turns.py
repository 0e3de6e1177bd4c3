"""Turns of a completion: what the policy said, what it was shown in between, and by which calls it asked for it."""

from __future__ import annotations

from collections.abc import Mapping
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
