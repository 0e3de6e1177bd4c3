"""`VideoTools`: parts of a row's videos at a higher frame rate or resolution, and what is said in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from typing_extensions import override

from longrl.datamodules.media.decoders import check_decoder
from longrl.datamodules.media.media_roots import ANYWHERE, MediaRoots
from longrl.datamodules.media.remote import RemoteMedia
from longrl.datamodules.media.sampling import VideoSampling, read_span
from longrl.datamodules.media.sources import DecodeLimits
from longrl.datamodules.media.subtitles import Line, lines_of, subtitle_files
from longrl.datamodules.media.video_parts import VideoPart, frame_at, video_length_s
from longrl.environments.tool_calls import quoted
from longrl.environments.tool_environment import Shown, ToolEnvironment, ToolError
from longrl.types import Frames, Row

MAX_QUERY_CHARS = 300
BOX_SCALE = 1000.0
"""Coordinates of boxes are thousandths, as Qwen3-VL and others ground in."""


class VideoTools(ToolEnvironment):
    """Tools that show a row's videos again: a span, a part of a frame, single frames, lines of the subtitles.

    Times are seconds from the video's start. What lies behind its end is cut off; what has nothing of it is refused,
    and the answer says how long the video is. Of a row with `metadata["span_s"]` that part alone is shown.

    Args:
        fps: frames per second of a span, unless a call says otherwise.
        max_frames: of a span; a longer one is sampled more thinly.
        max_images: frames of one call of `get_frames`.
        max_pixels: of a frame of a span; larger ones are made smaller. None leaves that to the family.
        zoom_pixels: of what `zoom` and `get_frames` show; a small part of a frame is enlarged up to four times.
        max_lines: of subtitles in an answer.
        subtitles: where they are, as `data.subtitles.source`: `record`, a folder, or None.
        several_videos: rows may have several; then calls say which, by `video`.
        only: names of the tools, if not all.
        media_root: folder that all files must lie in, links followed. None: the row's own videos, which the loader has
            checked, and what lies in their folders or the working folder.
        allow_outside_paths: trust the rows.
        media_cache_dir: where copies of videos that lie elsewhere are; None: such videos cannot be shown.
        decoder: what decodes the frames that are shown, as `data.video.decoder`, always on the CPU.
        max_calls: calls of a turn that are answered.
    """

    tool_names: tuple[str, ...] = ("crop_video", "zoom", "get_frames", "search_subtitles")

    def __init__(
        self,
        *,
        fps: float = 2.0,
        max_frames: int = 32,
        max_images: int = 8,
        max_pixels: int | None = None,
        zoom_pixels: int = 448 * 448,
        max_lines: int = 20,
        subtitles: str | None = "record",
        several_videos: bool = False,
        only: Sequence[str] | None = None,
        media_root: str | None = None,
        allow_outside_paths: bool = False,
        media_cache_dir: str | None = None,
        decoder: Literal["pyav", "decord", "torchcodec"] = "pyav",
        max_calls: int = 4,
    ) -> None:
        super().__init__(max_calls)
        unknown = [name for name in only or () if name not in type(self).tool_names]
        if unknown or only == []:
            raise ValueError(f"only must name some of {', '.join(type(self).tool_names)}, got {only}")
        counts = {"max_images": max_images, "max_lines": max_lines, "zoom_pixels": zoom_pixels}
        for name, count in {**counts, "max_pixels": 1 if max_pixels is None else max_pixels}.items():
            if count < 1:
                raise ValueError(f"{name} of VideoTools must be at least 1, got {count}")
        if only is not None:
            self.tool_names = tuple(only)
        least = min(4, max_frames)
        self.sampling = VideoSampling(fps=fps, min_frames=least, max_frames=max_frames, torn="keep", decoder=decoder)
        check_decoder(self.sampling)
        self.max_images = max_images
        self.max_pixels = max_pixels
        self.zoom_pixels = zoom_pixels
        self.max_lines = max_lines
        self.subtitles = subtitles
        self.several_videos = several_videos
        self.media_root = media_root
        self.allow_outside_paths = allow_outside_paths
        self.media_cache_dir = media_cache_dir
        self.limits = DecodeLimits()
        self.row = Row("", "", "")
        self.remote = RemoteMedia(media_cache_dir)

    @override
    def schema(self, method: Callable[..., Any]) -> dict[str, Any]:
        """Of a tool; `video` is an argument only where rows may have several."""
        schema = super().schema(method)
        if not self.several_videos:
            schema["function"]["parameters"]["properties"].pop("video", None)
        return schema

    @override
    def reset(self, row: Row) -> None:
        """Begins with a row.

        Raises:
            ValueError: it has several videos, and calls cannot say which.
        """
        if len(row.videos) > 1 and not self.several_videos:
            raise ValueError(
                f"row {row.id!r} has {len(row.videos)} videos, of which calls of VideoTools cannot choose; set "
                "several_videos in rollout.environment.options"
            )
        kept = {name: row.metadata[name] for name in ("span_s", "subtitles") if row.metadata.get(name)}
        self.row = Row(row.id, "", "", videos=row.videos, metadata=kept)
        self.remote = RemoteMedia(self.media_cache_dir, self._roots())

    # -- tools ---------------------------------------------------------------------------------------------------

    def crop_video(self, start_s: float, end_s: float, fps: float | None = None, video: int = 1) -> Shown:
        """Shows a part of the video again, with more frames per second than before.

        Args:
            start_s: Where the part begins, in seconds from the start of the video.
            end_s: Where it ends, in seconds; after start_s.
            fps: Frames per second to show. Leave it out for the usual rate.
            video: Number of the video, from 1.
        """
        path, (first, last) = self._video(video)
        if not start_s < end_s:
            raise ToolError(f"start_s must be before end_s, got {_s(start_s)} and {_s(end_s)}; swap or widen them")
        if not (first <= start_s < last):
            raise ToolError(f"start_s must be from {_s(first)} to below {_s(last)} s, got {_s(start_s)}; {_ends(last)}")
        if fps is not None and not 0 < fps <= 1000:
            raise ToolError(f"fps must be above 0 and at most 1000, got {quoted(fps)}; leave it out")
        span = (start_s, min(end_s, last))
        sampling = replace(self.sampling, span_s=span, fps=fps or self.sampling.fps)
        frames = self._part(path, sampling, max_pixels=self.max_pixels).outline()
        note = f" {_ends(last)}" if end_s > last else ""
        text = f"The video from {_s(span[0])} to {_s(span[1])} s, {_count(len(frames.timestamps), 'frame')}.{note}\n"
        return Shown((text, frames), span, frames.timestamps)

    def zoom(self, time_s: float, box: list[float], video: int = 1) -> Shown:
        """Shows a part of one frame of the video enlarged.

        Args:
            time_s: When the frame is on show, in seconds from the start of the video.
            box: The part as [left, top, right, bottom], each from 0 to 1000: thousandths of the frame's sides.
            video: Number of the video, from 1.
        """
        path, limits = self._video(video)
        time_s = self._moment(time_s, limits)
        if len(box) != 4 or not all(0 <= edge <= BOX_SCALE for edge in box):
            raise ToolError(
                f"box must be [left, top, right, bottom], each from 0 to 1000, got {quoted(box)}; correct it"
            )
        left, top, right, bottom = (edge / BOX_SCALE for edge in box)
        if not (left < right and top < bottom):
            raise ToolError(f"box must have left < right and top < bottom, got {quoted(box)}; widen it")
        part = self._part(path, frame_at(time_s), True, (left, top, right, bottom), self.zoom_pixels)
        text = f"The frame at {_s(time_s)} s, enlarged:\n"
        return Shown((text, part.outline()), (time_s, time_s), (time_s,))

    def get_frames(self, times_s: list[float], video: int = 1) -> Shown:
        """Shows single frames of the video.

        Args:
            times_s: When each frame is on show, in seconds from the start of the video.
            video: Number of the video, from 1.
        """
        path, limits = self._video(video)
        times = list(dict.fromkeys(times_s))
        if not 1 <= len(times) <= self.max_images:
            raise ToolError(f"times_s must be 1 to {self.max_images} times, got {len(times)}; ask for that many")
        times = [self._moment(time_s, limits) for time_s in times]
        content: list[str | Frames] = []
        for number, time_s in enumerate(times):
            part = self._part(path, frame_at(time_s), True, None, self.zoom_pixels)
            content += [f"{chr(10) if number else ''}The frame at {_s(time_s)} s:\n", part.outline()]
        return Shown(tuple(content), (min(times), max(times)), tuple(times))

    def search_subtitles(self, query: str, video: int = 1) -> str:
        """Finds lines of the video's subtitles, with the seconds at which they are spoken.

        Args:
            query: Words to look for.
            video: Number of the video, from 1.
        """
        words = query.casefold().split()
        if not words or len(query) > MAX_QUERY_CHARS:
            raise ToolError(f"query must have 1 to {MAX_QUERY_CHARS} characters, got {len(query)}; give a few words")
        lines = self._lines(video)
        if not lines:
            return "This video has no subtitles."
        # Lines with as many of the words as any line has.
        counts = [sum(word in line.text.casefold() for word in words) for line in lines]
        found = [line for line, count in zip(lines, counts, strict=True) if count and count == max(counts)]
        if not found:
            return f"None of {_count(len(lines), 'line')} has any of these words."
        shown = [f"[{_s(line.start_s)} to {_s(line.end_s)} s] {line.text}" for line in found[: self.max_lines]]
        if len(found) > len(shown):
            shown.append(f"({len(found) - len(shown)} more lines; give more words)")
        return "\n".join(shown)

    # -- what tools share ----------------------------------------------------------------------------------------

    def _video(self, number: int) -> tuple[str, tuple[float, float]]:
        """The path of a video, and the seconds between which it is shown.

        Raises:
            ToolError: there is none of that number.
            UnusableSample: it cannot be read.
        """
        self._check_number(number)
        path = self.row.videos[number - 1]
        length_s = video_length_s(path, self.remote, self.limits)
        if "span_s" not in self.row.metadata:
            return path, (0.0, length_s)
        first, last = read_span(self.row.metadata["span_s"])
        return path, (first, min(last, length_s))

    def _check_number(self, number: int) -> None:
        if not self.row.videos:
            raise ToolError("there is no video in this question; answer without it")
        if not 1 <= number <= len(self.row.videos):
            raise ToolError(f"video must be from 1 to {len(self.row.videos)}, got {number}; correct it")

    def _moment(self, time_s: float, limits: tuple[float, float]) -> float:
        """A time at which a frame is on show; the end is that of the last one.

        Raises:
            ToolError: it is outside the video.
        """
        first, last = limits
        if not first <= time_s <= last:
            raise ToolError(f"a time must be from {_s(first)} to {_s(last)} s, got {_s(time_s)}; {_ends(last)}")
        return max(min(time_s, last - 1e-3), first)

    def _part(
        self,
        path: str,
        sampling: VideoSampling,
        is_image: bool = False,
        box: tuple[float, float, float, float] | None = None,
        max_pixels: int | None = None,
    ) -> VideoPart:
        sampling = replace(sampling, decoder=self.sampling.decoder)
        return VideoPart(path, sampling, is_image, box, max_pixels, self.limits, self.remote)

    def _lines(self, number: int) -> list[Line]:
        """Subtitles of a video, within the part of it that is shown."""
        self._check_number(number)
        if self.subtitles is None:
            return []
        if self.subtitles == "record":
            for path in subtitle_files(self.row, self.subtitles):
                self.remote.roots.check(path)
        by_video = lines_of(self.row, self.subtitles)
        lines = by_video[number - 1] if number <= len(by_video) else []
        if "span_s" in self.row.metadata:
            first, last = read_span(self.row.metadata["span_s"])
            lines = [line for line in lines if line.start_s < last and line.end_s > first]
        return [line for line in lines if line.text]

    def _roots(self) -> MediaRoots:
        """Where the row's files may lie."""
        if self.allow_outside_paths:
            return ANYWHERE
        if self.media_root is not None:
            return MediaRoots.below([self.media_root])
        local = [path for path in self.row.videos if "://" not in path]
        folders = [os.path.dirname(path) for path in (*local, *map(os.path.realpath, local))]
        return MediaRoots.below([None, *folders])


def _s(seconds: float) -> str:
    """Seconds for the policy."""
    return f"{round(seconds, 2):g}" if abs(seconds) < 1e5 else f"{seconds:.0f}"


def _ends(last: float) -> str:
    return f"The video ends at {_s(last)} s."


def _count(number: int, name: str) -> str:
    return f"{number} {name}" + ("" if number == 1 else "s")
