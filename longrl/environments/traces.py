"""Traces of known turns: what an environment answers to them, in records that SFT reads (`datamodules/rows/traces.py`).

Media are written down as parts of videos, so that a loader shows the frames that a rollout shows, under the same keys.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from longrl.datamodules.media.video_parts import VideoPart
from longrl.datamodules.rows.traces import BOX_SCALE
from longrl.environments.environment import Environment, Observation
from longrl.environments.rendering import as_observation
from longrl.types import Frames, Row

Message = dict[str, Any]


def record_trace(
    environment: Environment, row: Row, turns: Sequence[str], media_root: str | None = None
) -> list[Message]:
    """The messages of an answer whose turns are known, with what the environment answers between them.

    Args:
        environment: begins with the row.
        row: the question.
        turns: of the assistant; calls stand in their text. The last one is not answered.
        media_root: files below it are named from there on.

    Raises:
        ValueError: the environment ends before the turns do, or shows what no record can name.
    """
    environment.reset(row)
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        messages.append({"role": "assistant", "content": turn})
        if number == len(turns):
            break
        answer = environment.step(turn)
        if answer is None:
            raise ValueError(
                f"row {row.id!r}: the environment ends with turn {number} of {len(turns)}: {turn[-200:]!r}"
            )
        messages += tool_messages(as_observation(answer), media_root)
    return messages


def tool_messages(observation: Observation, media_root: str | None = None) -> list[Message]:
    """What an environment answered to a turn, a message for each call.

    Args:
        observation: its media are `VideoPart`s.
        media_root: see `record_trace`.

    Raises:
        ValueError: a medium is none.
    """
    messages: list[Message] = []
    for response in observation.responses:
        parts = [
            {"type": "text", "text": part} if isinstance(part, str) else media_part(part, media_root)
            for part in response.content
        ]
        messages.append({"role": "tool", "content": parts})
    return messages


def media_part(frames: Frames, media_root: str | None = None) -> Mapping[str, Any]:
    """A medium of a tool's answer as records name it.

    Raises:
        ValueError: it is no part of a video.
    """
    part = frames.source
    if not isinstance(part, VideoPart):
        raise ValueError(
            f"a record can name parts of videos, got a {frames.kind} whose source is {type(part).__name__}; have the "
            "tool show a VideoPart's outline"
        )
    named: dict[str, Any] = {"type": "image" if part.is_image else "video", "video": _below(part.path, media_root)}
    sampling = part.sampling
    if part.is_image:
        assert sampling.span_s is not None, "a frame is one at a time"
        named["time_s"] = sampling.span_s[0]
    else:
        names = ("fps", "num_frames", "min_frames", "max_frames")
        named |= {"span_s": sampling.span_s, **{name: getattr(sampling, name) for name in names}}
    if part.box is not None:
        named["box"] = [round(edge * BOX_SCALE, 6) for edge in part.box]
    named["max_pixels"] = part.max_pixels
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in named.items() if value is not None
    }


def _below(path: str, media_root: str | None) -> str:
    """A path from `media_root` on, if the file is below it."""
    if media_root is None or "://" in path:
        return path
    relative = os.path.relpath(path, media_root)
    return path if relative.startswith("..") else relative
