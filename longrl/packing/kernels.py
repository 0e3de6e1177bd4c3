"""Kernels of packed attention: independent sequences end to end, with the log-sum-exp that lets results be merged.

One interface for all devices: flash attention of variable lengths on CUDA (the flash-attn package, or torch's own),
flash attention for CPU, and plain tensor operations anywhere. Query heads share their key head: no keys are repeated.

Letters: H query heads, K key heads, E = H / K; Q and N all queries and keys of a call, q and n those of one sequence;
D head size.
"""

from __future__ import annotations

import abc
import functools
import importlib.util
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from longrl.types import to_device

logger = logging.getLogger(__name__)

VARIABLE = "LONGRL_ATTENTION"
"""Environment variable that forces a kernel: `auto`, or a name of those that run, from `torch_flash3` to `eager`."""
FORMER_NAMES = {"portable": "eager"}
"""Names that the variable may still hold."""
NO_DROPOUT = 0.0
Grads = tuple[Tensor, Tensor, Tensor]
SeqLens = tuple[Tensor, Tensor, int, int]
"""See `_cu_seqlens`."""


@dataclass(frozen=True)
class VarlenBatch:
    """Sequences of various lengths that lie end to end, each with keys of its own.

    Example:
        `VarlenBatch((7, 3), (7, 3), causal=True)`: rows 0..7 see themselves, rows 7..10 see themselves
    """

    query_lengths: tuple[int, ...]
    """Queries of each sequence; at least 1."""
    key_lengths: tuple[int, ...]
    """Keys of each sequence; at least 1, and as many as queries if causal."""
    causal: bool

    @functools.cached_property
    def slices(self) -> list[tuple[slice, slice]]:
        """(rows of the queries, rows of the keys) of each sequence."""
        slices = []
        row = 0
        key = 0
        for num_queries, num_keys in zip(self.query_lengths, self.key_lengths, strict=True):
            slices.append((slice(row, row + num_queries), slice(key, key + num_keys)))
            row += num_queries
            key += num_keys
        return slices


