"""Kernels of block attention: independent sequences end to end, with the log-sum-exp that lets blocks be merged.

One interface for all devices: flash attention of variable lengths on CUDA (the flash-attn package, or torch's own),
flash attention for CPU, and plain tensor operations anywhere. Query heads share their key head: no keys are repeated.

Letters: H query heads, K key heads, E = H / K; Q and N all queries and keys of a call; D head size.
"""

from __future__ import annotations

import abc
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

log = logging.getLogger(__name__)

VARIABLE = "LONGRL_ATTENTION"
"""Environment variable that forces a kernel: `auto`, `flash_attn`, `torch_flash`, `cpu_flash` or `portable`."""
Grads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Blocks:
    """Sequences that lie end to end, each with keys of its own.

    Example:
        `Blocks(queries=(7, 3), keys=(7, 3), causal=True)`: rows 0..7 see themselves, rows 7..10 see themselves
    """

    queries: tuple[int, ...]
    """Queries of each sequence; at least 1."""
    keys: tuple[int, ...]
    """Keys of each sequence; at least 1, and as many as queries if causal."""
    causal: bool

    def slices(self) -> Iterator[tuple[slice, slice]]:
        """(rows of the queries, rows of the keys) of each sequence."""
        row = key = 0
        for queries, keys in zip(self.queries, self.keys, strict=True):
            yield slice(row, row + queries), slice(key, key + keys)
            row, key = row + queries, key + keys


class Kernel(Protocol):
    """Attention of blocks, and its backward from a log-sum-exp that may span more keys than the block has."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float) -> tuple[Tensor, Tensor]:
        """[H, Q, D] queries on [K, N, D] keys and values -> ([H, Q, D], log-sum-exp [H, Q])."""

    def backward(
        self, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
        blocks: Blocks, scale: float,
    ) -> Grads:  # fmt: skip
        """Gradients of query [H, Q, D], key [K, N, D] and value [K, N, D]."""


def kernel_for(query: Tensor) -> Kernel:
    """The fastest kernel that is exact on this device and precision, or the one that `LONGRL_ATTENTION` names.

    Raises:
        ValueError: the kernel named is unknown or does not run on these tensors.
    """
    return _chosen(query.device, query.dtype, query.shape[-1], os.environ.get(VARIABLE, "auto"))


@functools.cache
def _chosen(device: torch.device, dtype: torch.dtype, head_size: int, wanted: str) -> Kernel:
    able = _able(device, dtype, head_size)
    name = next(iter(able)) if wanted == "auto" else wanted
    if name not in able:
        raise ValueError(
            f"{VARIABLE} must be auto or a kernel that runs on {dtype} heads of size {head_size} on {device.type}, "
            f"which are {', '.join(able)}; got {wanted!r}: unset it, or use bfloat16 on a GPU with flash-attn installed"
        )
    log.info("attention on %s in %s with heads of size %d: %s", device.type, dtype, head_size, name)
    return able[name]()


def _able(device: torch.device, dtype: torch.dtype, head_size: int) -> dict[str, Callable[[], Kernel]]:
    """Kernels that run on such tensors, the fastest first."""
    able: dict[str, Callable[[], Kernel]] = {}
    if device.type == "cuda" and _has_flash(device, dtype, head_size):
        if importlib.util.find_spec("flash_attn"):
            able["flash_attn"] = FlashAttn
        if torch.backends.cuda.is_flash_attention_available():
            able["torch_flash"] = TorchFlash
    if device.type == "cpu":
        able["cpu_flash"] = CpuFlash
    return able | {"portable": Portable}


def _has_flash(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """What both flash kernels ask for; ROCm's give the log-sum-exp another shape."""
    ours = dtype in (torch.float16, torch.bfloat16) and head_size % 8 == 0 and head_size <= 256
    return ours and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


# -------------------------------------------------------------------------------------- all sequences in one call, CUDA


