"""Gated delta nets over packed groups: every prompt once, each completion from the state in which its prompt ends.

A sequence needs two things of what came before it: the rows that the convolution still sees and the state of the rule,
whatever the length of the past. So a group costs its prompt once, and a completion nothing beyond its own rows;
gradients of a group's completions add up in their prompt's state.

Letters: R rows, n sequences, C channels of the convolution (queries, keys, values), K key heads, V value heads, E size
of a key, F of a value.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from longrl.packing.delta_kernels import delta_kernel_for
from longrl.strategies.sequence import SequenceParallel
from longrl.types import GroupSpan, to_device


class DeltaRows(NamedTuple):
    """What a layer's projections make of R rows."""

    mixed: Tensor
    """[R, C] queries, keys and values, before the convolution."""
    decay: Tensor
    """[R, V] input of the decay."""
    beta: Tensor
    """[R, V] input of beta."""

    def part(self, rows: Sequence[slice]) -> DeltaRows:
        """The rows of these slices, end to end."""
        if len(rows) == 1:
            return DeltaRows(*(values[rows[0]] for values in self))
        return DeltaRows(*(torch.cat([values[each] for each in rows]) for values in self))


@dataclass(frozen=True)
class DeltaWeights:
    """A layer's weights between its projections, and the sizes of its heads."""

    conv: Tensor
    """[C, taps]."""
    decay_log: Tensor
    """[V] `A_log`."""
    decay_bias: Tensor
    """[V] `dt_bias`."""
    num_key_heads: int
    num_value_heads: int
    key_size: int
    value_size: int

    @property
    def taps(self) -> int:
        """Rows that the convolution sees, the row itself included."""
        return self.conv.shape[1]

    def split(self, channels: Tensor) -> list[Tensor]:
        """[..., C] -> queries and keys [..., K, E], values [..., V, F]."""
        heads = (self.num_key_heads, self.num_key_heads, self.num_value_heads)
        sizes = (self.key_size, self.key_size, self.value_size)
        widths = [count * size for count, size in zip(heads, sizes, strict=True)]
        parts = channels.split(widths, -1)
        return [part.unflatten(-1, (-1, size)) for part, size in zip(parts, sizes, strict=True)]


class DeltaPast(NamedTuple):
    """All that n sequences keep of their past."""

    context: Tensor
    """[n, taps - 1, C] rows before the convolution; zeros where a sequence has fewer."""
    state: Tensor
    """[n, V, E, F] of the rule, in float32 or more."""

    def repeat(self, counts: Sequence[int]) -> DeltaPast:
        """The past of sequence i counts[i] times."""
        repeats = to_device(torch.tensor(counts), self.state.device)
        total = sum(counts)
        return DeltaPast(*(part.repeat_interleave(repeats, 0, output_size=total) for part in self))


def no_past(rows: DeltaRows, weights: DeltaWeights, num_sequences: int) -> DeltaPast:
    """Of sequences that begin here."""
    mixed = rows.mixed
    context = mixed.new_zeros(num_sequences, weights.taps - 1, mixed.shape[1])
    shape = (num_sequences, weights.num_value_heads, weights.key_size, weights.value_size)
    return DeltaPast(context, mixed.new_zeros(shape, dtype=torch.promote_types(mixed.dtype, torch.float32)))


class LayerRecurrence(Protocol):
    """Replaces the recurrence in every linear layer of one forward pass: the rollout engine's decoding is one."""

    def __call__(self, layer: int, rows: DeltaRows, weights: DeltaWeights) -> Tensor:
        """The layer's rows -> [R, V, F]."""


