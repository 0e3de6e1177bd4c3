"""A video as the files of its frames: `NAME.frames.json` names them, and says when each is on show.

Its fields: `frames`, paths of images from the list's own folder on, in the order shown; and either `fps`, their rate,
or `times`, seconds from the video's start on. Record fields that become such a file are those of
`longrl.datamodules.rows.record_media`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longrl.datamodules.media.images import read_image
from longrl.datamodules.media.opening import DEFAULT_MEDIA_LIMITS, MediaLimits
from longrl.datamodules.media.sampling import VideoSampling, sample_indices
from longrl.datamodules.media.video import content_digest
from longrl.io.jsonl import parse_json
from longrl.types import FULL_SHARD, Frames, FrameShard, TemporalPatchSize, UnusableSample

FRAME_LIST_SUFFIX = ".frames.json"


@dataclass(frozen=True)
class FrameList:
    """Files of a video's frames."""

    paths: tuple[str, ...]
    """In the order shown."""
    times: tuple[float, ...]
    """Seconds at which each appears, from the video's start on."""
    end_s: float
    """When the last one disappears."""


def frame_times(num_frames: int, fps: Any = None, times: Any = None) -> tuple[tuple[float, ...], float]:
    """Times of frames from their rate or as they are given, and when the last one disappears.

    Raises:
        ValueError: neither is given, or they are no increasing times of as many frames.
    """
    if times is not None:
        seconds = tuple(float(time) for time in times)
        increase = all(earlier < later for earlier, later in itertools.pairwise(seconds))
        if len(seconds) != num_frames or not increase or not all(map(math.isfinite, seconds)) or min(seconds) < 0:
            raise ValueError(
                f"the times of {num_frames} frames must be as many increasing seconds from 0 on, got {list(seconds)}"
            )
        gaps = sorted(later - earlier for earlier, later in itertools.pairwise(seconds))
        return seconds, seconds[-1] + (gaps[len(gaps) // 2] if gaps else 0.0)
    if fps is None:
        raise ValueError("a video of single frames needs their rate, `fps`, or their times in seconds, `frame_times`")
    rate = float(fps)
    if not 0 < rate < math.inf:
        raise ValueError(f"the rate of a video of single frames must be above 0 frames per second, got {fps!r}")
    return tuple(index / rate for index in range(num_frames)), num_frames / rate


def read_frame_list(path: str | Path) -> FrameList:
    """The frames that a list names.

    Raises:
        UnusableSample: no such file, or not what this module says.
    """
    digest = content_digest(path)
    return _read(str(path), digest)


def frame_files(path: str) -> tuple[str, ...]:
    """A medium's path and, where it is a list of frames that can be read, those of its frames."""
    if path.endswith(FRAME_LIST_SUFFIX) and os.path.isfile(path):
        with contextlib.suppress(UnusableSample):
            return (path, *read_frame_list(path).paths)
    return (path,)


@functools.lru_cache(maxsize=64)  # a list is read by the check of its files, for its size, and for its frames
def _read(path: str, digest: str) -> FrameList:
    try:
        fields = parse_json(Path(path).read_text(encoding="utf-8"))
        names = fields["frames"]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError("`frames` must be a list of file names")
        times, end_s = frame_times(len(names), fields.get("fps"), fields.get("times"))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError) as error:
        raise UnusableSample.because(error, "it is no list of frames", path) from error
    folder = os.path.dirname(path)
    paths = tuple(name if "://" in name else os.path.join(folder, os.path.expanduser(name)) for name in names)
    return FrameList(paths, times, end_s)


def frame_list_text(paths: Sequence[str], timing: Mapping[str, Any]) -> str:
    """The content of a list's file."""
    return json.dumps({"frames": list(paths), **timing})


class FrameListReader:
    """The sampled frames of a video that is a list of image files; see `VideoReader`.

    Args:
        path: of the list.
        sampling: which frames.
        shard: which of them to decode; the others only count.
        temporal_patch_size: frames that stay together when a video is split over ranks.
        local_path: gives the local file of a frame that lies elsewhere.
        limits: what each frame may cost.

    Raises:
        UnusableSample: the list or a frame that was sampled is missing.
    """

    def __init__(
        self,
        path: str | Path,
        sampling: VideoSampling,
        shard: FrameShard = FULL_SHARD,
        temporal_patch_size: int | TemporalPatchSize = 1,
        local_path: Callable[[str], str] = str,
        limits: MediaLimits = DEFAULT_MEDIA_LIMITS,
    ) -> None:
        from PIL import __version__

        frames = read_frame_list(path)
        start_s = frames.times[0]
        if sampling.span_s is not None:
            if sampling.span_s[0] >= frames.end_s:
                raise UnusableSample(
                    path, f"it ends after {frames.end_s:.1f} s, before the part from {sampling.span_s[0]:g} s on"
                )
            first, last = (max(moment - start_s, 0.0) for moment in sampling.span_s)  # sampled from the first frame on
            sampling = replace(sampling, span_s=(first, max(last, math.nextafter(first, math.inf))))
        indices = sample_indices(frames.times, frames.end_s, sampling)
        held = shard.frames(len(indices), temporal_patch_size)
        self.path = path
        self.indices = indices[held.start : held.stop]
        """Those of the shard's frames in the list."""
        self._files = [local_path(frames.paths[index]) for index in indices]
        self._limits = limits
        self._held = range(held.start, held.stop)
        digests = [content_digest(file) for file in self._files]
        height, width = read_image(self._files[0], limits=limits).pixels.shape[-2:]
        self.outline = Frames(
            kind="video",
            pixels=torch.empty(0, 3, height, width, dtype=torch.uint8),
            timestamps=tuple(frames.times[index] for index in indices),
            key=hashlib.sha256(f"frames {digests} Pillow {__version__}".encode()).hexdigest(),
            duration_s=frames.end_s,
            indices=tuple(indices),
        )
        """Times, key and size, without a frame."""

    def chunks(self, num_frames: int) -> Iterator[Frames]:
        """The shard's frames, so many at a time, the last time fewer.

        Raises:
            UnusableSample: a frame cannot be decoded, or is not as large as the first one.
        """
        size = tuple(self.outline.pixels.shape[1:])
        for start in range(0, len(self._held), num_frames):
            images = []
            for position in self._held[start : start + num_frames]:
                image = read_image(self._files[position], limits=self._limits).pixels  # [1, 3, H, W]
                if tuple(image.shape[1:]) != size:
                    has, expected = tuple(image.shape[2:]), size[1:]
                    raise UnusableSample(
                        self._files[position], f"a frame of {has} pixels in a video that begins with {expected}"
                    )
                images.append(image)
            yield replace(self.outline, pixels=torch.cat(images))
