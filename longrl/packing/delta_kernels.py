"""Kernels of gated delta nets: a causal convolution, and the gated delta rule over sequences that lie end to end.

The rule (arXiv:2412.06464) keeps a state S [key size, value size] per head; with a token's decay exp(g) and beta

    S_t = exp(g_t) S_t-1 + beta_t k_t (v_t - exp(g_t) S_t-1^T k_t)^T        o_t = S_t^T q_t / sqrt(key size)

where queries and keys have length one. flash-linear-attention computes it on CUDA, all sequences in one call; plain
tensor operations anywhere: tokens of a chunk together (the WY form of arXiv:2406.06484, section 3), chunk after chunk
for all sequences at once.

Letters: R rows of all n sequences, V value heads, E size of a key, F of a value, C channels, N chunks of c rows.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu

from longrl.types import to_device

logger = logging.getLogger(__name__)

VARIABLE = "LONGRL_DELTA_RULE"
"""Environment variable that forces a kernel: `auto`, `fla` or `eager`."""
CHUNK_ROWS = 64
OLDEST_FLA = (0, 4, 0)
"""The first release of flash-linear-attention whose tensors are `[1, R, heads, size]` and nothing else."""
WRONG_TRITON = (3, 4, 0), (3, 7, 1)
"""From the first to before the second: its issue 640, seen with torch 2.11's Triton 3.6 on an H200."""


