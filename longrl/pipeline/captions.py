"""Steps caption and timeline: what each clip shows, and the clips of a video in order, short enough to be read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from longrl.chat.client import ReplyCache
from longrl.chat.endpoint import Reply, Request
from longrl.pipeline.asking import Task, answered_text, ask_all
from longrl.pipeline.config import PipelineConfig, TimelineOptions
from longrl.pipeline.prompt_folder import Prompts
from longrl.pipeline.video_frames import FrameSet, frame_times, middles
from longrl.pipeline.workspace import Record, Report, Workspace

ENTRY_CHARS = 800
"""Wanted length of a condensed entry."""
LABEL_CHARS = 32
"""Room for the times of an entry."""


# ------------------------------------------------------------------------------------------------------------ caption


def caption(
    config: PipelineConfig, workspace: Workspace, replies: ReplyCache, report: Report, advance: Callable[[int], Any]
) -> None:
    """Writes each clip with its caption; None where there is none."""
    clips = workspace.read("split")
    endpoint, options, prompts = config.endpoint("captioner"), config.caption, Prompts(config.prompts)
    boxes = prompts.text("caption_boxes") if options.boxes else ""

    def request(clip: Record, attempt: int) -> Request:
        frames = clip_frames(clip, options.frames, options.max_side)
        text = prompts.text("caption", seconds=f"{clip['end_s'] - clip['start_s']:.1f}", boxes=boxes).strip()
        content = [*frames.parts(), {"type": "text", "text": text}]
        messages = ({"role": "user", "content": content},)
        return Request(endpoint.model, messages, options.decoding, attempt, endpoint.extra, frames.load)

    task = Task(_id, request, lambda reply, clip: one_line(answered_text(reply)), options.attempts)
    advance(len(clips))
    texts = ask_all(clips, task, endpoint, replies, report, lambda: advance(0))
    workspace.write("caption", ({**clip, "caption": text} for clip, text in zip(clips, texts, strict=True)))


def clip_frames(clip: Record, count: int, max_side: int) -> FrameSet:
    """Frames spread over a clip."""
    indices = middles(frame_times(clip["path"]), clip["first"], clip["stop"], count)
    return FrameSet(clip["path"], clip["digest"], tuple(indices), max_side)


def one_line(text: str) -> str:
    """A text without line breaks and repeated spaces."""
    return " ".join(text.split())


def _id(record: Record) -> str:
    return str(record["id"])


# ----------------------------------------------------------------------------------------------------------- timeline


def timeline(
    config: PipelineConfig, workspace: Workspace, replies: ReplyCache, report: Report, advance: Callable[[int], Any]
) -> None:
    """Writes one record per video: all `entries`, and those to be `told` to a model within `timeline.max_chars`."""
    videos = _complete_videos(workspace.read("caption"), config.timeline, report)
    long = [video for video in videos if len(told(video["entries"])) > config.timeline.max_chars]
    groups = [group for video in long for group in condensable(video, config.timeline.max_chars)]
    texts = _condense(groups, config, replies, report, advance) if groups else []
    condensed: dict[str, list[Record]] = {}
    for group, text in zip(groups, texts, strict=True):
        condensed.setdefault(group["video"], []).append(_entry(group, text, report))
    report.items += len(videos) - len(long)
    report.done += len(videos) - len(long)
    report.counts["videos"] = len(videos)
    report.counts["videos condensed"] = len(long)
    shown = {video["video"]: condensed.get(video["video"], video["entries"]) for video in videos}
    workspace.write("timeline", ({**video, "told": shown[video["video"]]} for video in videos))


def _complete_videos(clips: Sequence[Record], options: TimelineOptions, report: Report) -> list[Record]:
    """Videos of which enough clips have a caption."""
    by_video: dict[str, list[Record]] = {}
    for clip in clips:
        by_video.setdefault(clip["video"], []).append(clip)
    videos = []
    for name, own in by_video.items():
        missing = sum(not clip["caption"] for clip in own)
        if missing:
            report.counts["clips without caption"] += missing
        if missing > options.max_missing_share * len(own):
            report.problem(name, "too few captions", f"{missing} of {len(own)} clips have none; the video is left out")
            continue
        entries = [
            {"start_s": clip["start_s"], "end_s": clip["end_s"], "text": clip["caption"]}
            for clip in own
            if clip["caption"]
        ]
        first = {key: own[0][key] for key in ("video", "path", "digest", "duration_s")}
        videos.append({**first, "entries": entries})
    return videos


def told(entries: Sequence[Record]) -> str:
    """Entries as a model reads them, one per line, times in seconds."""
    return "\n".join(f"[{entry['start_s']:.1f} s to {entry['end_s']:.1f} s] {entry['text']}" for entry in entries)


def condensable(video: Record, max_chars: int) -> list[Record]:
    """A video's entries in groups of neighbours, each to become one entry, so that all of them fit.

    As many groups as there is room for entries of `ENTRY_CHARS`, more where a group would not fit a prompt itself.
    """
    entries = video["entries"]
    count = max(math.ceil(len(told(entries)) / max_chars), min(len(entries), max(1, max_chars // ENTRY_CHARS)))
    count = min(count, len(entries))
    edges = [len(entries) * i // count for i in range(count + 1)]
    limit = max(40, max_chars // count - LABEL_CHARS)
    return [
        {
            "id": f"{video['video']}#{entries[a]['start_s']:.1f}-{entries[b - 1]['end_s']:.1f}",
            "video": video["video"],
            "entries": entries[a:b],
            "limit": limit,
            "max_chars": max_chars,
        }
        for a, b in itertools.pairwise(edges)
    ]


def _condense(
    groups: list[Record], config: PipelineConfig, replies: ReplyCache, report: Report, advance: Callable[[int], Any]
) -> list[str | None]:
    endpoint, options, prompts = config.endpoint("writer"), config.timeline, Prompts(config.prompts)

    def request(group: Record, attempt: int) -> Request:
        entries, limit = told(group["entries"])[: group["max_chars"]], str(group["limit"])
        text = prompts.text("condense", timeline=entries, limit=limit)
        return Request(endpoint.model, ({"role": "user", "content": text},), options.decoding, attempt, endpoint.extra)

    def read(reply: Reply, group: Record) -> str:
        return one_line(answered_text(reply))

    advance(len(groups))
    task = Task(_id, request, read, options.attempts)
    return ask_all(groups, task, endpoint, replies, report, lambda: advance(0))


def _entry(group: Record, text: str | None, report: Report) -> Record:
    """One entry for a group. Times are ours, never the model's; without a text the captions are cut to fit."""
    entries, limit = group["entries"], group["limit"]
    if text is None:
        report.problem(group["id"], "captions cut", "they could not be condensed, so each is cut to its share")
        share = max(1, limit // len(entries) - 1)
        text = " ".join(shortened(entry["text"], share) for entry in entries)
    elif len(text) > limit:
        report.counts["condensed entries cut"] += 1
    return {"start_s": entries[0]["start_s"], "end_s": entries[-1]["end_s"], "text": shortened(text, limit)}


def shortened(text: str, limit: int) -> str:
    """The first words of a text, at most `limit` characters."""
    if len(text) <= limit:
        return text
    return text[:limit].rsplit(" ", 1)[0] if " " in text[:limit] else text[:limit]