def delta_sequences(
    rows: DeltaRows, weights: DeltaWeights, lengths: tuple[int, ...], past: DeltaPast | None = None
) -> tuple[Tensor, DeltaPast]:
    """Convolution and rule over sequences that lie end to end.

    Args:
        rows: of all sequences.
        weights: of the layer.
        lengths: of the sequences, none of them 0; one may be shorter than the convolution sees.
        past: of each sequence; None if all begin here.

    Returns:
        [R, V, F] outputs, and what a continuation of each sequence needs.
    """
    if past is None:
        past = no_past(rows, weights, len(lengths))
    kernel = delta_kernel_for(rows.mixed)
    # 1. The convolution: every sequence behind its context, so that none sees another.
    index = _context_index(lengths, weights.taps, rows.mixed.device)
    extended = torch.cat([past.context.flatten(0, 1).to(rows.mixed.dtype), rows.mixed])
    extended = extended.index_select(0, index.extended)
    channels = kernel.conv(extended, weights.conv).index_select(0, index.outputs)  # [R, C]
    context = extended.index_select(0, index.last).unflatten(0, (len(lengths), -1))
    # 2. The rule, in which a key head serves several value heads.
    query, key, value = weights.split(channels)
    repeats = weights.num_value_heads // weights.num_key_heads
    query, key = (heads.repeat_interleave(repeats, 1) for heads in (query, key))  # [R, V, E]
    dtype = past.state.dtype
    decay = -weights.decay_log.to(dtype).exp() * softplus(rows.decay.to(dtype) + weights.decay_bias.to(dtype))
    output, state = kernel.rule(query, key, value, decay, rows.beta.sigmoid(), lengths, past.state)
    return output, DeltaPast(context, state)


class _ContextIndex(NamedTuple):
    """Sequences with the taps - 1 rows before each, from those contexts (first) and all rows (behind them)."""

    extended: Tensor
    """[R + n (taps - 1)]."""
    outputs: Tensor
    """[R] where a row's output is among those of the convolution, which is taps - 1 shorter than what it is given."""
    last: Tensor
    """[n (taps - 1)] the last rows of each extended sequence."""


@functools.lru_cache(maxsize=8)  # all layers of a forward pass share two; each has 16 bytes for every row
def _context_index(lengths: tuple[int, ...], taps: int, device: torch.device) -> _ContextIndex:
    before = taps - 1
    row = len(lengths) * before  # the first row of the sequence behind all contexts
    start = 0  # of the extended sequence
    extended, outputs, last = [], [], []
    for index, length in enumerate(lengths):
        extended += [torch.arange(index * before, (index + 1) * before), torch.arange(row, row + length)]
        outputs.append(torch.arange(start, start + length))
        last.append(torch.arange(start + length, start + length + before))
        row += length
        start += length + before
    with torch.inference_mode(False):  # they are kept, and training reads them too
        return _ContextIndex(*(to_device(torch.cat(parts), device) for parts in (extended, outputs, last)))


def shared_prefix_delta(rows: DeltaRows, weights: DeltaWeights, spans: tuple[GroupSpan, ...]) -> Tensor:
    """The recurrence of packed groups, each completion continuing its prompt.

    Args:
        rows: of the packed sequence.
        weights: of the layer.
        spans: where the groups lie, one behind the other from row 0; rows behind the last one get zeros.

    Returns:
        [R, V, F].
    """
    layout = _layout(spans)
    # 1. All prompts, and groups of one completion from end to end.
    output, past = delta_sequences(rows.part(layout.first), weights, _lengths(layout.first))
    parts = list(output.split(_lengths(layout.first)))
    # 2. All completions of the others, from the states in which their prompts end.
    if layout.forked:
        past = past.repeat(layout.num_forks)
        output, _ = delta_sequences(rows.part(layout.forked), weights, _lengths(layout.forked), past)
        parts += output.split(_lengths(layout.forked))
    # 3. Back in the order of the rows.
    starts = [each.start for each in layout.first + layout.forked]
    ordered = torch.cat([parts[index] for index in sorted(range(len(parts)), key=starts.__getitem__)])
    missing = len(rows.mixed) - len(ordered)
    return pad(ordered, (0, 0, 0, 0, 0, missing)) if missing else ordered


class _Layout(NamedTuple):
    """The two calls that a packed sequence takes."""

    first: list[slice]
    """Rows of sequences that begin in themselves."""
    num_forks: list[int]
    """Completions that continue each of them."""
    forked: list[slice]
    """Rows of these completions."""


