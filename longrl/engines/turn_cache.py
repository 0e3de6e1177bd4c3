"""Keys and values of completions of several turns: each has a length of its own, and reads what it is shown.

Letters: P prompts, G completions each, S tokens of the longest completion that samples, N rows of a forward pass that
completions are shown, D head size, H query heads, K key heads, V value heads of a linear layer, F their size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from longrl.engines.prefix_cache import KeysValues, PrefixCache
from longrl.packing.attention import attend_all, merge_attention, take_rows
from longrl.packing.delta_net import DeltaPast, DeltaRows, DeltaWeights, delta_sequences
from longrl.packing.kernels import VarlenBatch, kernel_for
from longrl.types import GroupSpan, to_device


@dataclass(frozen=True)
class Piece:
    """Rows of a forward pass that one completion is shown."""

    row: int
    """The completion's among the P * G."""
    start: int
    stop: int
    """Where they lie among all of the pass."""

    @property
    def count(self) -> int:
        """How many there are."""
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        """From start to stop."""
        return slice(self.start, self.stop)


class TurnCache(PrefixCache):
    """The prompts of one call of `generate_turns`, and completions that wait for answers and are shown them.

    A decoding step computes all completions. What it makes of one that does not sample is never read: such a completion
    gets no longer, and its linear layers' states are put aside by `hold` and taken from there by what it is shown.

    Args:
        spans: the prompts, one behind the other.
        num_generations: G.
        max_tokens: room of a completion at first.
        most_tokens: the longest completion that is expected; room grows up to it in few steps.
        device: of keys and values.
    """

    def __init__(
        self,
        spans: tuple[GroupSpan, ...],
        num_generations: int,
        max_tokens: int,
        most_tokens: int,
        device: torch.device,
    ) -> None:
        super().__init__(spans, num_generations, max_tokens, device)
        self.most_tokens = most_tokens
        num_completions = len(spans) * num_generations
        self.lengths = [0] * num_completions
        """Tokens held of each completion, as the host counts them."""
        self._lengths = torch.zeros(num_completions, dtype=torch.int64, device=device)
        self._rows = torch.arange(num_completions, device=device)
        self._are_uneven = False
        """New keys and values have columns of their own."""
        self._held: dict[int, dict[int, DeltaPast]] = {}
        """row of a completion that waits -> linear layer -> what it keeps, n = 1."""

    # -- decoding --------------------------------------------------------------------------------------------------

    def begin_step(self, sampling: Sequence[int]) -> None:
        """Prepares a decoding step of these completions."""
        lengths = [self.lengths[row] for row in sampling]
        self.length = max(lengths)
        # One that waits may be longer: a column of the others is among its own.
        is_among_own = any(self.lengths[row] > self.length for row in self._held)
        self._are_uneven = min(lengths) < self.length or is_among_own
        self.unseen = None
        if self._are_uneven:
            columns = torch.arange(self.length + 1, device=self._lengths.device)
            is_behind = (columns > self._lengths[:, None])[:, None]  # [P * G, 1, S + 1]
            self.unseen = torch.zeros(is_behind.shape, device=is_behind.device).masked_fill_(is_behind, float("-inf"))

    def end_step(self, sampling: Sequence[int], is_sampling: Tensor) -> None:
        """Counts the new token of these completions, which are those of a [P * G] mask."""
        for row in sampling:
            self.lengths[row] += 1
        self._lengths += is_sampling

    @override
    def _with_new(self, layer: int, key: Tensor, value: Tensor) -> KeysValues:
        if not self._are_uneven:
            return super()._with_new(layer, key, value)
        all_keys, all_values = self.completions[layer]  # [K, P * G, room, D]
        # Who does not sample may have no room left, and what lies in its last column is not read any more.
        columns = self._lengths.clamp_max(self.max_tokens - 1)
        all_keys[:, self._rows, columns] = key
        all_values[:, self._rows, columns] = value
        return all_keys[:, :, : self.length + 1], all_values[:, :, : self.length + 1]

    def hold(self, row: int) -> None:
        """Has a completion wait for an answer: what its linear layers keep is put aside."""
        layers = [*self.prompt_pasts, *self.completion_pasts]
        own = slice(row, row + 1)
        self._held[row] = {layer: DeltaPast(*(part[own].clone() for part in self._past(layer))) for layer in layers}

    # -- shown rows ------------------------------------------------------------------------------------------------

    def reserve(self, row: int, num_tokens: int) -> None:
        """Makes room for so many further tokens of a completion."""
        needed = self.lengths[row] + num_tokens
        if needed <= self.max_tokens:
            return
        self.max_tokens = max(needed, min(2 * self.max_tokens, self.most_tokens))
        for layer, (keys, values) in self.completions.items():
            missing = self.max_tokens - keys.shape[2]
            self.completions[layer] = (pad(keys, (0, 0, 0, missing)), pad(values, (0, 0, 0, missing)))

    def append(
        self, pieces: tuple[Piece, ...], layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """`LayerAttention`, once `pieces` are bound, of rows that completions are shown.

        Args:
            pieces: end to end, completions in rising order; N rows together.
            layer: number of the layer.
            query: [1, H, N, D].
            key: [1, K, N, D].
            value: [1, K, N, D].
            scale: factor on the scores.

        Returns:
            [1, H, N, D].
        """
        queries, keys, values = query[0], key[0], value[0]
        # 1. Every completion's rows see themselves.
        counts = tuple(piece.count for piece in pieces)
        causal = VarlenBatch(counts, counts, causal=True)
        output, lse = kernel_for(query).forward(queries, keys, values, causal, scale)  # [H, N, D], [H, N]
        # 2. And what the completion has said and was shown before, and its prompt.
        self._attend_own(pieces, layer, queries, output, lse, scale)
        self._attend_prompts(pieces, layer, queries, output, lse, scale)
        # 3. Then they go behind what was.
        own_keys, own_values = self.completions[layer]  # [K, P * G, room, D]
        for piece in pieces:
            length = self.lengths[piece.row]
            here = slice(length, length + piece.count)
            own_keys[:, piece.row, here] = keys[:, piece.rows]
            own_values[:, piece.row, here] = values[:, piece.rows]
        return output[None]

    def _attend_own(
        self, pieces: Sequence[Piece], layer: int, queries: Tensor, output: Tensor, lse: Tensor, scale: float
    ) -> None:
        """Adds what rows see of their own completions to `output` [H, N, D] and `lse` [H, N]: one call for all."""
        pieces = [piece for piece in pieces if self.lengths[piece.row]]
        if not pieces:  # all turns were of one token, which is the first of these rows
            return
        keys, values = self.completions[layer]  # [K, P * G, room, D]
        seen_keys = torch.cat([keys[:, piece.row, : self.lengths[piece.row]] for piece in pieces], 1)
        seen_values = torch.cat([values[:, piece.row, : self.lengths[piece.row]] for piece in pieces], 1)
        queries_of_pieces = take_rows(queries, [piece.rows for piece in pieces])
        heads_per_key = len(queries) // len(keys)
        batch = VarlenBatch(
            tuple(piece.count * heads_per_key for piece in pieces),
            tuple(self.lengths[piece.row] for piece in pieces),
            causal=False,
        )
        part, part_lse = attend_all(kernel_for(queries), queries_of_pieces, seen_keys, seen_values, batch, scale)
        start = 0
        for piece in pieces:
            stop = start + piece.count
            merge_attention(output[:, piece.rows], lse[:, piece.rows], part[:, start:stop], part_lse[:, start:stop])
            start = stop

    def _attend_prompts(
        self, pieces: Sequence[Piece], layer: int, queries: Tensor, output: Tensor, lse: Tensor, scale: float
    ) -> None:
        """Adds what rows see of their prompts to `output` [H, N, D] and `lse` [H, N]; no prompt's keys are copied."""
        keys, values = self.prompts[layer]  # [K, T, D]
        heads_per_key = len(queries) // len(keys)
        # Rows of a group's completions lie side by side and read the same keys.
        for number, group in itertools.groupby(pieces, lambda piece: piece.row // self.num_generations):
            of_prompt = list(group)
            rows = slice(of_prompt[0].start, of_prompt[-1].stop)
            span = self.spans[number]
            seen = slice(span.start, span.stop)
            batch = VarlenBatch(((rows.stop - rows.start) * heads_per_key,), (span.prompt_tokens,), causal=False)
            kernel = kernel_for(queries)
            part, part_lse = attend_all(kernel, queries[:, rows], keys[:, seen], values[:, seen], batch, scale)
            merge_attention(output[:, rows], lse[:, rows], part, part_lse)

    def append_recurrence(
        self, pieces: tuple[Piece, ...], layer: int, inputs: DeltaRows, weights: DeltaWeights
    ) -> Tensor:
        """`LayerRecurrence`, once `pieces` are bound, of rows that completions are shown; [N, V, F].

        Args:
            pieces: end to end; their completions wait.
            layer: number of the layer.
            inputs: of the N rows.
            weights: of the layer.
        """
        held = [self._held[piece.row][layer] for piece in pieces]
        past = DeltaPast(*(torch.cat(parts) for parts in zip(*held, strict=True)))
        output, ends = delta_sequences(inputs, weights, tuple(piece.count for piece in pieces), past)
        for index, piece in enumerate(pieces):
            self._held[piece.row][layer] = DeltaPast(*(end[index : index + 1] for end in ends))
        return output

    def end_append(self, pieces: tuple[Piece, ...]) -> None:
        """Counts the rows of a forward pass."""
        for piece in pieces:
            self.lengths[piece.row] += piece.count
        self._lengths = to_device(torch.tensor(self.lengths), self._lengths.device)

    def resume(self, row: int) -> None:
        """Lets a completion go on from the states that `append_recurrence` has left."""
        for layer, past in self._held.pop(row).items():
            for of_all, own in zip(self._past(layer), past, strict=True):
                of_all[row : row + 1] = own

    # -- fewer completions -----------------------------------------------------------------------------------------

    def keep(self, prompts: Sequence[int], rows: Sequence[int]) -> None:
        """Goes on with some completions alone, which are numbered anew.

        Args:
            prompts: numbers of those that have completions left, in rising order.
            rows: of these completions, as many of each prompt, side by side.
        """
        device = self._lengths.device
        index = to_device(torch.tensor(rows), device)
        for layer in tuple(self.prompt_pasts):
            self._past(layer)  # forked now: afterwards P and G are others
        for layer, past in self.completion_pasts.items():
            self.completion_pasts[layer] = DeltaPast(*(part[index] for part in past))
        for layer, states in self.completions.items():
            keys, values = (part[:, index] for part in states)
            self.completions[layer] = (keys, values)
        if len(prompts) < len(self.spans):
            slices = [slice(self.spans[number].start, self.spans[number].stop) for number in prompts]
            for layer, states in self.prompts.items():
                keys, values = (take_rows(part, slices).contiguous() for part in states)
                self.prompts[layer] = (keys, values)
            lengths = [self.prompt_lengths[number] for number in prompts]
            stops = itertools.accumulate(lengths)
            spans = [GroupSpan(stop - length, length, ()) for stop, length in zip(stops, lengths, strict=True)]
            self._set_spans(tuple(spans), device)
            self.padded.clear()
        self.num_generations = len(rows) // len(prompts)
        self.lengths = [self.lengths[row] for row in rows]
        self._lengths = self._lengths[index]
        self._rows = self._rows[: len(rows)]
        self._held = {new: self._held[old] for new, old in enumerate(rows) if old in self._held}
