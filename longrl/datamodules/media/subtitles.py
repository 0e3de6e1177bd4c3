"""Subtitles of a video as part of its question: reading them, choosing lines, and cutting what is too long."""

from __future__ import annotations

import html
import itertools
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from longrl.datamodules.media.sampling import read_span
from longrl.io.jsonl import parse_json
from longrl.types import Frames, Row, UnusableSample

logger = logging.getLogger(__name__)

SUFFIXES = (".srt", ".vtt", ".json", ".jsonl")
"""Endings of subtitle files; the first that a folder has for a video counts."""
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, OverflowError)
"""What JSON of another form raises."""
MARKUP = re.compile(r"</?[A-Za-z][^<>]*>|<[\d:.]+>")
"""Tags of speakers, fonts and the times of words; also media tags, which would place media."""


@dataclass(frozen=True)
class Subtitles:
    r"""Which subtitles a question shows, in place of `{subtitles}` in its template; nothing stands there without any.

    Example:
        `data.subtitles: {source: data/videomme/subtitle}` with
        `question_template: "{subtitles}{problem}\n\nAnswer with the letter."`
    """

    source: str | None = None
    """A folder with files of the videos' names, `.srt`, `.vtt`, `.json` or `.jsonl`; or `record`, for what a row's
    metadata has under `subtitles`: a file, the lines themselves, or a text; a list of files where a row has several
    videos. Times of a file begin `subtitles_from_s` of the metadata before the video does, if that is there."""
    lines: Literal["frames", "all", "interleaved"] = "frames"
    """Lines that are on show while a sampled frame is, all of the video's, or frames as single images with the lines
    between them, as LongVideoBench asks (`interleaved_frames.py`)."""
    max_chars: int = 8000
    """More than that, all videos of a question together, and only every second line is shown, or every third, and so
    on: the first of these that fits. One line that is too long by itself is cut."""
    times: bool = False
    """Write the time before each line: [1:05]."""
    heading: str = "The video's subtitles:"
    """Line above them."""
    ending: str = "\n\n"
    """What stands between the last of them and what follows."""
    absent: str | None = None
    """Line in their place where a video has none; null leaves the heading out as well."""
    when_blind: Literal["drop", "keep"] = "drop"
    """Their treatment where a question is asked without its video; kept, they are all lines."""
    words: bool = False
    """The lines are single words, as of Video-MME-v2: with blanks between them, and none left out as a repeat."""

    def __post_init__(self) -> None:
        if self.lines == "interleaved" and self.words:
            raise ValueError(
                "data.subtitles.words=true writes words behind each other, and lines=interleaved puts lines between "
                "frames; set one of them"
            )
        if self.max_chars < 1:
            raise ValueError(f"data.subtitles.max_chars must be at least 1, got {self.max_chars}")
        if self.source not in (None, "record") and not os.path.isdir(os.path.expanduser(str(self.source))):
            raise ValueError(
                f"data.subtitles.source must be a folder or `record`, got {self.source!r} (working folder: "
                f"{os.getcwd()}); correct the path"
            )

    @property
    def lays_out_frames(self) -> bool:
        """True if frames are shown as single images with the lines between them."""
        return self.source is not None and self.lines == "interleaved"

    def identity(self) -> dict[str, Any]:
        """All fields by name, but for later ones that have their default: stored answers are found by it."""
        later = {"words": False}
        return {name: value for name, value in asdict(self).items() if later.get(name, self) != value}


class Line(NamedTuple):
    """One line and when it is on show, in seconds from the video's start."""

    start_s: float
    end_s: float
    text: str

    def earlier(self, seconds: float) -> Line:
        """The same line so many seconds earlier; it may begin before 0."""
        return Line(self.start_s - seconds, self.end_s - seconds, self.text)


