"""Rows become prompts: media decoded, templates filled, token ids from the family."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch

from longrl.datamodules.loading.interleaved_frames import check_one_video, interleaved_text, single_frames
from longrl.datamodules.loading.prompt_lengths import check_characters, check_length
from longrl.datamodules.loading.reading_time import ReadingClock
from longrl.datamodules.loading.row_marks import video_of
from longrl.datamodules.loading.selected_media import ReadMedia, asked_question, check_selection, shown_frames
from longrl.datamodules.loading.shown_media import ordered_media, without_media
from longrl.datamodules.loading.skips import CODE_ERRORS
from longrl.datamodules.loading.templates import DEFAULT_QUESTION, DEFAULT_RESPONSE, fill_template
from longrl.datamodules.loading.traces import KnowsFeatures as KnowsFeatures, TraceRenderer
from longrl.datamodules.media.audio import SAMPLING_RATE, FileSound, read_sound
from longrl.datamodules.media.decoders import check_decoder, decoder_version
from longrl.datamodules.media.frame_lists import FRAME_LIST_SUFFIX
from longrl.datamodules.media.images import read_image
from longrl.datamodules.media.remote import NO_REMOTE, RemoteMedia
from longrl.datamodules.media.sampling import VideoSampling, in_parts, read_span
from longrl.datamodules.media.sources import DecodeLimits, FileFrames, HeldFrames, open_video
from longrl.datamodules.media.subtitles import Subtitles, subtitle_files, subtitle_text
from longrl.datamodules.media.video import MIB, VideoReader, hold_frames
from longrl.datamodules.media.video_parts import VideoPart
from longrl.datamodules.selection.details import text_with_details
from longrl.datamodules.selection.frame_selection import FrameSelection
from longrl.models.cell_order import shuffled_prompt
from longrl.models.chat_tokens import break_token
from longrl.models.reading import RendersPrompts
from longrl.packing.lengths import LengthLimit
from longrl.rewards.options import parse_options
from longrl.types import (
    FULL_SHARD,
    AudioClip,
    Continuation,
    Frames,
    FrameShard,
    MediaKind,
    Prompt,
    Row,
    UnusableSample,
)

Stage = Literal["sft", "rl", "preference"]
DEFAULT_LIMITS = DecodeLimits()
NO_SUBTITLES = Subtitles()
BLANKS: dict[MediaKind, Frames | AudioClip] = {
    "image": Frames("image", torch.zeros(1, 3, 224, 224, dtype=torch.uint8), (0.0,), "black"),
    "video": Frames("video", torch.zeros(4, 3, 224, 224, dtype=torch.uint8), (0.0, 0.5, 1.0, 1.5), "black"),
    "audio": AudioClip(torch.zeros(SAMPLING_RATE), SAMPLING_RATE, "silence"),
}
"""One of each kind, in the order in which a prompt shows them."""
PIXEL_RULES = 2
"""Raised when a file gives other pixels than before. 2: videos stand upright, transparent pixels lie on white."""
AUDIO_FAMILY = "use a family that does, as longrl.models.qwen_omni.QwenOmniFamily, or rows without `audios`"


class RendersForTeacher(Protocol):
    """What a row's teacher reads; see `TeacherPrompts`."""

    @property
    def families(self) -> list[RendersPrompts]:
        """Those that render it."""

    @property
    def most_held_bytes(self) -> float:
        """See `RowRenderer.most_held_bytes`."""

    def __call__(self, row: Row, policy: Prompt) -> Prompt | None:
        """A prompt of its own, or None for the policy's."""

    def try_options(self, rows: Sequence[Row]) -> None:
        """See `RowRenderer.try_options`."""

    def with_limits(self, limits: Sequence[LengthLimit]) -> RendersForTeacher:
        """The same within limits of the update."""


