"""A model's reply as a question: JSON in whatever wrapping, times in whatever spelling."""

from __future__ import annotations

import json
import math
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from longrl.pipeline.asking import UnusableReply
from longrl.pipeline.config import Kind
from longrl.rewards.time_intervals import parse_intervals

FUTILE_CHARS = 100_000
"""Read in vain in search of an object, besides ten times the text's length."""
MAX_CLOCK_CHARS = 400
OBJECT = re.compile(r'\{\s*["}]')
"""How an object begins, and no brace of prose or LaTeX."""
LABEL = re.compile(r"\s*\(?([A-Ha-h])\s?[).:]\s+")
CLOCK = re.compile(r"\s*(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)\s*(?:s|sec|secs|seconds?)?\.?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Step:
    """One step of the reasoning and the part of the video that shows it."""

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True)
class ParsedQuestion:
    """A question before its options have letters."""

    kind: Kind
    question: str
    options: tuple[str, ...]
    """Without letters, in the model's order; () if open-ended."""
    answer: str
    """One of the options, or a text."""
    steps: tuple[Step, ...]
    box: tuple[float, ...] | None = None
    """(x0, y0, x1, y1) in thousandths of width and height."""
    box_at_s: float | None = None


def parse_question(text: str, kind: Kind) -> ParsedQuestion:
    """The question that a reply holds.

    Raises:
        UnusableReply: no JSON object with a question, a field missing or of the wrong type, or an answer outside them.
    """
    reply = next((item for item in json_objects(text) if "question" in item), None)
    if reply is None:
        raise UnusableReply("no json", f"no JSON object with a question in {text[:200]!r}")
    question = _text_field(reply, "question")
    options = _options(reply) if kind == "multiple_choice" else ()
    answer = _text_field(reply, "answer")
    if kind == "multiple_choice":
        answer = _chosen_option(answer, options)
    box, box_at_s = _box(reply.get("box"))
    return ParsedQuestion(kind, question, options, answer, tuple(_steps(reply)), box, box_at_s)


def json_objects(text: str) -> Iterator[dict[str, Any]]:
    """Yields all outermost JSON objects in a text, whatever stands around them.

    It stops once it has read many times the text's length in vain, as in one of braces alone.
    """
    decoder, start = json.JSONDecoder(strict=False), 0
    left = 10 * len(text) + FUTILE_CHARS
    while left > 0 and (opening := OBJECT.search(text, start)):
        start = opening.start()
        try:
            value, start = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            left -= error.pos - start + error.pos // 20  # it counts the lines before it
            start += 1
        except (ValueError, RecursionError):  # an integer of thousands of digits, thousands of braces
            left -= FUTILE_CHARS // 10
            start += 1
        else:
            if isinstance(value, dict):
                yield value


def seconds_of(value: object) -> float:
    """A time in seconds: 75, 75.5, "75.5 s", "1:15" or "0:01:15".

    Raises:
        UnusableReply: it is none of them.
    """
    if _is_number(value):
        return float(value)
    # Of many blanks the pattern would try every share; no time is so long.
    match = CLOCK.fullmatch(value) if isinstance(value, str) and len(value) <= MAX_CLOCK_CHARS else None
    if match is None:
        raise UnusableReply("bad times", f"{str(value)[:MAX_CLOCK_CHARS]!r} is no time")
    hours, minutes, seconds = match.groups()
    time = 3600 * float(hours or 0) + 60 * float(minutes or 0) + float(seconds)
    if math.isinf(time):
        raise UnusableReply("bad times", f"a time of {len(match[0])} digits")
    return time


def _is_number(value: object) -> TypeGuard[float]:
    """Whether JSON held a number that a float can hold: no flag, not NaN, and no integer of hundreds of digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def single_spaced(text: str) -> str:
    """NFKC, single-spaced."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _text_field(item: Mapping[str, Any], field: str) -> str:
    value = item.get(field)
    value = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not isinstance(value, str) or not single_spaced(value):
        raise UnusableReply("bad schema", f"{field!r} must be a text, got {value!r}")
    return single_spaced(value)


def _options(reply: Mapping[str, Any]) -> tuple[str, ...]:
    value = reply.get("options")
    listed = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(listed, list) or not listed or not all(isinstance(item, str | int | float) for item in listed):
        raise UnusableReply("bad schema", f"'options' must be a list of texts, got {value!r}")
    options = [single_spaced(str(option)) for option in listed]
    labels = [LABEL.match(option) for option in options]
    if all(label and label[1].upper() == chr(ord("A") + i) for i, label in enumerate(labels)):
        options = [LABEL.sub("", option, count=1) for option in options]
    return tuple(options)


def _chosen_option(answer: str, options: Sequence[str]) -> str:
    """The option that an answer means, by its wording or its letter."""
    wording = answer.casefold()
    for i, option in enumerate(options):
        letter = chr(ord("a") + i)
        wordings = (option, f"{letter}. {option}", f"{letter}) {option}", f"({letter}) {option}", f"{letter}: {option}")
        if wording in {each.casefold() for each in wordings}:
            return option
    match = re.fullmatch(r"\(?(?:option )?([a-h])[).]?", wording)
    if match and ord(match[1]) - ord("a") < len(options):
        return options[ord(match[1]) - ord("a")]
    raise UnusableReply("answer outside the options", f"the answer {answer!r} is none of {list(options)}")


def _steps(reply: Mapping[str, Any]) -> Iterator[Step]:
    listed = reply.get("reasoning", reply.get("steps"))
    if not isinstance(listed, list):
        raise UnusableReply("bad schema", f"'reasoning' must be a list of steps, got {str(listed)[:100]!r}")
    for step in listed:
        if not isinstance(step, dict):
            raise UnusableReply("bad schema", f"a step must be an object with start, end and text, got {step!r}")
        if "start" in step and "end" in step:
            start_s, end_s = seconds_of(step["start"]), seconds_of(step["end"])
        else:
            intervals = parse_intervals(str(step.get("time", step.get("timestamp", ""))))
            if len(intervals) != 1:
                raise UnusableReply("bad times", f"a step needs start and end, got {step!r}"[:300])
            start_s, end_s = intervals[0].start_s, intervals[0].stop_s
        yield Step(start_s, end_s, _text_field(step, "text"))


def _box(value: object) -> tuple[tuple[float, ...] | None, float | None]:
    if value is None:
        return None, None
    fields = value if isinstance(value, dict) else {}
    corners = fields.get("corners")
    if not isinstance(corners, list) or len(corners) != 4 or not all(map(_is_number, corners)):
        raise UnusableReply("bad schema", f"'box' must have corners [x0, y0, x1, y1] and a time, got {value!r}")
    return tuple(float(corner) for corner in corners), seconds_of(fields.get("time"))
