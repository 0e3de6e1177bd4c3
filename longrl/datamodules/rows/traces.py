r"""Traces in records: what the assistant says and what tools answer, as OpenAI's and Hugging Face's messages have it.

A trace is the field `trace` of a question's record, or all that follows the last question of a conversation, if a
tool's answer is among it:

    {"role": "assistant", "content": "<think>..</think>", "tool_calls": [{"type": "function", "function": {
        "name": "crop_video", "arguments": {"start_s": 8, "end_s": 16}}}]}
    {"role": "tool", "content": [{"type": "text", "text": "The video from 8 to 16 s, 16 frames.\n"},
        {"type": "video", "video": SOURCE, "span_s": [8, 16], "fps": 2.0}]}
    {"role": "assistant", "content": "<think>..</think><answer>B</answer>"}

Calls may stand in the text, too, in `<tool_call>` tags. Each of a turn's answers is a message of its own. Media of
answers are parts of videos, read anew, as `VideoTools` shows them:

    {"type": "video", "video": SOURCE, "span_s": [8, 16]}     also `start_s` and `end_s`, or `video_start`, `video_end`
    {"type": "image", "video": SOURCE, "time_s": 9.5, "box": [0, 0, 500, 1000]}     a frame, or a part in thousandths
    {"type": "image", "image": SOURCE}                                              a file

Without SOURCE the video is the only one of the question. `fps`, `num_frames`, `min_frames` and `max_frames` of a video
say which frames are shown, without any those of `data.video`; `max_pixels` how large a frame is at most. A last answer
that calls a tool is a trace of one turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from longrl.datamodules.rows.record_media import RecordMedia
from longrl.io.jsonl import parse_json

SPANS = (("start_s", "end_s"), ("video_start", "video_end"))
COUNTS = ("num_frames", "min_frames", "max_frames", "max_pixels")
BOX_SCALE = 1000.0
"""Coordinates of boxes are thousandths, as in calls of `zoom`."""
OF_PARTS = ("span_s", "time_s", "box", "start_s", "video_start")
"""What says that a medium is a part of a video."""


def trace_start(messages: Sequence[Mapping[str, Any]]) -> int | None:
    """Where the trace of a conversation begins; None where no tool is called behind the last question."""
    start = len(messages)
    while start and messages[start - 1]["role"] in ("assistant", "tool"):
        start -= 1
    tail = messages[start:]
    is_trace = any(message["role"] == "tool" for message in tail) or bool(tail and tail[-1]["tool_calls"])
    return start if is_trace else None


def check_turns(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError unless a trace begins and ends with the assistant, and tools answer each turn but the last."""
    roles = [message["role"] for message in messages]
    if roles[0] != "assistant":
        raise ValueError("has a tool's answer before the assistant said anything; add the turn that asked for it")
    if roles[-1] != "assistant":
        raise ValueError("ends with a tool's answer; add the assistant's last turn")
    if any(pair == ("assistant", "assistant") for pair in itertools.pairwise(roles)):
        raise ValueError("has a turn of the assistant behind another, and a tool's answer later; join them")


def read_calls(calls: object) -> list[dict[str, Any]]:
    """The calls of a message as `{"name": .., "arguments": {..}}`.

    Raises:
        ValueError: they are something else.
    """
    listed = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise ValueError(f"has tool_calls that must be a list, got {calls!r:.60}")
    read = []
    for call in listed:
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        name = function.get("name") if isinstance(function, Mapping) else None
        arguments = function.get("arguments") if name else None
        if isinstance(arguments, str):
            arguments = parse_json(arguments)
        if not isinstance(name, str) or not isinstance(arguments or {}, Mapping):
            raise ValueError(f"has a tool call that must have a name and its arguments by name, got {str(call)[:80]}")
        # Tables with a column for each argument of any tool have null where a call does not use it.
        given = {key: value for key, value in (arguments or {}).items() if value is not None}
        read.append({"name": name, "arguments": given})
    return read


def read_media_part(
    part: Mapping[str, Any], kind: str, source: Any, media_root: str | None, videos: Sequence[str]
) -> dict[str, Any]:
    """A medium of a tool's answer in the form of `Row.trace`.

    Args:
        part: of a message's content.
        kind: `image` or `video`.
        source: where the medium is, None if the part does not say.
        media_root: see `RecordMedia`.
        videos: of the question.

    Raises:
        ValueError: it is none of the above.
    """
    if kind not in ("image", "video"):
        raise ValueError(f"has a tool's answer with a medium that must be an image or a video, got {kind}")
    if kind == "image" and source is not None:
        if any(part.get(name) is not None for name in OF_PARTS):
            raise ValueError(f"has an image file with what is of a video's frame, got {str(part)[:80]}; name its video")
        (path,) = RecordMedia("image", media_root).paths(source, part)
        return {"type": "image", "path": path}

    # 1. Which video.
    source = part.get("video") if kind == "image" else source
    named = RecordMedia("video", media_root).paths(source, {}) if source is not None else tuple(videos)
    if len(named) != 1:
        raise ValueError(f"has a tool's answer that must name one video, got {str(part)[:80]}; add `video`")
    read: dict[str, Any] = {"type": kind, "video": named[0]}

    # 2. Which frames of it, and which part of these.
    span = part.get("span_s")
    for first, last in SPANS:
        span = [part[first], part[last]] if part.get(first) is not None and part.get(last) is not None else span
    if span is not None:
        read["span_s"] = _numbers(span, 2, "span_s")
    if kind == "image":
        read["time_s"] = _numbers([part.get("time_s")], 1, "time_s")[0]
    if part.get("box") is not None:
        if kind == "video":
            raise ValueError("has a video with a box, which is of one frame; write an image with `time_s`")
        left, top, right, bottom = edges = _numbers(part["box"], 4, "box")
        if not (left < right <= BOX_SCALE and top < bottom <= BOX_SCALE):
            raise ValueError(
                f"has a tool's answer whose box must be [left, top, right, bottom] in thousandths, left < right and "
                f"top < bottom, got {edges}; correct it"
            )
        read["box"] = [edge / BOX_SCALE for edge in edges]
    if part.get("fps") is not None:
        (read["fps"],) = _numbers([part["fps"]], 1, "fps")
    for name in COUNTS:
        if part.get(name) is not None:
            read[name] = int(_numbers([part[name]], 1, name)[0])
    return read


def _numbers(values: object, count: int, name: str) -> list[float]:
    listed = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else []
    is_number = [isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 for value in listed]
    if len(listed) != count or not all(is_number):
        raise ValueError(f"has a tool's answer whose {name} must be {count} numbers from 0 on, got {values!r:.60}")
    return [float(value) for value in listed]
