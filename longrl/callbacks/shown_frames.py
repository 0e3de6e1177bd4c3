"""Pictures of what completions were shown: a contact sheet of a sample's calls, as the policy saw their frames."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from longrl.evaluation.sample_grids import FOLDER, PromptSamples, encode_images, picture_grid
from longrl.io.atomic import atomic_write
from longrl.turns import call_text
from longrl.types import Completion, Frames, Group, Media

logger = logging.getLogger(__name__)

MEDIA_TAG = re.compile("<(?:image|video)>")
MAX_FRAMES = 6
MAX_CLIPS = 8
"""Of a completion."""


def save_shown_frames(folder: Path, step: int, groups: Sequence[Group], num_completions: int) -> None:
    """Writes `pictures/shown_STEP_N.png` for the first completions of each group that were shown frames.

    Args:
        folder: of the run.
        step: optimizer steps so far.
        groups: of the step.
        num_completions: of each group.
    """
    number = 0
    for group in groups:
        for index, completion in enumerate(group.completions[:num_completions]):
            title = f"step {step}, {group.prompt.id}, completion {index}: {completion.text}"
            shown = shown_samples(title, completion)
            if shown.samples:
                content = encode_images([picture_grid([shown], max_frames=MAX_FRAMES)], "png")
                atomic_write(folder / FOLDER / f"shown_{step:06}_{number}.png", content)
                number += 1


def shown_samples(title: str, completion: Completion) -> PromptSamples:
    """The clips and images that a completion was shown, each under the calls of its turn; those that can be read."""
    captions = []
    for turn in completion.turns:
        calls = "; ".join(call_text(call) for call in turn.calls if call.error is None)
        captions += [calls] * (len(MEDIA_TAG.findall(turn.text)) if turn.role == "tool" else 0)
    samples = []
    shown_captions = []
    for item, caption in list(zip(completion.media, captions, strict=False))[:MAX_CLIPS]:
        frames = _frames_of(item)
        if frames is not None:
            samples.append(frames)
            shown_captions.append(caption)
    return PromptSamples(title, samples, shown_captions)


def _frames_of(item: Media) -> Tensor | None:
    """[F, 3, H, W] uint8 frames, from where they came; None if they are not there any more."""
    if item.source is None:
        return None
    try:
        parts = [part.pixels for part in item.source() if isinstance(part, Frames)]
    except Exception as error:  # whatever a source meets, which may be a user's own: no picture ends a run
        logger.warning("frames that a completion was shown cannot be pictured: %s", error)
        return None
    return torch.cat(parts) if parts else None
