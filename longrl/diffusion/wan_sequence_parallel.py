"""Sequence parallelism of Wan's transformer: ranks hold neighbouring tokens of a sample (Ulysses, arXiv:2309.14509).

It needs no more than PyTorch and diffusers offer: an attention processor brings all tokens of some heads together, and
forward hooks cut the tokens before the first layer and join them behind the last. Layers between work token by token,
text is there in full on every rank, and so is the loss; gradients are each rank's own part, to be summed.

Letters: B samples, L tokens, l of them here, H heads, h of them here, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from longrl.strategies.sequence import SequenceParallel


def shard_tokens(model: nn.Module, sequence: SequenceParallel) -> None:
    """Lets the ranks of `sequence` share every forward pass of a `WanTransformer3DModel`, from now on."""
    shards = _TokenShards(sequence)
    blocks = list(model.get_submodule("blocks").children())
    for block in blocks:
        attention: Any = block.get_submodule("attn1")
        attention.set_processor(shards)
    model.get_submodule("rope").register_forward_hook(shards.cut_positions)
    blocks[0].register_forward_pre_hook(shards.cut_tokens)
    model.get_submodule("proj_out").register_forward_hook(shards.join_tokens)


class _TokenShards:
    """How the tokens of the forward pass under way are shared; L need be no multiple of the ranks.

    Called, it is self-attention as diffusers' `WanAttnProcessor` computes it: over all tokens, for this rank's heads.
    """

    def __init__(self, sequence: SequenceParallel) -> None:
        self.sequence = sequence
        self.length = 0
        """L of the forward pass under way."""

    def cut(self, tokens: Tensor) -> Tensor:
        """[B, L, ...] -> [B, l, ...], the last rank's filled up with zeros."""
        missing = -tokens.shape[1] % self.sequence.size
        padded = pad(tokens, (0, 0) * (tokens.dim() - 2) + (0, missing))
        return padded[:, self.sequence.rows(padded.shape[1])]

    def cut_positions(self, module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Behind the rotary embedding: cosines and sines [1, L, 1, D]."""
        self.length = output[0].shape[1]
        return tuple(self.cut(part) for part in output)

    def cut_tokens(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """Before the first layer."""
        return self.cut(args[0]), *args[1:]

    def join_tokens(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Behind the last projection: [B, l, D] -> [B, L, D] on every rank; a gradient is that of the rank's tokens."""
        batch, num_local, width = output.shape
        num_padded = num_local * self.sequence.size
        flat = self.sequence.gather(output.transpose(0, 1).reshape(-1), num_padded * batch * width)
        return flat.view(num_padded, batch, width).transpose(0, 1)[:, : self.length]

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[B, l, H D] -> [B, l, H D]."""
        assert rotary_emb is not None
        batch = len(hidden_states)
        # 1. Queries, keys and values of this rank's tokens, [B, l, H, D] each.
        query = _rotate(attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)), *rotary_emb)
        key = _rotate(attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1)), *rotary_emb)
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))

        # 2. All tokens of this rank's heads, [h, L padded, B D] each.
        local = [part.permute(2, 1, 0, 3).flatten(2) for part in (query, key, value)]  # [H, l, B D]
        *gathered, layout = self.sequence.to_heads(*local)

        # 3. Attention as of one sample after the other, the filled-up tokens left out.
        by_sample = [part.unflatten(2, (batch, -1))[:, : self.length].permute(2, 0, 1, 3) for part in gathered]
        attended = scaled_dot_product_attention(*by_sample).permute(1, 2, 0, 3)  # [h, L, B, D]
        attended = pad(attended, (0, 0, 0, 0, 0, gathered[0].shape[1] - self.length))

        # 4. Back to all heads of this rank's tokens.
        output = self.sequence.to_rows(attended.flatten(2), layout).unflatten(2, (batch, -1))
        return attn.to_out[1](attn.to_out[0](output.permute(2, 1, 0, 3).flatten(2)))


def _rotate(tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, l, H, D] with its pairs of values turned; cos and sin are [1, l, 1, D], each angle twice."""
    first, second = tokens.unflatten(-1, (-1, 2)).unbind(-1)
    cos = cos[..., 0::2]
    sin = sin[..., 1::2]
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -1)
    return turned.flatten(-2).type_as(tokens)
