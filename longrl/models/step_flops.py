"""Operations of an update of the text stack, and what devices can do: how busy a run keeps its GPUs.

Letters: Q parameters of all layers that a row goes through, l layers that attend, A width of all query heads, V
vocabulary, D hidden size; T tokens of a prompt, S of a completion. A product with Q parameters is 2 Q operations per
row. The encoder does not count, nor what is computed again in the backward pass.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from longrl.models.base import CausalFamily
from longrl.models.planning_sizes import is_expert

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
"""The makers' dense bfloat16 operations per second of boards with NVLink."""


class GroupTokens(NamedTuple):
    """Rows of a group."""

    prompt: int
    completions: Sequence[int]
    """Of each, what it was shown included."""
    num_shown: int = 0
    """Those of all completions that they were shown, and that are not scored."""


def peak_flops(device_name: str) -> float | None:
    """Operations per second of a GPU, as `torch.cuda.get_device_name` calls it; None of one not in the table."""
    if re.search(r"PCIe|NVL|MIG", device_name) and "A100" not in device_name:
        return None  # slower than the boards of that name
    for name, flops in PEAK_FLOPS.items():
        if re.search(rf"\b{name}\b", device_name):
            return flops
    return None


@dataclass(frozen=True)
class TextCost:
    """What one row costs in the text stack of a model."""

    layer_params: float
    """Q, adapters included."""
    trained_params: float
    """Those of them that get gradients."""
    num_layers: int
    """l."""
    query_width: int
    """A."""
    head_params: int
    """V D."""
    head_trains: bool
    rule_flops: float = 0.0
    """Operations of the gated delta rule in all layers that have it."""

    @classmethod
    def of(cls, family: CausalFamily, model: Any) -> TextCost:
        """Counted on a model."""
        sizes, _ = family.planning_sizes()
        layers = nn.ModuleList(family.layers(model))
        head = model.get_output_embeddings().weight
        used = sizes.experts_per_token / sizes.num_experts if sizes.num_experts else 1.0
        counts = [
            (one.numel() * (used if is_expert(name) else 1.0), one.requires_grad)
            for name, one in layers.named_parameters()
        ]
        delta = sizes.delta_nets
        return cls(
            layer_params=sum(count for count, _ in counts),
            trained_params=sum(count for count, trains in counts if trains),
            num_layers=len(layers) - (delta.num_layers if delta else 0),
            query_width=sizes.num_heads * sizes.head_size,
            head_params=sizes.vocabulary * sizes.hidden,
            head_trains=head.requires_grad,
            rule_flops=delta.num_layers * delta.rule_flops() if delta else 0.0,
        )

    def forward_flops(self, groups: Sequence[GroupTokens]) -> float:
        """One forward pass: 2 Q per row, 4 A per layer and pair of rows that see each other, 2 V D per scored row.

        And the gated delta rule, where layers have it, per row.
        """
        tokens, pairs, scored = count_rows(groups)
        mixing = 4.0 * self.num_layers * self.query_width * pairs + self.rule_flops * tokens
        return 2.0 * self.layer_params * tokens + mixing + 2.0 * self.head_params * scored

    def update_flops(self, groups: Sequence[GroupTokens]) -> float:
        """Forward and backward pass: gradients of inputs cost a forward pass, those of weights where they train."""
        tokens, pairs, scored = count_rows(groups)
        weights = 2.0 * self.trained_params * tokens + 2.0 * self.head_params * scored * self.head_trains
        # What mixes rows has two inputs: one forward pass more.
        mixing = 4.0 * self.num_layers * self.query_width * pairs + self.rule_flops * tokens
        return 2 * self.forward_flops(groups) + weights + mixing


def count_rows(groups: Sequence[GroupTokens]) -> tuple[int, float, int]:
    """Rows, pairs of a query and a key, and scored rows; a prompt counts once, and attention is causal."""
    tokens = scored = 0
    pairs = 0.0
    for prompt, completions, num_shown in groups:
        tokens += prompt + sum(completions)
        scored += sum(completions) - num_shown
        pairs += prompt**2 / 2
        pairs += sum(prompt * length + length**2 / 2 for length in completions)
    return tokens, pairs, scored
