"""Files of media become frames and samples as a family reads them, in a loader worker."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace

from longrl.datamodules.loading.interleaved_frames import check_one_video, single_frames
from longrl.datamodules.loading.reading_time import ReadingClock
from longrl.datamodules.loading.selected_media import ReadMedia, shown_frames
from longrl.datamodules.loading.shown_media import ordered_media
from longrl.datamodules.loading.skips import CODE_ERRORS
from longrl.datamodules.loading.traces import KnowsFeatures, read_part
from longrl.datamodules.media.audio import FileSound, read_sound
from longrl.datamodules.media.frame_lists import FRAME_LIST_SUFFIX
from longrl.datamodules.media.images import read_image
from longrl.datamodules.media.remote import RemoteMedia
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.sources import DecodeLimits, FileFrames, HeldFrames, open_video
from longrl.datamodules.media.video import VideoReader, hold_frames
from longrl.datamodules.media.video_parts import VideoPart
from longrl.datamodules.selection.frame_selection import FrameSelection
from longrl.models.reading import RendersPrompts
from longrl.types import AudioClip, Frames, FrameShard, MediaKind, Row, UnusableSample

AUDIO_FAMILY = "use a family that does, as longrl.models.qwen_omni.QwenOmniFamily, or rows without `audios`"


@dataclass
class HeldMedia:
    """What a worker holds of media for the next rows that show them, and what they took to read."""

    items: OrderedDict[tuple[object, ...], Frames | AudioClip] = field(default_factory=OrderedDict)
    """kind, path and sampling -> frames or sound, the least recently used first."""
    checked: set[str] = field(default_factory=set)
    """Keys of videos too large to hold that were decoded once without an error."""
    clock: ReadingClock = field(default_factory=ReadingClock, compare=False)

    def keep(self, count: int) -> None:
        """Lets go of all items but the `count` used last."""
        while len(self.items) > count:
            self.items.popitem(last=False)


@dataclass(frozen=True)
class MediaReader:
    """Reads a row's media; the arguments are those of `RowRenderer`, but for these.

    Args:
        lays_out_frames: a video is shown as single images.
        held: what is held already, and where more is put.
    """

    family: RendersPrompts
    video: VideoSampling
    selection: FrameSelection | None
    lays_out_frames: bool
    decoding: DecodeLimits
    remote: RemoteMedia
    shard: FrameShard
    stored: KnowsFeatures | None
    held: HeldMedia

    def read_row(self, shown: Row, sampling: VideoSampling) -> ReadMedia:
        """A row's media in the order shown; a video's sound track, then its images, come right after its frames."""
        read = ReadMedia()
        for kind, path in ordered_media(shown):
            if kind != "video":
                read.add(path, self._read(kind, path, sampling))
                continue
            start = time.perf_counter()
            chosen = shown_frames(self.selection, shown, path, sampling, self.decoding, self.remote)
            if self.selection is not None:
                self.held.clock.chose(start, path)
            track = self._sound_track(path, sampling) if self.family.use_audio_in_video else None
            if self.lays_out_frames:
                read.add_frames(path, self._single_frames(shown, path, chosen.sampling))
                continue
            read.add(path, self._read(kind, path, chosen.sampling) if chosen.part is None else self._part(chosen.part))
            if track is not None:
                read.add(path, track)
            read.add_details(chosen.detail_times, [self._part(part) for part in chosen.details])
        return read

    def _sound_track(self, path: str, sampling: VideoSampling) -> AudioClip:
        if sampling.span_s is not None or sampling.at_s is not None:
            raise UnusableSample(
                path,
                "a part of its video is asked about (span_s, parts_s), but a sound track is heard as a whole; set "
                "model.family.init_args.use_audio_in_video to false",
            )
        if path.endswith(FRAME_LIST_SUFFIX):
            raise UnusableSample(
                path, "single frames have no sound track; set model.family.init_args.use_audio_in_video to false"
            )
        sound = self._read("audio", path, sampling)
        assert isinstance(sound, AudioClip)
        return replace(sound, is_video_track=True)

    def _single_frames(self, row: Row, path: str, sampling: VideoSampling) -> list[Frames]:
        """The frames of a row's only video as images, between which its subtitles stand."""
        check_one_video(row)
        self.remote.roots.check(path)
        local = self.remote.local_path(path) if "://" in path else path
        start = time.perf_counter()
        reader = open_video(local, sampling, remote=self.remote, limits=self.decoding.media)
        images = single_frames(reader, self.decoding, self.shard)
        self.held.clock.decoded(start, *(image.key for image in images))
        return images

    def _read(self, kind: MediaKind, path: str, sampling: VideoSampling) -> Frames | AudioClip:
        """A file as the family reads it, kept for the next rows that show it."""
        known = kind, path, sampling
        if known in self.held.items:
            self.held.items.move_to_end(known)
            return self.held.items[known]
        self.remote.roots.check(path)
        if "://" in path:
            return self._read_remote(kind, path, sampling)
        item: Frames | AudioClip
        start = time.perf_counter()
        try:
            if kind == "image":
                item = read_image(path, self.shard, self.decoding.media)
                self.family.outline_media(item)
                self.held.clock.decoded(start, item.key)
            elif kind == "video":
                item = self._video(path, sampling)
            else:
                item = self._sound(path)
        except (UnusableSample, *CODE_ERRORS):
            raise
        except Exception as error:  # the family's: too thin a picture, say
            raise UnusableSample.because(error, "the model cannot be shown it", path) from error
        self.held.items[known] = item
        return item

    def _part(self, part: VideoPart) -> Frames:
        """A part of a video as the family reads it, kept likewise; its path is that of a local file."""
        known = ("part", part)
        if known not in self.held.items:
            start = time.perf_counter()
            try:
                read = read_part(part, self.family, self.shard, self.decoding, self.stored)
                self.held.items[known] = read
                if len(read.pixels):  # else its features are stored
                    self.held.clock.decoded(start, read.key)
            except (UnusableSample, *CODE_ERRORS):
                raise
            except Exception as error:  # the family's
                raise UnusableSample.because(error, "the model cannot be shown it", part.path) from error
        self.held.items.move_to_end(known)
        item = self.held.items[known]
        assert isinstance(item, Frames)
        return item

    def _read_remote(self, kind: MediaKind, url: str, sampling: VideoSampling) -> Frames | AudioClip:
        """The same of a medium that lies elsewhere, from its local copy."""
        try:
            return self._read(kind, self.remote.local_path(url), sampling)
        except UnusableSample as error:
            raise UnusableSample(url, error.reason) from error

    def _sound(self, path: str) -> AudioClip:
        """A file's sound. Its length takes decoding; where its features are stored, the samples are let go of."""
        if not self.family.supports_audio:
            raise UnusableSample(path, f"{type(self.family).__name__} reads no sound; {AUDIO_FAMILY}")
        options = self.shard, self.video.torn, self.decoding.media
        start = time.perf_counter()
        sound = read_sound(path, *options)
        self.held.clock.decoded(start, sound.key)
        if self.stored is not None and self.stored.has(self.family.outline_media(sound).key):
            return replace(sound, waveform=sound.waveform[:0], source=FileSound(path, *options))
        return sound

    def _video(self, path: str, sampling: VideoSampling) -> Frames:
        """A video's frames at the encoder's size if they are few; else, or if features are stored, their source."""
        # 1. Times and size alone give the key of the features, and the grid.
        start = time.perf_counter()
        temporal_patch_size = self.family.temporal_patch_size
        limits = self.decoding
        reader = open_video(path, sampling, self.shard, temporal_patch_size, self.remote, limits.media)
        file = FileFrames(path, sampling, self.shard, temporal_patch_size, limits, self.remote)
        outline = replace(reader.outline, source=file)
        item = self.family.outline_media(outline)

        # 2. Nothing to decode: features are stored, the file was decoded before, or all frames are other ranks'.
        if outline.key in self.held.checked or (self.stored is not None and self.stored.has(item.key)):
            return outline
        if not reader.indices:
            return reader.outline

        # 3. Left to the encoder's GPU, but for two frames: what its decoder cannot read at all shows here.
        if sampling.decode_on == "encoder" and isinstance(reader, VideoReader):
            reader.try_ends()
            self.held.checked.add(outline.key)
            return outline

        # 4. Decoded once in any case, so that a broken frame shows here; held in memory if they are few.
        parts = map(self.family.resize, reader.chunks(limits.frames_at_once(reader.outline)))
        frames = hold_frames(parts, len(reader.indices), limits.max_held_mib)
        self.held.clock.decoded(start, outline.key)
        if frames is None:
            self.held.checked.add(outline.key)
            return outline

        # 5. What fits in one call of the encoder is patched here, more of it call by call.
        if len(self.shard.temporal_patches(item.grid_thw[0])) <= self.family.temporal_patches_per_encode(item):
            return frames
        return replace(outline, source=HeldFrames(frames))
