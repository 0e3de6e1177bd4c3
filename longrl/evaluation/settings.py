"""How an accuracy was measured, ours or a published one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """How an accuracy was measured; None is what nobody says."""

    model: str | None = None
    frames: float | None = None
    """Shown of a question, the median."""
    frames_at_most: int | None = None
    """Limit of them."""
    fps: float | None = None
    """Frames of a second of video, up to that limit."""
    frame_rule: str | None = None
    """How frames are chosen, in words."""
    selection: Mapping[str, Any] | None = None
    """Options of what chooses them, if something does."""
    media_tokens: float | None = None
    """Of a question, the median."""
    media_tokens_at_most: int | None = None
    max_pixels: int | None = None
    """Of a frame."""
    prompt: str | None = None
    """The question template, or what is said of it."""
    subtitles: bool | None = None
    thinking: bool | None = None
    tools: bool | None = None
    temperature: float | None = None
    max_completion_tokens: int | None = None
    num_generations: int | None = None
    scored_by: str | None = None
    """What counts as right."""
    questions: int | None = None

    @property
    def is_prompt_quoted(self) -> bool:
        """True if `prompt` is a template itself and not words about one."""
        return self.prompt is not None and "{problem}" in self.prompt


def setting_of(results: Mapping[str, Any], condition: str, rule: str | None = None) -> Setting:
    """The setting of an evaluation's condition.

    Args:
        results: results.json, of any release.
        condition: one of it.
        rule: which score is meant, in words.
    """
    asked = results.get("conditions", {}).get(condition, {})
    reading, shown = asked.get("reading", {}), asked.get("shown", {})
    video, budget, sampling = reading.get("video", {}), results.get("budget", {}), results.get("sampling", {})
    blind = bool(reading.get("blind", asked.get("blind", False)))
    is_sampled_here = results.get("policy", {}).get("video_as") != "video" and not blind
    subtitles = reading.get("subtitles")
    selection = reading.get("selection")
    return Setting(
        model=results.get("policy", {}).get("model"),
        frames=0 if blind else _median(shown.get("frames")),
        frames_at_most=video.get("max_frames") if is_sampled_here and video.get("fps") else None,
        fps=video.get("fps") if is_sampled_here else None,
        frame_rule=_frame_rule(video, selection) if is_sampled_here and video else None,
        selection=selection if is_sampled_here else None,
        media_tokens=_median(shown.get("media_tokens")),
        media_tokens_at_most=budget.get("max_video_tokens"),
        max_pixels=budget.get("max_pixels"),
        prompt=reading.get("question_template"),
        subtitles=None if subtitles is None else bool(subtitles.get("source")) and not blind,
        tools="environment" in results["policy"] if "policy" in results else None,
        temperature=sampling.get("temperature"),
        max_completion_tokens=sampling.get("max_completion_tokens"),
        num_generations=sampling.get("num_generations"),
        scored_by=rule,
        questions=results.get("questions", {}).get("asked"),
    )


def _median(spread: Mapping[str, float] | None) -> float | None:
    return None if spread is None else spread["median"]


def _frame_rule(video: Mapping[str, Any], selection: Mapping[str, Any] | None) -> str | None:
    """Which moments of a video are shown."""
    places = {"middles": "the middles of equal parts", "ends": "moments from the first frame to the last"}
    rule = places.get(str(video.get("moments")), video.get("moments"))
    if selection and selection.get("detail_frames"):
        return f"{rule}, and behind them {selection['detail_frames']} frames by the selection {selection['name']}"
    if selection:
        return f"frames by the selection {selection['name']}"
    return "frames at given times" if video.get("at_s") else rule