class Varlen(abc.ABC):
    """Flash attention of variable lengths: all sequences in one call, key heads shared within the kernel.

    The kernels read `[rows, heads, D]` of any stride but the last, which is a view of our `[heads, rows, D]`.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        states = [x.transpose(0, 1) for x in (query, key, value)]
        output, lse = self._forward(*states, *_offsets(blocks, query.device), blocks.causal, scale)
        return output.transpose(0, 1), lse

    def backward(
        self, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
        blocks: Blocks, scale: float,
    ) -> Grads:  # fmt: skip
        """See `Kernel.backward`."""
        states = [_dense_rows(x.transpose(0, 1)) for x in (grad_output, query, key, value, output)]
        offsets = _offsets(blocks, query.device)
        grads = self._backward(*states, lse.contiguous(), *offsets, blocks.causal, scale)
        return tuple(grad.transpose(0, 1) for grad in grads)  # type: ignore[return-value]

    @abc.abstractmethod
    def _forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """(query [Q, H, D], key [N, K, D], value, the four of `_offsets`, causal, scale) -> ([Q, H, D], [H, Q])."""

    @abc.abstractmethod
    def _backward(self, *arguments: Any) -> Grads:
        """(grad_output [Q, H, D], query, key, value, output, lse [H, Q], offsets, causal, scale) -> their gradients."""


class TorchFlash(Varlen):
    """torch's own flash attention 2 for CUDA (torch 2.11 and newer); needs no other package.

    Args:
        forward_op: `aten::_flash_attention_forward`, or what stands in for it in a test.
        backward_op: `aten::_flash_attention_backward`, likewise.
    """

    def __init__(self, forward_op: Any = None, backward_op: Any = None) -> None:
        self.forward_op = forward_op or torch.ops.aten._flash_attention_forward
        self.backward_op = backward_op or torch.ops.aten._flash_attention_backward

    def _forward(
        self, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, keys: Tensor, max_rows: int, max_keys: int,
        causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        output, lse, *_ = self.forward_op(
            query, key, value, rows, keys, max_rows, max_keys, 0.0, causal, False, scale=scale
        )
        return output, lse

    def _backward(
        self, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
        rows: Tensor, keys: Tensor, max_rows: int, max_keys: int, causal: bool, scale: float,
    ) -> Grads:  # fmt: skip
        unused = torch.zeros(2, dtype=torch.uint64, device=query.device)  # the dropout's state; there is no dropout
        return self.backward_op(
            grad_output, query, key, value, output, lse, rows, keys, max_rows, max_keys, 0.0, causal, unused,
            unused[0], scale=scale,
        )  # fmt: skip


class FlashAttn(Varlen):
    """The flash-attn package, 2.7 or newer.

    Args:
        forward_op: `_flash_attn_varlen_forward`, or what stands in for it in a test.
        backward_op: `_flash_attn_varlen_backward`, likewise.
    """

    def __init__(self, forward_op: Any = None, backward_op: Any = None) -> None:
        if forward_op is None:
            from flash_attn.flash_attn_interface import _flash_attn_varlen_backward, _flash_attn_varlen_forward

            forward_op, backward_op = _flash_attn_varlen_forward, _flash_attn_varlen_backward
        self.forward_op, self.backward_op = forward_op, backward_op

    def _forward(
        self, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, keys: Tensor, max_rows: int, max_keys: int,
        causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        output, lse, *_ = self.forward_op(query, key, value, rows, keys, max_rows, max_keys, 0.0, scale, causal)
        return output, lse

    def _backward(
        self, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
        rows: Tensor, keys: Tensor, max_rows: int, max_keys: int, causal: bool, scale: float,
    ) -> Grads:  # fmt: skip
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        self.backward_op(
            grad_output, query, key, value, output, lse, *grads, rows, keys, max_rows, max_keys, 0.0, scale, causal,
            window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return grads


@functools.lru_cache(maxsize=64)
def _offsets(blocks: Blocks, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """[n + 1] int32 starts of the sequences among queries and among keys, and the longest of each.

    The longest is given as at least 2: for single queries flash attention would take another path, whose log-sum-exp
    has another shape.
    """
    starts = []
    for lengths in (blocks.queries, blocks.keys):
        ends = torch.tensor((0, *lengths), dtype=torch.int64).cumsum(0)
        starts.append(ends.to(torch.int32).to(device))
    return starts[0], starts[1], max(2, *blocks.queries), max(2, *blocks.keys)


def _dense_rows(states: Tensor) -> Tensor:
    return states if states.stride(-1) == 1 else states.contiguous()


# ----------------------------------------------------------------------------------------------- one sequence at a time


class PerSequence(abc.ABC):
    """Calls a kernel per sequence: queries [K, E, q, D] on keys [K, 1, n, D]."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        output, lse = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=_lse_dtype(query))
        whole, whole_lse = _grouped(output, key), _grouped(lse, key)
        query, key, value = _grouped(query, key), key[:, None], value[:, None]
        for rows, keys in blocks.slices():
            part, part_lse = self._forward(query[:, :, rows], key[:, :, keys], value[:, :, keys], blocks.causal, scale)
            whole[:, :, rows], whole_lse[:, :, rows] = part, part_lse
        return output, lse

    def backward(
        self, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
        blocks: Blocks, scale: float,
    ) -> Grads:  # fmt: skip
        """See `Kernel.backward`."""
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        whole = _grouped(grads[0], key), grads[1][:, None], grads[2][:, None]
        of_rows = [_grouped(x, key) for x in (grad_output.contiguous(), query, output, lse)]
        key, value = key[:, None], value[:, None]
        for rows, keys in blocks.slices():
            grad, queries, outputs, lses = (x[:, :, rows] for x in of_rows)
            parts = self._backward(
                grad, queries, key[:, :, keys], value[:, :, keys], outputs, lses, blocks.causal, scale
            )
            whole[0][:, :, rows] = parts[0]
            for place in (1, 2):  # of every query head, perhaps
                whole[place][:, :, keys] = parts[place].sum(1, keepdim=True)
        return grads

    @abc.abstractmethod
    def _forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """-> ([K, E, q, D], [K, E, q])."""

    @abc.abstractmethod
    def _backward(
        self, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
        causal: bool, scale: float,
    ) -> Grads:  # fmt: skip
        """-> gradients [K, E, q, D] and twice [K, E or 1, n, D]."""


