"""VILA written out plainly: stock SigLIP and Qwen2, and the projectors as the published code describes them.

Nothing of longrl computes here; media come as the family's resized pixels.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM, SiglipVisionModel


def squares(features: Tensor, k: int) -> Tensor:
    """[F, P, C] -> [F, N, k * k * C]: patch by patch, row after row, zeros outside."""
    count, patches, width = features.shape
    side = int(patches**0.5)
    out = []
    for top in range(0, side, k):
        for left in range(0, side, k):
            parts = [
                features[:, y * side + x] if y < side and x < side else features.new_zeros(count, width)
                for y in range(top, top + k)
                for x in range(left, left + k)
            ]
            out.append(torch.cat(parts, 1))
    return torch.stack(out, 1)


def project(kind: str, weights: dict[str, Tensor], features: Tensor) -> Tensor:
    """The projector `kind` with the weights of mm_projector/model.safetensors."""

    def linear(x: Tensor, n: int | str) -> Tensor:
        return x @ weights[f"layers.{n}weight"].T + weights[f"layers.{n}bias"]

    def norm(x: Tensor, n: str) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"layers.{n}weight"] + weights[f"layers.{n}bias"]

    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    if kind == "linear":
        return linear(features, "")
    if kind == "mlp2x_gelu":
        return linear(gelu(linear(features, "0.")), "2.")
    if kind in ("mlp_downsample", "mlp_downsample_2x2_fix"):
        return linear(gelu(linear(norm(squares(features, 2), "1."), "2.")), "4.")
    assert kind == "mlp_downsample_3x3_fix"
    hidden = gelu(linear(norm(squares(features, 3), "1."), "2."))
    return linear(gelu(linear(norm(hidden, "4."), "5.")), "7.")


def released_pool(num_frames: int) -> int:
    """Frames that LongVILA-R1's code averages: 4 * (num_frames / 256 rounded up to 1, 2, 4 or 8)."""
    share = num_frames / 256
    for bucket in (1, 2, 4):
        if share <= bucket:
            return 4 * bucket
    return 4 * 8


class PlainVila(nn.Module):
    """The parts under their own names, gradients included."""

    def __init__(
        self, llm: nn.Module, vision_encoder: nn.Module, projector: nn.Module, kind: str, pool: int | str
    ) -> None:
        super().__init__()
        self.scales: list[int] = []
        self.output_scale = 0
        self.llm, self.vision_tower, self.mm_projector = llm, vision_encoder, projector
        self.kind, self.pool = kind, pool
        self.media_tokens: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: Any, family: Any) -> PlainVila:
        """A copy of the family's weights."""
        config = json.loads(Path(family.model_path, "mm_projector", "config.json").read_text())
        llm = Qwen2ForCausalLM._from_config(copy.deepcopy(family.config.llm), attn_implementation="eager")
        vision_encoder = SiglipVisionModel._from_config(
            copy.deepcopy(family.config.vision_encoder), attn_implementation="eager"
        )
        llm.load_state_dict(model.llm.state_dict())
        vision_encoder.load_state_dict(model.vision_tower.state_dict())
        projector = copy.deepcopy(model.mm_projector)
        plain = cls(llm, vision_encoder, projector, config["mm_projector_type"], family.pool_frames or 1)
        top = json.loads(Path(family.model_path, "config.json").read_text())
        if top.get("dynamic_s2"):
            plain.scales = [int(scale) for scale in top["s2_scales"].split(",")]
            plain.output_scale = top.get("s2_resize_output_to_scale_idx") or 0
        plain.media_tokens = tuple(family.tokenizer.convert_tokens_to_ids(["<image>", "<vila/video>"]))
        return plain

    def hidden(self, pixels: Tensor) -> Tensor:
        """[F, 3, S, S] uint8 -> [F, P, C] of the encoder's last layer but one."""
        scaled = (pixels.float() / 255 - 0.5) / 0.5
        return self.vision_tower(pixel_values=scaled, output_hidden_states=True).hidden_states[-2]

    def project(self, features: Tensor) -> Tensor:
        return project(self.kind, dict(self.mm_projector.named_parameters()), features)

    def frame_rows(self, pixels: Tensor) -> Tensor:
        """[F, 3, S, S] uint8 -> [F, N, D]; with scales, a frame's one stands for all."""
        return self.project(self.hidden(pixels).repeat(1, 1, max(1, len(self.scales))))

    def image_rows(self, pixels: Tensor, rows: int, columns: int) -> Tensor:
        """[tiles of all scales, 3, S, S] -> [N, D]: their maps side by side on the grid of one, projected by tiles."""
        hidden, maps, first = self.hidden(pixels), [], 0
        squares = [(scale // self.scales[0],) * 2 for scale in self.scales[:-1]]
        for down, across in [*squares, (rows, columns)]:
            tiles, first = hidden[first : first + down * across], first + down * across
            side = int(tiles.shape[1] ** 0.5)
            lines = []
            for y in range(down * side):
                line = [tiles[y // side * across + x // side, y % side * side + x % side] for x in range(across * side)]
                lines.append(torch.stack(line))
            maps.append(torch.stack(lines))  # [down * side, across * side, C]
        high, wide = maps[self.output_scale].shape[:2]
        joined = torch.cat([
            nn.functional.adaptive_avg_pool2d(item.permute(2, 0, 1)[None], (high, wide))[0].permute(1, 2, 0)
            for item in maps
        ], -1)  # fmt: skip
        lines = []
        for top in range(0, high, side):
            cut = [joined[top : top + side, left : left + side] for left in range(0, wide, side)]
            made = self.project(torch.stack([tile.flatten(0, 1) for tile in cut]))
            small = int(made.shape[1] ** 0.5)
            lines.append(torch.cat([tile.view(small, small, -1) for tile in made], 1))
        return torch.cat(lines).flatten(0, 1)

    def media_rows(self, medium: Any) -> Tensor:
        """[N, D] of a medium."""
        size = self.vision_tower.config.image_size
        pixels = medium.patches.view(-1, 3, size, size)
        if medium.kind == "image" and self.scales and len(pixels) > 1:
            patches = size // self.vision_tower.config.patch_size
            return self.image_rows(pixels, *(length // patches for length in medium.grid_thw[1:]))
        rows = self.frame_rows(pixels)
        if medium.kind == "image" or self.pool == 1:
            return rows.flatten(0, 1)
        pool = released_pool(len(rows)) if self.pool == "by_length" else int(self.pool)
        frames = [rows[min(place, len(rows) - 1)] for place in range(-(-len(rows) // pool) * pool)]
        pooled = [sum(frames[n : n + pool]) / pool for n in range(0, len(frames), pool)]
        return torch.cat(pooled)

    def forward(self, input_ids: Tensor, media: Any, position_ids: Tensor | None = None) -> Any:
        """Logits of one sequence; completions must not contain media tokens."""
        (ids,) = input_ids
        places = [i for i, token in enumerate(ids.tolist()) if token in self.media_tokens]
        wanted = sum(len(self.media_rows(medium)) for medium in media) if media else 0
        embeds = self.llm.model.embed_tokens(ids.clamp_max(self.llm.config.vocab_size - 1))
        if media:
            rows = torch.cat([self.media_rows(medium) for medium in media])
            embeds = embeds.clone()
            embeds[torch.tensor(places[:wanted])] = rows
        return self.llm(inputs_embeds=embeds[None], position_ids=position_ids)