@functools.lru_cache(maxsize=64)
def _layout(spans: tuple[GroupSpan, ...]) -> _Layout:
    layout = _Layout([], [], [])
    for span in spans:
        nonempty = [count for count in span.completion_tokens if count]
        if len(nonempty) <= 1:  # one sequence
            layout.first.append(slice(span.start, span.stop))
            layout.num_forks.append(0)
            continue
        row = span.start + span.prompt_tokens
        layout.first.append(slice(span.start, row))
        layout.num_forks.append(len(nonempty))
        for count in nonempty:
            layout.forked.append(slice(row, row + count))
            row += count
    return layout


def _lengths(slices: Sequence[slice]) -> tuple[int, ...]:
    return tuple(each.stop - each.start for each in slices)


# ---------------------------------------------------------------------------------------------------------- many ranks


def sequence_parallel_delta(
    rows: DeltaRows, weights: DeltaWeights, spans: tuple[GroupSpan, ...], sequence: SequenceParallel
) -> Tensor:
    """`shared_prefix_delta` by the ranks that share a sequence: of all rows each computes some heads.

    Convolution and rule know one head alone, so what attention does with its heads does here too: value heads travel
    as its queries, the queries and keys that they share as its keys and values. No state passes between ranks.

    Args:
        rows: this rank's, as many as any other's.
        weights: of the layer, all heads.
        spans: where the groups lie in the whole sequence.
        sequence: the ranks.

    Returns:
        [rows of this rank, V, F].
    """
    # 1. Rows of all heads -> all rows of this rank's heads; decay and beta as two more columns of the values.
    query, key, value = (heads.transpose(0, 1) for heads in weights.split(rows.mixed))  # [heads, rows, size]
    gates = torch.stack([rows.decay, rows.beta], -1).transpose(0, 1)  # [V, rows, 2]
    value = torch.cat([value, gates], -1)
    width = max(weights.key_size, weights.value_size + 2)
    value, query, key, layout = sequence.to_heads(*(_widen(heads, width) for heads in (value, query, key)))
    # 2. The weights of these heads, by the same layout.
    local = _local_weights(weights, sequence)
    # 3. The recurrence over whole rows, and back.
    values, decay, beta = value[..., : weights.value_size + 2].split([weights.value_size, 1, 1], -1)
    keys = [heads[..., : weights.key_size] for heads in (query, key)]
    mixed = torch.cat([heads.transpose(0, 1).flatten(1) for heads in (*keys, values)], -1)  # [R, C of this rank]
    output = shared_prefix_delta(DeltaRows(mixed, decay[..., 0].T, beta[..., 0].T), local, spans)  # [R, heads, F]
    return sequence.to_rows(output.transpose(0, 1), layout).transpose(0, 1)


def _widen(heads: Tensor, width: int) -> Tensor:
    """[heads, rows, size] with zeros behind, [heads, rows, width]."""
    return pad(heads, (0, width - heads.shape[-1]))


def _local_weights(weights: DeltaWeights, sequence: SequenceParallel) -> DeltaWeights:
    """Those of this rank's heads; heads that fill the layout up have zeros."""
    query, key, value = (heads.transpose(0, 1) for heads in weights.split(weights.conv.T))  # [heads, taps, size]
    width = max(weights.key_size, weights.value_size)
    value, query, key = sequence.local_heads(*(_widen(heads, width) for heads in (value, query, key)))
    value = value[..., : weights.value_size]
    keys = [heads[..., : weights.key_size] for heads in (query, key)]
    conv = torch.cat([heads.transpose(0, 1).flatten(1) for heads in (*keys, value)], -1).T  # [C of this rank, taps]
    decay = torch.stack([weights.decay_log, weights.decay_bias], -1)[:, None]  # [V, 1, 2]
    unused = decay.new_zeros(weights.num_key_heads, 1, 2)
    decay = sequence.local_heads(decay, unused, unused)[0]
    sizes = (len(key), len(value), weights.key_size, weights.value_size)
    return DeltaWeights(conv, decay[:, 0, 0], decay[:, 0, 1], *sizes)
