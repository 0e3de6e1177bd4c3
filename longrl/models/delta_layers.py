"""Linear layers of hybrid models (Qwen3.5, Qwen3-Next) that read packed groups: gated delta nets, arXiv:2412.06464."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from longrl.io.weight_folder import weight_names
from longrl.packing.attention import PackedLayout
from longrl.packing.delta_net import (
    DeltaRows,
    DeltaWeights,
    LayerRecurrence,
    delta_sequences,
    sequence_parallel_delta,
    shared_prefix_delta,
)
from longrl.strategies.sequence import NO_SEQUENCE_PARALLEL, SequenceParallel

FUSED_PROJECTIONS = ("in_proj_qkvz", "in_proj_ba")
"""Of Qwen3-Next: two matrices, rows of the key heads in turn, for the four of Qwen3.5."""


class PackedDeltaNet(nn.Module):
    """A gated delta net that knows where groups lie; its children and parameters are those of transformers' layer.

    They keep their names, so a `state_dict`, shards and exports stay what they were.

    Args:
        layer: transformers' `Qwen3_5GatedDeltaNet` or one with the same parts.
    """

    in_proj_qkv: nn.Module
    in_proj_z: nn.Module
    in_proj_b: nn.Module
    in_proj_a: nn.Module
    conv1d: nn.Conv1d
    norm: nn.Module
    out_proj: nn.Module
    A_log: Tensor
    dt_bias: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)
        for name, parameter in layer.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.layer_idx = layer.layer_idx
        self.sizes = (layer.num_k_heads, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim)

    @override
    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        layout: PackedLayout | None = None,
        sequence: SequenceParallel = NO_SEQUENCE_PARALLEL,
        layer_recurrence: LayerRecurrence | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The layer's output; without a layout every row of the batch is a sequence.

        Args:
            hidden_states: [B, L, D].
            cache_params: must be None; longrl's engine has a cache of its own.
            attention_mask: [B, L], 0 where a row is padding; read without a layout.
            layout: of a packed sequence (B = 1), as an extra keyword of the model's forward.
            sequence: the ranks that share the sequence; this one has L rows of it.
            layer_recurrence: takes convolution and rule over.
            kwargs: whatever else transformers passes.

        Returns:
            [B, L, D].

        Raises:
            ValueError: a cache of transformers is given.
        """
        if cache_params is not None:
            raise ValueError(
                "a packed gated delta net has no cache of transformers; call the model with use_cache=False"
            )
        if attention_mask is not None and layout is None and layer_recurrence is None:
            hidden_states = hidden_states * attention_mask[..., None].to(hidden_states.dtype)
        rows = DeltaRows(
            mixed=self.in_proj_qkv(hidden_states).flatten(0, 1),
            decay=self.in_proj_a(hidden_states).flatten(0, 1),
            beta=self.in_proj_b(hidden_states).flatten(0, 1),
        )
        output = self._recur(rows, hidden_states.shape[:2], layout, sequence, layer_recurrence)  # [B * L, V, F]
        gate = self.in_proj_z(hidden_states).reshape(-1, output.shape[-1])
        output = self.norm(output.reshape(gate.shape), gate)
        return self.out_proj(output.reshape(*hidden_states.shape[:2], -1))

    @torch.compiler.disable  # a layer that is compiled would be so for every layout anew
    def _recur(
        self,
        rows: DeltaRows,
        shape: torch.Size,
        layout: PackedLayout | None,
        sequence: SequenceParallel,
        layer_recurrence: LayerRecurrence | None,
    ) -> Tensor:
        weights = DeltaWeights(self.conv1d.weight[:, 0], self.A_log, self.dt_bias, *self.sizes)
        if layer_recurrence is not None:
            return layer_recurrence(self.layer_idx, rows, weights)
        if layout is None:
            batch_size, length = shape
            return delta_sequences(rows, weights, (length,) * batch_size)[0]
        if sequence.size == 1:
            return shared_prefix_delta(rows, weights, layout.spans)
        return sequence_parallel_delta(rows, weights, layout.spans, sequence)


def refuse_fused_projections(folder: str) -> None:
    """Raises ValueError if a folder's gated delta nets are those of another release; of a hub id it does nothing."""
    for name in weight_names(folder):
        if name.removesuffix(".weight").endswith(FUSED_PROJECTIONS):
            raise ValueError(
                f"{folder} holds {name}, a projection fused as in Qwen3-Next, but Qwen3.5's files must hold "
                "in_proj_qkv, in_proj_z, in_proj_b and in_proj_a; name a folder of Qwen3.5, or write a family for it"
            )


def pack_delta_nets(layers: Iterable[Any]) -> None:
    """Puts a `PackedDeltaNet` in place of every gated delta net of these layers."""
    for layer in layers:
        if hasattr(layer, "linear_attn"):
            layer.linear_attn = PackedDeltaNet(layer.linear_attn)
