"""What the engine in the trainer's process and the one beside it have in common: requests in, completions out."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn
from typing_extensions import override

from longrl.engines.expert_record import expert_layers, with_routed_experts
from longrl.engines.rollout_engine import RolloutEngine
from longrl.engines.turn_requests import TurnRequests
from longrl.engines.vllm_options import VERSION, Fields, make_completion, sampling_arguments
from longrl.engines.vllm_turns import TurnSampler
from longrl.environments.trajectory import Answer, Trajectory
from longrl.models.base import CausalFamily
from longrl.packing.lengths import check_lengths
from longrl.types import Completion, Prompt, SamplingParams


class VLLMRollouts(RolloutEngine):
    """The common part of the engine in the trainer's process and the one beside it: requests in, completions out."""

    supports_fp32_lm_head = True
    num_syncs = 0
    """Times weights were handed over."""

    @override
    def library_versions(self) -> dict[str, str]:
        return {**super().library_versions(), "vllm": VERSION}

    @override
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
        """See `RolloutEngine.generate`.

        Raises:
            RuntimeError: vLLM failed, or the server ended (ConnectionError); the message says how the run goes on.
            ValueError: a prompt is too long for the engine.
        """
        limit, option = self.length_limit()
        check_lengths(prompts, sampling, limit=limit, option=option)
        params = [sampling_arguments(family, prompt, sampling, seed, first) for prompt in prompts]
        requests = [family.engine_request(prompt, features) for prompt in prompts]
        answers = self.answer_requests(prompts, requests, params) if prompts else []
        groups = [[make_completion(family, output) for output in outputs] for outputs in answers]
        if not family.router_replay:
            return groups
        layers = expert_layers(family, model)
        for prompt, outputs, group in zip(prompts, answers, groups, strict=True):
            for index, output in enumerate(outputs):
                routed = output.get("routed_experts")
                group[index] = with_routed_experts(group[index], routed, len(prompt.input_ids), layers, index == 0)
        return groups

    @abc.abstractmethod
    def length_limit(self) -> tuple[int, str]:
        """Tokens of the longest prompt and completion together, and the option that sets it."""

    @abc.abstractmethod
    def answer_requests(self, prompts: Sequence[Prompt], requests: Fields, params: Fields) -> list[Fields]:
        """Completions of each request, as `completion_fields` gives them."""

    @override
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
        """See `RolloutEngine.generate_turns`.

        A trajectory that the engine has no room for ends with `finish_reason` "length".

        Raises:
            RuntimeError: vLLM failed, or the server ended (ConnectionError); the message says how the run goes on.
            ValueError: a prompt is too long for the engine.
        """
        limit, option = self.length_limit()
        prompts = [group[0].prompt for group in groups if group]
        check_lengths(prompts, sampling, limit=limit, option=option)
        with self.turn_requests(sum(map(len, groups))) as requests:
            TurnSampler(family, features, sampling, seed, requests, answer, limit, option).sample(groups)

    @abc.abstractmethod
    def turn_requests(self, num_trajectories: int) -> AbstractContextManager[TurnRequests]:
        """Nothing to answer yet; what has not been answered at the end is given up.

        Args:
            num_trajectories: of the rollout.
        """
