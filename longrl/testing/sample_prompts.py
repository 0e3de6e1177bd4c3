"""Noise as media, and prompts and completions for a tiny model: all kinds a family reads, odd sizes, uneven lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from longrl.models.base import CausalFamily
from longrl.types import FULL_SHARD, AudioClip, Frames, FrameShard, MediaKind, Prompt, Row, TemporalPatchSize

SAMPLE_RATE = 16_000


def noise_frames(
    count: int, height: int = 56, width: int = 56, key: str = "v", kind: MediaKind = "video", spacing: float = 0.7
) -> Frames:
    """A video, or an image, of random pixels; the key decides them."""
    generator = torch.Generator().manual_seed(sum(map(ord, key)))
    pixels = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
    return Frames(kind, pixels, tuple(spacing * i for i in range(count)), key, spacing * count)


def noise_sound(
    seconds: float, key: str = "s", is_video_track: bool = False, shard: FrameShard = FULL_SHARD
) -> AudioClip:
    """A sound of noise around a tone; the key decides it."""
    generator = torch.Generator().manual_seed(sum(map(ord, key)))
    count = round(SAMPLE_RATE * seconds)
    tone = torch.sin(torch.arange(count) * (0.02 + 0.01 * (sum(map(ord, key)) % 7)))
    waveform = 0.5 * tone + 0.1 * torch.randn(count, generator=generator)
    return AudioClip(waveform, count, key, is_video_track, shard)


def local_frames(frames: Frames, shard: FrameShard, temporal_patch_size: int | TemporalPatchSize = 2) -> Frames:
    """The frames of an image or video that a rank with this shard decodes."""
    indices = shard.frames(len(frames.timestamps), temporal_patch_size if frames.kind == "video" else 1)
    return replace(frames, pixels=frames.pixels[indices.start : indices.stop])


def sample_prompts(family: CausalFamily, shard: FrameShard = FULL_SHARD) -> list[Prompt]:
    """Three prompts of different lengths, as a rank with this shard of the media renders them.

    Two videos and an image in one prompt, a video alone, text alone, where the family reads them; sound beside the
    image if it reads sound.
    """
    kinds = family.media_token_ids()
    clips: dict[str, Frames | AudioClip] = {
        "<video>": noise_frames(5, 60, 90, "v1"),
        "<image>": noise_frames(1, 40, 40, "i1", "image"),
        "<audio>": noise_sound(0.53, "a1", shard=shard),
        " <video>": noise_frames(8, 87, 113, "v2"),
    }
    clips = {tag: clip for tag, clip in clips.items() if clip.kind in kinds}
    tags = " and".join(clips)
    lone = [noise_frames(6, 60, 60, "v3")] if "video" in kinds else []
    questions: list[tuple[str, str, Sequence[Frames | AudioClip]]] = [
        ("mixed", f"What comes first in {tags}?" if clips else "Which one?", list(clips.values())),
        ("video", "What? And then? " * (1 if lone else 5), lone),
        ("text", "no media here", []),
    ]
    prompts = []
    patch_size = family.temporal_patch_size
    for name, question, media in questions:
        row = Row(id=name, problem="Which?\nA. one\nB. two\nC. three\nD. four", answer="A")
        local = [local_frames(item, shard, patch_size) if isinstance(item, Frames) else item for item in media]
        prompts.append(family.render(row, question, local, response="It is the first."))
    return prompts


def random_completions(family: CausalFamily, lengths: Sequence[Sequence[int]], seed: int = 0) -> list[list[Tensor]]:
    """For each prompt completions of these lengths; ordinary tokens and special ones, as a policy may sample them."""
    generator = torch.Generator().manual_seed(seed)
    size = len(family.tokenizer)
    return [[torch.randint(0, size, (count,), generator=generator) for count in group] for group in lengths]
