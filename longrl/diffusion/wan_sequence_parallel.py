"""Sequence parallelism of Wan's transformer: ranks hold neighbouring tokens of a sample (Ulysses, arXiv:2309.14509).

All goes through doors that PyTorch and diffusers have: an attention processor brings all tokens of some heads together,
and forward hooks cut the tokens before the first layer and join them behind the last. Layers between work token by
token, text is whole on every rank, and so is the loss; gradients are each rank's own part, to be summed.

Letters: B samples, L tokens, l of them here, H heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from longrl.strategies.sequence import SequenceParallel


def share_tokens(model: nn.Module, sequence: SequenceParallel) -> None:
    """Lets the ranks of `sequence` share every forward pass of a `WanTransformer3DModel`, from now on."""
    shared = _Shared(sequence)
    for block in model.blocks:
        block.attn1.set_processor(_Processor(shared))
    model.rope.register_forward_hook(shared.cut_positions)
    model.blocks[0].register_forward_pre_hook(shared.cut_tokens)
    model.proj_out.register_forward_hook(shared.join_tokens)


class _Shared:
    """How the tokens of the forward pass under way are shared; L need be no multiple of the ranks."""

    def __init__(self, sequence: SequenceParallel) -> None:
        self.sequence = sequence
        self.length = 0

    def cut(self, tokens: Tensor) -> Tensor:
        """[B, L, ...] -> [B, l, ...], the last rank's filled up with zeros."""
        missing = -tokens.shape[1] % self.sequence.size
        padded = pad(tokens, (0, 0) * (tokens.dim() - 2) + (0, missing))
        return padded[:, self.sequence.rows(padded.shape[1])]

    def join(self, tokens: Tensor) -> Tensor:
        """[B, l, D] -> [B, L, D] on every rank; a rank's gradient is that of its own tokens."""
        batch, own, width = tokens.shape
        count = own * self.sequence.size
        flat = self.sequence.gather(tokens.transpose(0, 1).reshape(-1), count * batch * width)
        return flat.view(count, batch, width).transpose(0, 1)[:, : self.length]

    def cut_positions(self, module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Behind the rotary embedding: cosines and sines [1, L, 1, D]."""
        self.length = output[0].shape[1]
        return tuple(self.cut(part) for part in output)

    def cut_tokens(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """Before the first layer."""
        return self.cut(args[0]), *args[1:]

    def join_tokens(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Behind the last projection."""
        return self.join(output)


class _Processor:
    """Self-attention as diffusers' `WanAttnProcessor` computes it, over all tokens, for this rank's heads."""

    def __init__(self, shared: _Shared) -> None:
        self.shared = shared

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
        projected = (attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)))
        query, key = (_rotate(part.unflatten(2, (attn.heads, -1)), *rotary_emb) for part in projected)
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        own = (part.permute(2, 1, 0, 3).flatten(2) for part in (query, key, value))  # [H, l, B D]
        *whole, plan = self.shared.sequence.to_heads(*own)
        attended = self._attend(*(part.unflatten(2, (len(hidden_states), -1)) for part in whole))
        back = self.shared.sequence.to_rows(attended.flatten(2), plan).unflatten(2, (len(hidden_states), -1))
        return attn.to_out[1](attn.to_out[0](back.permute(2, 1, 0, 3).flatten(2)))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[heads here, all tokens, B, D] of each, the filled-up tokens left out of attention."""
        filled, length = query.shape[1], self.shared.length
        query, key, value = (part[:, :length].permute(2, 0, 1, 3) for part in (query, key, value))
        found = scaled_dot_product_attention(query, key, value).permute(1, 2, 0, 3)
        return pad(found, (0, 0, 0, 0, 0, filled - length))


def _rotate(tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, l, H, D] with its pairs of numbers turned; cos and sin are [1, l, 1, D], each angle twice."""
    first, second = tokens.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -1)
    return turned.flatten(-2).type_as(tokens)
