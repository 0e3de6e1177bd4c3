"""What bench/gpu.py measures: the true shapes with random weights, prompts of any length, and the work itself."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from longrl import types
from longrl.engines.hf import HFEngine
from longrl.models.qwen3_5 import Qwen3_5Family
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.packing.pack import pack
from longrl.planning import shapes
from longrl.planning.inputs import ModelSizes, Plan
from longrl.testing.tiny import tiny_qwen2_5_vl

TINY = "tiny"
FAMILIES: dict[str, type[Qwen2_5_VLFamily]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": Qwen2_5_VLFamily,
    "Qwen/Qwen3.5-9B": Qwen3_5Family,
    "Qwen/Qwen2.5-VL-7B-Instruct": Qwen2_5_VLFamily,
}


@dataclass(frozen=True)
class Sizes:
    """What a run measures."""

    models: tuple[str, ...] = tuple(FAMILIES)
    tokens: tuple[int, ...] = (8_192, 16_384, 32_768, 65_536, 131_072, 262_144)
    """Of the prompt."""
    completions: int = 8
    response_tokens: int = 256
    decoded_tokens: int = 16
    separate_tokens: int = 32_768
    """Longer prompts are not measured one completion at a time."""
    profiled_tokens: int = 16_384
    cell: tuple[int, int] = (24, 24)
    """Patches of a temporal cell along height and width: frames of 336 x 336."""
    patches_per_call: int = 65_536
    checked: types.GroupSpan = field(default_factory=lambda: types.GroupSpan(0, 1500, (1, 300, 129, 77)))
    checked_heads: tuple[int, int, int] = (28, 4, 128)
    """Query heads, key heads and head size."""


FULL = Sizes()
TINY_SIZES = Sizes(
    models=(TINY,), tokens=(64, 128), completions=2, response_tokens=4, decoded_tokens=2, separate_tokens=64,
    profiled_tokens=64, cell=(4, 4), patches_per_call=256, checked=types.GroupSpan(0, 50, (1, 20, 9)),
    checked_heads=(6, 2, 16),
)  # fmt: skip


@dataclass
class Case:
    """A model with prompts of any length."""

    sizes: Sizes
    family: Qwen2_5_VLFamily
    model: nn.Module
    device: torch.device

    @functools.cached_property
    def model_sizes(self) -> ModelSizes:
        """Counted once."""
        return ModelSizes.from_family(self.family)

    def plan(self, tokens: int) -> Plan:
        """What the formulas of operations read."""
        media = self.cells(tokens) * self.cell_tokens
        return Plan(
            self.model_sizes, prompt_tokens=tokens, media_tokens=media,
            spatial_patches=self.sizes.cell[0] * self.sizes.cell[1], num_generations=self.sizes.completions,
            completion_tokens=self.sizes.response_tokens, max_tokens_per_micro_batch=1 << 40,
        )  # fmt: skip

    @property
    def cell_tokens(self) -> int:
        """Of a temporal cell."""
        return self.sizes.cell[0] * self.sizes.cell[1] // self.family.config.vision_config.spatial_merge_size**2

    def cells(self, tokens: int) -> int:
        """Temporal cells of the video in a prompt of so many tokens; the rest is text."""
        return (tokens - 16) // self.cell_tokens

    def video(self, cells: int) -> types.Media:
        """A video of noise whose patches are those of one call of the encoder, or fewer."""
        vision, (height, width) = self.family.config.vision_config, self.sizes.cell
        part = min(cells, max(1, self.sizes.patches_per_call // (height * width)))
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        patches = torch.randn(part * height * width, values, generator=torch.Generator().manual_seed(0))
        return types.Media("video", patches, (cells, height, width), 2.0, tuple(2.0 * i for i in range(cells)), "noise")

    def prompt(self, tokens: int) -> types.Prompt:
        """Text, the video's placeholders, text."""
        media = self.video(self.cells(tokens))
        ids = torch.randint(10, 200, (tokens,), generator=torch.Generator().manual_seed(1))
        ids[8 : 8 + self.family.num_features(media)] = self.family.media_token_ids()["video"]
        row = types.Row(id="bench", problem="", answer="")
        return types.Prompt("bench", ids, self.family.position_ids(ids, (media,)), (media,), row)

    def answers(self) -> list[Tensor]:
        """G times random tokens."""
        shape = (self.sizes.completions, self.sizes.response_tokens)
        return list(torch.randint(10, 200, shape, generator=torch.Generator().manual_seed(2)))

    @torch.no_grad()
    def encode(self, video: types.Media) -> Tensor:
        """[N, D]: the same patches again and again until the video is over."""
        features, left = [], video.grid_thw[0]
        here = len(video.patches) // (self.sizes.cell[0] * self.sizes.cell[1])
        while left:
            cells = min(left, here)
            patches = video.patches[: cells * self.sizes.cell[0] * self.sizes.cell[1]]
            part = dataclasses.replace(video.part(cells), patches=patches)
            features += self.family.encode_media(self.model, [part])
            left -= cells
        return torch.cat(features)

    def zeros(self, tokens: int) -> dict[str, Tensor]:
        """Features of a prompt's video, for work that does not depend on what they are."""
        (video,) = self.prompt(tokens).media
        shape = (self.family.num_features(video), self.family.config.get_text_config().hidden_size)
        return {video.key: torch.zeros(shape, dtype=torch.bfloat16, device=self.device)}

    def generate(self, prompt: types.Prompt, features: Mapping[str, Tensor], tokens: int) -> None:
        """Prefill, and `tokens` of every completion."""
        sampling = types.SamplingParams(self.sizes.completions, tokens)
        HFEngine().generate(self.family, self.model, [prompt], features, sampling, seed=0)

    def update(
        self, prompt: types.Prompt, features: Mapping[str, Tensor], answers: Sequence[Tensor], separate: bool = False
    ) -> None:
        """Gradients of a policy gradient's loss over all answers."""
        self.model.zero_grad(set_to_none=True)
        for given in [[answer] for answer in answers] if separate else [answers]:
            (packed,) = pack([prompt], [given], max_tokens=1 << 62)
            logp = self.family.forward(self.model, packed, features).logp
            (-logp.sum() / (len(answers) * self.sizes.response_tokens)).backward()


def _no_text(ids: Sequence[int], **options: Any) -> str:
    return ""


def built(name: str, sizes: Sizes, device: torch.device, folder: str) -> Case:
    """The model with random weights, made on the device."""
    options: dict[str, Any] = {
        "dtype": "bfloat16", "random_init": True, "init_device": str(device), "gradient_checkpointing": True,
    }  # fmt: skip
    if name == TINY:
        family = Qwen2_5_VLFamily(str(tiny_qwen2_5_vl(folder)), **options)
    else:
        family = shapes.find_config(FAMILIES[name](name, **options))
    family.tokenizer = SimpleNamespace(  # no text is wanted
        eos_token_id=-1, all_special_tokens=(), added_tokens_decoder={}, chat_template=None, decode=_no_text
    )
    return Case(sizes, family, family.build().to(device).train(), device)
