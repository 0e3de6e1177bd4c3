"""Keys and values of prompts, each once, and of their completions, while `HFEngine` decodes; states of linear layers.

Letters: P prompts, G completions each, T tokens of all prompts, S completion tokens so far, D head size, H query heads,
K key heads, E query heads of each, n tiles.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from longrl.packing.attention import attend_all, merge_attention
from longrl.packing.delta_net import DeltaPast, DeltaRows, DeltaWeights, delta_sequences, no_past
from longrl.packing.kernels import VarlenBatch, kernel_for
from longrl.types import GroupSpan

TILE_KEYS = 4096
"""Keys of a prompt that one block of queries reads while decoding."""
MAX_SCORES = 1 << 24
"""Short prompts are padded to one length and read in one product if it makes no more scores than that."""
KeysValues = tuple[Tensor, Tensor]


class PrefixCache:
    """The prompts of one call of `generate`, packed without padding, and room for their completions.

    Args:
        spans: the prompts, one behind the other.
        num_generations: G.
        max_tokens: the longest completion.
        device: of keys and values.
    """

    def __init__(
        self, spans: tuple[GroupSpan, ...], num_generations: int, max_tokens: int, device: torch.device
    ) -> None:
        self.num_generations = num_generations
        self.max_tokens = max_tokens
        self.length = 0
        """Completion tokens held, S."""
        self.unseen: Tensor | None = None
        """[P * G, 1, S + 1] added to scores: 0, and -inf behind a completion's newest token. None: all have as many."""
        self._set_spans(spans, device)
        self.prompts: dict[int, KeysValues] = {}
        """layer -> keys and values [K, T, D]."""
        self.completions: dict[int, KeysValues] = {}
        """layer -> keys and values [K, P * G, max_tokens, D]."""
        self.padded: dict[int, KeysValues] = {}
        """layer -> keys and values [K, P, T of the longest prompt, D], of short prompts once they are decoded from."""
        self.prompt_pasts: dict[int, DeltaPast] = {}
        """linear layer -> what the P prompts keep, as far as they have been prefilled."""
        self.completion_pasts: dict[int, DeltaPast] = {}
        """linear layer -> what the P * G completions keep."""

    def _set_spans(self, spans: tuple[GroupSpan, ...], device: torch.device) -> None:
        self.spans = spans
        self.prompt_lengths = tuple(span.prompt_tokens for span in spans)
        lengths = torch.tensor(self.prompt_lengths, device=device)
        is_padding = torch.arange(max(self.prompt_lengths), device=device) >= lengths[:, None]
        self.padding = torch.zeros(is_padding.shape, device=device).masked_fill_(is_padding, float("-inf"))
        """[P, T of the longest prompt] added to scores: 0, and -inf behind the end of a shorter one. All layers and
        tokens share it."""

    def prefill(self, rows: slice, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """`LayerAttention`, once `rows` is bound, of these rows of the packed prompts; those before have been.

        Args:
            rows: the chunk, c rows.
            layer: number of the layer.
            query: [1, H, c, D].
            key: [1, K, c, D].
            value: [1, K, c, D].
            scale: factor on the scores.

        Returns:
            [1, H, c, D].
        """
        # 1. Keys and values go into the cache, which the first chunk makes.
        if layer not in self.prompts:
            _, heads, _, size = key.shape
            prompts = (heads, self.spans[-1].stop, size)
            completions = (heads, len(self.spans) * self.num_generations, self.max_tokens, size)
            self.prompts[layer] = (key.new_empty(prompts), key.new_empty(prompts))
            # Zeros, for what is hidden from a query still is in its products, and what memory held before may be NaN.
            self.completions[layer] = (key.new_zeros(completions), key.new_zeros(completions))
        keys, values = self.prompts[layer]  # [K, T, D]
        keys[:, rows] = key[0]
        values[:, rows] = value[0]
        # 2. Every prompt's rows of the chunk see themselves.
        causal, earlier = _chunk_batches(self.spans, rows.start, rows.stop)
        kernel = kernel_for(query)
        output, lse = kernel.forward(query[0], key[0], value[0], causal, scale)  # [H, c, D], [H, c]
        # 3. The first prompt may have begun in an earlier chunk: its rows see those, too.
        if earlier:
            count = causal.query_lengths[0]
            seen = slice(earlier.start, earlier.stop)
            heads_per_key = query.shape[1] // key.shape[1]
            across = VarlenBatch((count * heads_per_key,), (len(earlier),), causal=False)
            part, part_lse = attend_all(kernel, query[0, :, :count], keys[:, seen], values[:, seen], across, scale)
            merge_attention(output[:, :count], lse[:, :count], part, part_lse)
        return output[None]

    def decode(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """`LayerAttention` of one decoding step: queries on the prompt and on what was written so far.

        Args:
            layer: number of the layer.
            query: [P * G, H, 1, D].
            key: [P * G, K, 1, D].
            value: [P * G, K, 1, D].
            scale: factor on the scores.

        Returns:
            [P * G, H, 1, D].
        """
        # 1. The new token's key and value.
        keys, values = self._with_new(layer, key[:, :, 0].transpose(0, 1), value[:, :, 0].transpose(0, 1))
        # 2. Each completion on its prompt. A kernel call for every short prompt would cost more than what it computes.
        queries = query[:, :, 0].transpose(0, 1)  # [H, P * G, D]
        num_scores = len(queries) * queries.shape[1] * max(self.prompt_lengths)
        attend_prompts = self._attend_padded_prompts if num_scores <= MAX_SCORES else self._attend_tiled_prompts
        output, lse = attend_prompts(layer, queries, scale)  # [H, P * G, D], [H, P * G]
        # 3. Each completion on its own tokens.
        grouped = queries.unflatten(0, (len(keys), -1)).transpose(1, 2)  # [K, P * G, E, D]
        scores = (grouped @ keys.mT).float() * scale  # [K, P * G, E, S]
        if self.unseen is not None:
            scores += self.unseen
        self_lse = scores.logsumexp(-1)  # [K, P * G, E]
        self_output = torch.exp(scores - self_lse[..., None]).to(values.dtype) @ values  # [K, P * G, E, D]
        merge_attention(output, lse, self_output.transpose(1, 2).flatten(0, 1), self_lse.transpose(1, 2).flatten(0, 1))
        return output.to(query.dtype).transpose(0, 1)[:, :, None]

    def prefill_recurrence(self, rows: slice, layer: int, inputs: DeltaRows, weights: DeltaWeights) -> Tensor:
        """`LayerRecurrence`, once `rows` is bound, of these rows of the packed prompts; [c, V, F].

        Args:
            rows: the chunk, c rows.
            layer: number of the layer.
            inputs: of the chunk.
            weights: of the layer.
        """
        if layer not in self.prompt_pasts:
            self.prompt_pasts[layer] = no_past(inputs, weights, len(self.spans))
        pasts = self.prompt_pasts[layer]
        here = _prompts_between(self.spans, rows.start, rows.stop)
        causal, _ = _chunk_batches(self.spans, rows.start, rows.stop)
        output, ends = delta_sequences(
            inputs, weights, causal.query_lengths, DeltaPast(*(past[here] for past in pasts))
        )
        for past, end in zip(pasts, ends, strict=True):
            past[here] = end
        return output

    def decode_recurrence(self, layer: int, inputs: DeltaRows, weights: DeltaWeights) -> Tensor:
        """`LayerRecurrence` of one decoding step: every completion's new token on its own state; [P * G, V, F]."""
        lengths = (1,) * len(inputs.mixed)
        output, self.completion_pasts[layer] = delta_sequences(inputs, weights, lengths, self._past(layer))
        return output

    def _past(self, layer: int) -> DeltaPast:
        """What the P * G completions keep of a linear layer; at first that of their prompts, which is forked."""
        if layer not in self.completion_pasts:
            past = self.prompt_pasts.pop(layer)
            self.completion_pasts[layer] = past.repeat((self.num_generations,) * len(self.spans))
        return self.completion_pasts[layer]

    def _with_new(self, layer: int, key: Tensor, value: Tensor) -> KeysValues:
        """Keys and values [K, P * G, S + 1, D] of the completions, the new ones [K, P * G, D] behind the others."""
        all_keys, all_values = self.completions[layer]  # [K, P * G, max_tokens, D]
        all_keys[:, :, self.length] = key
        all_values[:, :, self.length] = value
        return all_keys[:, :, : self.length + 1], all_values[:, :, : self.length + 1]

    def _attend_padded_prompts(self, layer: int, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """[H, P * G, D] -> ([H, P * G, D], log-sum-exp [H, P * G]) over each completion's prompt, in one product."""
        num_prompts = len(self.spans)
        # 1. Keys and values padded to the longest prompt, once per layer.
        if layer not in self.padded:
            keys, values = self.prompts[layer]  # [K, T of all prompts, D]
            if len(set(self.prompt_lengths)) == 1:  # nothing to pad: views
                keys = keys.unflatten(1, (num_prompts, -1))
                values = values.unflatten(1, (num_prompts, -1))
            else:
                keys_of_prompts = keys.transpose(0, 1).split(self.prompt_lengths)
                values_of_prompts = values.transpose(0, 1).split(self.prompt_lengths)
                keys = pad_sequence(keys_of_prompts, batch_first=True).permute(2, 0, 1, 3).contiguous()
                values = pad_sequence(values_of_prompts, batch_first=True).permute(2, 0, 1, 3).contiguous()
            self.padded[layer] = (keys, values)
        keys, values = self.padded[layer]  # [K, P, T, D]
        # 2. Queries of a prompt side by side, for they read the same keys.
        by_prompt = query.unflatten(0, (len(keys), -1)).unflatten(2, (num_prompts, -1))  # [K, E, P, G, D]
        rows = by_prompt.transpose(1, 2).flatten(2, 3)  # [K, P, E * G, D]
        scores = (rows @ keys.mT).float() * scale  # [K, P, E * G, T]
        scores += self.padding[:, None]  # a mask with gaps takes a CPU many times as long
        lse = scores.logsumexp(-1)  # [K, P, E * G]
        output = torch.exp(scores - lse[..., None]).to(values.dtype) @ values  # [K, P, E * G, D]
        # 3. Back to completion after completion.
        output = output.unflatten(2, (-1, self.num_generations)).transpose(1, 2)  # [K, E, P, G, D]
        lse = lse.unflatten(2, (-1, self.num_generations)).transpose(1, 2)  # [K, E, P, G]
        return output.flatten(0, 1).flatten(1, 2), lse.flatten(0, 1).flatten(1, 2)

    def _attend_tiled_prompts(self, layer: int, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """[H, P * G, D] -> ([H, P * G, D], log-sum-exp [H, P * G]) over each completion's prompt, tile by tile."""
        keys, values = self.prompts[layer]  # [K, T, D]
        queries_per_tile = self.num_generations * (len(query) // len(keys))
        tiles, batch = _tile_batch(self.prompt_lengths, queries_per_tile, TILE_KEYS)
        # 1. A copy of the queries for every tile.
        by_prompt = query.unflatten(1, (len(self.spans), 1, self.num_generations))  # [H, P, 1, G, D]
        repeated = by_prompt.expand(-1, -1, tiles, -1, -1).flatten(1, 3)  # [H, P * n * G, D]
        parts, lses = attend_all(kernel_for(query), repeated, keys, values, batch, scale)
        if tiles == 1:
            return parts, lses
        # 2. Tiles merged by their log-sum-exps.
        shape = (len(self.spans), tiles, self.num_generations)
        parts = parts.unflatten(1, shape)  # [H, P, n, G, D]
        lses = lses.unflatten(1, shape)  # [H, P, n, G]
        output = (parts * lses.softmax(2)[..., None]).sum(2)  # [H, P, G, D]
        return output.flatten(1, 2), lses.logsumexp(2).flatten(1, 2)


@functools.lru_cache(maxsize=64)  # all layers, and all steps of decoding, share one
def _tile_batch(prompt_lengths: tuple[int, ...], num_queries: int, tile_keys: int) -> tuple[int, VarlenBatch]:
    """Tiles per prompt, the same number for all, none of them empty; and what they are to a kernel."""
    tiles = min(-(-max(prompt_lengths) // tile_keys), *prompt_lengths)
    key_lengths = []
    for length in prompt_lengths:
        edges = [length * tile // tiles for tile in range(tiles + 1)]
        key_lengths += [stop - start for start, stop in itertools.pairwise(edges)]
    return tiles, VarlenBatch((num_queries,) * len(key_lengths), tuple(key_lengths), causal=False)


def _prompts_between(spans: tuple[GroupSpan, ...], start: int, stop: int) -> slice:
    """The prompts of which rows lie between start and stop."""
    here = [index for index, span in enumerate(spans) if span.start < stop and start < span.stop]
    return slice(here[0], here[-1] + 1)


@functools.lru_cache(maxsize=64)  # all layers share one
def _chunk_batches(spans: tuple[GroupSpan, ...], start: int, stop: int) -> tuple[VarlenBatch, range]:
    """Rows start..stop of packed prompts by groups in their chunk, and the earlier rows that the first of them see."""
    lengths = []
    earlier = range(0)
    for span in spans:
        first = max(start, span.start)
        last = min(stop, span.stop)
        if first < last:
            lengths.append(last - first)
            if first > span.start:
                earlier = range(span.start, first)
    return VarlenBatch(tuple(lengths), tuple(lengths), causal=True), earlier
