"""Keys and values of a rollout: every prompt once, prefilled in chunks, its completions apart.

Attention over a prompt is cut twice, and merged by log-sum-exp, so it stays exact: while prefilling into a chunk's own
tokens and those before it, while decoding into tiles of keys, which flash attention then reads side by side.

Letters: P prompts, G completions each, T tokens of all prompts, n tiles of a prompt, S completion tokens so far, K
key/value heads, E query heads per key head, H = K * E, D head size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longrl.packing.attention import attend_all, merge
from longrl.packing.kernels import Blocks, kernel_for
from longrl.types import GroupSpan

TILE_KEYS = 4096
"""Keys of a prompt that one block of queries reads while decoding."""
MAX_SCORES = 1 << 24
"""Short prompts are padded to one length and read in one product if it makes no more scores than that."""
KeysValues = tuple[Tensor, Tensor]


@dataclass
class PrefixCache:
    """The prompts of one call of `generate`, packed without padding, and room for their completions.

    Args:
        spans: the prompts, one behind the other.
        num_generations: G.
        max_tokens: the longest completion.
    """

    spans: tuple[GroupSpan, ...]
    num_generations: int
    max_tokens: int
    length: int = 0
    """Completion tokens held, S."""
    prompts: dict[int, KeysValues] = field(default_factory=dict)
    """layer -> keys and values [K, T, D]."""
    completions: dict[int, KeysValues] = field(default_factory=dict)
    """layer -> keys and values [K, P * G, max_tokens, D]."""
    padded: dict[int, KeysValues] = field(default_factory=dict)
    """layer -> keys and values [K, P, T of the longest prompt, D], of short prompts once they are decoded from."""

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
        keys, values = self._room(layer, key)
        keys[:, rows], values[:, rows] = key[0], value[0]
        own, earlier = _chunk(self.spans, rows.start, rows.stop)
        kernel = kernel_for(query)
        output, lse = kernel.forward(query[0], key[0], value[0], own, scale)
        if earlier:
            first = slice(0, own.queries[0])  # the rows whose prompt began in an earlier chunk
            seen = slice(earlier.start, earlier.stop)
            blocks = Blocks((first.stop,), (len(earlier),), causal=False)
            part = attend_all(kernel, query[0, :, first], keys[:, seen], values[:, seen], blocks, scale)
            merge(output[:, first], lse[:, first], *part)
        return output[None]

    def _room(self, layer: int, key: Tensor) -> KeysValues:
        if layer not in self.prompts:
            heads, size, total = key.shape[1], key.shape[-1], self.spans[-1].stop
            shape = (heads, len(self.spans) * self.num_generations, self.max_tokens, size)
            self.prompts[layer] = key.new_empty(heads, total, size), key.new_empty(heads, total, size)
            self.completions[layer] = key.new_empty(shape), key.new_empty(shape)
        return self.prompts[layer]

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
        for room, states in zip(self.completions[layer], (key, value), strict=True):
            room[:, :, self.length] = states[:, :, 0].transpose(0, 1)
        queries = query[:, :, 0].transpose(0, 1)
        short = len(queries) * queries.shape[1] * self._longest <= MAX_SCORES
        output, lse = (self._on_short_prompts if short else self._on_prompts)(layer, queries, scale)
        merge(output, lse, *self._on_own(layer, queries, scale))
        return output.to(query.dtype).transpose(0, 1)[:, :, None]

    def _on_own(self, layer: int, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """[H, P * G, D] -> ([H, P * G, D], log-sum-exp [H, P * G]) over each completion's own tokens."""
        keys, values = (states[:, :, : self.length + 1] for states in self.completions[layer])
        grouped = query.unflatten(0, (len(keys), -1)).transpose(1, 2)  # [K, P * G, E, D]
        scores = (grouped @ keys.mT).float() * scale  # [K, P * G, E, S]
        lse = scores.logsumexp(-1)
        output = torch.exp(scores - lse[..., None]).to(values.dtype) @ values
        return output.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)

    def _on_short_prompts(self, layer: int, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """As `_on_prompts`, all prompts in one product: a call for each would cost more than what it computes."""
        keys, values = self._padded(layer)
        count, group = len(self.spans), self.num_generations
        rows = query.unflatten(0, (len(keys), -1)).unflatten(2, (count, group)).transpose(1, 2).flatten(2, 3)
        scores = (rows @ keys.mT).float() * scale  # [K, P, E * G, T]
        scores = scores.masked_fill(self._padding(scores.device), float("-inf"))
        lse = scores.logsumexp(-1)
        output = torch.exp(scores - lse[..., None]).to(values.dtype) @ values
        output, lse = (x.unflatten(2, (-1, group)).transpose(1, 2) for x in (output, lse))  # [K, E, P, G, ...]
        return output.flatten(0, 1).flatten(1, 2), lse.flatten(0, 1).flatten(1, 2)

    @functools.cached_property
    def _longest(self) -> int:
        return max(span.prompt_tokens for span in self.spans)

    def _padded(self, layer: int) -> KeysValues:
        lengths = [span.prompt_tokens for span in self.spans]
        if min(lengths) == max(lengths):
            keys, values = (states.unflatten(1, (len(lengths), -1)) for states in self.prompts[layer])
            return keys, values
        if layer not in self.padded:
            keys, values = (
                torch.nn.utils.rnn.pad_sequence(states.transpose(0, 1).split(lengths), batch_first=True)
                for states in self.prompts[layer]
            )  # [P, T, K, D]
            self.padded[layer] = keys.permute(2, 0, 1, 3).contiguous(), values.permute(2, 0, 1, 3).contiguous()
        return self.padded[layer]

    def _padding(self, device: torch.device) -> Tensor:
        """[P, 1, T], True behind a prompt's end."""
        lengths = torch.tensor([span.prompt_tokens for span in self.spans], device=device)
        return (torch.arange(self._longest, device=device) >= lengths[:, None])[:, None]

    def _on_prompts(self, layer: int, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """[H, P * G, D] -> ([H, P * G, D], log-sum-exp [H, P * G]) over each completion's prompt, tile by tile."""
        tiles, blocks = self._tiles
        queries = query.unflatten(1, (len(self.spans), 1, self.num_generations))
        repeated = queries.expand(-1, -1, tiles, -1, -1).flatten(1, 3)  # [H, P * n * G, D]
        parts, lses = attend_all(kernel_for(query), repeated, *self.prompts[layer], blocks, scale)
        if tiles == 1:
            return parts, lses
        shape = (len(self.spans), tiles, self.num_generations)
        parts, lses = parts.unflatten(1, shape), lses.unflatten(1, shape)
        output = (parts * lses.softmax(2)[..., None]).sum(2)
        return output.flatten(1, 2), lses.logsumexp(2).flatten(1, 2)

    @functools.cached_property
    def _tiles(self) -> tuple[int, Blocks]:
        """Tiles per prompt, the same number for all, none of them empty; and what they are to a kernel."""
        lengths = [span.prompt_tokens for span in self.spans]
        tiles = min(-(-max(lengths) // TILE_KEYS), *lengths)
        keys = [length * (i + 1) // tiles - length * i // tiles for length in lengths for i in range(tiles)]
        return tiles, Blocks((self.num_generations,) * len(keys), tuple(keys), causal=False)


@functools.lru_cache(maxsize=64)
def _chunk(spans: tuple[GroupSpan, ...], start: int, stop: int) -> tuple[Blocks, range]:
    """What rows start..stop of packed prompts see of their chunk, and the earlier rows that the first of them see."""
    lengths, earlier = [], range(0)
    for span in spans:
        first, last = max(start, span.start), min(stop, span.stop)
        if first < last:
            lengths.append(last - first)
            if first > span.start:
                earlier = range(span.start, first)
    return Blocks(tuple(lengths), tuple(lengths), causal=True), earlier
