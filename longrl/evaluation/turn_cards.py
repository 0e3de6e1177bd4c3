"""Turns of an answer as a report shows them: what was said, each call, and the frames that it asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from longrl.datamodules.media.video_parts import VideoPart, frame_at
from longrl.turns import ToolCall, call_text, restored_turn

logger = logging.getLogger(__name__)

MAX_FRAMES = 6
"""Of a call."""
BOX_SCALE = 1000
"""Of the edges in a call's `box`, as `VideoTools.zoom` takes them."""
THUMBNAIL_PIXELS = 200 * 150


@dataclass(frozen=True)
class CallCard:
    """One call on the page."""

    text: str
    """As a reader would write it."""
    error: str | None
    frames: Sequence[tuple[Image.Image, float]] = ()
    """Some of those that it showed, and their times in seconds."""


@dataclass(frozen=True)
class TurnCard:
    """One turn on the page."""

    is_tool: bool
    text: str
    """What was said, or what tools answered in words."""
    calls: Sequence[CallCard] = field(default_factory=tuple)


def turn_cards(turns: Sequence[Mapping[str, Any]], videos: Sequence[str]) -> list[TurnCard]:
    """Turns with frames decoded once more from the question's videos; without frames where these cannot be read.

    Args:
        turns: as `saved_turn` has them.
        videos: files of the question.
    """
    cards = []
    for turn in map(restored_turn, turns):
        calls = [CallCard(call_text(call), call.error, _frames(call, videos)) for call in turn.calls]
        cards.append(TurnCard(turn.role == "tool", turn.text, calls))
    return cards


def _frames(call: ToolCall, videos: Sequence[str]) -> list[tuple[Image.Image, float]]:
    """Evenly spaced frames that a call showed, of its box if it has one."""
    shown = min(len(call.frame_times), MAX_FRAMES)
    times = [call.frame_times[index * (len(call.frame_times) - 1) // max(1, shown - 1)] for index in range(shown)]
    frames = []
    try:
        path = videos[int(call.arguments.get("video", 1)) - 1]
        for time_s in times:
            part = VideoPart(path, frame_at(time_s), True, _box(call.arguments.get("box")), THUMBNAIL_PIXELS)
            pixels = next(iter(part())).pixels[0]  # [3, H, W]
            frames.append((Image.fromarray(pixels.movedim(0, -1).contiguous().numpy()), time_s))
    except Exception as error:  # arguments mean what an environment likes, and files may have gone: a report goes on
        logger.warning("frames of %s are not shown: %s", call_text(call), error)
    return frames


def _box(box: Any) -> tuple[float, float, float, float] | None:
    """The part of the picture as shares of its sides; None is all of it."""
    if not isinstance(box, list | tuple) or len(box) != 4:
        return None
    left, top, right, bottom = (float(edge) / BOX_SCALE for edge in box)
    return left, top, right, bottom