class CpuFlash(PerSequence):
    """torch's flash attention for CPU. Key heads are expanded by stride 0, never copied."""

    def _forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, _expand(key, query), _expand(value, query), 0.0, causal, attn_mask=None, scale=scale
        )

    def _backward(
        self, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
        causal: bool, scale: float,
    ) -> Grads:  # fmt: skip
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_output, query, _expand(key, query), _expand(value, query), output, lse, 0.0, causal, attn_mask=None,
            scale=scale,
        )  # fmt: skip


class Portable(PerSequence):
    """Plain tensor operations in slices of queries: any device and precision, [rows, n] scores at a time."""

    max_scores: int = 1 << 24

    def _forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        outputs, lses = [], []
        for rows in self._slices(query, key):
            scores = _scores(query, key, rows, causal, scale)
            lse = scores.logsumexp(-1)
            outputs.append(torch.matmul(torch.exp(scores - lse[..., None]).to(value.dtype), value))
            lses.append(lse)
        return torch.cat(outputs, -2), torch.cat(lses, -1)

    def _backward(
        self, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
        causal: bool, scale: float,
    ) -> Grads:  # fmt: skip
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
    """[K, E, rows, n] scaled scores in at least float32; causal counts query i and key i as the same token."""
    dtype = _lse_dtype(query)
    scores = (query[:, :, rows].to(dtype) @ key.to(dtype).mT) * scale
    if causal:
        positions = torch.arange(rows.start, rows.stop, device=query.device)
        later = torch.arange(key.shape[-2], device=query.device) > positions[:, None]
        scores.masked_fill_(later, float("-inf"))
    return scores


def _grouped(states: Tensor, key: Tensor) -> Tensor:
    """[H, ...] -> [K, E, ...], a view."""
    return states.unflatten(0, (key.shape[0], -1))


def _expand(key: Tensor, query: Tensor) -> Tensor:
    return key.expand(-1, query.shape[1], -1, -1)


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32
