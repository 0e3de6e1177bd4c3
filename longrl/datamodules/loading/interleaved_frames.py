"""A video as single images with its subtitles between them, as LongVideoBench (arXiv:2407.15754) asks image models.

Where a line stands is the rule of its released loader (`insert_subtitles_into_frames`): behind the frames that are on
show by the middle of its time; and a line during which no frame appears is left out. A line of less than a second
counts as one of a second, half of it before its middle.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from longrl.datamodules.media.frame_lists import FrameListReader
from longrl.datamodules.media.sources import DecodeLimits
from longrl.datamodules.media.subtitles import Line, Subtitles, lines_of, take_fitting, timed_text
from longrl.datamodules.media.video import MIB, VideoReader
from longrl.types import FULL_SHARD, Frames, FrameShard, Row, UnusableSample

SHORTEST_S = 1.0


def check_one_video(row: Row) -> None:
    """Raises UnusableSample for a row whose frames cannot be laid out: it must have one video, and place nothing."""
    from longrl.models.chat_tokens import MEDIA_TAG

    if len(row.videos) != 1 or row.images or row.audios or row.messages or MEDIA_TAG.search(row.problem):
        raise UnusableSample(
            None,
            f"data.subtitles.lines=interleaved lays out the frames of one video, and row {row.id!r} has other media, "
            "messages or media tags; set it to frames",
        )


def single_frames(
    reader: VideoReader | FrameListReader, limits: DecodeLimits, shard: FrameShard = FULL_SHARD
) -> list[Frames]:
    """The sampled frames of a video as images, each at its time and with the video's length.

    Args:
        reader: of all of them, on every rank.
        limits: of what is in memory.
        shard: a rank whose image it is not gets it without pixels.

    Raises:
        UnusableSample: a frame cannot be decoded, or they take more memory than `data.max_held_mib`.
    """
    outline = reader.outline
    needed = math.prod(outline.pixels.shape[1:]) * len(outline.timestamps)
    if needed > limits.max_held_mib * MIB:
        raise UnusableSample(
            str(reader.path),
            f"its {len(outline.timestamps)} frames as single images take {needed / MIB:.0f} MiB, above "
            f"data.max_held_mib={limits.max_held_mib}; raise it, or show fewer",
        )
    held = len(shard.temporal_patches(1))
    images: list[Frames] = []
    for part in reader.chunks(limits.frames_at_once(outline)):
        for pixels in part.pixels:
            number = len(images)
            key = hashlib.sha256(f"frame {number} of {outline.key}".encode()).hexdigest()
            image = replace(
                outline, kind="image", pixels=pixels[None][:held].clone(), timestamps=(outline.timestamps[number],),
                key=key, indices=(outline.indices[number],),
            )  # fmt: skip
            images.append(image)
    return images


def interleaved_text(
    row: Row, options: Subtitles, images: Sequence[Frames], as_text: Callable[[str], str] = str
) -> str:
    r"""What stands in place of `{subtitles}`: `<image>\n<image>\na line\n<image>`, heading and ending around it.

    Args:
        row: with its video.
        options: where lines come from, and how many characters of them at most.
        images: of `single_frames`.
        as_text: keeps what a line spells of control tokens and media tags text.

    Raises:
        UnusableSample: its subtitles cannot be read.
    """
    assert options.source is not None, "without subtitles nothing is laid out"
    from_s = float(row.metadata.get("subtitles_from_s") or 0.0)
    end_s = images[0].duration_s - from_s  # of a line that does not say when it ends
    times = [image.timestamps[0] for image in images]
    (lines,) = lines_of(row, options.source) or [[]]
    shown = [(line, place) for line in lines if (place := _place(line, times, end_s)) is not None and line.text]
    texts = [timed_text(line) if options.times else line.text for line, _ in shown]
    fitting = take_fitting(texts, options.max_chars)
    step = -(-len(texts) // max(len(fitting), 1)) or 1

    # Places never fall, but for lines that overlap: none stands before what was said earlier.
    pieces: list[str] = [options.heading] if options.heading else []
    num_placed = 0
    for (_, place), text in zip(shown[::step], fitting, strict=True):
        pieces += ["<image>"] * (place - num_placed)
        num_placed = max(place, num_placed)
        pieces.append(as_text(text))
    pieces += ["<image>"] * (len(images) - num_placed)
    return "\n".join(pieces) + options.ending


def _place(line: Line, times: Sequence[float], unknown_end_s: float) -> int | None:
    """How many frames stand before a line; None where no frame appears during it."""
    start_s, end_s = line.start_s, line.end_s if math.isfinite(line.end_s) else unknown_end_s
    middle_s = (start_s + end_s) / 2
    if end_s - start_s < SHORTEST_S:
        start_s, end_s = middle_s - SHORTEST_S / 2, middle_s + SHORTEST_S / 2
    if not any(start_s < time_s < end_s for time_s in times):
        return None
    return sum(time_s <= middle_s for time_s in times)
