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

Letters: H query heads, K key/value heads, E = H / K query heads per key head, L packed tokens, D head size; Q rows of
completions and N rows of their prompts.
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

from longrl.packing.kernels import Kernel, VarlenBatch, kernel_for
from longrl.strategies.sequence import NO_SEQUENCE_PARALLEL, SequenceParallel
from longrl.types import GroupSpan

ATTENTION_NAME = "longrl_shared_prefix"


class PackedLayout:
    """Where the groups of a packed sequence lie, on the way through the layers.

    A plain object: torch's compiler (2.11) reads a tuple of dataclasses in full, and compiles layers for each anew.

    Args:
        spans: of the groups.
    """

    def __init__(self, spans: tuple[GroupSpan, ...]) -> None:
        self.spans = spans


class LayerAttention(Protocol):
    """Replaces attention in every layer of one forward pass: the rollout engine's decoding is one."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[B, H, L, D], [B, K, L, D], [B, K, L, D] -> [B, H, L, D]."""


@torch.compiler.disable  # a layer that is compiled would be so for every layout anew
def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: PackedLayout | None = None,
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
        layout: of a packed sequence (B = 1), as an extra keyword of the model's forward.
        sequence: the ranks that share the sequence; this one has `L / sequence.size` of its rows.
        layer_attention: takes the call over altogether.
        kwargs: whatever else transformers passes.

    Returns:
        ([B, L, H, D] output, None).

    Raises:
        ValueError: the layer has dropout or a sliding window.
    """
    # 1. The model is used as transformers would: nothing is packed.
    if layout is None and layer_attention is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    # 2. What packed attention cannot do is refused here, where the layer is known.
    if dropout:
        raise ValueError(f"packed attention needs attention_dropout=0, got {dropout}; set it so in the model's config")
    if getattr(module, "sliding_window", None):
        raise ValueError(
            f"packed attention has no sliding window, but layer {module.layer_idx} uses one of "
            f"{module.sliding_window} tokens; set use_sliding_window=false in the model's config"
        )
    scale = scaling if scaling is not None else 1 / math.sqrt(query.shape[-1])
    query = query.to(value.dtype)  # under autocast rotary embeddings return float32
    key = key.to(value.dtype)
    # 3. The rollout engine has a layout of its own; in training the rows are packed groups.
    if layer_attention is not None:
        output = layer_attention(module.layer_idx, query, key, value, scale)  # [B, H, L, D]
        return output.transpose(1, 2), None
    assert layout is not None
    spans = layout.spans
    if sequence.size == 1:
        output = shared_prefix_attention(query[0], key[0], value[0], spans, scale)  # [H, L, D]
    else:
        # Attention needs all rows, so ranks exchange their rows of all heads for all rows of some heads, and back.
        query, key, value, heads = sequence.to_heads(query[0], key[0], value[0])  # [heads of this rank, L, D]
        output = shared_prefix_attention(query, key, value, spans, scale)
        output = sequence.to_rows(output, heads)  # [H, L / ranks, D]
    return output[None].transpose(1, 2), None


AttentionInterface.register(ATTENTION_NAME, attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def dense_mask(spans: Sequence[GroupSpan], length: int) -> Tensor:
    """The same layout as a [L, L] boolean mask, True where a query (row) may see a key (column): the test oracle."""
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for span in spans:
        prompt = slice(span.start, span.start + span.prompt_tokens)
        start = span.start
        for count in (span.prompt_tokens, *span.completion_tokens):
            rows = slice(start, start + count)
            allowed[rows, prompt] = True
            allowed[rows, rows] = torch.ones(count, count, dtype=torch.bool).tril()
            start += count
    return allowed


@dataclass(frozen=True)
class _Layout:
    """The two kernel calls of a packed sequence."""

    causal: VarlenBatch
    """All rows: every prompt and completion sees itself."""
    across: VarlenBatch
    """Completions of groups with more than one see their prompts. Queries count E times, see `attend_all`."""
    completions: list[slice]
    """Rows of each such group's completions, Q together."""
    prompts: list[slice]
    """Rows of its prompt, N together."""
    stop: int
    """One past the last group."""


@functools.lru_cache(maxsize=64)  # all layers of a forward pass share one
def _layout(spans: tuple[GroupSpan, ...], length: int, heads_per_key: int) -> _Layout:
    lengths: list[int] = []
    completions = []
    prompts = []
    stop = 0
    for span in spans:
        assert span.start == stop, f"groups must lie end to end, got {spans}"
        stop = span.stop
        nonempty = [count for count in span.completion_tokens if count]
        if len(nonempty) > 1:
            prompt_stop = span.start + span.prompt_tokens
            prompts.append(slice(span.start, prompt_stop))
            completions.append(slice(prompt_stop, stop))
            lengths += [span.prompt_tokens, *nonempty]
        else:  # simply causal: prompt and completion are one sequence
            lengths.append(stop - span.start)
    if length > stop:  # rows that pad the sequence; left out, a kernel would not initialise their output
        lengths.append(length - stop)
    across = VarlenBatch(
        tuple((rows.stop - rows.start) * heads_per_key for rows in completions),
        tuple(rows.stop - rows.start for rows in prompts),
        causal=False,
    )
    return _Layout(VarlenBatch(tuple(lengths), tuple(lengths), causal=True), across, completions, prompts, stop)


