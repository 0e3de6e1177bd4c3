"""Attention over packed groups: every prompt once, its completions behind it, exactly as if each were alone.

A packed sequence is `[prompt][y1]..[yG]`, group after group. A completion sees its own prompt and itself:

                 keys   prompt   y1    y2
    queries  prompt   [ causal    .     .  ]
             y1       [ full   causal   .  ]
             y2       [ full      .  causal]

Two calls of a kernel (longrl/packing/kernels.py) compute it: every prompt and every completion causal on itself, and
the completions of each group on their prompt. They are merged by log-sum-exp (Milakov and Gimelshein,
arXiv:1805.02867), so there is no [L, L] mask and no prompt's keys are repeated. The backward pass reuses the merged
log-sum-exp, as ring attention does (arXiv:2310.01889): with it every block's probabilities are the exact ones of the
whole row.

Letters: H query heads, K key/value heads, E = H / K query heads per key head, L packed tokens, D head size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from longrl.packing.kernels import Blocks, Kernel, kernel_for
from longrl.strategies.sequence import NO_SEQUENCE_PARALLEL, SequenceParallel
from longrl.types import GroupSpan

ATTENTION_NAME = "longrl_shared_prefix"


class LayerAttention(Protocol):
    """Replaces attention in every layer of one forward pass: the rollout engine's decoding is one."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[B, H, L, D], [B, K, L, D], [B, K, L, D] -> [B, H, L, D]."""


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    spans: Sequence[GroupSpan] | None = None,
    sequence: SequenceParallel = NO_SEQUENCE_PARALLEL,
    layer_attention: LayerAttention | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls in every text layer; plain SDPA unless a layout is passed with the forward.

    Args:
        module: the attention layer; its `layer_idx` names it.
        query: [B, H, L, D].
        key: [B, K, L, D].
        value: [B, K, L, D].
        attention_mask: used only without a layout.
        scaling: factor on the scores.
        dropout: must be 0 with a layout.
        spans: layout of a packed sequence (B = 1), as an extra keyword of the model's forward.
        sequence: the ranks that share the sequence; this one has `L / sequence.size` of its rows.
        layer_attention: takes the call over altogether.
        kwargs: whatever else transformers passes.

    Returns:
        ([B, L, H, D] output, None).
    """
    if spans is None and layer_attention is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = scaling if scaling is not None else 1 / math.sqrt(query.shape[-1])
    _reject_unsupported(module, dropout)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rotary embeddings return float32
    if layer_attention is not None:
        output = layer_attention(module.layer_idx, query, key, value, scale)
    elif sequence.size == 1:
        output = shared_prefix_attention(query[0], key[0], value[0], spans, scale)[None]
    else:
        *heads, plan = sequence.to_heads(query[0], key[0], value[0])
        output = sequence.to_rows(shared_prefix_attention(*heads, spans, scale), plan)[None]
    return output.transpose(1, 2), None


def _reject_unsupported(module: torch.nn.Module, dropout: float) -> None:
    if dropout:
        raise ValueError(f"packed attention needs attention_dropout=0, got {dropout}; set it so in the model's config")
    if getattr(module, "sliding_window", None):
        raise ValueError(
            f"packed attention has no sliding window, but layer {module.layer_idx} uses one of "
            f"{module.sliding_window} tokens; set use_sliding_window=false in the model's config"
        )


AttentionInterface.register(ATTENTION_NAME, attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def shared_prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, spans: Sequence[GroupSpan], scale: float
) -> Tensor:
    """Attention of packed groups with every prompt's keys used in place.

    Args:
        query: [H, L, D].
        key: [K, L, D]; K divides H.
        value: [K, L, D].
        spans: where the groups lie, one behind the other from row 0; tokens behind the last one get zeros.
        scale: factor on the scores.

    Returns:
        [H, L, D].
    """
    return _SharedPrefix.apply(query, key, value, tuple(spans), scale)


def dense_mask(spans: Sequence[GroupSpan], length: int) -> Tensor:
    """The same layout as a [L, L] boolean mask, True where a query (row) may see a key (column): the test oracle."""
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for span in spans:
        prompt = slice(span.start, span.start + span.prompt_tokens)
        for rows in (prompt, *_completions(span)):
            allowed[rows, prompt] = True
            allowed[rows, rows] = torch.ones(rows.stop - rows.start, rows.stop - rows.start, dtype=torch.bool).tril()
    return allowed


def _completions(span: GroupSpan) -> list[slice]:
    """Rows of each completion."""
    start, rows = span.start + span.prompt_tokens, []
    for count in span.completion_tokens:
        rows.append(slice(start, start + count))
        start += count
    return rows


@dataclass(frozen=True)
class _Layout:
    """The two calls: `own` covers all rows, `across` the completions of groups with more than one."""

    own: Blocks
    across: Blocks
    suffixes: tuple[slice, ...]
    """Rows of each such group's completions."""
    prompts: tuple[slice, ...]
    """Rows of its prompt."""
    stop: int
    """One past the last group."""


