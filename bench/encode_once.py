"""Step time of RL on long videos: features reused by every pass, against encoding again wherever they are needed.

One step on P videos of a Qwen2.5-VL with random weights and a frozen vision encoder, G completions each: rollout, old
log-probabilities, reference log-probabilities, update (forward, backward, AdamW). Decoding and patching come before.
The text model does the same work in both variants (longrl's shared-prefix packing); they differ in the encoder's calls:

- reuse: longrl's FeatureCache, empty at the start of the step. The first pass that asks encodes, all others read:
  1 encoding per video and step.
- no reuse: what trainers without a feature cache do (verl, ms-swift, Long-RL's Qwen path). The rollout engine encodes
  a video once per prompt; old, reference and update pass each read every completion as a sample of its own, with its
  own pixels: 1 + 3 G encodings per video and step. In its favour the encoder is frozen: no encoding has a backward.

A video token costs the encoder 0.7 of what it costs the text model's forward pass (Qwen2.5-VL-7B: 0.4, 3B: 0.9, from
their weights alone). The variants alternate, and each reports its median. `encodes_per_video` is counted by a hook on
the encoders of policy and reference in the reuse steps, and must be 1.

    python bench/encode_once.py --json bench/results/encode_once.json
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import Row, parse_arguments, report
from torch import Tensor, nn

from longrl import types
from longrl.algorithms import Algorithm, single_rank
from longrl.engines.hf import HFEngine
from longrl.features.cache import FeatureCache
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.packing.pack import pack
from longrl.testing.tiny import tiny_qwen2_5_vl

Encode = Callable[[nn.Module, int], Mapping[str, Tensor]]
"""(model, samples per prompt) -> features of all prompts, for one pass."""


@dataclass(frozen=True)
class Sizes:
    """What a run measures."""

    frames: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    videos: int = 2
    completions: int = 8
    response_tokens: int = 16
    repeats: int = 3
    frame_size: int = 112
    text: Mapping[str, Any] = field(
        default_factory=lambda: {
            "hidden_size": 384, "intermediate_size": 2048, "num_hidden_layers": 4,
            "num_attention_heads": 6, "num_key_value_heads": 2,
        }
    )  # fmt: skip
    vision: Mapping[str, Any] = field(
        default_factory=lambda: {
            "hidden_size": 128, "intermediate_size": 384, "depth": 8, "num_heads": 4, "fullatt_block_indexes": [3, 7],
            "window_size": 112,
        }
    )  # fmt: skip


FULL = Sizes()
QUICK = Sizes(frames=(8, 64), videos=1)


def family_of(sizes: Sizes, folder: str | Path) -> Qwen2_5_VLFamily:
    """The model, its config and processor written to `folder`."""
    tiny_qwen2_5_vl(folder, text=dict(sizes.text), vision=dict(sizes.vision))
    pixels = sizes.frame_size**2
    return Qwen2_5_VLFamily(str(folder), random_init=True, max_pixels=pixels, min_pixels=pixels)


class Step:
    """One RL step on fixed prompts; the learning rate is 0, so that every repetition does the same work."""

    def __init__(self, sizes: Sizes, family: Qwen2_5_VLFamily, num_frames: int) -> None:
        self.sizes, self.family = sizes, family
        self.policy, self.reference = family.build(), family.build().requires_grad_(False)
        self.algorithm = Algorithm(kl_coef=0.01)
        self.optimizer = torch.optim.AdamW([p for p in self.policy.parameters() if p.requires_grad], lr=0.0)
        self.sampling = types.SamplingParams(sizes.completions, sizes.response_tokens)
        self.prompts = [self._prompt(f"video{i}", num_frames) for i in range(sizes.videos)]
        self.encodes = 0
        for model in (self.policy, self.reference):
            family.media_encoders(model)[0].register_forward_hook(self._count, with_kwargs=True)

    def reuse(self) -> None:
        """A step with the features of a new cache."""
        cache = FeatureCache(self.family)
        self._run(lambda model, samples: cache.get_or_encode(model, self.prompts))

    def no_reuse(self) -> None:
        """A step whose passes encode every sample's video."""
        self._run(self._encode_each)

    def _encode_each(self, model: nn.Module, samples: int) -> dict[str, Tensor]:
        features = {}
        for _ in range(samples):
            for prompt in self.prompts:
                (features[prompt.media[0].key],) = self.family.encode_media(model, prompt.media)
        return features

    def _run(self, encode: Encode) -> None:
        completions = self._rollout(encode(self.policy, 1))
        answers = [[completion.token_ids for completion in group] for group in completions]
        (packed,) = pack(self.prompts, answers, max_tokens=1 << 62)
        with torch.no_grad():
            old = self._logp(self.policy, packed, encode)
            reference = self._logp(self.reference, packed, encode)
        logp = self._logp(self.policy, packed, encode)
        lengths = torch.tensor([len(ids) for group in answers for ids in group])
        valid = torch.ones(len(answers), self.sizes.completions, dtype=torch.bool)
        rewards = torch.arange(valid.numel(), dtype=torch.float32).view_as(valid)
        loss = self.algorithm.loss(
            logp,
            old,
            reference,
            torch.cat([completion.logprobs for group in completions for completion in group]),
            self.algorithm.token_advantages(rewards, valid, lengths),
            self.algorithm.token_weights(lengths, valid.flatten(), single_rank)[packed.completion_index],
            packed.completion_index,
        ).loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def _rollout(self, features: Mapping[str, Tensor]) -> list[list[types.Completion]]:
        return HFEngine().generate(self.family, self.policy, self.prompts, features, self.sampling, seed=0)

    def _logp(self, model: nn.Module, packed: types.Packed, encode: Encode) -> Tensor:
        return self.family.forward(model, packed, encode(model, self.sizes.completions)).logp

    def _prompt(self, name: str, num_frames: int) -> types.Prompt:
        size, generator = self.sizes.frame_size, torch.Generator().manual_seed(sum(map(ord, name)))
        pixels = torch.randint(0, 256, (num_frames, 3, size, size), dtype=torch.uint8, generator=generator)
        frames = types.Frames("video", pixels, tuple(map(float, range(num_frames))), name, float(num_frames))
        return self.family.render(types.Row(id=name, problem="", answer=""), "What happens?", [frames])

    def _count(self, vision_encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.encodes += len(kwargs["grid_thw"])


def measure(sizes: Sizes, family: Qwen2_5_VLFamily, num_frames: int) -> Row:
    """A row of the table."""
    step = Step(sizes, family, num_frames)
    reuse, no_reuse, encodes = [], [], 0
    for _ in range(sizes.repeats):
        step.encodes = 0
        reuse.append(_seconds(step.reuse))
        encodes += step.encodes
        no_reuse.append(_seconds(step.no_reuse))
    return {
        "frames": num_frames,
        "reuse_s": statistics.median(reuse),
        "no_reuse_s": statistics.median(no_reuse),
        "speedup": statistics.median(no_reuse) / statistics.median(reuse),
        "encodes_per_video": encodes / (sizes.repeats * sizes.videos),
    }


def _seconds(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None, sizes: Sizes | None = None) -> None:
    """The command; `sizes` replaces what `--quick` or its absence choose."""
    arguments = parse_arguments(__doc__, argv)
    sizes = sizes or (QUICK if arguments.quick else FULL)
    with tempfile.TemporaryDirectory() as folder:
        family = family_of(sizes, folder)
        Step(sizes, family, min(sizes.frames)).no_reuse()  # the first passes of a process are slow
        rows = [measure(sizes, family, count) for count in sizes.frames]
    settings = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(sizes).items())
    report(__file__, arguments, rows, notes=[f"sizes: {settings}"])


if __name__ == "__main__":
    main()