class Kernel(Protocol):
    """Attention of packed sequences, and its backward from a log-sum-exp that may span more keys than they have."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, batch: VarlenBatch, scale: float
    ) -> tuple[Tensor, Tensor]:
        """[H, Q, D] queries on [K, N, D] keys and values -> ([H, Q, D], log-sum-exp [H, Q])."""

    def backward(self, *states: Tensor, batch: VarlenBatch, scale: float) -> Grads:
        """Gradients of query [H, Q, D], key [K, N, D] and value [K, N, D].

        `states` are the output's gradient [H, Q, D], query, key, value, output [H, Q, D] and log-sum-exp [H, Q].
        """


def kernel_for(query: Tensor) -> Kernel:
    """The fastest kernel that is exact on this device and precision, or the one that `LONGRL_ATTENTION` names.

    Raises:
        ValueError: the kernel named is unknown or does not run on these tensors.
    """
    return kernel_of(query.device, query.dtype, query.shape[-1])


def kernel_of(device: torch.device, dtype: torch.dtype, head_size: int) -> Kernel:
    """`kernel_for` queries that are not there yet."""
    return _select_kernel(device, dtype, head_size, os.environ.get(VARIABLE, "auto"))


def kernel_name(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """The name of `kernel_of`, as `LONGRL_ATTENTION` takes it."""
    kernel = kernel_of(device, dtype, head_size)
    available = _available_kernels(device, dtype, head_size)
    return next(name for name, kind in available.items() if kind is type(kernel))


@functools.cache
def _select_kernel(device: torch.device, dtype: torch.dtype, head_size: int, requested: str) -> Kernel:
    available = _available_kernels(device, dtype, head_size)
    names = list(available) if requested == "auto" else [FORMER_NAMES.get(requested, requested)]
    if names[0] not in available:
        raise ValueError(
            f"{VARIABLE} must be auto or a kernel that runs on {dtype} heads of size {head_size} on {device.type}, "
            f"which are {', '.join(available)}; got {requested!r}: unset it, or use bfloat16 on a GPU with flash-attn "
            "installed"
        )
    for name in names:
        try:
            kernel = available[name]()
        except KernelNotUsable as error:
            if requested != "auto":
                raise
            logger.warning("attention by %s is not possible: %s", name, error)
            continue
        logger.info("attention on %s in %s with heads of size %d: %s", device.type, dtype, head_size, name)
        return kernel
    raise AssertionError("plain tensor operations are always possible")


def _available_kernels(device: torch.device, dtype: torch.dtype, head_size: int) -> dict[str, Callable[[], Kernel]]:
    """Kernels that run on such tensors, the fastest first."""
    kernels: dict[str, Callable[[], Kernel]] = {}
    if device.type == "cpu":
        kernels["cpu_flash"] = CpuFlashKernel
    if device.type == "cuda":
        # What both flash kernels ask for; ROCm's give the log-sum-exp another shape.
        fits = dtype in (torch.float16, torch.bfloat16) and head_size % 8 == 0 and head_size <= 256
        if fits and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0):
            on_hopper = torch.cuda.get_device_capability(device)[0] == 9
            if on_hopper and importlib.util.find_spec("flash_attn_interface"):  # FlashAttention-3's module
                kernels["torch_flash3"] = TorchFlash3Kernel
            if _has_flash_attn_2():
                kernels["flash_attn"] = FlashAttnKernel
            if torch.backends.cuda.is_flash_attention_available():
                kernels["torch_flash"] = TorchFlashKernel
    kernels["eager"] = EagerKernel
    return kernels


def _has_flash_attn_2() -> bool:
    """True if flash-attn is installed in a version whose interface `FlashAttnKernel` knows.

    A module `flash_attn` says nothing: flash-attn-4 is a distribution of its own that puts `flash_attn.cute` there.
    """
    try:
        found = version("flash-attn")
    except PackageNotFoundError:
        return False
    major, minor = (int(number) for number in re.findall(r"\d+", found)[:2])
    if major == 2 and minor >= 7:
        return True
    logger.warning("flash-attn %s is not used: longrl calls the interface of 2.7 and newer, below 3", found)
    return False


# -------------------------------------------------------------------------------------- all sequences in one call, CUDA


class VarlenKernel(abc.ABC):
    """Flash attention of variable lengths: all sequences in one call, key heads shared within the kernel.

    The kernels read `[rows, heads, D]` of any stride but the last, which is a view of our `[heads, rows, D]`. The two
    packages differ in the order of what follows the tensors.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, batch: VarlenBatch, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        states = [x.transpose(0, 1) for x in (query, key, value)]
        output, lse = self.forward_rows(states, _cu_seqlens(batch, query.device), batch.causal, scale)
        return output.transpose(0, 1), lse

    def backward(self, *states: Tensor, batch: VarlenBatch, scale: float) -> Grads:
        """See `Kernel.backward`."""
        *by_head, lse = states
        by_row = [x.transpose(0, 1) for x in by_head]
        by_row = [x if x.stride(-1) == 1 else x.contiguous() for x in by_row]
        seqlens = _cu_seqlens(batch, lse.device)
        query, key, value = self.backward_rows([*by_row, lse.contiguous()], seqlens, batch.causal, scale)
        return query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)

    @abc.abstractmethod
    def forward_rows(self, states: list[Tensor], seqlens: SeqLens, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Query [Q, H, D], key and value [N, K, D] -> ([Q, H, D], [H, Q])."""

    @abc.abstractmethod
    def backward_rows(self, states: list[Tensor], seqlens: SeqLens, causal: bool, scale: float) -> Grads:
        """Output's gradient [Q, H, D], query, key, value, output, log-sum-exp [H, Q] -> gradients."""


class TorchFlashKernel(VarlenKernel):
    """torch's own flash attention 2 for CUDA (torch 2.11 and newer); needs no other package.

    Args:
        forward_op: `aten::_flash_attention_forward`, or what stands in for it in a test.
        backward_op: `aten::_flash_attention_backward`, likewise.
    """

    def __init__(self, forward_op: Any = None, backward_op: Any = None) -> None:
        self.forward_op = forward_op or torch.ops.aten._flash_attention_forward
        self.backward_op = backward_op or torch.ops.aten._flash_attention_backward

    @override
    def forward_rows(self, states: list[Tensor], seqlens: SeqLens, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        output, lse, *_ = self.forward_op(*states, *seqlens, NO_DROPOUT, causal, False, scale=scale)
        return output, lse

    @override
    def backward_rows(self, states: list[Tensor], seqlens: SeqLens, causal: bool, scale: float) -> Grads:
        unused = torch.zeros(2, dtype=torch.uint64, device=states[0].device)  # the state of the dropout
        return self.backward_op(*states, *seqlens, NO_DROPOUT, causal, unused, unused[0], scale=scale)


class KernelNotUsable(RuntimeError):
    """A kernel's package is there and does not work."""


class TorchFlash3Kernel(TorchFlashKernel):
    """torch's operators with FlashAttention-3 behind them (package flash_attn_interface), for the whole process.

    `scaled_dot_product_attention` takes it from then on too.

    Args:
        forward_op: see `TorchFlashKernel`.
        backward_op: likewise.
    """

    def __init__(self, forward_op: Any = None, backward_op: Any = None) -> None:
        try:
            torch.nn.attention.activate_flash_attention_impl("FA3")
        except (
            ImportError,
            OSError,
            RuntimeError,
        ) as error:  # built for another torch, or without backward pass
            raise KernelNotUsable(f"flash_attn_interface does not load ({error})") from error
        super().__init__(forward_op, backward_op)


class FlashAttnKernel(VarlenKernel):
    """The flash-attn package, 2.7 or newer and below 3.

    Args:
        forward_op: `_flash_attn_varlen_forward`, or what stands in for it in a test.
        backward_op: `_flash_attn_varlen_backward`, likewise.
    """

    def __init__(self, forward_op: Any = None, backward_op: Any = None) -> None:
        if forward_op is None:
            from flash_attn import flash_attn_interface

            forward_op = flash_attn_interface._flash_attn_varlen_forward
            backward_op = flash_attn_interface._flash_attn_varlen_backward
        self.forward_op = forward_op
        self.backward_op = backward_op

    @override
    def forward_rows(self, states: list[Tensor], seqlens: SeqLens, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        output, lse, *_ = self.forward_op(*states, *seqlens, NO_DROPOUT, scale, causal)
        return output, lse

    @override
    def backward_rows(self, states: list[Tensor], seqlens: SeqLens, causal: bool, scale: float) -> Grads:
        query, key, value = states[1:4]
        grads = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
        self.backward_op(
            *states,
            *grads,
            *seqlens,
            NO_DROPOUT,
            scale,
            causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return grads


@functools.lru_cache(maxsize=64)
def _cu_seqlens(batch: VarlenBatch, device: torch.device) -> SeqLens:
    """[n + 1] int32 starts of the sequences among queries and among keys, and the longest of each.

    The longest is given as at least 2: for single queries flash attention would take another path, whose log-sum-exp
    has another shape.
    """
    starts = []
    for lengths in (batch.query_lengths, batch.key_lengths):
        ends = torch.tensor((0, *lengths), dtype=torch.int64).cumsum(0)
        starts.append(to_device(ends.to(torch.int32), device))
    return starts[0], starts[1], max(2, *batch.query_lengths), max(2, *batch.key_lengths)


# ----------------------------------------------------------------------------------------------- one sequence at a time


class PerSequenceKernel(abc.ABC):
    """A kernel of single sequences: queries [K, E, q, D] on keys [K, 1, n, D]."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, batch: VarlenBatch, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        output = torch.empty_like(query)  # [H, Q, D]
        lse = query.new_empty(query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32))  # [H, Q]
        heads = (len(key), -1)  # a view in which the E query heads of a key head lie side by side
        for rows, keys in batch.slices:
            queries = query[:, rows].unflatten(0, heads)  # [K, E, q, D]
            part, part_lse = self._forward(queries, key[:, None, keys], value[:, None, keys], batch.causal, scale)
            output[:, rows] = part.flatten(0, 1)
            lse[:, rows] = part_lse.flatten(0, 1)
        return output, lse

    def backward(self, *states: Tensor, batch: VarlenBatch, scale: float) -> Grads:
        """See `Kernel.backward`."""
        grad_output, query, key, value, output, lse = states
        grads = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
        heads = (len(key), -1)
        grad_output = grad_output.contiguous()
        for rows, keys in batch.slices:
            grad_query, grad_key, grad_value = self._backward(
                grad_output[:, rows].unflatten(0, heads),  # [K, E, q, D]
                query[:, rows].unflatten(0, heads),
                key[:, None, keys],  # [K, 1, n, D]
                value[:, None, keys],
                output[:, rows].unflatten(0, heads),
                lse[:, rows].unflatten(0, heads),  # [K, E, q]
                causal=batch.causal,
                scale=scale,
            )
            grads[0][:, rows] = grad_query.flatten(0, 1)
            # A kernel may give gradients per query head: those of a shared key head add up.
            grads[1][:, keys] = grad_key.sum(1)
            grads[2][:, keys] = grad_value.sum(1)
        return grads

    @abc.abstractmethod
    def _forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """-> ([K, E, q, D], [K, E, q])."""

    @abc.abstractmethod
    def _backward(self, *states: Tensor, causal: bool, scale: float) -> Grads:
        """The states of `Kernel.backward` -> gradients [K, E, q, D] and twice [K, E or 1, n, D]."""


class CpuFlashKernel(PerSequenceKernel):
    """torch's flash attention for CPU. Key heads are expanded by stride 0, never copied."""

    @override
    def _forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        shape = (-1, query.shape[1], -1, -1)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key.expand(shape), value.expand(shape), NO_DROPOUT, causal, attn_mask=None, scale=scale
        )

    @override
    def _backward(self, *states: Tensor, causal: bool, scale: float) -> Grads:
        grad_output, query, key, value, output, lse = states
        shape = (-1, query.shape[1], -1, -1)
        states = (grad_output, query, key.expand(shape), value.expand(shape), output, lse)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *states, NO_DROPOUT, causal, attn_mask=None, scale=scale
        )


class EagerKernel(PerSequenceKernel):
    """Plain tensor operations in slices of queries: any device and precision, [slice, n] scores at a time."""

    max_scores: int = 1 << 24

    @override
    def _forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        outputs = []
        lses = []
        for rows in self._slices(query, key):
            scores = _scores(query, key, rows, causal, scale)  # [K, E, slice, n]
            lse = scores.logsumexp(-1)
            probs = torch.exp(scores - lse[..., None])
            outputs.append(probs.to(value.dtype) @ value)
            lses.append(lse)
        return torch.cat(outputs, -2), torch.cat(lses, -1)

    @override
    def _backward(self, *states: Tensor, causal: bool, scale: float) -> Grads:
        grad_output, query, key, value, output, lse = states
        dtype = torch.promote_types(query.dtype, torch.float32)
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros_like(key, dtype=dtype)
        grad_value = torch.zeros_like(value, dtype=dtype)
        delta = (grad_output.to(dtype) * output.to(dtype)).sum(-1, keepdim=True)  # [K, E, q, 1]
        for rows in self._slices(query, key):
            # With the log-sum-exp of all keys that a row sees, these are its true probabilities.
            probs = torch.exp(_scores(query, key, rows, causal, scale) - lse[:, :, rows, None])  # [K, E, slice, n]
            grad = grad_output[:, :, rows].to(dtype)
            grad_scores = probs * (grad @ value.to(dtype).mT - delta[:, :, rows]) * scale
            grad_query[:, :, rows] = (grad_scores @ key.to(dtype)).to(query.dtype)
            grad_key += (grad_scores.mT @ query[:, :, rows].to(dtype)).sum(1, keepdim=True)
            grad_value += (probs.mT @ grad).sum(1, keepdim=True)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)

    def _slices(self, query: Tensor, key: Tensor) -> list[slice]:
        num_queries = query.shape[-2]
        step = max(1, self.max_scores // (query.shape[0] * query.shape[1] * key.shape[-2]))
        return [slice(start, min(start + step, num_queries)) for start in range(0, num_queries, step)]


def _scores(query: Tensor, key: Tensor, rows: slice, causal: bool, scale: float) -> Tensor:
    """[K, E, slice, n] scaled scores in at least float32; causal counts query i and key i as the same token."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = (query[:, :, rows].to(dtype) @ key.to(dtype).mT) * scale
    if causal:
        positions = torch.arange(rows.start, rows.stop, device=query.device)
        later = torch.arange(key.shape[-2], device=query.device) > positions[:, None]  # [slice, n]
        scores.masked_fill_(later, float("-inf"))
    return scores
