"""What of an image, video or sound the encoder reads: pixels and spectrograms to patches, and how many tokens that is.

Runs in loader workers and touches no weights.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from longrl.models.pretrained_folder import PretrainedFolder
from longrl.types import AudioClip, Dtype, Frames, Media, MediaKind, TemporalPatchSize, UnusableSample

GridTHW = tuple[int, int, int]
"""Patches along time, height and width."""


class PatchesMedia(PretrainedFolder):
    """What of an image, video or sound does the encoder read, and how many tokens is it?"""

    supports_audio: bool = False
    """True if it reads sound."""
    use_audio_in_video: bool = False
    """True if a video is shown with its sound track."""
    dtype: Dtype = "float32"
    """Precision of the encoder's weights, in which it reads patches."""

    def grid(
        self, num_frames: int, height: int, width: int, *, kind: MediaKind = "video", resized: bool = False
    ) -> GridTHW:
        """Patches along time, height and width of an image or video; needs no pixels.

        Args:
            num_frames: of the video.
            height: of a frame in pixels.
            width: of a frame in pixels.
            kind: `image` or `video`.
            resized: height and width are the encoder's already, as `resize` leaves them.
        """
        self._refuse_media(kind)

    def pixel_patches(self, frames: Frames) -> Tensor:
        """[number of patches, values of a patch] of an image or some frames of a video, as the encoder reads them."""
        self._refuse_media(frames.kind)

    def num_features(self, media: Media) -> int:
        """Rows of a media item's features: one for each of its placeholder tokens."""
        self._refuse_media(media.kind)

    def _refuse_media(self, kind: MediaKind) -> NoReturn:
        readable = "text only" if type(self).grid is PatchesMedia.grid else f"no {kind}"
        raise UnusableSample(
            None,
            f"{type(self).__name__} reads {readable}, but the row has a {kind}; use a family that reads it, or rows "
            "without media",
        )

    @property
    def temporal_patch_size(self) -> int | TemporalPatchSize:
        """Video frames that the encoder reads together: ranks share a video in such temporal patches."""
        return 1

    @property
    def has_even_patches(self) -> bool:
        """True if every temporal patch of a video has as many rows of features as its others, so that they can move."""
        return True

    def temporal_patches_per_encode(self, media: Media) -> int:
        """Temporal patches of a media item that are patched and encoded at once; by default all of them."""
        return media.grid_thw[0]

    def resize(self, frames: Frames) -> Frames:
        """Part of a video in the size in which the encoder reads it, so that no more than a part is held full-size.

        Each frame on its own, and `patch` must give the same with or without it. By default `pixel_patches` does it.
        """
        return frames

    def outline_media(self, frames: Any) -> Media:
        """The media item of decoded `Frames` (or an `AudioClip`) without its patches; the pixels may be elsewhere."""
        kind = frames.kind
        if kind == "audio":
            self._refuse_media(kind)
        times = frames.timestamps
        num_frames = len(times)
        height, width = frames.pixels.shape[-2:]
        grid = self.grid(num_frames, height, width, kind=kind, resized=frames.resized)

        # Frames of a temporal patch, their mean time, and the spacing of neighbours.
        size = self.temporal_patch_size if kind == "video" else 1
        num_together = size if isinstance(size, int) else size.of(num_frames)
        mean_times, seconds = times_of_patches(times, num_together)
        if kind == "image":
            seconds = 0.0

        return Media(
            kind=kind,
            patches=torch.empty(0, 0),
            grid_thw=grid,
            seconds_per_temporal_patch=seconds,
            timestamps=mean_times,
            key=f"{frames.key}-{grid[1]}x{grid[2]}",  # names the features: what was decoded, and at which size
            temporal_patch_size=num_together,
        )

    def patch(self, frames: Any) -> Media:
        """The media item of decoded `Frames` (or an `AudioClip`) with patches, as by the model's own processor."""
        outline = self.outline_media(frames)
        if not len(frames.pixels):  # another rank has them
            return outline
        return replace(outline, patches=self.pixel_patches(frames))

    def patch_all(self, frames: Sequence[Frames | AudioClip]) -> list[Media]:
        """`patch` of all media of a prompt, for a family in which one depends on the others."""
        return [self.patch(item) for item in frames]


def times_of_patches(times: Sequence[float], num_together: int) -> tuple[tuple[float, ...], float]:
    """Mean time of every so many frames, and the seconds from one of these to the next, by the mean spacing.

    Args:
        times: of each frame in seconds.
        num_together: frames of a temporal patch; the last one may lack some.
    """
    starts = range(0, len(times), num_together)
    seconds = num_together * (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1.0
    return tuple(statistics.fmean(times[start : start + num_together]) for start in starts), seconds