@functools.lru_cache(maxsize=64)
def _layout(spans: tuple[GroupSpan, ...], length: int) -> _Layout:
    """A group of one completion is simply causal; rows behind the last group are a sequence of their own."""
    lengths: list[int] = []
    suffixes, prompts, stop = [], [], 0
    for span in spans:
        assert span.start == stop, f"groups must lie end to end, got {spans}"
        stop, prompt = span.stop, slice(span.start, span.start + span.prompt_tokens)
        own = [count for count in span.completion_tokens if count]
        if len(own) > 1:
            suffixes.append(slice(prompt.stop, stop))
            prompts.append(prompt)
            lengths += [span.prompt_tokens, *own]
        else:
            lengths.append(stop - span.start)
    lengths += [length - stop] if length > stop else []
    across = Blocks(tuple(map(_size, suffixes)), tuple(map(_size, prompts)), causal=False)
    own_blocks = Blocks(tuple(lengths), tuple(lengths), causal=True)
    return _Layout(own_blocks, across, tuple(suffixes), tuple(prompts), stop)


def _size(rows: slice) -> int:
    return rows.stop - rows.start


class _SharedPrefix(torch.autograd.Function):
    """query [H, L, D], key and value [K, L, D] -> [H, L, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, spans: tuple[GroupSpan, ...], scale: float):
        layout, kernel = _layout(spans, query.shape[1]), kernel_for(query)
        output, lse = kernel.forward(query, key, value, layout.own, scale)
        if layout.prompts:
            rows = take(query, layout.suffixes), take(key, layout.prompts), take(value, layout.prompts)
            part, part_lse = attend_all(kernel, *rows, layout.across, scale)
            for place, (own, _) in zip(layout.suffixes, layout.across.slices(), strict=True):
                merge(output[:, place], lse[:, place], part[:, own], part_lse[:, own])
        output[:, layout.stop :] = 0
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor):
        query, key, value, output, lse = ctx.saved_tensors
        layout, kernel = ctx.layout, kernel_for(query)
        grads = kernel.backward(grad_output, query, key, value, output, lse, layout.own, ctx.scale)
        if layout.prompts:
            of_rows = [take(x, layout.suffixes) for x in (grad_output, query, output, lse)]
            keys, values = take(key, layout.prompts), take(value, layout.prompts)
            parts = _attend_all_backward(kernel, *of_rows, keys, values, layout.across, ctx.scale)
            for grad, part, places in zip(grads, parts, (layout.suffixes, layout.prompts, layout.prompts), strict=True):
                _add(grad, part, places)
        for grad in grads:
            grad[:, layout.stop :] = 0
        return *grads, None, None


def attend_all(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention in which a query sees all keys of its sequence: query heads of a key head are then just more queries.

    So a key head is read once for all of them, and its gradient comes as one.

    Returns:
        ([H, Q, D], log-sum-exp [H, Q]) of queries [H, Q, D] on keys and values [K, N, D].
    """
    output, lse = kernel.forward(_fold(query, key), key, value, _folded(blocks, query, key), scale)
    return _unfold(output, query), _unfold(lse, query)


def _attend_all_backward(
    kernel: Kernel, grad_output: Tensor, query: Tensor, output: Tensor, lse: Tensor, key: Tensor, value: Tensor,
    blocks: Blocks, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad, folded, out, lses = (_fold(x, key) for x in (grad_output, query, output, lse))
    grads = kernel.backward(grad, folded, key, value, out, lses, _folded(blocks, query, key), scale)
    return _unfold(grads[0], query), grads[1], grads[2]


def _fold(states: Tensor, key: Tensor) -> Tensor:
    """[H, Q, ...] -> [K, Q * E, ...]: the E heads of a row one after the other."""
    return states.unflatten(0, (key.shape[0], -1)).transpose(1, 2).flatten(1, 2)


def _unfold(states: Tensor, query: Tensor) -> Tensor:
    """[K, Q * E, ...] -> [H, Q, ...]."""
    return states.unflatten(1, (query.shape[1], -1)).transpose(1, 2).flatten(0, 1)


def _folded(blocks: Blocks, query: Tensor, key: Tensor) -> Blocks:
    times = query.shape[0] // key.shape[0]
    return Blocks(tuple(count * times for count in blocks.queries), blocks.keys, blocks.causal)


def take(states: Tensor, places: Sequence[slice]) -> Tensor:
    """[heads, L, ...] -> the rows at these places, end to end; without a copy if it is one place."""
    parts = [states[:, rows] for rows in places]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _add(states: Tensor, parts: Tensor, places: Sequence[slice]) -> None:
    """Adds rows that lie end to end to those at these places."""
    for rows, part in zip(places, parts.split([_size(rows) for rows in places], 1), strict=True):
        states[:, rows] += part


def merge(output: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Adds the attention over further keys to `output` and `lse`, in place; all [..., rows, D] and [..., rows]."""
    total = torch.logaddexp(lse, part_lse)
    old, new = torch.exp(lse - total)[..., None], torch.exp(part_lse - total)[..., None]
    output.copy_(output * old + part * new)
    lse.copy_(total)