class DeltaKernel(Protocol):
    """The two parts of a gated delta net that look beyond a row."""

    def conv(self, rows: Tensor, weight: Tensor) -> Tensor:
        """SiLU of the causal convolution of every channel: [R, C] by [C, taps] -> [R - taps + 1, C]."""

    def rule(
        self, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor,
        lengths: tuple[int, ...], state: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The rule over sequences of these lengths, each from a state of its own.

        Args:
            query: [R, V, E], of any length.
            key: [R, V, E], likewise.
            value: [R, V, F].
            decay: [R, V], at most 0, in float32 or more.
            beta: [R, V].
            lengths: of the n sequences, none of them 0.
            state: [n, V, E, F] in float32 or more.

        Returns:
            [R, V, F] in the values' precision, and the states behind the last rows [n, V, E, F].
        """


def delta_kernel_for(rows: Tensor) -> DeltaKernel:
    """The fastest kernel that runs on this device in this precision, or the one that `LONGRL_DELTA_RULE` names.

    Raises:
        ValueError: the kernel named is unknown or does not run on these tensors.
    """
    return _select_kernel(rows.device, rows.dtype, os.environ.get(VARIABLE, "auto"))


def delta_kernel_name(device: torch.device, dtype: torch.dtype) -> str:
    """The name of `delta_kernel_for` such rows, as `LONGRL_DELTA_RULE` takes it."""
    kernel = _select_kernel(device, dtype, os.environ.get(VARIABLE, "auto"))
    return next(name for name, kind in _available_kernels(device, dtype).items() if kind is type(kernel))


@functools.cache
def _select_kernel(device: torch.device, dtype: torch.dtype, requested: str) -> DeltaKernel:
    kernels = _available_kernels(device, dtype)
    name = next(iter(kernels)) if requested == "auto" else requested
    if name not in kernels:
        raise ValueError(
            f"{VARIABLE} must be auto or a kernel that runs in {dtype} on {device.type}, which are "
            f"{', '.join(kernels)}; got {requested!r}: unset it, or install flash-linear-attention beside a GPU"
        )
    kernel = kernels[name]()
    logger.info("gated delta rule on %s in %s: %s", device.type, dtype, name)
    return kernel


def _available_kernels(device: torch.device, dtype: torch.dtype) -> dict[str, type[DeltaKernel]]:
    """Kernels that run on such rows, the fastest first."""
    kernels: dict[str, type[DeltaKernel]] = {"eager": EagerDeltaKernel}
    is_half = dtype in (torch.float16, torch.bfloat16)  # float32 it would round to tf32
    if device.type == "cuda" and is_half and _has_fla(device):
        kernels = {"fla": FlaDeltaKernel, **kernels}
    return kernels


def _has_fla(device: torch.device) -> bool:
    """True if flash-linear-attention is installed in a version whose interface `FlaDeltaKernel` knows, and is right."""
    problem = _problem_of_fla(device)
    if problem:
        logger.warning("gated delta nets are computed by plain tensor operations, which takes longer: %s", problem)
    return not problem


def _problem_of_fla(device: torch.device) -> str | None:
    """Why flash-linear-attention is not used, and what helps."""
    found = _installed("flash-linear-attention")
    if found is None:
        return "flash-linear-attention is not installed; pip install flash-linear-attention causal-conv1d"
    if found < OLDEST_FLA:
        return f"longrl calls flash-linear-attention {_text(OLDEST_FLA)} and newer, and {_text(found)} is installed"
    triton = _installed("triton")
    on_hopper = torch.cuda.get_device_capability(device)[0] == 9
    if on_hopper and triton and WRONG_TRITON[0] <= triton < WRONG_TRITON[1] and not _installed("tilelang"):
        return (
            f"with Triton {_text(triton)} flash-linear-attention's gradients are wrong on Hopper, so that it refuses "
            f"them; install Triton {_text(WRONG_TRITON[1])} or newer, or tilelang"
        )
    return None


def _installed(name: str) -> tuple[int, ...] | None:
    """The version of a distribution, (major, minor, patch)."""
    try:
        return tuple(int(number) for number in re.findall(r"\d+", version(name))[:3])
    except PackageNotFoundError:
        return None


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def convolve(rows: Tensor, weight: Tensor) -> Tensor:
    """`DeltaKernel.conv` by torch: [R, C] by [C, taps] -> [R - taps + 1, C]."""
    weight = weight.to(rows.dtype)
    output = conv1d(rows.T[None], weight[:, None], groups=len(weight))[0].T
    return silu(output)


# ----------------------------------------------------------------------------------------- flash-linear-attention, CUDA


class FlaDeltaKernel:
    """flash-linear-attention's chunked rule, and causal-conv1d where that is installed; all sequences in one call.

    Args:
        rule_op: `fla.ops.gated_delta_rule.chunk_gated_delta_rule`, or what stands in for it in a test.
        step_op: `fla.ops.gated_delta_rule.fused_recurrent_gated_delta_rule`, likewise; for one row per sequence
            without gradients.
        conv_op: `causal_conv1d.causal_conv1d_fn`, likewise.
    """

    def __init__(self, rule_op: Any = None, step_op: Any = None, conv_op: Any = None) -> None:
        if rule_op is None:
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

            rule_op = chunk_gated_delta_rule
            step_op = fused_recurrent_gated_delta_rule
        self.rule_op = rule_op
        self.step_op = step_op
        self.conv_op = conv_op or _causal_conv1d()

    def conv(self, rows: Tensor, weight: Tensor) -> Tensor:
        """See `DeltaKernel.conv`."""
        num_channels, taps = weight.shape
        if self.conv_op is None or not _has_conv_kernel(num_channels, taps):
            return convolve(rows, weight)
        output = self.conv_op(rows.T[None], weight.to(rows.dtype), None, activation="silu")  # [1, C, R]
        return output[0].T[taps - 1 :]

    def rule(
        self, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor,
        lengths: tuple[int, ...], state: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See `DeltaKernel.rule`."""
        operator = self.step_op if max(lengths) == 1 and not torch.is_grad_enabled() else self.rule_op
        output, final = operator(
            query[None], key[None], value[None],
            g=decay[None],
            beta=beta[None],
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=_starts(lengths, query.device),
        )  # fmt: skip
        return output[0], final


def _causal_conv1d() -> Any:
    """causal-conv1d's function, or None."""
    try:
        from causal_conv1d import causal_conv1d_fn
    except ImportError:
        logger.warning("causal-conv1d is not installed: torch's convolution is used")
        return None
    return causal_conv1d_fn


@functools.cache  # said once
def _has_conv_kernel(num_channels: int, taps: int) -> bool:
    """True if causal-conv1d has a kernel of so many taps, and takes so many channels of rows that lie end to end."""
    if 2 <= taps <= 4 and num_channels % 8 == 0:
        return True
    logger.warning("causal-conv1d takes no %d channels by %d taps: torch's convolution is used", num_channels, taps)
    return False


@functools.lru_cache(maxsize=64)
def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[n + 1] int64 first rows of the sequences."""
    with torch.inference_mode(False):  # it is kept, and training reads it too
        return to_device(torch.tensor((0, *lengths)).cumsum(0), device)


# ---------------------------------------------------------------------------------------------- plain tensor operations


class EagerDeltaKernel:
    """Plain tensor operations: any device, in float32 or the precision of the rows if that is more."""

    def conv(self, rows: Tensor, weight: Tensor) -> Tensor:
        """See `DeltaKernel.conv`."""
        return convolve(rows, weight)

    def rule(
        self, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor,
        lengths: tuple[int, ...], state: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See `DeltaKernel.rule`."""
        dtype = torch.promote_types(value.dtype, torch.float32)
        with torch.autocast(value.device.type, enabled=False):
            query = _unit(query.to(dtype)) / query.shape[-1] ** 0.5
            key = _unit(key.to(dtype))
            gates = decay.to(dtype), beta.to(dtype)
            output, final = _chunked_rule(query, key, value.to(dtype), *gates, lengths, state.to(dtype))
        return output.to(value.dtype), final


def _unit(vectors: Tensor) -> Tensor:
    """[..., E] divided by their lengths, as flash-linear-attention does it."""
    return vectors * torch.rsqrt((vectors * vectors).sum(-1, keepdim=True) + 1e-6)


def _chunked_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, lengths: tuple[int, ...], state: Tensor
) -> tuple[Tensor, Tensor]:
    """[R, V, E] twice, [R, V, F], [R, V] twice, [n, V, E, F] -> ([R, V, F], [n, V, E, F]), all in one precision."""
    size = min(CHUNK_ROWS, 1 << (max(lengths) - 1).bit_length())  # short sequences are not filled up to 64 rows
    plan = _chunk_plan(lengths, size, query.device)
    # 1. Rows in chunks, [N, V, c, size]; those that fill a chunk up write nothing and keep the state as it is.
    query, key, value = (plan.to_chunks(rows) for rows in (query, key, value))
    decay, beta = (plan.to_chunks(rows[..., None])[..., 0] for rows in (decay, beta))  # [N, V, c]
    # 2. How far a row's decay reaches within its chunk: to later rows, from its start and to its end.
    total = decay.cumsum(-1)  # [N, V, c]
    later = torch.ones(plan.size, plan.size, dtype=torch.bool, device=query.device).triu(1)
    between = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()  # [N, V, c, c]
    from_start = total.exp()[..., None]  # [N, V, c, 1]
    to_end = (total[..., -1:] - total).exp()[..., None]  # [N, V, c, 1]
    # 3. What the rows of a chunk write, if its state at the start were 0; and what is to be taken off per state.
    weighted_key = key * beta[..., None]
    system = (weighted_key @ key.mT) * between  # the part below the diagonal; solve_triangular reads no other
    sides = torch.cat([value * beta[..., None], weighted_key * from_start], -1)  # [N, V, c, F + E]
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    written, taken_off = solved.split([value.shape[-1], key.shape[-1]], -1)
    # 4. From chunk to chunk, all sequences that have a further one together.
    keys = (key * to_end).mT  # [N, V, E, c]
    kept = from_start[..., -1:, :]  # [N, V, 1, 1]
    running = state[plan.order]
    ended: list[Tensor] = []
    states: list[Tensor] = []
    writes: list[Tensor] = []
    parts = (part.split(plan.counts) for part in (written, taken_off, keys, kept))
    for write, off, into, keep in zip(*parts, strict=True):
        ended.append(running[len(write) :])
        running = running[: len(write)]
        states.append(running)
        writes.append(write - off @ running)
        running = running * keep + into @ writes[-1]
    final = torch.cat([running, *reversed(ended)])[plan.place]
    # 5. What the rows read: of the state at their chunk's start, and of what their chunk has written up to them.
    scores = (query @ key.mT) * between
    output = (query * from_start) @ torch.cat(states) + scores @ torch.cat(writes)  # [N, V, c, F]
    return plan.to_rows(output), final


