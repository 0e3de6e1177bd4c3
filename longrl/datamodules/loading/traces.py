"""Traces as SFT targets, with the tokens that rollouts have: turns are taught, what tools answer is shown."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from longrl.datamodules.loading.skips import CODE_ERRORS
from longrl.datamodules.media.images import read_image
from longrl.datamodules.media.remote import RemoteMedia
from longrl.datamodules.media.sampling import VideoSampling, read_span
from longrl.datamodules.media.sources import DecodeLimits
from longrl.datamodules.media.video import hold_frames
from longrl.datamodules.media.video_parts import VideoPart, frame_at
from longrl.models.reading import RendersPrompts
from longrl.types import Continuation, Frames, FrameShard, MediaKind, Observed, Row, TemporalPatchSize, UnusableSample


class KnowsFeatures(Protocol):
    """Whoever can tell whether the features of a media item are there already."""

    def has(self, key: str) -> bool:
        """True if they are."""


def trace_media(row: Row) -> list[tuple[MediaKind, str]]:
    """Kind and file of each medium that tools show in a row's trace, each once."""
    parts = [part for message in row.trace if message["role"] == "tool" for part in message["content"]]
    media = [(part["type"], part.get("path") or part["video"]) for part in parts if part["type"] != "text"]
    return list(dict.fromkeys(media))


@dataclass(frozen=True)
class ShardOfPart:
    """A `Frames.source` of a rank's shard of a part of a video."""

    part: VideoPart
    shard: FrameShard
    temporal_patch_size: int | TemporalPatchSize

    def __call__(self) -> Iterator[Frames]:
        """The shard's frames in chunks."""
        start = 0
        for chunk in self.part():
            held = self.shard.frames(len(chunk.timestamps), self.temporal_patch_size)
            stop = start + len(chunk.pixels)
            pixels = chunk.pixels[max(held.start - start, 0) : max(held.stop - start, 0)]
            if len(pixels):
                yield replace(chunk, pixels=pixels)
            start = stop


def read_part(
    part: VideoPart, family: RendersPrompts, shard: FrameShard, decoding: DecodeLimits, stored: KnowsFeatures | None
) -> Frames:
    """A part of a video, this rank's shard of it; without pixels where its features are stored."""
    outline = part.outline()
    size = 1 if part.is_image else family.temporal_patch_size
    source = ShardOfPart(part, shard, size)
    outline = replace(outline, source=source)
    item = family.outline_media(outline)
    held = shard.frames(len(outline.timestamps), size)
    if not held or (stored is not None and stored.has(item.key)):
        return outline if held else replace(outline, source=None)

    # All of it in memory, if the encoder takes it at once; else it is decoded again while it is encoded.
    frames = hold_frames(map(family.resize, source()), len(held), decoding.max_held_mib)
    local = len(shard.temporal_patches(item.grid_thw[0]))
    if frames is None or local > family.temporal_patches_per_encode(item):
        return outline
    return replace(frames, source=None)


@dataclass(frozen=True)
class TraceRenderer:
    """Renders traces in a loader worker; the arguments are those of `RowRenderer`."""

    family: RendersPrompts
    video: VideoSampling
    shard: FrameShard
    decoding: DecodeLimits
    remote: RemoteMedia
    patch_dtype: torch.dtype
    stored: KnowsFeatures | None = None

    def target(self, row: Row) -> Continuation:
        """The tokens of a row's trace.

        Raises:
            UnusableSample: a medium cannot be read.
        """
        turns: list[str] = []
        observed: list[Observed] = []
        for is_tool, messages in itertools.groupby(row.trace, lambda message: message["role"] == "tool"):
            if is_tool:
                observed.append(self._observed(list(messages)))
                continue
            turns += [self.family.chat.with_calls(one["content"], one.get("tool_calls", ())) for one in messages]
        return self.family.continuation(turns, observed)

    def _observed(self, messages: Sequence[Mapping[str, Any]]) -> Observed:
        """What tools answer to a turn, a message each."""
        responses = []
        for message in messages:
            parts = message["content"]
            responses.append([part["text"] if part["type"] == "text" else self._frames(part) for part in parts])
        observed = self.family.observation(responses, ended=True)
        frames = [part for response in responses for part in response if isinstance(part, Frames)]
        # Where pixels were left out, or are encoded part by part, the source has them.
        media = [
            replace(item, source=part.source).with_patches_in(self.patch_dtype)
            for item, part in zip(observed.media, frames, strict=True)
        ]
        return replace(observed, media=tuple(media))

    def _frames(self, part: Mapping[str, Any]) -> Frames:
        """A medium, this rank's shard of it, without pixels where its features are stored."""
        path = part.get("path") or part["video"]
        self.remote.roots.check(path)
        try:
            if "path" in part:
                return read_image(self.remote.local_path(path), self.shard, self.decoding.media)
            return read_part(self._video_part(part), self.family, self.shard, self.decoding, self.stored)
        except (UnusableSample, *CODE_ERRORS):
            raise
        except Exception as error:  # the family's: too thin a picture, say
            raise UnusableSample.because(error, "the model cannot be shown it", path) from error

    def _video_part(self, part: Mapping[str, Any]) -> VideoPart:
        is_image = part["type"] == "image"
        sampling = frame_at(part["time_s"]) if is_image else self._sampling(part)
        sampling = replace(sampling, decoder=self.video.decoder, decode_on="cpu")
        box = tuple(part["box"]) if "box" in part else None
        limits = (self.decoding, self.remote)
        return VideoPart(part["video"], sampling, is_image, box, part.get("max_pixels"), *limits)

    def _sampling(self, part: Mapping[str, Any]) -> VideoSampling:
        """Which frames of a video: those that the part says, else those of the data module."""
        span = read_span(part["span_s"]) if "span_s" in part else None
        names = ("fps", "num_frames", "min_frames", "max_frames")
        given = {name: part[name] for name in names if name in part}
        if not given:
            return replace(self.video, span_s=span)
        if "num_frames" in given:
            given = {"fps": None, "min_frames": 1, **given}
        if "max_frames" in given:
            given = {"min_frames": min(VideoSampling().min_frames, given["max_frames"]), **given}
        return VideoSampling(span_s=span, torn="keep", **given)
