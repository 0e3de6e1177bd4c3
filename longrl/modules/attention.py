"""Attention over packed groups: every prompt once, its completions behind it, exactly as if each were alone.

A packed sequence is `[prompt][y1]..[yG]`, group after group. A completion sees its own prompt and itself:

                 keys   prompt   y1    y2
    queries  prompt   [ causal    .     .  ]
             y1       [ full   causal   .  ]
             y2       [ full      .  causal]

The kernels compute each coloured block on its own and merge the two blocks of a completion by log-sum-exp (Milakov and
Gimelshein, arXiv:1805.02867), so neither the prompt's keys nor a [L, L] mask is ever copied. The backward pass reuses
the merged log-sum-exp, as ring attention does (arXiv:2310.01889): with it every block's probabilities are the exact
ones of the whole row.

Letters: H query heads, K key/value heads, E = H / K query heads per key head, L packed tokens, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from longrl.strategies.sequence import ALONE, SequenceParallel
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
    sequence: SequenceParallel = ALONE,
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
        spans: where the groups lie; tokens outside every span get zeros.
        scale: factor on the scores.

    Returns:
        [H, L, D].
    """
    heads, length, size = query.shape
    grouped = query.view(key.shape[0], heads // key.shape[0], length, size)
    output = _SharedPrefix.apply(grouped, key[:, None], value[:, None], tuple(spans), scale)
    return output.reshape(heads, length, size)


def dense_mask(spans: Sequence[GroupSpan], length: int) -> Tensor:
    """The same layout as a [L, L] boolean mask, True where a query (row) may see a key (column): the test oracle."""
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for span in spans:
        for prompt, own in ((range(span.start, span.start + span.prompt_tokens), None), *_completions(span)):
            rows = own if own is not None else prompt
            if own is not None:
                allowed[rows.start : rows.stop, prompt.start : prompt.stop] = True
            causal = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
            allowed[rows.start : rows.stop, rows.start : rows.stop] = causal
    return allowed


def _completions(span: GroupSpan) -> list[tuple[range, range]]:
    """(token range of the prompt, token range of a completion) for each completion."""
    prompt, start, pairs = range(span.start, span.start + span.prompt_tokens), span.start + span.prompt_tokens, []
    for count in span.completion_tokens:
        pairs.append((prompt, range(start, start + count)))
        start += count
    return pairs


def _blocks(span: GroupSpan) -> tuple[slice, slice, list[slice]]:
    """(prompt rows, all completion rows, rows of each completion); one completion is simply the prompt's tail."""
    if len(span.completion_tokens) <= 1:
        return slice(span.start, span.stop), slice(span.stop, span.stop), []
    prompt = slice(span.start, span.start + span.prompt_tokens)
    own = [slice(rows.start, rows.stop) for _, rows in _completions(span) if len(rows)]
    return prompt, slice(prompt.stop, span.stop), own


class _SharedPrefix(torch.autograd.Function):
    """query [K, E, L, D], key and value [K, 1, L, D] -> [K, E, L, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, spans: tuple[GroupSpan, ...], scale: float):
        kernel = kernel_for(query)
        output, lse = torch.zeros_like(query), query.new_zeros(query.shape[:-1], dtype=_lse_dtype(query))

        def attend(rows: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor]:
            return kernel.forward(query[:, :, rows], key[:, :, keys], value[:, :, keys], causal, scale)

        for span in spans:
            prompt, suffix, completions = _blocks(span)
            output[:, :, prompt], lse[:, :, prompt] = attend(prompt, prompt, causal=True)
            if not completions:
                continue
            output[:, :, suffix], lse[:, :, suffix] = attend(suffix, prompt, causal=False)
            for own in completions:
                part, part_lse = attend(own, own, causal=True)
                _merge(output[:, :, own], lse[:, :, own], part, part_lse)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.spans, ctx.scale = spans, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor):
        query, key, value, output, lse = ctx.saved_tensors
        kernel = kernel_for(query)
        grad_output = grad_output.contiguous()
        grad_query, grad_key, grad_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)

        def add(rows: slice, keys: slice, causal: bool) -> None:
            grads = kernel.backward(
                grad_output[:, :, rows], query[:, :, rows], key[:, :, keys], value[:, :, keys],
                output[:, :, rows], lse[:, :, rows], causal, ctx.scale,
            )  # fmt: skip
            grad_query[:, :, rows] += grads[0]
            grad_key[:, :, keys] += grads[1].sum(1, keepdim=True)
            grad_value[:, :, keys] += grads[2].sum(1, keepdim=True)

        for span in ctx.spans:
            prompt, suffix, completions = _blocks(span)
            add(prompt, prompt, causal=True)
            if completions:
                add(suffix, prompt, causal=False)
            for own in completions:
                add(own, own, causal=True)
        return grad_query, grad_key, grad_value, None, None


def _merge(output: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Adds the attention over further keys to `output` and `lse`, in place; all [..., rows, D] and [..., rows]."""
    total = torch.logaddexp(lse, part_lse)
    old, new = torch.exp(lse - total)[..., None], torch.exp(part_lse - total)[..., None]
    output.copy_(output * old + part * new)
    lse.copy_(total)


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


class Kernel(Protocol):
    """One block of attention with its log-sum-exp, and its backward from a log-sum-exp that may span more blocks."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """[K, E, Q, D] queries on [K, 1, N, D] keys -> ([K, E, Q, D], log-sum-exp [K, E, Q])."""

    def backward(
        self, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
        causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of query [K, E, Q, D], key and value ([K, E or 1, N, D], to be summed over E)."""


class CpuFlash:
    """torch's flash attention for CPU. Key heads are expanded by stride 0, never copied."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        key, value = _expand(key, query), _expand(value, query)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=None, scale=scale
        )

    def backward(
        self, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
        causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See `Kernel.backward`."""
        key, value = _expand(key, query), _expand(value, query)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_output, query, key, value, output, lse, 0.0, causal, attn_mask=None, scale=scale
        )


