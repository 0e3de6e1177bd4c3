"""Rollouts by the trainer's own transformers model, in the trainer's process.

A prompt is prefilled once whatever the number of completions, in chunks that bound its memory, and its keys and values
are shared while decoding: nothing is repeated G times.

Letters: P prompts, G completions each, T tokens of all prompts, S completion tokens so far, A position axes, D hidden
size, V vocabulary.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from longrl.engines import prefix_cache
from longrl.engines.decoding_memory import DecodingMemory, free_bytes
from longrl.engines.expert_record import ExpertRecord, TurnExperts
from longrl.engines.rollout_engine import RolloutEngine, prompt_seed
from longrl.engines.sampling import LMHead, sample_tokens
from longrl.engines.turn_cache import TurnCache
from longrl.engines.turn_sampler import TurnSampler
from longrl.environments.trajectory import Answer, Trajectory
from longrl.io.number_ranges import COUNT, check_ranges
from longrl.io.pulse import PULSE
from longrl.models.base import CausalFamily
from longrl.packing.pack import pack
from longrl.types import Completion, FinishReason, Packed, Prompt, SamplingParams

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
        answer_after_tokens: with `rollout.environment`, tokens that other completions sample before the answer to a
            turn is waited for. More of them hide slower tools; how long tools take decides no completion.
    """

    reads_policy_weights = True
    supports_fp32_lm_head = True
    replays_turns = True

    def __init__(
        self,
        max_sequences: int | None = None,
        prefill_chunk_tokens: int = 16_384,
        answer_after_tokens: int = 16,
    ) -> None:
        if prefill_chunk_tokens < 1:
            raise ValueError(
                f"the engine's prefill_chunk_tokens must be at least 1, got {prefill_chunk_tokens}; leave it out for "
                "16384, or take one larger than every prompt to prefill in one go"
            )
        check_ranges(locals(), "the engine's ", max_sequences=COUNT, answer_after_tokens=COUNT)
        self.max_sequences = max_sequences
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.answer_after_tokens = answer_after_tokens
        self._has_told = False

    @override
    def identity(self) -> dict[str, Any]:
        return {"prefill_chunk_tokens": self.prefill_chunk_tokens}  # chunks of another size round otherwise

    @override
    def router_replay_problem(self) -> str | None:
        return None

    @override
    def environment_problem(self) -> str | None:
        return None

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
                uniform = _uniforms(together, sampling, seed, first)
                groups += self._decode(family, model, together, features, sampling, uniform)
            return groups
        finally:
            model.train(was_training)

    @override
    @torch.no_grad()
    def generate_turns(
        self,
        family: CausalFamily,
        model: nn.Module,
        groups: Sequence[Sequence[Trajectory]],
        features: Mapping[str, Tensor],
        sampling: SamplingParams,
        seed: int,
        answer: Answer,
    ) -> None:
        was_training = model.training
        model.eval()
        most_observed = max((one.max_observed_tokens for group in groups for one in group), default=0)
        room = replace(sampling, max_completion_tokens=sampling.max_completion_tokens + most_observed)
        try:
            remaining = list(groups)
            while remaining:
                prompts = [group[0].prompt for group in remaining]
                count = self._num_prompts(family, model, prompts, room)
                self._sample_turns(family, model, remaining[:count], features, sampling, seed, answer)
                del remaining[:count]
        finally:
            model.train(was_training)

    def _num_prompts(
        self, family: CausalFamily, model: Any, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> int:
        """How many of the prompts, the first of them first, are decoded together."""
        free = None if self.max_sequences else free_bytes(model.get_input_embeddings().weight.device)
        if free is None:
            return max(1, (self.max_sequences or SEQUENCES_ON_CPU) // sampling.num_generations)
        tiles = {"max_scores": prefix_cache.MAX_SCORES, "tile_keys": prefix_cache.TILE_KEYS}
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
        lm_head = LMHead(family, model)
        device = lm_head.weight.device
        # What every token of a completion needs goes to the device here, once: a copy from a list waits for the GPU.
        end_tokens = torch.tensor(family.end_token_ids, device=device)
        uniform = uniform.to(device)
        # 1. Every prompt once through the model, into the cache.
        packed = pack(prompts, [[] for _ in prompts], NO_LIMIT)[0].to(device)
        cache = prefix_cache.PrefixCache(packed.spans, group_size, max_tokens, device)
        experts = ExpertRecord(family, model)
        hidden = self._prefill(family, model, packed, features, cache, experts)  # [P, D]
        hidden = hidden.repeat_interleave(group_size, 0)  # [P * G, D]
        # A completion's positions go on where its prompt's ended: with media that is not the number of tokens.
        following = torch.stack([prompt.position_ids.max() + 1 for prompt in prompts]).to(hidden.device)
        following = following.repeat_interleave(group_size)[:, None]  # [P * G, 1]
        # 2. Sample a token of every completion and feed it back, until all have ended.
        layers = {"layer_attention": cache.decode, "layer_recurrence": cache.decode_recurrence}
        tokens: list[Tensor] = []
        logps: list[Tensor] = []
        finished = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        while True:
            PULSE.beats += 1
            token, logp = sample_tokens(lm_head(hidden), sampling, uniform[:, cache.length])
            tokens.append(token)
            logps.append(logp)
            finished |= torch.isin(token, end_tokens)
            if len(tokens) == max_tokens or finished.all():  # the one wait for the GPU of a token
                break
            embeds = embed_tokens(token)[:, None]  # [P * G, 1, D]
            positions = (following + cache.length).expand(len(packed.position_ids), -1, -1)  # [A, P * G, 1]
            inputs = {"inputs_embeds": embeds, **layers, **experts.of_tokens(len(token))}
            hidden = family.hidden_states(model, positions, **inputs)[:, 0]
            cache.length += 1
        completions = _until_their_ends(family, torch.stack(tokens, 1), torch.stack(logps, 1))
        completions = experts.handed_to(completions, [span.prompt_tokens for span in packed.spans])
        return [completions[start : start + group_size] for start in range(0, len(completions), group_size)]

    def _sample_turns(
        self,
        family: CausalFamily,
        model: Any,
        groups: Sequence[Sequence[Trajectory]],
        features: Mapping[str, Tensor],
        sampling: SamplingParams,
        seed: int,
        answer: Answer,
    ) -> None:
        """Samples trajectories of prompts that are decoded together."""
        every = [one for group in groups for one in group]
        assert all(len(group) == sampling.num_generations for group in groups), "prompts have as many trajectories"
        assert not any(one.turns for one in every), "they begin here"
        device = model.get_input_embeddings().weight.device
        prompts = [group[0].prompt for group in groups]
        group_size = sampling.num_generations
        max_tokens = sampling.max_completion_tokens
        most_tokens = max_tokens + max(one.max_observed_tokens for one in every)
        packed = pack(prompts, [[] for _ in prompts], NO_LIMIT)[0].to(device)
        cache = TurnCache(packed.spans, group_size, max_tokens, most_tokens, device)
        experts = TurnExperts(family, model)
        hidden = self._prefill(family, model, packed, features, cache, experts)  # [P, D]
        sampler = TurnSampler(
            family, model, every, features, sampling,
            _uniforms(prompts, sampling, seed, groups[0][0].number), answer,
            cache=cache, hidden=hidden.repeat_interleave(group_size, 0), experts=experts,
            chunk_tokens=self.prefill_chunk_tokens, answer_after_tokens=self.answer_after_tokens,
        )  # fmt: skip
        sampler.run()
        experts.hand_to(groups)

    def _prefill(
        self,
        family: CausalFamily,
        model: Any,
        packed: Packed,
        features: Mapping[str, Tensor],
        cache: prefix_cache.PrefixCache,
        experts: ExpertRecord,
    ) -> Tensor:
        """[P, D] hidden states of the prompts' last tokens; what the layers keep goes into the cache.

        Prompts go through the model in chunks that end anywhere.
        """
        total = len(packed.input_ids)
        last_states = []
        for start in range(0, total, self.prefill_chunk_tokens):
            rows = slice(start, min(start + self.prefill_chunk_tokens, total))
            inputs = family.text_inputs(model, packed, features, rows)
            inputs |= experts.of_prompts(rows.stop - rows.start)
            inputs["layer_attention"] = functools.partial(cache.prefill, rows)
            inputs["layer_recurrence"] = functools.partial(cache.prefill_recurrence, rows)
            positions = packed.position_ids[:, None, rows]  # [A, 1, rows]
            hidden = family.hidden_states(model, positions, **inputs)[0]  # [rows, D]
            last_rows = [span.stop - 1 - start for span in packed.spans if start < span.stop <= rows.stop]
            last_states.append(hidden[last_rows])
        return torch.cat(last_states)


def _uniforms(prompts: Sequence[Prompt], sampling: SamplingParams, seed: int, first: int) -> Tensor:
    """[P * G, S] numbers in [0, 1) that decide draws.

    They depend on seed, prompt and completion alone: neither on the batch nor on the device. Other ranks sample the
    completions before `first`.
    """
    shape = (first + sampling.num_generations, sampling.max_completion_tokens)
    generators = [torch.Generator().manual_seed(prompt_seed(seed, prompt.id)) for prompt in prompts]
    return torch.cat([torch.rand(shape, generator=each, dtype=torch.float64)[first:] for each in generators])


def _until_their_ends(family: CausalFamily, token_ids: Tensor, logps: Tensor) -> list[Completion]:
    """[P * G, S] tokens and log-probabilities as completions; what follows an end was sampled for the others' sake."""
    completions = []
    end_tokens = torch.tensor(family.end_token_ids)
    for ids, logp in zip(token_ids.cpu(), logps.cpu(), strict=True):
        ends = torch.isin(ids, end_tokens).nonzero()
        count = int(ends[0]) + 1 if len(ends) else len(ids)
        reason: FinishReason = "stop" if len(ends) else "length"
        completions.append(Completion(ids[:count].clone(), logp[:count].clone(), family.decode(ids[:count]), reason))
    return completions
