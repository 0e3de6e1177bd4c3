"""How many prompts have room on a device while their completions are decoded together.

Letters: G completions of a prompt, each of up to S tokens; N layers that attend, C width of all key heads; b bytes of a
value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from longrl.models.base import CausalFamily
from longrl.types import SamplingParams

USED_SHARE = 0.9
"""Of the free memory; the rest is for gaps between tensors and for what is not counted here."""


def free_bytes(device: torch.device) -> float | None:
    """Memory that new tensors can have on a GPU: what the driver has left, and what torch holds unused; else None."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


@dataclass(frozen=True)
class DecodingMemory:
    """Bytes that prompts and completions need beside the weights, by what they grow with."""

    token: float
    """Keys and values of a token in all layers that attend: 2 N C b."""
    completion: float
    """A completion, wherever it ends: its keys and values, its scores on itself, and its distribution in float64; its
    states in gated delta nets, of which one layer has them twice."""
    tile: float
    """A completion's part of a tile of its prompt's keys."""
    always: float
    """A chunk of prompts on its way through a layer, scores on padded prompts, a float32 LM head."""
    num_generations: int
    padded_tokens: float
    """Prompt tokens of which there can be a padded copy."""
    tile_keys: int

    @classmethod
    def of(
        cls,
        family: CausalFamily,
        model: Any,
        sampling: SamplingParams,
        *,
        chunk_tokens: int,
        max_scores: int,
        tile_keys: int,
    ) -> DecodingMemory:
        """The bytes of a model, in the precision in which it would compute here and now.

        Args:
            family: of the model.
            model: made by `build`.
            sampling: G and S.
            chunk_tokens: prompt tokens that go through the model together.
            max_scores: scores on padded prompts.
            tile_keys: keys of a tile.
        """
        sizes, _ = family.planning_sizes()
        weight = model.get_input_embeddings().weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        value = dtype.itemsize  # b
        length = sampling.max_completion_tokens
        num_layers, states = len(family.layers(model)), 0
        if sizes.delta_nets:
            num_layers -= sizes.delta_nets.num_layers
            states = (sizes.delta_nets.num_layers + 1) * sizes.delta_nets.state_bytes(value)
        token = 2.0 * num_layers * sizes.num_key_heads * sizes.head_size * value
        own_scores = sizes.num_heads * length * (8 + value)  # twice in float32, and once as they are multiplied
        distribution = 28 * sizes.vocabulary  # three copies in float64, one in float32
        chunk = chunk_tokens * 3 * (sizes.hidden + sizes.mlp_width) * value
        head = 4 * sizes.vocabulary * sizes.hidden if family.fp32_lm_head and value < 4 else 0
        return cls(
            token=token,
            completion=length * token + own_scores + distribution + states,
            tile=sizes.num_heads * sizes.head_size * (3 * value + 4),
            always=float(chunk + max_scores * (12 + value) + head),
            num_generations=sampling.num_generations,
            padded_tokens=max_scores / (sizes.num_heads * sampling.num_generations),
            tile_keys=tile_keys,
        )

    def needed(self, lengths: Sequence[int]) -> float:
        """Bytes for prompts of these lengths with their completions; never less with one prompt more."""
        padded = min(len(lengths) * max(lengths), self.padded_tokens)
        tiles = math.ceil(max(lengths) / self.tile_keys)
        completions = len(lengths) * self.num_generations
        return self.always + self.token * (sum(lengths) + padded) + completions * (self.completion + tiles * self.tile)

    def num_prompts(self, lengths: Sequence[int], free: float) -> int:
        """How many of the prompts fit together, the first of them first; 1 if not even that does.

        Args:
            lengths: tokens of each prompt.
            free: bytes that the device has left.
        """
        count = 1
        while count < len(lengths) and self.needed(lengths[: count + 1]) <= USED_SHARE * free:
            count += 1
        return count