class CudaFlash:
    """torch's own flash attention for CUDA in half precision; needs no flash-attn package."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        key, value = _expand(key, query), _expand(value, query)
        result = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)
        return result[0], result[1][..., : query.shape[-2]]

    def backward(
        self, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
        causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See `Kernel.backward`."""
        key, value = _expand(key, query), _expand(value, query)
        unused = torch.empty(2, dtype=torch.uint64, device=query.device)  # the dropout state; dropout is 0
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad_output, query, key, value, output.contiguous(), lse.contiguous(), None, None,
            query.shape[-2], key.shape[-2], 0.0, causal, unused, unused[0], scale=scale,
        )  # fmt: skip


class Portable:
    """Plain tensor operations in slices of queries: any device and precision, [rows, N] scores at a time."""

    max_scores: int = 1 << 24

    def forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        outputs, lses = [], []
        for rows in self._slices(query, key):
            scores = _scores(query, key, rows, causal, scale)
            lse = scores.logsumexp(-1)
            outputs.append(torch.matmul(torch.exp(scores - lse[..., None]).to(value.dtype), value))
            lses.append(lse)
        return torch.cat(outputs, -2), torch.cat(lses, -1)

    def backward(
        self, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
        causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See `Kernel.backward`."""
        dtype = _lse_dtype(query)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (key, value))
        delta = (grad_output.to(dtype) * output.to(dtype)).sum(-1, keepdim=True)
        for rows in self._slices(query, key):
            probs = torch.exp(_scores(query, key, rows, causal, scale) - lse[:, :, rows, None])
            grad = grad_output[:, :, rows].to(dtype)
            grad_scores = probs * (grad @ value.to(dtype).mT - delta[:, :, rows]) * scale
            grad_query[:, :, rows] = (grad_scores @ key.to(dtype)).to(query.dtype)
            grad_key += (grad_scores.mT @ query[:, :, rows].to(dtype)).sum(1, keepdim=True)
            grad_value += (probs.mT @ grad).sum(1, keepdim=True)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)

    def _slices(self, query: Tensor, key: Tensor) -> list[slice]:
        step = max(1, self.max_scores // (query.shape[0] * query.shape[1] * key.shape[-2]))
        return [slice(i, min(i + step, query.shape[-2])) for i in range(0, query.shape[-2], step)]


def _scores(query: Tensor, key: Tensor, rows: slice, causal: bool, scale: float) -> Tensor:
    """[K, E, rows, N] scaled scores in at least float32; causal counts query i and key i as the same token."""
    dtype = _lse_dtype(query)
    scores = (query[:, :, rows].to(dtype) @ key.to(dtype).mT) * scale
    if causal:
        positions = torch.arange(rows.start, rows.stop, device=query.device)
        later = torch.arange(key.shape[-2], device=query.device) > positions[:, None]
        scores.masked_fill_(later, float("-inf"))
    return scores


def _expand(key: Tensor, query: Tensor) -> Tensor:
    return key.expand(-1, query.shape[1], -1, -1)


def kernel_for(query: Tensor) -> Kernel:
    """The fastest kernel that is exact on this device and precision."""
    if query.device.type == "cpu":
        return CpuFlash()
    if query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16):
        return CudaFlash()
    return Portable()
