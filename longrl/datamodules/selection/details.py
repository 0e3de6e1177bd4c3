"""Images behind a video, each behind its time in words: where they stand in a question or a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from longrl.models.chat_tokens import MEDIA_TAG
from longrl.types import MediaKind, Row

Times = Sequence[Sequence[float]]
"""Seconds of the images behind each video."""


def said_time(time_s: float) -> str:
    """What stands before an image."""
    return f"\nFrame at {time_s:.1f} s: "


def text_with_details(text: str, kinds: Sequence[MediaKind], times: Times) -> str:
    """A question with a tag for each image behind its video's.

    Args:
        text: whose tags name all media but these images, in order, or none.
        kinds: of those media.
        times: of the images.
    """
    tags = MEDIA_TAG.findall(text)
    if not tags:
        text = "".join(f"<{kind}>" for kind in kinds) + text
    elif tags != [*kinds]:
        return text  # the family says what is wrong with it
    videos = iter(times)
    parts = []
    for index, part in enumerate(MEDIA_TAG.split(text)):  # kinds of media lie at odd indices
        parts.append(f"<{part}>" if index % 2 else part)
        if index % 2 and part == "video":
            shown = next(videos, ())
            parts += [f"{said_time(time_s)}<image>" for time_s in shown] + ["\n"] * bool(shown)
    return "".join(parts)


def row_with_details(row: Row, times: Times) -> Row:
    """A conversation with these images behind its videos."""
    videos = iter(times)
    messages = []
    for message in row.messages:
        content: list[Mapping[str, Any]] = []
        for part in message["content"]:
            content.append(part)
            if part["type"] == "video":
                shown = next(videos, ())
                for time_s in shown:
                    content += [{"type": "text", "text": said_time(time_s)}, {"type": "image"}]
                content += [{"type": "text", "text": "\n"}] * bool(shown)
        messages.append({**message, "content": content})
    return replace(row, messages=tuple(messages))
