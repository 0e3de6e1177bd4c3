"""Memory of a vLLM that shares the trainer's devices (longrl/engines/vllm.py), one formula for each kind.

Letters as in `longrl.planning.formulas`, and r ranks over which vLLM splits the model. vLLM computes in b, what enters
a matrix product of the trainer. It takes a share of the whole memory of a device, whatever the trainer has of it: its
weights, the activations of its largest batch and its CUDA graphs come first, the rest is its cache. Constants are read
in the sources of vLLM 0.32 or assumed, as they say; nothing here is measured.
"""

from __future__ import annotations

import math

from longrl.engines.vllm_options import MIN_BATCHED_TOKENS
from longrl.planning.delta_formulas import state_memory
from longrl.planning.formulas import largest_weight
from longrl.planning.inputs import Plan, VLLMShare

BATCHED_TOKENS = 16_384
"""Rows of one batch where nothing sets them: vLLM's own for `LLM` on GPUs of 70 GiB and more (engine/arg_utils.py)."""
GRAPH_BYTES = 1 << 30
"""CUDA graphs, which stay while vLLM sleeps. Assumed: its own test of sleep only asks for less than 7 GiB."""


def share_of(plan: Plan) -> VLLMShare:
    """What the config says of vLLM.

    Raises:
        ValueError: the run has no vLLM on its devices.
    """
    if plan.vllm is None:
        raise ValueError("this run has no vLLM on its devices")
    return plan.vllm


def model_length(plan: Plan) -> int:
    """Tokens of the longest prompt and completion that vLLM must take, `max_model_len`: at least T + S."""
    return max(share_of(plan).max_model_len, plan.prompt_tokens + plan.completion_tokens)


def batched_tokens(plan: Plan) -> int:
    """Rows of vLLM's largest batch. Its cache of features holds so many as well, so all of a prompt with media."""
    if share_of(plan).media_enter_whole and plan.media_tokens:
        return max(MIN_BATCHED_TOKENS, model_length(plan))
    return BATCHED_TOKENS


def engine_weights(plan: Plan) -> float:
    """The text stack, b text / r; and the encoder, b each, which never runs, if features go to deeper layers as well.

    Beside other features vLLM builds none.
    """
    sizes = plan.sizes
    encoder = sizes.encoder_params if sizes.feature_size > sizes.hidden else 0
    return plan.matmul_bytes * (sizes.text_params / share_of(plan).ranks + encoder)


def engine_activations(plan: Plan) -> float:
    """The largest batch, l rows: three of the stream, gate, up and product, l (3 D + 3 F / r) b; or sampling, 12 n V.

    Sampling has logits and log-probabilities of n completions in float32, and a temporary.
    """
    sizes, share = plan.sizes, share_of(plan)
    layers = batched_tokens(plan) * (3 * sizes.hidden + 3 * sizes.mlp_width / share.ranks) * plan.matmul_bytes
    return max(layers, 12.0 * share.max_num_seqs * sizes.vocabulary)


def graph_memory(plan: Plan) -> float:
    """CUDA graphs; none with `enforce_eager`."""
    return 0.0 if share_of(plan).enforce_eager else float(GRAPH_BYTES)


def cache_per_token(plan: Plan) -> float:
    """Keys and values of a token on one rank: 2 N C b over r, of which a key head needs one."""
    sizes = plan.sizes
    width = 2 * sizes.num_attending * sizes.key_width
    return width * plan.matmul_bytes / min(share_of(plan).ranks, sizes.num_key_heads)


def cache_per_sequence(plan: Plan) -> float:
    """States of a sequence on one rank. Pages round them up and a prefix cache keeps further ones: not counted."""
    return state_memory(plan, 1) / share_of(plan).ranks


def least_cache(plan: Plan) -> float:
    """Keys and values, and states, of one sequence of `max_model_len`: with less vLLM does not start."""
    return cache_per_token(plan) * model_length(plan) + cache_per_sequence(plan)


def without_cache(plan: Plan) -> float:
    """All of vLLM's share that is not cache."""
    return engine_weights(plan) + engine_activations(plan) + graph_memory(plan)


def awake_memory(plan: Plan) -> float:
    """From `sync` to `sleep`: `gpu_memory_utilization` of the device, or what `kv_cache_gib` adds up to."""
    share = share_of(plan)
    if share.kv_cache_bytes is not None:
        return without_cache(plan) + share.kv_cache_bytes
    return share.gpu_memory_utilization * share.device_bytes


def engine_cache(plan: Plan) -> float:
    """What is left for keys and values; negative if weights and activations alone are more than the share."""
    return awake_memory(plan) - without_cache(plan)


def cache_shortfall(plan: Plan) -> float:
    """Bytes that vLLM's cache lacks to start at all; 0 if it starts, or is not on these devices."""
    return 0.0 if plan.vllm is None else max(0.0, least_cache(plan) - engine_cache(plan))


def asleep_memory(plan: Plan) -> float:
    """CUDA graphs, and the logits and log-probabilities they write to, 8 n V; all if vLLM is not sent to sleep."""
    share = share_of(plan)
    if not share.sleeps:
        return awake_memory(plan)
    return graph_memory(plan) + 8.0 * share.max_num_seqs * plan.sizes.vocabulary


def handed_over(plan: Plan) -> float:
    """Whole tensors of a `sync`: `gathered_bucket`, and its largest tensor in vLLM's precision."""
    cast = plan.matmul_bytes if plan.matmul_bytes < plan.weight_bytes else 0
    return gathered_bucket(plan) + float(cast * largest_weight(plan))


def gathered_bucket(plan: Plan) -> float:
    """A bucket gathered from shards and its largest tensor; one that is larger is a bucket of its own."""
    if plan.shards == 1:
        return 0.0
    largest = plan.weight_bytes * largest_weight(plan)
    bucket = min(plan.bucket_bytes, plan.weight_bytes * plan.sizes.text_params)
    return float(largest if largest >= bucket else bucket + largest)


def engine_features(plan: Plan) -> float:
    """Features of the prompts at work, beside vLLM's share: it does not count them where no encoder is to be run."""
    tokens = min(batched_tokens(plan), plan.local_prompts * (plan.feature_tokens + plan.crop_tokens))
    return float(tokens * plan.sizes.feature_size * plan.matmul_bytes)


def prompts_together(plan: Plan) -> int:
    """Prompts that one engine decodes together: as many as its cache and `max_num_seqs` hold, at least one."""
    tokens = plan.prompt_tokens + plan.rank_completions * plan.completion_tokens
    of_prompt = cache_per_token(plan) * tokens + plan.rank_completions * cache_per_sequence(plan)
    by_cache = math.floor(engine_cache(plan) / of_prompt)
    by_count = share_of(plan).max_num_seqs // plan.rank_completions
    return max(1, min(plan.local_prompts, by_cache, by_count))


def least_utilization(plan: Plan) -> float:
    """The smallest `gpu_memory_utilization`, in hundredths, with room for two of the longest sequences."""
    need = without_cache(plan) + 2 * least_cache(plan)
    return math.ceil(100 * need / share_of(plan).device_bytes) / 100
