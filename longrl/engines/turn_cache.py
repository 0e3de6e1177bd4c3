"""Keys and values of completions of several turns: each has a length of its own, and reads what it is shown.

Letters: P prompts, G completions each, S tokens of the longest completion, D head size, H query heads, K key heads, E
query heads of each, c rows of a chunk.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from longrl.engines.prefix_cache import KeysValues, PrefixCache
from longrl.packing.attention import attend_all, merge_attention
from longrl.packing.delta_net import DeltaPast, DeltaRows, DeltaWeights, delta_sequences
from longrl.packing.kernels import VarlenBatch, kernel_for
from longrl.types import GroupSpan, to_device


class Piece(NamedTuple):
    """Rows that one completion is shown in one forward pass."""

    completion: int
    """Among the P * G."""
    count: int


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
        """completion that waits -> linear layer -> what it keeps, n = 1."""

    # -- decoding --------------------------------------------------------------------------------------------------

    def begin_step(self, sampling: Sequence[int]) -> None:
        """Prepares a decoding step of these completions."""
        lengths = [self.lengths[index] for index in sampling]
        self.length = max(lengths)
        # One that waits may be longer: a column of the others is among its own.
        self._are_uneven = any(self.lengths[index] != self.length for index in sampling)
        self._are_uneven |= any(self.lengths[index] > self.length for index in self._held)
        self.unseen = None
        if self._are_uneven:
            columns = torch.arange(self.length + 1, device=self._lengths.device)
            self.unseen = (columns > self._lengths[:, None])[:, None]  # [P * G, 1, S + 1]

    def end_step(self, sampling: Sequence[int], is_sampling: Tensor) -> None:
        """Counts the new token of these completions, which are those of a [P * G] mask."""
        for index in sampling:
            self.lengths[index] += 1
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

    def hold(self, completion: int) -> None:
        """Puts aside what a completion's linear layers keep, as it waits for an answer."""
        layers = [*self.prompt_pasts, *self.completion_pasts]
        rows = slice(completion, completion + 1)
        self._held[completion] = {
            layer: DeltaPast(*(part[rows].clone() for part in self._past(layer))) for layer in layers
        }

    # -- shown rows ------------------------------------------------------------------------------------------------

    def reserve(self, completion: int, num_tokens: int) -> None:
        """Makes room for so many further tokens of a completion."""
        needed = self.lengths[completion] + num_tokens
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
            pieces: of completions in rising order, end to end in the c rows.
            layer: number of the layer.
            query: [1, H, c, D].
            key: [1, K, c, D].
            value: [1, K, c, D].
            scale: factor on the scores.

        Returns:
            [1, H, c, D].
        """
        queries = query[0]
        keys, values = self.completions[layer]  # [K, P * G, room, D]
        heads_per_key = len(queries) // len(keys)
        counts = tuple(piece.count for piece in pieces)
        edges = list(itertools.accumulate(counts, initial=0))
        # 1. Keys and values go into the cache.
        for piece, (start, stop) in zip(pieces, itertools.pairwise(edges), strict=True):
            length = self.lengths[piece.completion]
            keys[:, piece.completion, length : length + piece.count] = key[0, :, start:stop]
            values[:, piece.completion, length : length + piece.count] = value[0, :, start:stop]
        # 2. Every completion's rows see themselves.
        kernel = kernel_for(query)
        causal = VarlenBatch(counts, counts, causal=True)
        output, lse = kernel.forward(queries, key[0], value[0], causal, scale)  # [H, c, D], [H, c]
        # 3. And what the completion has said and was shown before.
        for piece, (start, stop) in zip(pieces, itertools.pairwise(edges), strict=True):
            length = self.lengths[piece.completion]
            if length:
                own = (keys[:, piece.completion, :length], values[:, piece.completion, :length])
                across = VarlenBatch((piece.count * heads_per_key,), (length,), causal=False)
                part, part_lse = attend_all(kernel, queries[:, start:stop], *own, across, scale)
                merge_attention(output[:, start:stop], lse[:, start:stop], part, part_lse)
        # 4. And its prompt; rows of a group's completions lie side by side and read the same keys.
        prompt_keys, prompt_values = self.prompts[layer]  # [K, T, D]
        start = 0
        for number, of_prompt in itertools.groupby(pieces, lambda piece: piece.completion // self.num_generations):
            stop = start + sum(piece.count for piece in of_prompt)
            span = self.spans[number]
            prompt = (prompt_keys[:, span.start : span.stop], prompt_values[:, span.start : span.stop])
            across = VarlenBatch(((stop - start) * heads_per_key,), (span.prompt_tokens,), causal=False)
            part, part_lse = attend_all(kernel, queries[:, start:stop], *prompt, across, scale)
            merge_attention(output[:, start:stop], lse[:, start:stop], part, part_lse)
            start = stop
        return output[None]

    def append_recurrence(
        self, pieces: tuple[Piece, ...], layer: int, inputs: DeltaRows, weights: DeltaWeights
    ) -> Tensor:
        """`LayerRecurrence`, once `pieces` are bound, of rows that completions are shown; [c, V, F].

        Args:
            pieces: of completions, end to end in the c rows; all of them wait.
            layer: number of the layer.
            inputs: of the rows.
            weights: of the layer.
        """
        held = [self._held[piece.completion][layer] for piece in pieces]
        past = DeltaPast(*(torch.cat(parts) for parts in zip(*held, strict=True)))
        output, ends = delta_sequences(inputs, weights, tuple(piece.count for piece in pieces), past)
        for index, piece in enumerate(pieces):
            self._held[piece.completion][layer] = DeltaPast(*(end[index : index + 1] for end in ends))
        return output

    def end_append(self, pieces: tuple[Piece, ...]) -> None:
        """Counts the rows of one forward pass."""
        for completion, count in pieces:
            self.lengths[completion] += count
        self._lengths = to_device(torch.tensor(self.lengths), self._lengths.device)

    def resume(self, completion: int) -> None:
        """Lets a completion go on from the states that `append_recurrence` has left."""
        for layer, past in self._held.pop(completion).items():
            for of_all, own in zip(self._past(layer), past, strict=True):
                of_all[completion : completion + 1] = own