@dataclass(frozen=True)
class _ChunkPlan:
    """The chunks of some sequences: first those that begin one, then the second ones, and so on."""

    size: int
    """Rows of a chunk, c."""
    counts: tuple[int, ...]
    """Sequences that have a first chunk, a second one, ..."""
    places: Tensor
    """[R] where a row lies among those of all chunks."""
    order: Tensor
    """[n] the sequences, those of most chunks first."""
    place: Tensor
    """[n] where a sequence is in that order."""

    def to_chunks(self, rows: Tensor) -> Tensor:
        """[R, V, size] -> [N, V, c, size], zeros where a sequence has no row."""
        padded = rows.new_zeros(sum(self.counts) * self.size, *rows.shape[1:])
        return padded.index_copy(0, self.places, rows).unflatten(0, (-1, self.size)).transpose(1, 2)

    def to_rows(self, chunks: Tensor) -> Tensor:
        """[N, V, c, size] -> [R, V, size]."""
        return chunks.transpose(1, 2).flatten(0, 1).index_select(0, self.places)


@functools.lru_cache(maxsize=8)  # all layers of a forward pass share two; each has 8 bytes for every row
def _chunk_plan(lengths: tuple[int, ...], size: int, device: torch.device) -> _ChunkPlan:
    num_chunks = [-(-length // size) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda index: -num_chunks[index])
    counts = tuple(sum(number > step for number in num_chunks) for step in range(max(num_chunks)))
    starts = list(itertools.accumulate(counts, initial=0))
    place = _inverse(order)
    places = []
    for index, length in enumerate(lengths):
        rows = torch.arange(length)
        first_of_chunk = torch.tensor(starts)[rows // size] + place[index]
        places.append(first_of_chunk * size + rows % size)
    tensors = (torch.cat(places), torch.tensor(order), torch.tensor(place))
    with torch.inference_mode(False):  # they are kept, and training reads them too
        return _ChunkPlan(size, counts, *(to_device(tensor.clone(), device) for tensor in tensors))


def _inverse(order: Sequence[int]) -> list[int]:
    """The inverse of a permutation."""
    return sorted(range(len(order)), key=order.__getitem__)
