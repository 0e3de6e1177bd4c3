"""Seconds in which a step's kernels are launched: what a decode step of a few sequences waits for.

A device computes while the host launches what comes next, so a phase takes as long as the longer of the two. Kernels
per layer are those of the model that the code runs, counted on a CPU as operations that are no views (tests/planning);
the time of one is an assumption, `--launch_us`: 5 to 10 microseconds from Python, whatever the tensors' sizes. vLLM
replays CUDA graphs of fused kernels, which start a microsecond apart, and has its own Python between two of them.
"""

from __future__ import annotations

import math

from longrl.planning.formulas import prefilled_prompts
from longrl.planning.inputs import Plan
from longrl.planning.micro_batches import MicroBatch
from longrl.planning.vllm_formulas import batched_tokens, prompts_together

DECODE_KERNELS = 65
"""Of a layer in a step of `PrefixCache.decode`."""
FORWARD_KERNELS = 65
"""Of a layer, text or vision, in any other forward pass."""
BACKWARD_KERNELS = 115
"""Of a layer's backward pass."""
VLLM_KERNELS = 12
"""Of a layer of vLLM: two norms with their sums, four products, rotary, cache, attention in two, SwiGLU. Assumed."""
REPLAY_S = 1e-6
"""From one kernel of a CUDA graph to the next. Assumed."""
SCHEDULE_S = 2e-3
"""vLLM's own Python for one token of all sequences. Assumed."""


def decoded_prompts(plan: Plan) -> int:
    """Prompts whose completions an engine decodes together."""
    return prompts_together(plan) if plan.vllm else prefilled_prompts(plan)


def decode_launch_s(plan: Plan, launch_s: float) -> float:
    """A token of all sequences of a round: 65 N kernels; vLLM's 12 N in a graph, or one by one with `enforce_eager`."""
    layers = len(plan.sizes.layer_params)
    if plan.vllm is None:
        return layers * DECODE_KERNELS * launch_s
    return SCHEDULE_S + layers * VLLM_KERNELS * (launch_s if plan.vllm.enforce_eager else REPLAY_S)


def prefill_launch_s(plan: Plan, launch_s: float) -> float:
    """The prompts of a round, chunk by chunk."""
    tokens = decoded_prompts(plan) * plan.prompt_tokens
    chunks = math.ceil(tokens / (batched_tokens(plan) if plan.vllm else plan.prefill_chunk_tokens))
    kernels = VLLM_KERNELS if plan.vllm else FORWARD_KERNELS
    return chunks * len(plan.sizes.layer_params) * kernels * launch_s


def encode_launch_s(plan: Plan, launch_s: float) -> float:
    """All videos of a batch, call by call, and as many of crops as their tokens make."""
    encoder = plan.sizes.vision_encoder
    if encoder is None or not plan.local_patches:
        return 0.0
    temporal_patches = plan.local_patches // plan.shared_patches
    of_video = math.ceil(temporal_patches / (plan.encoded_together or temporal_patches))
    calls = plan.prompts_per_batch * plan.encoded_videos * of_video
    return calls * encoder.num_layers * FORWARD_KERNELS * launch_s


def score_launch_s(plan: Plan, batch: MicroBatch, launch_s: float) -> float:
    """One forward pass over the rollout."""
    return batch.count * len(plan.sizes.layer_params) * FORWARD_KERNELS * launch_s


def update_launch_s(plan: Plan, batch: MicroBatch, launch_s: float) -> float:
    """Forward and backward passes over the rollout, with checkpointing one more forward."""
    kernels = FORWARD_KERNELS * (1 + plan.gradient_checkpointing) + BACKWARD_KERNELS
    return plan.epochs * batch.count * len(plan.sizes.layer_params) * kernels * launch_s