class _SharedPrefix(torch.autograd.Function):
    """query [H, L, D], key and value [K, L, D] -> [H, L, D]; see `shared_prefix_attention`."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, spans: tuple[GroupSpan, ...], scale: float
    ) -> Tensor:
        layout = _layout(spans, query.shape[1], len(query) // len(key))
        kernel = kernel_for(query)
        # 1. Every prompt and completion on itself.
        output, lse = kernel.forward(query, key, value, layout.causal, scale)  # [H, L, D], [H, L]
        # 2. Completions on their prompts, merged into what they saw of themselves.
        if layout.prompts:
            queries = take_rows(query, layout.completions)  # [H, Q, D]
            keys = take_rows(key, layout.prompts)  # [K, N, D]
            values = take_rows(value, layout.prompts)  # [K, N, D]
            part, part_lse = attend_all(kernel, queries, keys, values, layout.across, scale)  # [H, Q, D], [H, Q]
            start = 0
            for rows in layout.completions:
                stop = start + rows.stop - rows.start
                merge_attention(output[:, rows], lse[:, rows], part[:, start:stop], part_lse[:, start:stop])
                start = stop
        output[:, layout.stop :] = 0
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.layout = layout
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        layout: _Layout = ctx.layout
        kernel = kernel_for(query)
        # 1. Given the merged log-sum-exp each call is exact on its own: gradients only have to be added.
        grads = kernel.backward(grad_output, query, key, value, output, lse, batch=layout.causal, scale=ctx.scale)
        # 2. Completions on their prompts.
        if layout.prompts:
            num_keys = len(key)
            part_query, part_key, part_value = kernel.backward(
                fold_heads(take_rows(grad_output, layout.completions), num_keys),  # [K, Q * E, D]
                fold_heads(take_rows(query, layout.completions), num_keys),
                take_rows(key, layout.prompts),  # [K, N, D]
                take_rows(value, layout.prompts),
                fold_heads(take_rows(output, layout.completions), num_keys),
                fold_heads(take_rows(lse, layout.completions), num_keys),  # [K, Q * E]
                batch=layout.across,
                scale=ctx.scale,
            )
            parts = (unfold_heads(part_query, len(query) // num_keys), part_key, part_value)
            targets = (layout.completions, layout.prompts, layout.prompts)
            for grad, part, slices in zip(grads, parts, targets, strict=True):
                start = 0
                for rows in slices:
                    stop = start + rows.stop - rows.start
                    grad[:, rows] += part[:, start:stop]
                    start = stop
        for grad in grads:
            grad[:, layout.stop :] = 0  # padding
        return *grads, None, None


def shared_prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, spans: tuple[GroupSpan, ...], scale: float
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
    return _SharedPrefix.apply(query, key, value, spans, scale)


def attend_all(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, batch: VarlenBatch, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention in which a query sees all keys of its sequence: query heads of a key head are then just more queries.

    So a key head is read once for all of them, and its gradient comes as one.

    Args:
        kernel: computes it.
        query: [H, Q, D].
        key: [K, N, D].
        value: [K, N, D].
        batch: sequences of E times as many queries as they have rows.
        scale: factor on the scores.

    Returns:
        ([H, Q, D], log-sum-exp [H, Q]).
    """
    heads_per_key = len(query) // len(key)
    output, lse = kernel.forward(fold_heads(query, len(key)), key, value, batch, scale)  # [K, Q * E, D], [K, Q * E]
    return unfold_heads(output, heads_per_key), unfold_heads(lse, heads_per_key)


def fold_heads(states: Tensor, num_keys: int) -> Tensor:
    """[H, Q, ...] -> [K, Q * E, ...]: the E heads of a row one after the other."""
    return states.unflatten(0, (num_keys, -1)).transpose(1, 2).flatten(1, 2)


def unfold_heads(states: Tensor, heads_per_key: int) -> Tensor:
    """[K, Q * E, ...] -> [H, Q, ...]: the inverse of `fold_heads`."""
    return states.unflatten(1, (-1, heads_per_key)).transpose(1, 2).flatten(0, 1)


def take_rows(states: Tensor, slices: Sequence[slice]) -> Tensor:
    """[heads, L, ...] -> the rows of these slices, end to end; without a copy if it is one slice."""
    if len(slices) == 1:
        return states[:, slices[0]]
    return torch.cat([states[:, rows] for rows in slices], 1)


def merge_attention(output: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Adds the attention over further keys to `output` and `lse`, in place; all [..., rows, D] and [..., rows]."""
    total = torch.logaddexp(lse, part_lse)
    old_weight = torch.exp(lse - total)[..., None]
    new_weight = torch.exp(part_lse - total)[..., None]
    output.copy_(output * old_weight + part * new_weight)
    lse.copy_(total)
