"""Rollouts by the trainer's own transformers model, in the trainer's process.

A prompt is prefilled once whatever the number of
completions, in chunks that bound its memory, and its keys and values are shared while decoding
(longrl/engines/prefix_cache.py): nothing is repeated G times.

Letters: P prompts, G completions each, S completion tokens so far, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from longrl.engines.rollout_engine import RolloutEngine, prompt_seed
from longrl.models.base import CausalFamily
from longrl.packing.pack import pack
from longrl.types import Completion, Packed, Prompt, SamplingParams


class HFEngine(RolloutEngine):
    """Generates with the trainer's own model, so there is nothing to sync.

    Args:
        max_sequences: completions decoded together; fewer need less memory.
        prefill_chunk_tokens: prompt tokens that go through the model together; beside keys and values, which all stay,
            a prompt of any length needs the memory of so many.
    """

    reads_policy_weights = True

    def __init__(self, max_sequences: int = 256, prefill_chunk_tokens: int = 16_384) -> None:
        if prefill_chunk_tokens < 1:
            raise ValueError(
                f"the engine's prefill_chunk_tokens must be at least 1, got {prefill_chunk_tokens}; leave it out for "
                "16384, or take one larger than every prompt to prefill in one go"
            )
        self.max_sequences = max_sequences
        self.prefill_chunk_tokens = prefill_chunk_tokens

    def sync(self, family: CausalFamily, model: nn.Module, step: int) -> None:
        """The engine reads the trainer's weights in place."""

    @override
    def identity(self) -> dict[str, Any]:
        return {"prefill_chunk_tokens": self.prefill_chunk_tokens}  # chunks round otherwise

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
        """See `RolloutEngine.generate`."""
        was_training = model.training
        model.eval()
        try:
            step = max(1, self.max_sequences // sampling.num_generations)
            completions = []
            for start in range(0, len(prompts), step):
                decoder = _Decoder(family, model, prompts[start : start + step], features, sampling, seed, first)
                completions += decoder.run(self.prefill_chunk_tokens)
            return completions
        finally:
            model.train(was_training)


class _Decoder:
    """One call of `generate`: prefill, then token by token for all completions together."""

    def __init__(
        self,
        family: CausalFamily,
        model: nn.Module,
        prompts: Sequence[Prompt],
        features: Mapping[str, Tensor],
        sampling: SamplingParams,
        seed: int,
        first: int,
    ) -> None:
        from longrl.engines.prefix_cache import PrefixCache

        self.family, self.model, self.prompts, self.sampling = family, model, prompts, sampling
        self.device = model.get_input_embeddings().weight.device
        self.packed = self._pack().to(self.device)
        self.features = features
        self.cache = PrefixCache(self.packed.spans, sampling.num_generations, sampling.max_completion_tokens)
        self.uniforms = torch.stack([self._uniforms(prompt, seed, first) for prompt in prompts]).flatten(0, 1)
        self.eos = family.tokenizer.eos_token_id

    def _pack(self) -> Packed:
        (packed,) = pack(self.prompts, [[]] * len(self.prompts), max_tokens=1 << 62)
        return packed

    def _uniforms(self, prompt: Prompt, seed: int, first: int) -> Tensor:
        """[G, S] random numbers in [0, 1) that depend on the seed and the prompt alone, not on the batch or device."""
        generator = torch.Generator().manual_seed(prompt_seed(seed, prompt.id))
        shape = (first + self.sampling.num_generations, self.sampling.max_completion_tokens)
        return torch.rand(shape, generator=generator, dtype=torch.float64)[first:]

    def run(self, chunk_tokens: int) -> list[list[Completion]]:
        """The completions of every prompt, prefilled `chunk_tokens` at a time."""
        hidden = self._prefill(chunk_tokens)
        tokens, logps = [], []
        finished = torch.zeros(len(hidden), dtype=torch.bool, device=self.device)
        for step in range(self.sampling.max_completion_tokens):
            token, logp = self._sample(hidden @ self.family.lm_head(self.model).T, self.uniforms[:, step])
            tokens.append(token)
            logps.append(logp)
            finished |= token == self.eos
            if finished.all() or step + 1 == self.sampling.max_completion_tokens:
                break
            hidden = self._decode(token, step)
        return self._collect(torch.stack(tokens, 1).cpu(), torch.stack(logps, 1).cpu())

    def _prefill(self, chunk_tokens: int) -> Tensor:
        """[P*G, hidden size] states that predict each completion's first token."""
        hidden = torch.cat([self._last_states(rows) for rows in self._chunks(chunk_tokens)])
        following = [int(prompt.position_ids.max()) + 1 for prompt in self.prompts]
        self.following = torch.tensor(following, device=self.device).repeat_interleave(self.sampling.num_generations)
        return hidden.repeat_interleave(self.sampling.num_generations, 0)

    def _chunks(self, tokens: int) -> Iterator[slice]:
        """Rows of the packed prompts, wherever one ends and the next begins."""
        total = len(self.packed.input_ids)
        return (slice(start, min(start + tokens, total)) for start in range(0, total, tokens))

    def _last_states(self, rows: slice) -> Tensor:
        """[prompts that end in these rows, hidden size]: states of their last tokens; all rows go into the cache."""
        embeds = self.family.embed(self.model, self.packed, self.features, rows)
        positions = self.packed.position_ids[:, None, rows]
        attention = functools.partial(self.cache.prefill, rows)
        extra = self.family.backbone_inputs(self.packed, self.features, rows)
        hidden = self.family.hidden_states(self.model, embeds[None], positions, layer_attention=attention, **extra)[0]
        last = [span.stop - 1 - rows.start for span in self.packed.spans if rows.start < span.stop <= rows.stop]
        return hidden[last]

    def _decode(self, token: Tensor, step: int) -> Tensor:
        embeds = self.model.get_input_embeddings()(token)[:, None]
        positions = (self.following + step)[None, :, None].expand(self.packed.position_ids.shape[0], -1, -1)
        hidden = self.family.hidden_states(self.model, embeds, positions, layer_attention=self.cache.decode)
        self.cache.length += 1
        return hidden[:, 0]

    def _sample(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """([P*G] tokens, [P*G] their log-probabilities under the distribution they were drawn from)."""
        if self.sampling.temperature == 0:
            logp = logits.float().log_softmax(-1)
            token = logp.argmax(-1)
        else:
            logp = _filtered(logits.float() / self.sampling.temperature, self.sampling).log_softmax(-1)
            token = inverse_cdf(logp, uniform.to(logp.device))
        return token, logp.gather(-1, token[:, None])[:, 0]

    def _collect(self, tokens: Tensor, logps: Tensor) -> list[list[Completion]]:
        completions = []
        for ids, logp in zip(tokens, logps, strict=True):
            ends = (ids == self.eos).nonzero()
            count = int(ends[0]) + 1 if len(ends) else len(ids)
            text, reason = self.family.decode(ids[:count]), "stop" if len(ends) else "length"
            completions.append(Completion(ids[:count].clone(), logp[:count].clone(), text, reason))
        group = self.sampling.num_generations
        return [completions[start : start + group] for start in range(0, len(completions), group)]


def inverse_cdf(logp: Tensor, uniform: Tensor) -> Tensor:
    """Draws from [B, V] log-probabilities with [B] numbers in [0, 1): the first token whose cumulated mass exceeds."""
    cumulated = logp.double().exp().cumsum(-1)
    drawn = torch.searchsorted(cumulated, (uniform[:, None] * cumulated[:, -1:]).contiguous(), right=True)[:, 0]
    return drawn.clamp_max(logp.shape[-1] - 1)


def _filtered(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Logits with everything outside top-k and top-p at -inf."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    if sampling.top_k:
        logits = TopKLogitsWarper(sampling.top_k)(None, logits)
    if sampling.top_p < 1:
        logits = TopPLogitsWarper(sampling.top_p)(None, logits)
    return logits
