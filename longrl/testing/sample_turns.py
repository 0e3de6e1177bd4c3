"""Completions of several turns for a tiny model: random tokens, and between them text, images and videos of noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from longrl.datamodules.media.sources import HeldFrames
from longrl.environments.trajectory import Trajectory
from longrl.models.base import CausalFamily
from longrl.testing.sample_prompts import local_frames, noise_frames
from longrl.types import FULL_SHARD, Continuation, Frames, FrameShard, Prompt, SamplingParams

Segment = int | Sequence[Sequence[str | Frames]]
"""So many sampled tokens, or what each of a turn's calls is answered with."""

TEXT: Segment = [["It is 12."]]
VIDEO: Segment = [["from 1.5 s on", noise_frames(5, 60, 90, "crop", spacing=0.5)]]
IMAGE: Segment = [[noise_frames(1, 40, 40, "zoom", "image")]]
TWO: Segment = [["a", noise_frames(1, 60, 60, "frame", "image"), "b"], [noise_frames(8, 113, 87, "late", spacing=2.0)]]
LATER: Segment = [["again", noise_frames(3, 60, 90, "crop 2", spacing=0.3)]]

TURNS: tuple[tuple[tuple[Segment, ...], ...], ...] = (
    ((3,), (4, VIDEO, 2), (2, TEXT, 1, IMAGE, 3, TWO, 2)),
    ((LATER, 3), (5, VIDEO), (1, IMAGE, 1)),
    ((2, TWO, 1, VIDEO, 4), (6,), (TEXT, 2)),
)
"""Groups of completions: without an observation, with one and with three; shown something at the very start, at the
end, one video by two completions of a group; media without a word; of uneven length."""


def random_turns(
    family: CausalFamily,
    prompts: Sequence[Prompt],
    shard: FrameShard = FULL_SHARD,
    pixels_left_out: bool = False,
    seed: int = 0,
) -> list[list[Continuation]]:
    """For each prompt completions of `TURNS`. What the family cannot be shown is left out of them.

    Args:
        family: renders what is shown.
        prompts: that are continued.
        shard: which part of all media this rank decodes.
        pixels_left_out: media are those of a rollout, whole items whose frames their source gives.
        seed: of the sampled tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for index, prompt in enumerate(prompts):
        turns = TURNS[index % len(TURNS)]
        options = shard, pixels_left_out
        groups.append([random_continuation(family, prompt, segments, generator, *options) for segments in turns])
    return groups


def random_continuation(
    family: CausalFamily,
    prompt: Prompt,
    segments: Sequence[Segment],
    generator: torch.Generator,
    shard: FrameShard = FULL_SHARD,
    pixels_left_out: bool = False,
) -> Continuation:
    """A completion of these segments, put together as engines do it; see `random_turns`."""
    special = {*family.tokenizer.all_special_ids, *family.media_token_ids().values()}
    ordinary = torch.tensor([token for token in range(len(family.tokenizer)) if token not in special])
    trajectory = Trajectory(prompt, 0, SamplingParams(), max_turns=len(segments) + 1)
    media = []
    for segment in segments:
        if isinstance(segment, int):
            ids = ordinary[torch.randint(0, len(ordinary), (segment,), generator=generator)]
            trajectory.add_turn(ids, torch.zeros(segment), "", stopped=True)
            continue
        responses = [_readable(family, response, shard) for response in segment]
        observed = family.observation(responses, ended=True)
        trajectory.add_observed(observed)
        frames = [part for response in responses for part in response if isinstance(part, Frames)]
        for item, source in zip(observed.media, frames, strict=True):
            left_out = replace(item, patches=item.patches[:0], source=HeldFrames(source), is_whole=True)
            media.append(left_out if pixels_left_out else item)
    trajectory.finish_reason = "stop"
    completion = trajectory.completion()
    return Continuation(
        completion.token_ids,
        sampled=completion.sampled,
        position_ids=completion.position_ids,
        media=tuple(media),
    )


def _readable(family: CausalFamily, response: Sequence[str | Frames], shard: FrameShard) -> list[str | Frames]:
    """What of a response the family reads, media without frames of other ranks; text stands for media it cannot see."""
    parts: list[str | Frames] = []
    for part in response:
        if isinstance(part, str):
            parts.append(part)
        elif family.reads_media(part.kind):
            parts.append(local_frames(part, shard, family.temporal_patch_size))
        else:
            parts.append(f"({part.kind})")
    return parts
