"""Attention of vision and audio encoders: every window, frame or picture on itself, all of a layer in one call.

An encoder lays its sequences end to end and says where each one stops. transformers hands that on to attention
functions with "flash" in their name; any other it calls for one sequence after the other, in every layer: 29,184 times
for 256 frames of Qwen2.5-VL-7B in its smallest windows. So this one has such a name.

On CUDA in half precision it is one varlen call of flash attention, forwards and backwards. Elsewhere it is one call of
torch's attention per distinct length, of which a video has up to four: windows within a frame, at its edges, and in
its corner. On CPU that gives the bits of transformers' loop.

Letters: N rows of all sequences, H heads, D head size, S sequences, n rows of one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from longrl.packing.kernels import Kernel, VarlenKernel, kernel_for

ENCODER_ATTENTION_NAME = "longrl_varlen_flash"


def encoder_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls in every layer of an encoder.

    Args:
        module: the attention layer.
        query: [1, H, N, D].
        key: [1, H, N, D].
        value: [1, H, N, D].
        attention_mask: must be None; the sequences say who sees whom.
        scaling: factor on the scores.
        dropout: must be 0.
        cu_seq_lens_q: [S + 1] where sequences start, and N.
        max_length_q: rows of the longest one.
        kwargs: whatever else transformers passes.

    Returns:
        ([1, N, H, D] output, None).

    Raises:
        ValueError: the layer has dropout.
    """
    assert cu_seq_lens_q is not None, "an encoder that does not say where its sequences lie"
    assert max_length_q is not None
    assert attention_mask is None
    if dropout:
        raise ValueError(f"encoders need attention_dropout=0, got {dropout}; set it so in the model's config")
    scale = scaling if scaling is not None else 1 / math.sqrt(query.shape[-1])
    # [N, H, D], which is how the layer laid them out; under autocast rotary embeddings may return float32.
    query, key, value = (states[0].transpose(0, 1).to(value.dtype) for states in (query, key, value))
    kernel = encoder_kernel(kernel_for(query))
    if kernel is not None:
        output = varlen_attention(query, key, value, cu_seq_lens_q.to(torch.int32), max_length_q, scale, kernel)
    else:
        output = equal_lengths_attention(query, key, value, cu_seq_lens_q, scale)
    return output[None], None


def encoder_kernel(kernel: Kernel) -> VarlenKernel | None:
    """The kernel that takes all sequences of a layer in one call; None if torch's attention is called per length."""
    return kernel if isinstance(kernel, VarlenKernel) else None


AttentionInterface.register(ENCODER_ATTENTION_NAME, encoder_attention_forward)


class _Varlen(torch.autograd.Function):
    """See `varlen_attention`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        longest: int,
        scale: float,
        kernel: VarlenKernel,
    ) -> Tensor:
        longest = max(2, longest)  # for single rows flash attention would take another path
        seqlens = (cu_seqlens, cu_seqlens, longest, longest)
        output, lse = kernel.forward_rows([query, key, value], seqlens, False, scale)  # [N, H, D], [H, N]
        ctx.save_for_backward(query, key, value, output, lse, cu_seqlens)
        ctx.longest = longest
        ctx.scale = scale
        ctx.kernel = kernel
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *saved, lse, cu_seqlens = ctx.saved_tensors
        states = [x if x.stride(-1) == 1 else x.contiguous() for x in (grad_output, *saved)]
        seqlens = (cu_seqlens, cu_seqlens, ctx.longest, ctx.longest)
        grads = ctx.kernel.backward_rows([*states, lse.contiguous()], seqlens, False, ctx.scale)
        return *grads, None, None, None, None


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float, kernel: VarlenKernel
) -> Tensor:
    """Attention of sequences of any lengths in one call of a kernel, and one backwards; the host waits for neither.

    Args:
        query: [N, H, D].
        key: [N, H, D].
        value: [N, H, D].
        cu_seqlens: [S + 1] int32 starts of the sequences, and N.
        longest: rows of the longest one.
        scale: factor on the scores.
        kernel: computes it.

    Returns:
        [N, H, D].
    """
    return _Varlen.apply(query, key, value, cu_seqlens, longest, scale, kernel)


def equal_lengths_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Attention of sequences of any lengths, those of one length in one call of torch's: any device and precision.

    Args:
        query: [N, H, D].
        key: [N, H, D].
        value: [N, H, D].
        cu_seqlens: [S + 1] starts of the sequences, and N.
        scale: factor on the scores.

    Returns:
        [N, H, D].
    """
    states = [query, key, value]
    lengths = cu_seqlens.diff()  # [S]
    distinct: list[int] = lengths.unique().tolist()
    if len(distinct) == 1:
        return _attend(states, distinct[0], scale)

    # 1. Rows of sequences of one length side by side.
    starts = cu_seqlens[:-1]
    groups = []
    for length in distinct:
        rows = starts[lengths == length, None] + torch.arange(length, device=starts.device)  # [s, n]
        groups.append(rows.flatten())
    order = torch.cat(groups)  # [N]
    states = [rows.index_select(0, order) for rows in states]

    # 2. A call for each length, and every row back to its place.
    output = torch.empty_like(value)
    sizes = [len(rows) for rows in groups]
    by_length = zip(distinct, groups, *(rows.split(sizes) for rows in states), strict=True)
    for length, places, *parts in by_length:
        output.index_copy_(0, places, _attend(parts, length, scale))
    return output


def _attend(states: list[Tensor], length: int, scale: float) -> Tensor:
    """Query, key and value [S * n, H, D] of sequences of n rows -> [S * n, H, D]."""
    query, key, value = (rows.unflatten(0, (-1, length)).transpose(1, 2) for rows in states)  # [S, H, n, D]
    output = F.scaled_dot_product_attention(query, key, value, scale=scale)
    return output.transpose(1, 2).flatten(0, 1)
