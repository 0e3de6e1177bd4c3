"""Does the engine read prompts as the trainer does? Compared before the first step.

Engines go silently wrong: other positions behind a video, other frames. What they were given shows in token ids, grids,
times and positions; what they made of it in log-probabilities (`longrl.modules.mismatch.Mismatch`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longrl.types import Prompt


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as an engine reads it."""

    input_ids: Tensor
    """[T] with media placeholders expanded; -1 where a feature stands and the engine keeps no id."""
    position_ids: Tensor | None = None
    """[A, T]; None if the engine counts 0, 1, 2, ..."""
    features: Mapping[str, Tensor] = field(default_factory=dict)
    """media key -> [n, D] rows the engine puts in place of the placeholders."""


def rendering_differences(prompt: Prompt, rendered: RenderedPrompt, features: Mapping[str, Tensor]) -> list[str]:
    """Lines that say where trainer and engine read a prompt differently; none if they agree."""
    known: Tensor | slice = slice(None)
    if len(rendered.input_ids) == len(prompt.input_ids):
        known = rendered.input_ids >= 0
    positions = rendered.position_ids
    if positions is None:
        positions = torch.arange(len(rendered.input_ids))[None]  # [1, T]
    pairs = {
        "input_ids": (prompt.input_ids[known], rendered.input_ids[known]),
        "position_ids": (prompt.position_ids, positions),
    }
    for key, rows in rendered.features.items():
        pairs[f"features of {key}"] = (features[key], rows)
    lines = []
    for name, (trainer, engine) in pairs.items():
        if trainer.shape != engine.shape:
            lines.append(f"  {name}: trainer {list(trainer.shape)}, engine {list(engine.shape)}")
            continue
        trainer = trainer.cpu()
        engine = engine.to(trainer.dtype).cpu()
        differing = (trainer != engine).nonzero()
        if len(differing):
            index = differing[0].tolist()
            values = f"trainer {trainer[tuple(index)].item()}, engine {engine[tuple(index)].item()}"
            lines.append(f"  {name}: from {index} on, {values}")
    return lines


def check_rendered_prompts(
    prompts: Sequence[Prompt], rendered: Sequence[RenderedPrompt], features: Mapping[str, Tensor]
) -> None:
    """Raises RuntimeError with a diff if the engine reads a prompt in another way than the trainer.

    Args:
        prompts: as the trainer renders them.
        rendered: as the engine reads them; empty for an engine that reads the trainer's.
        features: media key -> [n, D].
    """
    lines = []
    for prompt, item in zip(prompts, rendered, strict=bool(rendered)):
        differences = rendering_differences(prompt, item, features)
        if differences:
            media = ", ".join(f"{m.kind} {m.grid_thw} every {m.seconds_per_temporal_patch:.3f} s" for m in prompt.media)
            lines += [f"prompt {prompt.id!r}, {len(prompt.input_ids)} tokens, media [{media}]:", *differences]
    if lines:
        raise RuntimeError(
            "engine and trainer read the same prompts differently, so the engine would sample from another model than "
            "the one trained:\n" + "\n".join(lines) + "\nCheck that model.family and the engine read the same folder, "
            "and that vLLM is the version longrl is written for; longrl.engines.hf.HFEngine needs no agreement"
        )
