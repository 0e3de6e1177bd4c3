"""How rows become prompts: chat template, placeholders, positions. Runs in loader workers and touches no weights."""

from __future__ import annotations

import abc
import hashlib
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longrl.models.family import ModelFamily
from longrl.types import AudioClip, Frames, Media, MediaKind, Prompt, Row, TemporalPatchSize

MEDIA_TAG = re.compile(r"<(image|video|audio)>")


class ReadsChats(ModelFamily):
    """A family that reads text and media as a chat, with as many placeholder tokens as a medium has features."""

    chat_template_kwargs: dict[str, Any]
    """Passed to the chat template."""

    @property
    @abc.abstractmethod
    def tokenizer(self) -> Any:
        """The model's transformers tokenizer."""

    @abc.abstractmethod
    def positions(self, input_ids: Tensor, media: Sequence[Media]) -> Tensor:
        """[A, T] positions of a prompt of [T] token ids."""

    @abc.abstractmethod
    def grid(
        self, num_frames: int, height: int, width: int, *, kind: MediaKind = "video", resized: bool = False
    ) -> tuple[int, int, int]:
        """Patches along time, height and width of an image or video; needs no pixels.

        Args:
            num_frames: of the video.
            height: of a frame in pixels.
            width: of a frame in pixels.
            kind: `image` or `video`.
            resized: height and width are the encoder's already, as `resize` leaves them.
        """

    @abc.abstractmethod
    def pixel_patches(self, frames: Frames) -> Tensor:
        """[number of patches, values of a patch] of an image or some frames of a video, as the encoder reads them."""

    def media_key(self, frames: Frames | AudioClip, grid: tuple[int, int, int]) -> str:
        """The name of a media item's features: what was decoded, and the size in which the encoder reads it."""
        return f"{frames.key}-{grid[1]}x{grid[2]}"

    def outline_media(self, frames: Any) -> Media:
        """The media item of decoded `Frames` (or an `AudioClip`) without its patches; the pixels may be elsewhere."""
        height, width = frames.pixels.shape[-2:]
        num_frames = len(frames.timestamps)
        grid = self.grid(num_frames, height, width, kind=frames.kind, resized=frames.resized)
        size = 1
        if frames.kind == "video":
            size = self.temporal_patch_size
            size = size if isinstance(size, int) else size.of(num_frames)
        times = frames.timestamps
        spacing = size * (times[-1] - times[0]) / (num_frames - 1) if num_frames > 1 else float(frames.kind == "video")
        return Media(
            kind=frames.kind,
            patches=torch.empty(0, 0),
            grid_thw=grid,
            seconds_per_temporal_patch=spacing,
            timestamps=tuple(statistics.fmean(times[start : start + size]) for start in range(0, num_frames, size)),
            key=self.media_key(frames, grid),
            temporal_patch_size=size,
        )

    def patch(self, frames: Any) -> Media:
        """The media item of decoded `Frames` (or an `AudioClip`) with patches, as by the model's own processor."""
        outline = self.outline_media(frames)
        return replace(outline, patches=self.pixel_patches(frames)) if len(frames.pixels) else outline

    def patch_all(self, frames: Sequence[Frames | AudioClip]) -> list[Media]:
        """`patch` of all media of a prompt, for a family in which one depends on the others."""
        return [self.patch(item) for item in frames]

    def resize(self, frames: Frames) -> Frames:
        """A part of a video in the size in which the encoder reads it, so that no more than a part is held full-size.

        Each frame on its own, and `patch` must give the same with or without it. By default `patch` does it all.
        """
        return frames

    def temporal_patches_per_encode(self, media: Media) -> int:
        """Temporal cells of a medium that are patched and encoded at once; by default all of them."""
        return media.grid_thw[0]

    @abc.abstractmethod
    def placeholder(self, media: Media) -> list[int]:
        """The token ids that stand for a medium, without the template's start and end tokens."""

    def num_features(self, media: Media) -> int:
        """Rows of a medium's features: one for each of its placeholder tokens."""
        return len(self.placeholder(media))

    def time_tokens(self, timestamps: Sequence[float]) -> int:
        """Tokens that say when a video's temporal cells were, beside its features."""
        return 0

    @property
    def temporal_patch_size(self) -> int | TemporalPatchSize:
        """Video frames that the encoder reads together: ranks share a video in such cells."""
        return 1

    def render(
        self, row: Row, text: str, frames: Sequence[Frames | AudioClip] = (), response: str | None = None
    ) -> Prompt:
        """See `ModelFamily.render`. `<image>`, `<video>` and `<audio>` place media; else they come before the text."""
        media = tuple(self.patch_all(frames))
        input_ids = self._expand(self._chat(text, media, row), media, row)
        return Prompt(
            id=row.id,
            input_ids=input_ids,
            position_ids=self.positions(input_ids, media),
            media=media,
            row=row,
            response_ids=None if response is None else self.encode_response(response),
        )

    def identity(self) -> dict[str, Any]:
        """What decides, beside the weights, how the model answers a row: options by name, in plain values.

        Options that change training alone are none of it. Stored answers are found by it, so it must be the same in
        every process.
        """
        template = json.dumps(self.tokenizer.chat_template)
        return {
            "chat_template_kwargs": self.chat_template_kwargs,
            "chat_template": hashlib.sha256(template.encode()).hexdigest(),
        }

    def encode_response(self, response: str) -> Tensor:
        """[S] token ids of an SFT target, with the end token."""
        ids = self.tokenizer(response, add_special_tokens=False)["input_ids"]
        return torch.tensor([*ids, self.tokenizer.eos_token_id])

    def decode(self, token_ids: Tensor) -> str:
        """Text of a completion, without special tokens."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def _chat(self, text: str, media: Sequence[Media], row: Row) -> list[int]:
        """Token ids of the chat with one placeholder token per medium."""
        tags = MEDIA_TAG.findall(text)
        if tags and tags != [item.kind for item in media]:
            raise ValueError(
                f"row {row.id!r} has media {[item.kind for item in media]} but its text places {tags}; "
                "name every medium once, in order, or none"
            )
        parts = MEDIA_TAG.split(text) if tags else [*(x for item in media for x in ("", item.kind)), text]
        content = [
            {"type": part} if place % 2 else {"type": "text", "text": part}
            for place, part in enumerate(parts)
            if place % 2 or part
        ]
        chat = self.tokenizer.apply_chat_template(
            [*self.system_messages(), {"role": "user", "content": self.chat_content(content) if media else text}],
            tokenize=False,
            add_generation_prompt=True,
            **self.chat_template_kwargs,
        )
        return self.tokenizer(chat, add_special_tokens=False)["input_ids"]

    def system_messages(self) -> list[dict[str, Any]]:
        """Messages before the user's: the chat template adds its own system message where there is none."""
        return []

    def chat_content(self, content: list[dict[str, str]]) -> Any:
        """A message as the template reads it, from its texts and media: `{"type": "video"}` and the like."""
        return content

    def _expand(self, ids: list[int], media: Sequence[Media], row: Row) -> Tensor:
        """Every placeholder token becomes as many as its medium has features."""
        wanted = self.media_token_ids()
        places = [place for place, token in enumerate(ids) if token in wanted.values()]
        if [ids[place] for place in places] != [wanted[item.kind] for item in media]:
            raise ValueError(
                f"row {row.id!r} renders to {len(places)} media placeholders for {len(media)} media; its text must not "
                "contain the model's own placeholder tokens"
            )
        for place, item in reversed(list(zip(places, media, strict=True))):
            ids[place : place + 1] = self.placeholder(item)
        return torch.tensor(ids)

    def media_token_ids(self) -> dict[str, int]:
        """Placeholder token of each media kind; empty for text models."""
        return {}
