"""What two settings did not do alike, in words: a difference of accuracies may come from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from longrl.evaluation.settings import Setting

WORDS: Mapping[str, str] = {
    "frames": "frames", "media_tokens": "video tokens", "max_pixels": "pixels of a frame",
    "prompt": "prompt", "subtitles": "subtitles", "temperature": "sampling",
    "max_completion_tokens": "length of answers", "scored_by": "scoring", "questions": "questions",
}  # fmt: skip
"""What a reader would like to know of a published figure."""
MAX_QUOTED = 60
DIGESTS = ("model", "file")
"""Options of a selection that are the sha256 of what it reads."""
FLAGS: Mapping[str, tuple[str, str, str, str]] = {
    "subtitles": ("reads subtitles", "reads no subtitles", "reads them", "reads none"),
    "thinking": ("thinks first", "does not think first", "does", "does not"),
    "tools": ("has tools", "has no tools", "has some", "has none"),
}
"""Of each setting that is there or not, how the first and the second half of a sentence say so."""


def describe_differences(ours: Setting, other: Setting, name: str = "the published one") -> list[str]:
    """What two did not do alike, in words; what one of them does not say is no difference.

    Args:
        ours: the setting that sentences begin with.
        other: the one it is held against.
        name: of the other.
    """
    return [f"{one} where {name} {two}" for one, two in _pairs(ours, other)]


def list_unsaid(setting: Setting) -> list[str]:
    """What a published figure does not say of how it was measured."""
    known = {item.name for item in fields(setting) if getattr(setting, item.name) is not None}
    known |= {"frames"} if known & {"frames_at_most", "fps"} else set()
    known |= {"media_tokens"} if "media_tokens_at_most" in known else set()
    return [words for name, words in WORDS.items() if name not in known]


def list_unrecorded(ours: Setting, published: Setting) -> list[str]:
    """What a published figure says of how it was measured, and results do not, so that nobody can tell a difference."""
    said = {
        "frames": published.frames or published.frames_at_most,
        "media_tokens": published.media_tokens or published.media_tokens_at_most,
    }
    names = {**WORDS, "fps": "frames a second", "thinking": "thinking", "tools": "tools"}
    return [
        words
        for name, words in names.items()
        if said.get(name, getattr(published, name)) is not None and getattr(ours, name) is None
    ]


def _pairs(ours: Setting, other: Setting) -> Iterator[tuple[str, str]]:
    """The two halves of each sentence."""
    if _differ(ours.model, other.model) and not _same_model(ours.model, other.model):
        yield f"is {ours.model}", f"is {other.model}"
    yield from _frames(ours, other)
    if _differ(ours.fps, other.fps):
        yield f"takes {_number(ours.fps)} frames a second", f"takes {_number(other.fps)}"
    if _differ(ours.frame_rule, other.frame_rule):
        yield f"chooses {ours.frame_rule}", f"chooses {other.frame_rule}"
    elif ours.selection and other.selection and ours.selection != other.selection:
        yield (
            f"selects by {_changed(ours.selection, other.selection)}",
            f"selects by {_changed(other.selection, ours.selection)}",
        )
    yield from _tokens(ours, other)
    if _differ(ours.max_pixels, other.max_pixels):
        times = _times(ours.max_pixels, other.max_pixels)
        yield f"shows frames of at most {_number(ours.max_pixels)} pixels", f"shows {_number(other.max_pixels)}{times}"
    if _differ(ours.prompt, other.prompt):
        if other.is_prompt_quoted and ours.is_prompt_quoted:
            yield f"asks by the template {_quoted(ours.prompt)}", f"asks by {_quoted(other.prompt)}"
        elif not (ours.is_prompt_quoted and ours.prompt == other.prompt):
            yield f"asks by the template {_quoted(ours.prompt)}", f"asks by {other.prompt}"
    for flag, (yes, no, also, neither) in FLAGS.items():
        one, two = getattr(ours, flag), getattr(other, flag)
        if _differ(one, two):
            yield yes if one else no, also if two else neither
    if _differ(ours.temperature, other.temperature):
        yield f"samples at {_temperature(ours.temperature)}", f"samples at {_temperature(other.temperature)}"
    if _differ(ours.max_completion_tokens, other.max_completion_tokens):
        yield (
            f"lets answers have {_number(ours.max_completion_tokens)} tokens",
            (f"lets them have {_number(other.max_completion_tokens)}"),
        )
    if _differ(ours.num_generations, other.num_generations):
        yield f"answers each question {_number(ours.num_generations)} times", f"does {_number(other.num_generations)}"
    if _differ(ours.scored_by, other.scored_by):
        yield f"is scored by {ours.scored_by}", f"is scored by {other.scored_by}"
    if _differ(ours.questions, other.questions):
        yield f"asks {_number(ours.questions)} questions", f"asks {_number(other.questions)}"


def _frames(ours: Setting, other: Setting) -> Iterator[tuple[str, str]]:
    if ours.frames is None:
        return
    shown = f"shows {_number(ours.frames)} frames" if ours.frames else "shows no video"
    if other.frames is not None:
        if other.frames != ours.frames:
            yield shown, f"shows {_number(other.frames) if other.frames else 'none'}{_times(ours.frames, other.frames)}"
    elif other.frames_at_most is not None and ours.frames_at_most != other.frames_at_most:
        rate = f", {_number(other.fps)} a second" if other.fps is not None else ""
        yield shown, f"shows at most {_number(other.frames_at_most)}{rate}{_times(ours.frames, other.frames_at_most)}"


def _tokens(ours: Setting, other: Setting) -> Iterator[tuple[str, str]]:
    """Video tokens: ours as shown, the other's as shown or by their limit."""
    if ours.media_tokens is None:
        return
    if other.media_tokens is not None:
        if other.media_tokens != ours.media_tokens and other.frames == ours.frames:  # else the frames say it
            times = _times(ours.media_tokens, other.media_tokens)
            yield f"spends {_number(ours.media_tokens)} video tokens", f"spends {_number(other.media_tokens)}{times}"
    elif other.media_tokens_at_most is not None:
        times = _times(ours.media_tokens, other.media_tokens_at_most)
        limit = _number(other.media_tokens_at_most)
        yield f"spends {_number(ours.media_tokens)} video tokens", f"may spend {limit}{times}"


