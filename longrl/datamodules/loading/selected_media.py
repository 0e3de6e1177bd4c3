"""What a selection (`data.selection`) makes of a row's media: which frames of a video, and images behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from longrl.datamodules.loading.shown_media import ordered_media
from longrl.datamodules.loading.skips import CODE_ERRORS
from longrl.datamodules.media.remote import RemoteMedia
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.sources import DecodeLimits
from longrl.datamodules.selection.details import row_with_details, text_with_details
from longrl.datamodules.selection.frame_selection import FrameSelection, ShownFrames
from longrl.models.chat_tokens import MEDIA_TAG
from longrl.models.reading import RendersPrompts
from longrl.rewards.options import without_options
from longrl.types import AudioClip, Frames, Row, UnusableSample


@dataclass
class ReadMedia:
    """A row's media as they were read, with the images behind its videos."""

    media: list[Frames | AudioClip] = field(default_factory=list)
    """In the order shown; a sound track, then images, come right behind their video."""
    torn: list[str] = field(default_factory=list)
    """Files that were cut off."""
    detail_times: list[tuple[float, ...]] = field(default_factory=list)
    """Of each video, seconds of the images behind it."""
    frame_times: list[tuple[float, ...]] = field(default_factory=list)
    """Of each video and image, those of its frames: of an image behind a video its own."""

    def add(self, path: str, item: Frames | AudioClip) -> None:
        """A medium of the row, or the track of the last one."""
        self.media.append(item)
        if isinstance(item, Frames):
            self.frame_times.append(item.timestamps)
            if item.missing_s:
                self.torn.append(path)

    def add_frames(self, path: str, images: Sequence[Frames]) -> None:
        """A video as single images."""
        self.media += images
        self.detail_times.append(())
        self.frame_times += [image.timestamps for image in images]
        if images[0].missing_s:
            self.torn.append(path)

    def add_details(self, times: tuple[float, ...], images: Sequence[Frames]) -> None:
        """The images behind a video."""
        self.media += images
        self.detail_times.append(times)
        self.frame_times += [(time_s,) for time_s in times]

    def place_details(self, row: Row, text: str) -> tuple[Row, str]:
        """The row and its question with the images in their places; without any both as they are."""
        if not any(self.detail_times):
            return row, text
        if row.messages:
            return row_with_details(row, self.detail_times), text
        return row, text_with_details(text, [kind for kind, _ in ordered_media(row)], self.detail_times)


def asked_question(row: Row) -> str:
    """What a selection reads of a row: its question without options and media, of a conversation the user's last."""
    asked = row.problem
    if row.messages:
        of_user = [message for message in row.messages if message["role"] == "user"]
        parts = of_user[-1]["content"] if of_user else ()
        asked = "\n".join(part["text"] for part in parts if part["type"] == "text")
    return without_options(MEDIA_TAG.sub("", asked)).strip()


def shown_frames(
    selection: FrameSelection | None,
    row: Row,
    path: str,
    sampling: VideoSampling,
    limits: DecodeLimits,
    remote: RemoteMedia,
) -> ShownFrames:
    """What a row is shown of a video; all that `sampling` says without a selection, or where it names moments itself.

    Raises:
        UnusableSample: the video cannot be read, or the selection fails with it.
    """
    if selection is None or sampling.at_s is not None:  # a row's `parts_s`
        return ShownFrames(sampling)
    try:
        return selection.shown_frames(remote.local_path(path), asked_question(row), sampling, limits, remote)
    except UnusableSample as error:
        raise UnusableSample(path, error.reason) from error
    except CODE_ERRORS:
        raise
    except Exception as error:  # whatever somebody's function raises
        raise UnusableSample.because(error, "data.selection cannot choose its frames", path) from error


def check_selection(selection: FrameSelection | None, family: RendersPrompts, lays_out_frames: bool) -> None:
    """Raises ValueError for a selection that cannot work, or whose images cannot be shown.

    Args:
        selection: to be checked.
        family: which shows the images.
        lays_out_frames: subtitles stand between single frames, so that no image can stand behind a video.
    """
    if selection is None:
        return
    selection.check()
    if selection.detail_frames and not family.reads_media("image"):
        raise ValueError(
            f"data.selection.init_args.detail_frames={selection.detail_frames} shows images behind a video, and "
            f"{type(family).__name__} reads none; set it to 0, or use a family that does"
        )
    if selection.detail_frames and lays_out_frames:
        raise ValueError(
            f"data.selection.init_args.detail_frames={selection.detail_frames} shows images behind a video, of which "
            "data.subtitles.lines=interleaved leaves single frames; set it to 0, or lines to frames"
        )
