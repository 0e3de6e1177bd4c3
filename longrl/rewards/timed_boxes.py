"""Boxes in texts, with the times at which they are stated."""

from __future__ import annotations

import re
from typing import NamedTuple

from longrl.rewards.plain_numbers import end_of_text

MAX_BOX_CHARS = 20_000
"""Of a longer text only the end is read."""


class TimedBox(NamedTuple):
    """A rectangle of a frame, `x1 <= x2` and `y1 <= y2` if it has an area."""

    x1: float
    y1: float
    x2: float
    y2: float
    time_s: float | None = None
    """None: no time is stated."""


def parse_boxes(text: str) -> list[TimedBox]:
    """All boxes a text states, in order.

    A box is `[x1, y1, x2, y2]`, four numbers and nothing else, `(x1, y1), (x2, y2)` or an object with `xmin`, `ymin`,
    `xmax` and `ymax`. Its time is

    - a field of its object: `{"time": 1.0, "bbox_2d": [...], "label": "dog"}` (Qwen3-VL);
    - the key it stands under, several boxes perhaps: `{"12": [...], "13": [[...], [...]]}` (V-STAR);
    - beside it: `<obj>dog</obj><box>[...]</box>at<t>12.0</t>s` (Open-o3-Video), "at 12.0 s: [...]", `[12.0, [...]]`.
    """
    text = end_of_text(text, MAX_BOX_CHARS)
    if _BARE.fullmatch(text):
        text = f"[{text}]"
    matches = list(_BOX.finditer(text))
    boxes: list[TimedBox] = []
    for index, match in enumerate(matches):
        begin = matches[index - 1].end() if index else 0
        end = matches[index + 1].start() if index + 1 < len(matches) else len(text)
        before = text[max(begin, match.start() - _REACH) : match.start()]
        after = text[match.end() : min(end, match.end() + _REACH)]
        time_s = _stated_time(before, after)
        if time_s is None and boxes and _SAME_LIST.fullmatch(before):
            time_s = boxes[-1].time_s
        x1, y1, x2, y2 = map(float, _NUMBER.findall(_KEY.sub(" ", match[0])))
        boxes.append(TimedBox(x1, y1, x2, y2, time_s))
    for index in range(len(boxes) - 1, 0, -1):  # <box>[...]</box><box>[...]</box>at<t>12.0</t>s
        between = text[matches[index - 1].end() : matches[index].start()]
        if boxes[index - 1].time_s is None and _SAME_TAG.fullmatch(between):
            boxes[index - 1] = boxes[index - 1]._replace(time_s=boxes[index].time_s)
    return boxes


_REACH = 120
_N = r"-?\d{1,6}(?:\.\d{1,9})?"
_NUMBER = re.compile(_N)
_BARE = re.compile(rf"\s*{_N}(?:\s*,\s*{_N}){{3}}\s*")
_KEY = re.compile(r"[xy]_?(?:min|max|[12])")
_FIELDS = ("x_?(?:min|1)", "y_?(?:min|1)", "x_?(?:max|2)", "y_?(?:max|2)")
_BOX = re.compile(
    rf"[\[(]\s*{_N}(?:\s*,\s*{_N}){{3}}\s*[\])]"
    rf"|\(\s*{_N}\s*,\s*{_N}\s*\)\s*,?\s*\(\s*{_N}\s*,\s*{_N}\s*\)"
    "|" + r"\s*,\s*".join(rf"['\"]{name}['\"]\s*:\s*{_N}" for name in _FIELDS)
)
_TIME = r"((?:\d{1,3}:)?\d{1,3}:\d{2}(?:\.\d{1,6})?|\d{1,7}(?:\.\d{1,6})?)"
_UNIT = r"\s*(?:seconds?|secs?|s)?"
_MARK = rf"['\"]?(?:<t>|<)?\s*{_TIME}\s*(?:</t>)?{_UNIT}\s*>?['\"]?"
_FIELD = rf"['\"]?\b(?:time|timestamp|time_s|t|seconds?|frame_time)\b['\"]?\s*[:=]\s*{_MARK}"
_FIELD_BEFORE = re.compile(rf"{_FIELD}[^{{}}]*$", re.IGNORECASE)
_FIELD_AFTER = re.compile(rf"[^{{}}]*?{_FIELD}", re.IGNORECASE)
_KEY_BEFORE = re.compile(
    rf"(?:['\"]<?{_TIME}{_UNIT}>?['\"]\s*:"  # "12": [
    rf"|(?:^|[\n{{\[,])\s*{_TIME}{_UNIT}\s*[:,]"  # [12.0, [
    rf"|(?:\b(?:at|t\s*=)\s*<?|<){_TIME}{_UNIT}>?\s*[:,]?"  # at 12.0 s: [
    r")[\s\[]*$",
    re.IGNORECASE,
)
_BESIDE = re.compile(rf"\s*(?:</box>)?[\s,]*(?:at|@)\s*{_MARK}", re.IGNORECASE)
_SAME_LIST = re.compile(r"\s*,\s*")
_SAME_TAG = re.compile(r"\s*</box>\s*<box>\s*")


def _stated_time(before: str, after: str) -> float | None:
    """The time in what stands around a box; None where there is none."""
    match = _BESIDE.match(after) or _FIELD_BEFORE.search(before) or _KEY_BEFORE.search(before)
    match = match or _FIELD_AFTER.match(after)
    if match is None:
        return None
    time = next(group for group in match.groups() if group)
    seconds = 0.0
    for part in time.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds
