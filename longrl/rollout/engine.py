"""Rollout engines: who turns prompts into completions.

`HFEngine` generates with the trainer's own transformers model. A prompt is prefilled once whatever the number of
completions, and its keys and values are shared while decoding: nothing is repeated G times.

Letters: P prompts, G completions each, T longest prompt, S completion tokens so far, K key/value heads,
E query heads per key head, D head size, V vocabulary.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from longrl.models.base import CausalFamily
from longrl.modules.packing import pack
from longrl.rollout.parity import Seen
from longrl.types import Completion, GroupSpan, Packed, Prompt, SamplingParams


class RolloutEngine(abc.ABC):
    """Generates completions with the trainer's weights.

    A step calls `sync`, `generate` for the prompts and for each refill, then `rest`.
    """

    needs_whole_weights: bool = False
    """Whether `generate` reads the trainer's model: sharded weights are then gathered around it."""
    runs_elsewhere: bool = False
    """Whether it computes in another process, so that it can generate while the trainer updates."""
    ranks_per_engine: int = 1
    """So many neighbouring ranks of a team are one engine: they are given the same prompts and return the same."""

    @abc.abstractmethod
    def sync(self, family: CausalFamily, model: nn.Module, step: int) -> None:
        """Takes over the trainer's weights of `step`; nothing to do if the engine already holds them.

        Every rank of the run calls it at the same time.
        """

    @abc.abstractmethod
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
        """G completions of each prompt, from number `first` on: other ranks may have sampled those before.

        Equal seeds give equal completions of a prompt, whatever its batch and whoever samples which.
        """

    def seen(self, family: CausalFamily, prompts: Sequence[Prompt], features: Mapping[str, Tensor]) -> list[Seen]:
        """What the engine makes of each prompt, to be compared with the trainer's; none if it reads the trainer's."""
        return []

    def rest(self) -> None:  # noqa: B027  # nothing to let go of by default
        """The rollouts of a step are done: memory may go to the update."""


class HFEngine(RolloutEngine):
    """Generates with the trainer's own model, so there is nothing to sync.

    Args:
        max_sequences: completions decoded together; fewer need less memory.
    """

    needs_whole_weights = True

    def __init__(self, max_sequences: int = 256) -> None:
        self.max_sequences = max_sequences

    def sync(self, family: CausalFamily, model: nn.Module, step: int) -> None:
        """The engine reads the trainer's weights in place."""

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
                completions += decoder.run()
            return completions
        finally:
            model.train(was_training)


@dataclass
class _SharedPrefixCache:
    """Keys and values while decoding: prompts padded to [P, K, T, D], completions [P, K, G, S, D]."""

    spans: tuple[GroupSpan, ...]
    num_generations: int
    max_tokens: int
    length: int = 0
    """Completion tokens held, S."""
    prompts: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """layer -> keys and values of the prompts."""
    completions: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def store_prompts(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """`LayerAttention` of the prefill: packed causal attention, its keys kept."""
        from longrl.modules.attention import shared_prefix_attention

        longest = max(span.prompt_tokens for span in self.spans)
        self.prompts[layer] = tuple(self._by_prompt(states[0], longest) for states in (key, value))
        shape = (len(self.spans), key.shape[1], self.num_generations, self.max_tokens, key.shape[-1])
        self.completions[layer] = (key.new_empty(shape), value.new_empty(shape))
        return shared_prefix_attention(query[0], key[0], value[0], self.spans, scale)[None]

    def _by_prompt(self, states: Tensor, longest: int) -> Tensor:
        """[K, packed tokens, D] -> [P, K, T, D], zeros behind shorter prompts."""
        padded = states.new_zeros(len(self.spans), states.shape[0], longest, states.shape[-1])
        for place, span in enumerate(self.spans):
            padded[place, :, : span.prompt_tokens] = states[:, span.start : span.stop]
        return padded

    def decode(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """`LayerAttention` of one decoding step: [P*G, H, 1, D] queries on the prompt and what was written so far."""
        prompt_keys, prompt_values = self.prompts[layer]
        own_keys, own_values = self.completions[layer]
        num_prompts, heads, longest, size = prompt_keys.shape
        group = self.num_generations
        own_keys[:, :, :, self.length] = key.view(num_prompts, group, heads, size).transpose(1, 2)
        own_values[:, :, :, self.length] = value.view(num_prompts, group, heads, size).transpose(1, 2)
        own_keys, own_values = own_keys[:, :, :, : self.length + 1], own_values[:, :, :, : self.length + 1]

        queries = query.view(num_prompts, group, heads, -1, size).transpose(1, 2) * scale  # [P, K, G, E, D]
        on_prompt = (queries.flatten(2, 3) @ prompt_keys.mT).masked_fill(self._padding(longest), float("-inf"))
        on_prompt = on_prompt.view(*queries.shape[:4], longest)
        on_own = queries @ own_keys.mT  # [P, K, G, E, S]
        probs = torch.cat([on_prompt, on_own], -1).float().softmax(-1).to(query.dtype)
        from_prompt = probs[..., :longest].flatten(2, 3) @ prompt_values
        output = from_prompt.view_as(queries) + probs[..., longest:] @ own_values
        return output.transpose(1, 2).reshape(query.shape)

    def _padding(self, longest: int) -> Tensor:
        """[P, 1, 1, T], True behind a prompt's end."""
        lengths = torch.tensor([span.prompt_tokens for span in self.spans])
        padding = torch.arange(longest) >= lengths[:, None]
        return padding[:, None, None].to(self.prompts[0][0].device)


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
        self.family, self.model, self.prompts, self.sampling = family, model, prompts, sampling
        self.device = model.get_input_embeddings().weight.device
        self.packed = self._pack().to(self.device)
        self.features = features
        self.cache = _SharedPrefixCache(
            self.packed.spans, sampling.num_generations, sampling.max_completion_tokens
        )
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

    def run(self) -> list[list[Completion]]:
        """The completions of every prompt."""
        hidden = self._prefill()
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

    def _prefill(self) -> Tensor:
        """[P*G, hidden size] states that predict each completion's first token."""
        embeds = self.family.embed(self.model, self.packed, self.features)
        extra = self.family.backbone_inputs(self.packed, self.features)
        positions, attend = self.packed.position_ids[:, None], self.cache.store_prompts
        hidden = self.family.hidden_states(self.model, embeds[None], positions, layer_attention=attend, **extra)[0]
        last = [span.stop - 1 for span in self.packed.spans]
        following = [int(prompt.position_ids.max()) + 1 for prompt in self.prompts]
        self.following = torch.tensor(following, device=self.device).repeat_interleave(self.sampling.num_generations)
        return hidden[last].repeat_interleave(self.sampling.num_generations, 0)

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


def prompt_seed(seed: int, prompt_id: str) -> int:
    """A 63-bit seed from the rollout's seed and the prompt's id, the same on every machine."""
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt_id}".encode()).digest()[:8], "big") >> 1


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