def subtitle_text(row: Row, options: Subtitles, videos: Sequence[Frames] | None) -> str:
    """The text in place of `{subtitles}` in a row's question.

    Args:
        row: with its videos, whether or not they are shown.
        options: which lines.
        videos: as they are shown; None where they are not.

    Raises:
        UnusableSample: a subtitle file cannot be read.
    """
    if options.source is None or (videos is None and options.when_blind == "drop"):
        return ""
    span = read_span(row.metadata["span_s"]) if row.metadata.get("span_s") else None
    pairs = itertools.zip_longest(lines_of(row, options.source), videos or ())
    by_video = [texts for lines, video in pairs if (texts := _chosen(lines or [], video, span, options))]
    between = " " if options.words else "\n"
    blocks = [between.join(take_fitting(texts, options.max_chars // len(by_video))) for texts in by_video]
    if not blocks and options.absent is not None:
        blocks = [options.absent]
    return "\n".join([options.heading, "\n\n".join(blocks)]) + options.ending if blocks else ""


def log_subtitles(split: str, rows: Sequence[Row], options: Subtitles) -> None:
    """Logs how many rows have subtitles; files are not opened.

    Raises:
        ValueError: none has.
    """
    if options.source is None:
        return
    in_record = options.source == "record"
    count = sum(
        bool(row.metadata.get("subtitles") if in_record else subtitle_files(row, options.source)) for row in rows
    )
    if not count:
        raise ValueError(
            f"none of the {len(rows)} rows of data.{split} has subtitles in data.subtitles.source={options.source}, "
            "which must have files of the videos' names; correct it, or set it to null"
        )
    logger.info("%d of %d %s rows have subtitles", count, len(rows), split)


def subtitle_files(row: Row, source: str | None) -> list[str]:
    """The files that a row's subtitles are read from; those of its metadata whether or not they are there."""
    if source != "record":
        return [path for video in row.videos if source and (path := _file_of(video, source))]
    given = row.metadata.get("subtitles") or []
    listed = given if isinstance(given, list) else [given]
    return [one for one in listed if is_subtitle_file(one)]


def take_fitting(texts: Sequence[str], max_chars: int) -> list[str]:
    """Every n-th of the texts, with the smallest n for which their lines have at most so many characters."""
    for step in range(1, len(texts) + 1):
        kept = list(texts[::step])
        if sum(map(len, kept)) + len(kept) - 1 <= max_chars:
            return kept
    return [texts[0][:max_chars]] if texts else []


def lines_of(row: Row, source: str) -> list[list[Line]]:
    """Subtitles of each of a row's videos."""
    from_s = float(row.metadata.get("subtitles_from_s") or 0.0)
    if from_s:
        return [[line.earlier(from_s) for line in lines] for lines in _lines_as_written(row, source)]
    return _lines_as_written(row, source)


def _lines_as_written(row: Row, source: str) -> list[list[Line]]:
    """The same with the times of the files."""
    if source != "record":
        paths = [_file_of(video, source) for video in row.videos or row.metadata.get("left_out_videos", ())]
        return [read_subtitles(path) if path else [] for path in paths]
    given = row.metadata.get("subtitles") or []
    several = isinstance(given, list) and all(isinstance(item, str) for item in given)
    by_video = []
    for item in given if several else [given]:
        if not isinstance(item, str):
            try:
                by_video.append(_from_json(item))
            except UNREADABLE as error:
                raise UnusableSample.because(error, "its own subtitles cannot be read") from error
        elif is_subtitle_file(item):
            by_video.append(read_subtitles(item))
        else:  # a text, on show all the time
            by_video.append([Line(0.0, float("inf"), text) for text in item.splitlines() if text.strip()])
    return by_video


def _file_of(video: str, folder: str) -> str | None:
    paths = [os.path.join(os.path.expanduser(folder), Path(video).stem + suffix) for suffix in SUFFIXES]
    return next(filter(os.path.isfile, paths), None)


def is_subtitle_file(value: object) -> bool:
    """True if a record's subtitles name a file, rather than being lines or a text."""
    return isinstance(value, str) and value.endswith(SUFFIXES) and "\n" not in value


def subtitles_below(given: Any, media_root: str | None) -> Any:
    """A record's subtitles with the paths of files from the working folder on; lines and texts stay as they are."""
    if isinstance(given, list):
        return [subtitles_below(item, media_root) if isinstance(item, str) else item for item in given]
    return os.path.join(media_root or "", given) if is_subtitle_file(given) else given


def _chosen(lines: Sequence[Line], video: Frames | None, span: Sequence[float] | None, options: Subtitles) -> list[str]:
    """The lines to show, without repeats one after another (captions that roll up say everything twice)."""
    start, end = span or (0.0, video.duration_s if video else float("inf"))
    shown = [line for line in lines if line.start_s < end and line.end_s > start and line.text]
    if video is not None and options.lines == "frames":
        shown = [line for line in shown if any(line.start_s <= time < line.end_s for time in video.timestamps)]
    if options.words:
        return [line.text for line in shown]
    texts = []
    for text, same in itertools.groupby(shown, key=lambda line: line.text):
        texts.append(timed_text(next(same)) if options.times else text)
    return texts


def timed_text(line: Line) -> str:
    """A line behind its time: "[1:05] She waves."."""
    minutes, seconds = divmod(int(max(line.start_s, 0.0)), 60)
    return f"[{minutes}:{seconds:02d}] {line.text}"


# ---------------------------------------------------------------------------------------------------------- reading


def read_subtitles(path: str | Path) -> list[Line]:
    """The lines of a `.srt`, `.vtt`, `.json` or `.jsonl` file by their times, each in one line, without markup.

    JSON is a list of `{start, end, text}` (or `line` for `text`, or `start_time` and `end_time`, or `timestamp: [start,
    end]`), in seconds or as "00:01:05.2", by itself or under `segments`; of `.jsonl` each line is one of these.

    Raises:
        UnusableSample: no such file, or no lines in it.
    """
    path = os.path.expanduser(str(path))
    try:
        return list(_read(path, os.stat(path).st_mtime_ns))
    except FileNotFoundError as error:
        raise UnusableSample(path, f"the file does not exist (working folder: {os.getcwd()})") from error
    except OSError as error:
        raise UnusableSample(path, f"the file cannot be opened ({error.strerror})") from error


@lru_cache(maxsize=256)  # several questions on one video follow each other
def _read(path: str, version: int) -> tuple[Line, ...]:
    import pysubs2

    lines = []
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        if path.endswith(".json"):
            lines = _from_json(parse_json(text))
        elif path.endswith(".jsonl"):
            lines = _from_json([parse_json(line) for line in text.splitlines() if line.strip()])
        else:
            for event in pysubs2.SSAFile.from_string(text, format_=path.rpartition(".")[2]):
                # A blank line ends a cue of WebVTT; what follows are notes and names, which pysubs2 leaves in.
                cue = event.plaintext.partition("\n\n")[0] if path.endswith(".vtt") else event.plaintext
                lines.append(Line(event.start / 1000, event.end / 1000, _plain(cue)))
    except (*UNREADABLE, pysubs2.exceptions.Pysubs2Error) as error:
        raise UnusableSample(path, f"its subtitles cannot be read ({type(error).__name__}: {error})") from error
    if text.strip() and not lines:
        raise UnusableSample(path, "there are no subtitles in it")
    return tuple(sorted(lines, key=lambda line: line.start_s))


def _plain(text: str) -> str:
    return " ".join(MARKUP.sub("", html.unescape(text)).split())


def _from_json(value: Any) -> list[Line]:
    entries = value["segments"] if isinstance(value, Mapping) else value
    if not isinstance(entries, list):
        raise ValueError(f"subtitles are a list of lines, got {type(entries).__name__}")
    lines = []
    for one in entries:
        if "timestamp" in one:
            start, end = one["timestamp"]
        else:
            names = ("start_time", "end_time") if "start_time" in one else ("start", "end")
            start, end = (one[name] for name in names)
        text = one["text"] if "text" in one else one["line"]
        lines.append(Line(_seconds(start), float("inf") if end is None else _seconds(end), _plain(str(text))))
    return lines


def _seconds(time: Any) -> float:
    """65.2 of 65.2, "65.2" and "00:01:05,2"."""
    parts = str(time).replace(",", ".").split(":")
    seconds = 0.0
    for part in parts:
        seconds = 60 * seconds + float(part)
    if not math.isfinite(seconds):
        raise ValueError(f"a time must be a number of seconds, got {str(time)[:60]!r}")
    return seconds
