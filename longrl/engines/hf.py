"""Rollouts by the trainer's own transformers model, in the trainer's process.

A prompt is prefilled once whatever the number of completions, in chunks that bound its memory, and its keys and values
are shared while decoding: nothing is repeated G times.

Letters: P prompts, G completions each, T tokens of all prompts, S completion tokens so far, A position axes, D hidden
size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import override

from longrl.engines.decoding_memory import DecodingMemory, free_bytes
from longrl.engines.rollout_engine import RolloutEngine, prompt_seed
from longrl.io.number_ranges import COUNT, check_ranges
from longrl.io.pulse import PULSE
from longrl.models.base import CausalFamily
from longrl.packing.attention import attend_all, merge_attention
from longrl.packing.kernels import VarlenBatch, kernel_for
from longrl.packing.pack import pack
from longrl.types import Completion, FinishReason, GroupSpan, Prompt, SamplingParams

logger = logging.getLogger(__name__)

NO_LIMIT = 1 << 62
"""Tokens packed together for a rollout: chunks of prefilling bound the memory, not this."""
SEQUENCES_ON_CPU = 256
"""`max_sequences` where free memory is not known."""
GIB = 1 << 30


class HFEngine(RolloutEngine):
    """Generates with the trainer's own model, so there is nothing to sync.

    Args:
        max_sequences: completions decoded together; fewer need less memory. None is as many as fit into the GPU's free
            memory, whole groups, and 256 on a CPU. How many that are decides the last bits of a GPU's products: give a
            number for runs that are to be repeated to the bit.
        prefill_chunk_tokens: prompt tokens that go through the model together; beside keys and values, which all stay,
            a prompt of any length needs the memory of so many.
    """

    reads_policy_weights = True
    supports_fp32_lm_head = True

    def __init__(self, max_sequences: int | None = None, prefill_chunk_tokens: int = 16_384) -> None:
        if prefill_chunk_tokens < 1:
            raise ValueError(
                f"the engine's prefill_chunk_tokens must be at least 1, got {prefill_chunk_tokens}; leave it out for "
                "16384, or take one larger than every prompt to prefill in one go"
            )
        check_ranges(locals(), "the engine's ", max_sequences=COUNT)
        self.max_sequences = max_sequences
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self._has_told = False

    @override
    def identity(self) -> dict[str, Any]:
        return {"prefill_chunk_tokens": self.prefill_chunk_tokens}  # chunks of another size round otherwise

    @override
    def sync(self, family: CausalFamily, model: nn.Module, step: int) -> None:
        """The engine reads the trainer's weights in place."""

    @override
    @torch.no_grad()
    def generate(
        self,
        family: CausalFamily,
        model: nn.Module,
        prompts: Sequence[Prompt],
        features: Mapping[str, Tensor],
        sampling: SamplingParams,
        seed: int,
        first: int = 0,
    ) -> list[list[Completion]]:
        was_training = model.training
        model.eval()
        try:
            groups: list[list[Completion]] = []
            while len(groups) < len(prompts):
                remaining = prompts[len(groups) :]
                together = remaining[: self._num_prompts(family, model, remaining, sampling)]
                # Random numbers depend on seed, prompt and completion alone: neither on the batch nor on the device.
                # Other ranks sample the completions before `first`.
                shape = (first + sampling.num_generations, sampling.max_completion_tokens)
                generators = [torch.Generator().manual_seed(prompt_seed(seed, prompt.id)) for prompt in together]
                uniforms = [torch.rand(shape, generator=each, dtype=torch.float64)[first:] for each in generators]
                groups += self._decode(family, model, together, features, sampling, torch.cat(uniforms))
            return groups
        finally:
            model.train(was_training)

    def _num_prompts(
        self, family: CausalFamily, model: Any, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> int:
        """How many of the prompts, the first of them first, are decoded together."""
        free = None if self.max_sequences else free_bytes(model.get_input_embeddings().weight.device)
        if free is None:
            return max(1, (self.max_sequences or SEQUENCES_ON_CPU) // sampling.num_generations)
        tiles = {"max_scores": MAX_SCORES, "tile_keys": TILE_KEYS}
        memory = DecodingMemory.of(family, model, sampling, chunk_tokens=self.prefill_chunk_tokens, **tiles)
        lengths = [len(prompt.input_ids) for prompt in prompts]
        count = memory.num_prompts(lengths, free)
        logger.log(
            logging.DEBUG if self._has_told else logging.INFO,
            "%d of %d prompts are decoded together, with %d completions each: about %.1f GiB of %.1f GiB free",
            count, len(prompts), sampling.num_generations, memory.needed(lengths[:count]) / GIB, free / GIB,
        )  # fmt: skip
        self._has_told = True
        return count

    def _decode(
        self,
        family: CausalFamily,
        model: Any,
        prompts: Sequence[Prompt],
        features: Mapping[str, Tensor],
        sampling: SamplingParams,
        uniform: Tensor,
    ) -> list[list[Completion]]:
        """Completions of prompts that are decoded together, drawn with [P * G, S] numbers in [0, 1)."""
        group_size = sampling.num_generations
        max_tokens = sampling.max_completion_tokens
        embed_tokens = model.get_input_embeddings()
        lm_head = model.get_output_embeddings().weight  # [V, D]
        precision: Any = contextlib.nullcontext()
        if family.fp32_lm_head:  # also where layers compute in another precision by autocast
            lm_head = lm_head.float()
            precision = torch.autocast(lm_head.device.type, enabled=False)
        # What every token of a completion needs goes to the device here, once: a copy from a list waits for the GPU.
        end_tokens = torch.tensor(family.end_token_ids, device=lm_head.device)
        uniform = uniform.to(lm_head.device)
        # 1. Every prompt once through the model, into the cache, in chunks that end anywhere.
        packed = pack(prompts, [[] for _ in prompts], NO_LIMIT)[0].to(lm_head.device)
        cache = PrefixCache(packed.spans, group_size, max_tokens, lm_head.device)
        total = len(packed.input_ids)
        last_states = []  # of the prompts' last tokens, which predict the first ones of their completions
        for start in range(0, total, self.prefill_chunk_tokens):
            rows = slice(start, min(start + self.prefill_chunk_tokens, total))
            inputs = family.text_inputs(model, packed, features, rows)
            positions = packed.position_ids[:, None, rows]  # [A, 1, rows]
            prefill = functools.partial(cache.prefill, rows)
            hidden = family.hidden_states(model, positions, layer_attention=prefill, **inputs)[0]  # [rows, D]
            last_rows = [span.stop - 1 - start for span in packed.spans if start < span.stop <= rows.stop]
            last_states.append(hidden[last_rows])
        hidden = torch.cat(last_states).repeat_interleave(group_size, 0)  # [P * G, D]
        # A completion's positions go on where its prompt's ended: with media that is not the number of tokens.
        following = torch.tensor([int(prompt.position_ids.max()) + 1 for prompt in prompts], device=hidden.device)
        following = following.repeat_interleave(group_size)[:, None]  # [P * G, 1]
        # 2. Sample a token of every completion and feed it back, until all have ended.
        tokens: list[Tensor] = []
        logps: list[Tensor] = []
        finished = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        while True:
            PULSE.beats += 1
            with precision:
                logits = hidden.to(lm_head.dtype) @ lm_head.T  # [P * G, V]
            token, logp = sample_tokens(logits, sampling, uniform[:, cache.length])
            tokens.append(token)
            logps.append(logp)
            finished |= torch.isin(token, end_tokens)
            if len(tokens) == max_tokens or finished.all():  # the one wait for the GPU of a token
                break
            embeds = embed_tokens(token)[:, None]  # [P * G, 1, D]
            positions = (following + cache.length).expand(len(packed.position_ids), -1, -1)  # [A, P * G, 1]
            hidden = family.hidden_states(model, positions, inputs_embeds=embeds, layer_attention=cache.decode)[:, 0]
            cache.length += 1
        # 3. What follows a completion's end was sampled for the others' sake.
        completions = []
        end_tokens = end_tokens.cpu()
        for ids, logp in zip(torch.stack(tokens, 1).cpu(), torch.stack(logps, 1).cpu(), strict=True):
            ends = torch.isin(ids, end_tokens).nonzero()
            count = int(ends[0]) + 1 if len(ends) else len(ids)
            reason: FinishReason = "stop" if len(ends) else "length"
            completions.append(
                Completion(ids[:count].clone(), logp[:count].clone(), family.decode(ids[:count]), reason)
            )
        return [completions[start : start + group_size] for start in range(0, len(completions), group_size)]


def sample_tokens(logits: Tensor, sampling: SamplingParams, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draws a token for each row, or takes the likeliest at temperature 0.

    Args:
        logits: [B, V].
        sampling: temperature, top-k and top-p.
        uniform: [B] numbers in [0, 1) that decide the draw, on the device of the logits.

    Returns:
        ([B] tokens, [B] their log-probabilities under the distribution they were drawn from).
    """
    logits = logits.float()
    if sampling.temperature == 0:
        logp = logits.log_softmax(-1)
        token = logp.argmax(-1)
        return token, logp.gather(-1, token[:, None])[:, 0]
    logits = logits / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        from transformers import TopKLogitsWarper, TopPLogitsWarper

        if sampling.top_k:
            logits = TopKLogitsWarper(sampling.top_k)(None, logits)
        if sampling.top_p < 1:
            logits = TopPLogitsWarper(sampling.top_p)(None, logits)
    logp = logits.log_softmax(-1)
    # The first token whose cumulated mass exceeds the number; rounding: all of the mass is not 1 exactly.
    cumulated = logp.double().exp().cumsum(-1)  # [B, V]
    threshold = uniform[:, None] * cumulated[:, -1:]  # [B, 1]
    token = torch.searchsorted(cumulated, threshold.contiguous(), right=True)[:, 0].clamp_max(logp.shape[-1] - 1)
    return token, logp.gather(-1, token[:, None])[:, 0]


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
        self.spans = spans
        self.num_generations = num_generations
        self.max_tokens = max_tokens
        self.length = 0
        """Completion tokens held, S."""
        self.prompt_lengths = tuple(span.prompt_tokens for span in spans)
        lengths = torch.tensor(self.prompt_lengths, device=device)
        self.padding = torch.arange(max(self.prompt_lengths), device=device) >= lengths[:, None]
        """[P, T of the longest prompt], True behind the end of a shorter one; all layers and tokens share it."""
        self.prompts: dict[int, KeysValues] = {}
        """layer -> keys and values [K, T, D]."""
        self.completions: dict[int, KeysValues] = {}
        """layer -> keys and values [K, P * G, max_tokens, D]."""
        self.padded: dict[int, KeysValues] = {}
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
        # 1. Keys and values go into the cache, which the first chunk makes.
        if layer not in self.prompts:
            _, heads, _, size = key.shape
            prompts = (heads, self.spans[-1].stop, size)
            completions = (heads, len(self.spans) * self.num_generations, self.max_tokens, size)
            self.prompts[layer] = (key.new_empty(prompts), key.new_empty(prompts))
            self.completions[layer] = (key.new_empty(completions), key.new_empty(completions))
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
        all_keys, all_values = self.completions[layer]  # [K, P * G, max_tokens, D]
        all_keys[:, :, self.length] = key[:, :, 0].transpose(0, 1)
        all_values[:, :, self.length] = value[:, :, 0].transpose(0, 1)
        keys = all_keys[:, :, : self.length + 1]
        values = all_values[:, :, : self.length + 1]
        # 2. Each completion on its prompt. A kernel call for every short prompt would cost more than what it computes.
        queries = query[:, :, 0].transpose(0, 1)  # [H, P * G, D]
        num_scores = len(queries) * queries.shape[1] * max(self.prompt_lengths)
        attend_prompts = self._attend_padded_prompts if num_scores <= MAX_SCORES else self._attend_tiled_prompts
        output, lse = attend_prompts(layer, queries, scale)  # [H, P * G, D], [H, P * G]
        # 3. Each completion on its own tokens.
        grouped = queries.unflatten(0, (len(keys), -1)).transpose(1, 2)  # [K, P * G, E, D]
        scores = (grouped @ keys.mT).float() * scale  # [K, P * G, E, S]
        self_lse = scores.logsumexp(-1)  # [K, P * G, E]
        self_output = torch.exp(scores - self_lse[..., None]).to(values.dtype) @ values  # [K, P * G, E, D]
        merge_attention(output, lse, self_output.transpose(1, 2).flatten(0, 1), self_lse.transpose(1, 2).flatten(0, 1))
        return output.to(query.dtype).transpose(0, 1)[:, :, None]

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
        scores = scores.masked_fill(self.padding[:, None], float("-inf"))
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