def _changed(options: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    """The options of a selection that another one has otherwise; digests are shortened."""
    changed = {name: value for name, value in options.items() if others.get(name) != value}
    short = {name: value[:8] if name in DIGESTS else value for name, value in changed.items()}
    return ", ".join(f"{name} {value}" for name, value in short.items()) or "nothing of that"


def _differ(one: Any, two: Any) -> bool:
    return one is not None and two is not None and one != two


def _same_model(one: str | None, two: str | None) -> bool:
    """True for a hub id and its last part."""
    return str(one).rpartition("/")[2].lower() == str(two).rpartition("/")[2].lower()


def _times(ours: float | None, other: float | None) -> str:
    """How much more that is, or less: " (8 times as many)", " (1/8 as many)"."""
    if not ours or not other:
        return ""
    ratio = other / ours
    share = f"{1 / ratio:.3g}"
    return f" (1/{share} as many)" if ratio < 1 and share.isdigit() else f" ({ratio:.3g} times as many)"


def _number(value: float | None) -> str:
    """1234.0 is "1,234" and 0.5 is "0.5"."""
    if value is None:
        return "an unknown number of"
    return f"{value:,.0f}" if float(value).is_integer() and math.isfinite(value) else f"{value:,.4g}"


def _temperature(value: float | None) -> str:
    return "temperature 0 (greedy)" if value == 0 else f"temperature {value:g}"


def _quoted(text: str | None) -> str:
    line = " ".join(str(text).split())
    return f'"{line}"' if len(line) <= MAX_QUOTED else f'"{line[: MAX_QUOTED - 3]}..."'