@dataclass
class RowRenderer:
    """Row -> prompt, in a loader worker: decodes the media, fills the templates and asks the family for token ids."""

    family: RendersPrompts
    video: VideoSampling
    stage: Stage = "rl"
    question_template: str = DEFAULT_QUESTION
    response_template: str = DEFAULT_RESPONSE
    answer_template: str = "{answer}"
    blind: bool = False
    blind_share: float = 0.0
    shuffle_frames: bool = False
    """Show videos with their temporal patches in an order that follows from the row's id."""
    max_prompt_tokens: int | None = None
    subtitles: Subtitles = NO_SUBTITLES
    selection: FrameSelection | None = None
    """Which frames of a video a question is shown; None leaves it to `video`."""
    cached_media: int = 0
    decoding: DecodeLimits = DEFAULT_LIMITS
    remote: RemoteMedia = NO_REMOTE
    """Where media that lie elsewhere are copied to, if they may be fetched."""
    limits: tuple[LengthLimit, ...] = ()
    """Of the update and the engine, beside `max_prompt_tokens`."""
    shard: FrameShard = FULL_SHARD
    """Which part of every medium this rank decodes."""
    patch_dtype: torch.dtype = torch.float32
    """Precision in which patches are handed over: that of the encoder, which would round them to it anyway."""
    teacher: RendersForTeacher | None = None
    """Makes `Prompt.teacher`, of training rows alone; None where there is no teacher, or it reads the same prompt."""
    tells_answer: bool = False
    """The question's template may name `{answer}`, `{option}` and `{reasoning}`: it is a teacher's."""
    prompt_option: str = "data.max_prompt_tokens"
    """The option that `max_prompt_tokens` is."""
    stored: KnowsFeatures | None = None
    """Videos that it knows are not decoded; should their features prove unusable, `Media.source` decodes them."""
    _cache: OrderedDict[tuple[object, ...], Frames | AudioClip] = field(default_factory=OrderedDict, repr=False)
    """kind, path and sampling -> frames or sound, the least recently used first."""
    _checked: set[str] = field(default_factory=set, repr=False)
    """Keys of videos too large to hold that were decoded once without an error."""
    _clock: ReadingClock = field(default_factory=ReadingClock, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.subtitles.lays_out_frames and (self.shuffle_frames or self.family.use_audio_in_video):
            option = "data.shuffle_frames (or --shuffled_baseline)" if self.shuffle_frames else "use_audio_in_video"
            raise ValueError(
                f"data.subtitles.lines=interleaved shows a video as single images, and {option}=true is of videos; set "
                "one of them to another value"
            )

    @property
    def families(self) -> list[RendersPrompts]:
        """The policy's, and those of teachers that read other prompts."""
        return [self.family] if self.teacher is None else [self.family, *self.teacher.families]

    @property
    def most_held_bytes(self) -> float:
        """Most that a row's frames may take in a loader's memory, three bytes a pixel, its teacher's with them."""
        limit = self.decoding.max_held_mib * MIB
        pixels = getattr(self.family, "max_pixels", None)
        num_frames = self.video.num_frames or self.video.max_frames
        num_frames += self.selection.detail_frames if self.selection else 0
        held = limit if pixels is None else min(limit, 3 * pixels * num_frames)
        return held if self.teacher is None else held + self.teacher.most_held_bytes

    def __call__(self, row: Row) -> Prompt:
        """The prompt of a row, with the answers that its stage teaches, and with its teacher's prompt.

        Raises:
            UnusableSample: a media file or its subtitles are missing or broken, or the prompt is too long.
            Exception: whatever else the row makes a processor or tokenizer raise; see `RenderedRows`.
        """
        try:
            prompt = self._prompt(row)
            if self.teacher is None:
                return prompt
            return replace(prompt, teacher=self.teacher(row, prompt))
        finally:  # not before: the teacher may be shown the same frames
            while len(self._cache) > self.cached_media:
                self._cache.popitem(last=False)

    def _prompt(self, row: Row) -> Prompt:
        """The policy's own."""
        # 1. No file can hold half a character (a lone surrogate), so no run may go on with one.
        said = (row.id, row.problem, row.answer, row.reasoning, row.messages, row.response, row.trace, row.rejected)
        json.dumps(said, ensure_ascii=False).encode()

        check_characters(row, self.own_limit, self.limits, with_trace=self.stage == "sft")

        # 2. Which media are shown, and which part of a video.
        blind = (self.blind or self.blind_share > 0) and self.drops_media(row)
        shown = without_media(row) if blind else row
        span = row.metadata.get("span_s")
        video = video_of(row, self.video)
        sampling = replace(video, span_s=read_span(span)) if span else video
        parts = row.metadata.get("parts_s")
        if parts:
            sampling = in_parts(video, parts, row.metadata.get("parts_frames"))

        # 3. Decoded media, or where to get them.
        mark = self._clock.mark()
        read = self._media(shown, sampling)
        media = read.media

        # 4. Token ids, at most so many.
        text = self._question_text(shown, None if blind else media)
        asked, text = read.place_details(shown, text)
        is_pair = self.stage == "preference" and shown.rejected is not None
        is_text = is_pair or (self.stage == "sft" and not shown.trace)
        prompt = self.family.render(asked, text, media, self.response(shown) if is_text else None)
        if asked is not shown:  # what else reads the row, and renders it again, reads it without the images
            prompt = replace(prompt, row=shown)
        if is_pair:
            prompt = with_rejected(self.family, prompt)
        if self.stage == "sft" and shown.trace:
            prompt = replace(prompt, response=self._traces(video).target(shown))
        self.check_length(prompt)

        # 5. Where left-out pixels come from, and which frames are shown.
        items = tuple(item.with_patches_in(self.patch_dtype) for item in prompt.media)
        if any(item.source for item in media):
            items = tuple(replace(item, source=read.source) for item, read in zip(items, media, strict=True))
        frames = [item for item in media if isinstance(item, Frames)]
        prompt = replace(
            prompt,
            media=items,
            frame_indices=tuple(item.indices for item in frames),
            frame_times=tuple(read.frame_times),
            torn_videos=tuple(read.torn),
            video_s=tuple(item.duration_s for item in frames if item.kind == "video"),
            reading=self._clock.of(media, mark),
        )
        if not self.shuffle_frames:
            return prompt
        return shuffled_prompt(self.family, prompt, f"frames of {row.id}") or prompt

    def _media(self, shown: Row, sampling: VideoSampling) -> ReadMedia:
        """A row's media in the order shown; a video's sound track, then its images, come right after its frames."""
        read = ReadMedia()
        for kind, path in ordered_media(shown):
            if kind != "video":
                read.add(path, self._read(kind, path, sampling))
                continue
            start = time.perf_counter()
            chosen = shown_frames(self.selection, shown, path, sampling, self.decoding, self.remote)
            if self.selection is not None:
                self._clock.chose(start)
            track = self._sound_track(path, sampling) if self.family.use_audio_in_video else None
            if self.subtitles.lays_out_frames:
                read.add_frames(path, self._single_frames(shown, path, chosen.sampling))
                continue
            read.add(path, self._read(kind, path, chosen.sampling) if chosen.part is None else self._part(chosen.part))
            if track is not None:
                read.add(path, track)
            read.add_details(chosen.detail_times, [self._part(part) for part in chosen.details])
        return read

    def media_question(self, row: Row) -> str:
        """What of a row's question decides which frames of its videos are shown; "" where nothing does."""
        return asked_question(row) if self.selection is not None and self.selection.reads_question else ""

    def _traces(self, video: VideoSampling) -> TraceRenderer:
        return TraceRenderer(self.family, video, self.shard, self.decoding, self.remote, self.patch_dtype, self.stored)

    def _question_text(self, shown: Row, media: Sequence[Frames | AudioClip] | None) -> str:
        """The question as text: what it spells of control tokens is text, and subtitles place no media either.

        Args:
            shown: the row, without media where it is shown blind.
            media: None then.
        """
        chat = self.family.chat
        question = chat.declared.sub(break_token, shown.problem)
        subtitles = ""
        if self.subtitles.source is not None:
            videos = None
            if media is not None:
                videos = [item for item in media if isinstance(item, Frames) and item.kind == "video"]
            for path in subtitle_files(shown, self.subtitles.source) if self.subtitles.source == "record" else ():
                self.remote.roots.check(path)
            as_text = functools.partial(chat.declared_and_tags.sub, break_token)
            if self.subtitles.lays_out_frames and media:
                images = [item for item in media if isinstance(item, Frames)]
                subtitles = interleaved_text(shown, self.subtitles, images, as_text)
            else:
                subtitles = as_text(subtitle_text(shown, self.subtitles, videos))
        told = self._told(shown) if self.tells_answer else {}
        told |= {"asked": question} | self._wordings(shown, media or ())
        return fill_template(self.question_template, problem=question, subtitles=subtitles, **told)

    def _wordings(self, shown: Row, media: Sequence[Frames | AudioClip]) -> dict[str, str]:
        """What a published protocol's wording says beside the problem: `QUESTION_NAMES` says of what."""
        times = [time for item in media if isinstance(item, Frames) for time in item.timestamps if item.kind == "video"]
        given = {name: shown.metadata.get(name) for name in ("asked", "instruction")}
        texts = {name: self.family.chat.declared.sub(break_token, str(text)) for name, text in given.items() if text}
        seconds = ", ".join(str(round(time, 4)) for time in times)
        return {"instruction": "", "num_frames": str(len(times)), "frame_times": seconds, **texts}

    def _told(self, row: Row) -> dict[str, str]:
        """What a row's own answer says, as text that places no media and ends no turn."""
        option = parse_options(row.problem).get(row.answer, row.answer)
        values = {"answer": row.answer, "option": option, "reasoning": row.reasoning or ""}
        tokens = self.family.chat.declared_and_tags
        return {name: tokens.sub(break_token, value) for name, value in values.items()}

    def check_length(self, prompt: Prompt) -> None:
        """Raises UnusableSample for a prompt that is too long for the data's own limit, the update or the engine."""
        check_length(prompt, self.own_limit, self.limits)

    @property
    def own_limit(self) -> LengthLimit | None:
        """The data's, of prompts alone."""
        if self.max_prompt_tokens is None:
            return None
        return LengthLimit(self.max_prompt_tokens, self.prompt_option)

    def with_limits(self, limits: Sequence[LengthLimit]) -> RowRenderer:
        """The same, with further limits for itself and its teacher."""
        teacher = None if self.teacher is None else self.teacher.with_limits(limits)
        # A second stage says the same again.
        return replace(self, limits=tuple(dict.fromkeys((*self.limits, *limits))), teacher=teacher)

    def try_options(self, rows: Sequence[Row]) -> None:
        """Renders a row with black media of the kinds that the rows have.

        What fails here is an option or the family, for the row is harmless: the error is raised as it is, before a run
        begins. What fails later depends on a row, which is skipped.
        """
        check_decoder(self.video, has_encoder=hasattr(self.family, "encode_media"))
        shown = [row for row in rows if not self.drops_media(row)]
        kinds = {kind for row in shown for kind, _ in ordered_media(row) if self.family.reads_media(kind)}
        media = [black for kind, black in BLANKS.items() if kind in kinds]
        row = Row("harmless", "What is this?", "A", reasoning="It is black.")
        told = self._told(row) if self.tells_answer else {}
        text = fill_template(self.question_template, problem=row.problem, subtitles="", **told)
        check_selection(self.selection, self.family, self.subtitles.lays_out_frames)
        if self.selection is not None and self.selection.detail_frames and "video" in kinds:
            text = text_with_details(text, [item.kind for item in media], [(0.0,)])
            media.insert([item.kind for item in media].index("video") + 1, BLANKS["image"])
        self.family.render(row, text, media, None if self.stage == "rl" else self.response(row))
        if self.teacher is not None:
            self.teacher.try_options(rows)

    def identity(self) -> dict[str, Any]:
        """All that decides, beside row and family, what is shown: options by name, in values that JSON can hold.

        Stored answers are found by it. Options that change training targets, or only where and when media are decoded,
        are none of it.
        """
        identity = {
            "video": self.video.identity(),
            "question_template": self.question_template,
            "blind": self.blind,
            "subtitles": self.subtitles.identity(),
            "decoder": decoder_version(self.video),
            "pixel_rules": PIXEL_RULES,
        }
        if self.shuffle_frames:  # without it, answers stored before there was such an option are found
            identity["shuffle_frames"] = True
        if self.selection is not None:
            identity["selection"] = self.selection.identity()
        return identity

    def drops_media(self, row: Row) -> bool:
        """True for a row shown without its media: all are, or it is one of `blind_share` of the training rows."""
        drawn = int.from_bytes(hashlib.sha256(row.id.encode("utf-8", "surrogatepass")).digest()[:4], "big") / 2**32
        return self.blind or drawn < self.blind_share

    def response(self, row: Row) -> str:
        """The SFT target of a row: reasoning and answer, or the answer alone where there is no reasoning.

        Of a conversation its last answer. What reasoning and answer spell of control tokens is text.
        """
        if row.response is not None:
            return row.response
        template = self.response_template if row.reasoning else self.answer_template
        option = parse_options(row.problem).get(row.answer, row.answer)
        tokens = self.family.chat.text_in_answers
        values = {"reasoning": row.reasoning or "", "answer": row.answer, "option": option}
        values = {name: tokens.sub(break_token, value) for name, value in values.items()}
        return fill_template(template, **values)

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
        self._clock.decoded(start, *(image.key for image in images))
        return images

    def _read(self, kind: MediaKind, path: str, sampling: VideoSampling) -> Frames | AudioClip:
        """A file as the family reads it, kept for the next rows that show it."""
        known = kind, path, sampling
        if known in self._cache:
            self._cache.move_to_end(known)
            return self._cache[known]
        self.remote.roots.check(path)
        if "://" in path:
            return self._read_remote(kind, path, sampling)
        item: Frames | AudioClip
        start = time.perf_counter()
        try:
            if kind == "image":
                item = read_image(path, self.shard, self.decoding.media)
                self.family.outline_media(item)
                self._clock.decoded(start, item.key)
            elif kind == "video":
                item = self._video(path, sampling)
            else:
                item = self._sound(path)
        except (UnusableSample, *CODE_ERRORS):
            raise
        except Exception as error:  # the family's: too thin a picture, say
            raise UnusableSample.because(error, "the model cannot be shown it", path) from error
        self._cache[known] = item
        return item

    def _part(self, part: VideoPart) -> Frames:
        """A part of a video as the family reads it, kept likewise; its path is that of a local file."""
        known = ("part", part)
        if known not in self._cache:
            start = time.perf_counter()
            try:
                read = self._traces(self.video).read_part(part)
                self._cache[known] = read
                if len(read.pixels):  # else its features are stored
                    self._clock.decoded(start, read.key)
            except (UnusableSample, *CODE_ERRORS):
                raise
            except Exception as error:  # the family's
                raise UnusableSample.because(error, "the model cannot be shown it", part.path) from error
        self._cache.move_to_end(known)
        item = self._cache[known]
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
        self._clock.decoded(start, sound.key)
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
        if outline.key in self._checked or (self.stored is not None and self.stored.has(item.key)):
            return outline
        if not reader.indices:
            return reader.outline

        # 3. Left to the encoder's GPU, but for two frames: what its decoder cannot read at all shows here.
        if sampling.decode_on == "encoder" and isinstance(reader, VideoReader):
            reader.try_ends()
            self._checked.add(outline.key)
            return outline

        # 4. Decoded once in any case, so that a broken frame shows here; held in memory if they are few.
        parts = map(self.family.resize, reader.chunks(limits.frames_at_once(reader.outline)))
        frames = hold_frames(parts, len(reader.indices), limits.max_held_mib)
        self._clock.decoded(start, outline.key)
        if frames is None:
            self._checked.add(outline.key)
            return outline

        # 5. What fits in one call of the encoder is patched here, more of it call by call.
        if len(self.shard.temporal_patches(item.grid_thw[0])) <= self.family.temporal_patches_per_encode(item):
            return frames
        return replace(outline, source=HeldFrames(frames))


def with_rejected(family: RendersPrompts, prompt: Prompt) -> Prompt:
    """The prompt of a pair with its other answer.

    Raises:
        UnusableSample: both answers have the same tokens.
    """
    assert prompt.row.rejected is not None, "the row is a pair"
    assert prompt.response is not None, "so it has two answers"
    ids = family.encode_answer(prompt.row, prompt.row.rejected)
    if torch.equal(ids, prompt.response.token_ids):
        raise UnusableSample(None, "its chosen and its rejected answer have the same tokens; leave it out")
    return replace(prompt, rejected=Continuation(ids))
