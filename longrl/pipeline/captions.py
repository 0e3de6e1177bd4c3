"""Steps caption and timeline: what each clip shows, and the clips of a video in order, short enough to be read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from longrl.chat.endpoint import Reply, Request
from longrl.pipeline.asking import Task, answered_text, ask_all
from longrl.pipeline.prompt_folder import Prompts
from longrl.pipeline.step_run import Record, StepReport, StepRun
from longrl.pipeline.video_frames import FrameSet, frame_times, middle_frames

ENTRY_CHARS = 800
"""Desired length of a condensed entry."""
CAPTION_FORM = "a description in plain text, not empty and no refusal"
LABEL_CHARS = 32
"""Room for the times of an entry."""


# ---- caption ----


def caption_clips(run: StepRun) -> None:
    """Writes each clip with its caption; None where there is none."""
    clips = run.workspace.read("split")
    endpoint, options, prompts = run.config.endpoint("captioner"), run.config.caption, Prompts(run.config.prompts)
    boxes = prompts.text("caption_boxes") if options.boxes else ""

    def request(clip: Record, attempt: int) -> Request:
        times = frame_times(clip["path"])
        indices = middle_frames(times, clip["first"], clip["stop"], options.frames)
        frames = FrameSet(clip["path"], clip["digest"], tuple(indices), options.max_side, times.index.pixel_rule)
        text = prompts.text("caption", seconds=f"{clip['end_s'] - clip['start_s']:.1f}", boxes=boxes).strip()
        content = [*frames.parts(), {"type": "text", "text": text}]
        return endpoint.request(content, options.decoding, attempt, frames.load)

    texts = ask_all(run, clips, Task(request, _one_line, CAPTION_FORM, options.attempts), endpoint)
    run.workspace.write("caption", ({**clip, "caption": text} for clip, text in zip(clips, texts, strict=True)))


def _one_line(reply: Reply, item: Record) -> str:
    """A reply without line breaks and repeated spaces."""
    return " ".join(answered_text(reply).split())


# ---- timeline ----


def write_timelines(run: StepRun) -> None:
    """Writes one record per video: all `entries`, and those `shown` to a model, within `timeline.max_chars`."""
    report, max_chars = run.report, run.config.timeline.max_chars
    videos = _complete_videos(run.workspace.read("caption"), run.config.timeline.max_missing_share, report)
    long = [video for video in videos if len(timeline_text(video["entries"])) > max_chars]
    groups = [group for video in long for group in condensable_groups(video, max_chars)]
    condensed: dict[str, list[Record]] = {}
    if groups:
        for group, text in zip(groups, _condense(run, groups), strict=True):
            condensed.setdefault(group["video"], []).append(_entry(group, text, report))
    report.items += len(videos) - len(long)
    report.done += len(videos) - len(long)
    report.counts.update({"videos": len(videos), "videos condensed": len(long)})
    shown = (video | {"shown": condensed.get(video["video"], video["entries"])} for video in videos)
    run.workspace.write("timeline", shown)


def _complete_videos(clips: Sequence[Record], max_missing_share: float, report: StepReport) -> list[Record]:
    """Videos of which enough clips have a caption."""
    by_video: dict[str, list[Record]] = {}
    for clip in clips:
        by_video.setdefault(clip["video"], []).append(clip)
    videos = []
    for name, of_video in by_video.items():
        captioned = [clip for clip in of_video if clip["caption"]]
        missing = len(of_video) - len(captioned)
        if missing:
            report.counts["clips without caption"] += missing
        if missing > max_missing_share * len(of_video):
            text = f"{missing} of {len(of_video)} clips have none; the video is left out"
            report.add_problem(name, "too few captions", text)
            continue
        entries = [{"start_s": clip["start_s"], "end_s": clip["end_s"], "text": clip["caption"]} for clip in captioned]
        first = {key: of_video[0][key] for key in ("video", "path", "digest", "duration_s")}
        videos.append({**first, "entries": entries})
    return videos


def shown_entries(video: Record) -> list[Record]:
    """The entries of a timeline that a model reads; files of earlier releases call them `told`."""
    return video["shown"] if "shown" in video else video["told"]


def timeline_text(entries: Sequence[Record]) -> str:
    """Entries as a model reads them, one per line, times in seconds."""
    return "\n".join(f"[{entry['start_s']:.1f} s to {entry['end_s']:.1f} s] {entry['text']}" for entry in entries)


def condensable_groups(video: Record, max_chars: int) -> list[Record]:
    """A video's entries in groups of neighbours, each to become one entry, so that all of them fit.

    As many groups as there is room for entries of `ENTRY_CHARS`, more where a group would not fit a prompt itself.
    """
    entries = video["entries"]
    num_full_prompts = math.ceil(len(timeline_text(entries)) / max_chars)
    count = min(max(num_full_prompts, max_chars // ENTRY_CHARS, 1), len(entries))
    edges = [len(entries) * i // count for i in range(count + 1)]
    limit = max(40, max_chars // count - LABEL_CHARS)
    groups = []
    for start, stop in itertools.pairwise(edges):
        name = f"{video['video']}#{entries[start]['start_s']:.1f}-{entries[stop - 1]['end_s']:.1f}"
        groups.append({"id": name, "video": video["video"], "entries": entries[start:stop], "limit": limit})
    return groups


def _condense(run: StepRun, groups: list[Record]) -> list[str | None]:
    endpoint, options, prompts = run.config.endpoint("writer"), run.config.timeline, Prompts(run.config.prompts)

    def request(group: Record, attempt: int) -> Request:
        entries = timeline_text(group["entries"])[: options.max_chars]
        text = prompts.text("condense", timeline=entries, limit=str(group["limit"]))
        return endpoint.request(text, options.decoding, attempt)

    return ask_all(run, groups, Task(request, _one_line, CAPTION_FORM, options.attempts), endpoint)


def _entry(group: Record, text: str | None, report: StepReport) -> Record:
    """One entry for a group. Its times are the clips', never the model's; without a text the captions are cut."""
    entries, limit = group["entries"], group["limit"]
    if text is None:
        report.add_problem(group["id"], "captions cut", "they could not be condensed, so each is cut to its share")
        share = max(1, limit // len(entries) - 1)
        text = " ".join(_first_words(entry["text"], share) for entry in entries)
    elif len(text) > limit:
        report.counts["condensed entries cut"] += 1
    return {"start_s": entries[0]["start_s"], "end_s": entries[-1]["end_s"], "text": _first_words(text, limit)}


def _first_words(text: str, limit: int) -> str:
    """The first words of a text, at most `limit` characters."""
    return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0]
