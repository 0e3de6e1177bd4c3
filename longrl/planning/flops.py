"""How much a step computes, and how long that takes; the prompt counts once per group, as the code computes it.

Letters as in `longrl.planning.inputs`; Q parameters of all layers that a row goes through, P prompts of a
sequence-parallel group. A product with Q parameters is 2 Q operations per row. Times are of one rank: the slowest,
since all wait for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from longrl.models.encode_flops import hearing_flops, seeing_flops
from longrl.packing.delta_kernels import CHUNK_ROWS
from longrl.planning import formulas as f, launches
from longrl.planning.delta_formulas import state_memory
from longrl.planning.formulas import is_mlp_chunked
from longrl.planning.hardware import Hardware
from longrl.planning.inputs import ModelSizes, Plan
from longrl.planning.launches import decoded_prompts
from longrl.planning.micro_batches import MicroBatch, micro_batch
from longrl.planning.teachers import as_policy
from longrl.strategies.sequence import HeadLayout

BACKWARD = 2
"""A backward pass is twice its forward pass."""


@dataclass(frozen=True)
class Efficiency:
    """Fractions of the makers' peaks that are reached, and what no peak bounds."""

    compute: float = 0.4
    bandwidth: float = 0.6
    launch_s: float = 7e-6
    """Seconds from one kernel that Python launches to the next."""


def encode_flops(plan: Plan) -> float:
    """One video and its sound, see `longrl.models.encode_flops`."""
    encoder, audio = plan.sizes.vision_encoder, plan.sizes.audio_encoder
    if encoder is None or not plan.patches:
        return 0.0
    sees = seeing_flops(encoder, encoder.params - encoder.audio_params, plan.patches, plan.spatial_patches)
    return sees + (hearing_flops(audio, encoder.audio_params, plan.sound_tokens) if audio else 0.0)


def prefill_flops(plan: Plan) -> float:
    """One prompt: 2 Q T, causal attention 2 A T^2 per layer that attends, and the rule of gated delta nets."""
    sizes, tokens = plan.sizes, plan.prompt_tokens
    attention = 2.0 * sizes.num_attending * sizes.query_width * tokens**2
    return 2.0 * sizes.used_params * tokens + attention + rule_flops(sizes, tokens)


def decode_flops(plan: Plan) -> float:
    """One completion: 2 Q S + 2 V D n, 4 A (T S + S^2 / 2) per layer that attends, and the rule, row by row."""
    sizes, tokens = plan.sizes, plan.completion_tokens
    dense = 2.0 * (sizes.used_params * tokens + sizes.vocabulary * sizes.hidden * plan.sampled_tokens)
    seen = plan.prompt_tokens * tokens + tokens**2 / 2
    return dense + 4.0 * sizes.num_attending * sizes.query_width * seen + rule_flops(sizes, tokens, chunk_rows=1)


def rule_flops(sizes: ModelSizes, rows: float, chunk_rows: int = CHUNK_ROWS) -> float:
    """The gated delta rule in all layers that have it."""
    return rows * sizes.num_delta_nets * sizes.delta_nets.rule_flops(chunk_rows) if sizes.delta_nets else 0.0


def forward_flops(plan: Plan, batch: MicroBatch) -> float:
    """A micro-batch's layers.

    2 Q per row; per group and layer that attends 2 A (T^2 + g (2 T S + S^2)), g completions; the rule of the others.
    Heads that pad the ranks' parts count as heads.
    """
    sizes, heads, sp = plan.sizes, plan.heads, plan.sequence_parallel_size
    width = sp * heads.per_rank * heads.size * sizes.head_size
    t, s = plan.prompt_tokens, plan.completion_tokens
    pairs = batch.groups * (t**2 + batch.completions * (2 * t * s + s**2))
    rule = 0.0
    if sizes.delta_nets:
        padded = sp * plan.delta_heads.per_rank * plan.delta_heads.size / sizes.delta_nets.num_heads
        rule = padded * rule_flops(sizes, batch.tokens)
    return 2.0 * sizes.used_params * batch.tokens + 2.0 * sizes.num_attending * width * pairs + rule


def head_flops(plan: Plan, batch: MicroBatch) -> float:
    """The scored rows of a micro-batch: 2 V D each."""
    return 2.0 * plan.sizes.vocabulary * plan.sizes.hidden * batch.scored


def spared_flops(plan: Plan, batch: MicroBatch) -> float:
    """Part of a backward pass that LoRA leaves out, gradients of frozen weights: 2 Q per row, 2 V D per scored row."""
    if not plan.sizes.adapter_params:
        return 0.0
    return 2.0 * plan.sizes.used_params * batch.tokens + head_flops(plan, batch)


def chunked_mlp_flops(plan: Plan, batch: MicroBatch) -> float:
    """MLPs in chunks compute each once more in the backward pass: 2 * 3 D F per row and layer."""
    if not is_mlp_chunked(plan, batch.local_rows(plan)):
        return 0.0
    return 6.0 * len(plan.sizes.layer_params) * plan.sizes.hidden * plan.sizes.mlp_width * batch.tokens


def step_flops(plan: Plan) -> dict[str, float]:
    """Operations of a step of one sequence-parallel group, by phase."""
    batch = micro_batch(plan)
    prompts = plan.prompts_per_batch
    count = batch.count * (plan.sp_group // plan.sequence_parallel_size)
    once = count * (forward_flops(plan, batch) + head_flops(plan, batch))
    layers = (1 + BACKWARD + plan.gradient_checkpointing) * forward_flops(plan, batch)
    head = (2 + BACKWARD) * head_flops(plan, batch)  # its logits are always computed again
    encoding = prompts * plan.encoded_videos * encode_flops(plan)
    update = count * (layers + head - spared_flops(plan, batch) + chunked_mlp_flops(plan, batch))
    trains = plan.sizes.vision_encoder is not None and plan.sizes.vision_encoder.trains
    of_teachers: dict[str, float] = {}
    for teacher in plan.teachers:  # of several, which share the groups, the largest
        own = as_policy(plan, teacher)
        whole = count * (forward_flops(own, batch) + head_flops(own, batch)) + prompts * encode_flops(own)
        of_teachers["teacher"] = max(whole, of_teachers.get("teacher", 0.0))
        if teacher.keeps_hidden:  # its logits, in the update's chunks and when these are computed again
            update += 2 * count * head_flops(own, batch) / len(plan.teachers)
    return {
        "encode": encoding,
        "prefill": prompts * prefill_flops(plan),
        "decode": prompts * plan.num_generations * decode_flops(plan),
        "score": once * scoring_passes(plan),
        **of_teachers,
        "update": plan.epochs * (update + trains * (1 + BACKWARD) * encoding),
    }


def scoring_passes(plan: Plan) -> int:
    """Old log-probabilities if a rollout serves several optimizer steps, tokens' statistics, and the reference's."""
    return max(int(plan.mini_batches * plan.epochs > 1), plan.statistics_passes) + int(plan.reference)


def step_times(plan: Plan, hardware: Hardware, efficiency: Efficiency) -> dict[str, float]:
    """Seconds of a step's phases on the slowest rank, and of the `step`: one phase after the other.

    Gathering weights, launching kernels and moving layer inputs overlap with computing, exchanges and moments do not.
    """
    peak, launch_s = hardware.flops * efficiency.compute, efficiency.launch_s
    flops, batch = step_flops(plan), micro_batch(plan)
    gather, passes = gather_s(plan, hardware, efficiency), scoring_passes(plan)
    exchange = batch.count * exchange_s(plan, batch, hardware, efficiency)
    backward = 1 + BACKWARD / 2 + plan.gradient_checkpointing
    scoring = max(
        flops["score"] / plan.sp_group / peak,
        passes * batch.count * gather,
        passes * launches.score_launch_s(plan, batch, launch_s),
    )
    updating = max(
        flops["update"] / plan.sp_group / peak,
        plan.epochs * batch.count * 3 * gather,
        launches.update_launch_s(plan, batch, launch_s),
        layer_inputs_s(plan, batch, hardware, efficiency),
    )
    seconds = {
        "encode": max(flops["encode"] / plan.sp_group / peak, launches.encode_launch_s(plan, launch_s)),
        "prefill": prefill_s(plan, hardware, efficiency),
        "decode": decode_s(plan, hardware, efficiency),
        "score": scoring + passes * exchange,
        **teacher_s(plan, batch, hardware, efficiency, flops.get("teacher", 0.0)),
        "update": updating + plan.epochs * backward * exchange + moments_s(plan, hardware, efficiency),
    }
    return seconds | {"step": sum(seconds.values())}


def teacher_s(
    plan: Plan, batch: MicroBatch, hardware: Hardware, efficiency: Efficiency, operations: float
) -> dict[str, float]:
    """Seconds of the teachers' phase, nothing without any."""
    seconds: dict[str, float] = {}
    for teacher in plan.teachers:
        own = as_policy(plan, teacher)
        busy = operations / plan.sp_group / (hardware.flops * efficiency.compute)
        gathering = batch.count * gather_s(own, hardware, efficiency)
        launching = launches.score_launch_s(own, batch, efficiency.launch_s)
        exchanging = batch.count * exchange_s(own, batch, hardware, efficiency)
        slowest = max(busy, gathering, launching) + exchanging
        seconds["teacher"] = max(slowest, seconds.get("teacher", 0.0))
    return seconds


def prefill_rounds(plan: Plan) -> int:
    """Calls of the decoder of one engine; none if another process generates."""
    return 0 if plan.generates_elsewhere else math.ceil(plan.local_prompts / decoded_prompts(plan))


def prefill_s(plan: Plan, hardware: Hardware, efficiency: Efficiency) -> float:
    """The prompts of each round by their operations, which vLLM's ranks share; or by launching their kernels."""
    ranks = plan.vllm.ranks if plan.vllm else 1
    computing = decoded_prompts(plan) * prefill_flops(plan) / ranks / (hardware.flops * efficiency.compute)
    return prefill_rounds(plan) * max(computing, launches.prefill_launch_s(plan, efficiency.launch_s))


def decode_s(plan: Plan, hardware: Hardware, efficiency: Efficiency) -> float:
    """All n steps of each round, each reading text weights, keys and values so far, and states; or the products' time.

    Or the time in which their kernels are launched. Ranks that share an engine share the reading and the products.
    """
    sizes, sequences = plan.sizes, decoded_prompts(plan) * plan.rank_completions
    ranks = plan.vllm.ranks if plan.vllm else 1
    weight_bytes = plan.matmul_bytes if plan.vllm else plan.gathered_bytes
    cached = 2 * sizes.num_attending * sizes.key_width * plan.matmul_bytes / min(ranks, sizes.num_key_heads)
    seen = decoded_prompts(plan) * plan.prompt_tokens + sequences * plan.completion_tokens / 2
    states = 2 * state_memory(plan, sequences) / ranks  # read and written
    read = weight_bytes * sizes.touched_params(sequences) / ranks + cached * seen + states
    by_memory = plan.sampled_tokens * read / (hardware.memory_bandwidth * efficiency.bandwidth)
    by_compute = sequences * decode_flops(plan) / ranks / (hardware.flops * efficiency.compute)
    by_launches = plan.sampled_tokens * launches.decode_launch_s(plan, efficiency.launch_s)
    return prefill_rounds(plan) * max(by_memory, by_compute, by_launches)


def gather_s(plan: Plan, hardware: Hardware, efficiency: Efficiency) -> float:
    """Gathering all sharded weights once: c Q (1 - 1 / m) over the slower of the two networks it crosses."""
    size = plan.gathered_bytes * plan.sizes.text_params * (1 - 1 / plan.shards)
    return size / (hardware.bandwidth_among(plan.shards) * efficiency.bandwidth)


def exchange_s(plan: Plan, batch: MicroBatch, hardware: Hardware, efficiency: Efficiency) -> float:
    """The all-to-alls of one forward pass: N l (2 h + 2 k) d b sp per rank, of which 1 - 1 / sp travels.

    Gated delta nets send heads of the larger of key and value, which has two columns more.
    """
    sp, sizes = plan.sequence_parallel_size, plan.sizes
    width = float(sizes.num_attending * _parts(plan.heads) * sizes.head_size)
    if sizes.delta_nets:
        head_size = max(sizes.delta_nets.key_size, sizes.delta_nets.value_size + 2)
        width += sizes.num_delta_nets * _parts(plan.delta_heads) * head_size
    size = batch.tokens / sp * sp * width * plan.matmul_bytes * (1 - 1 / sp)
    return size / (hardware.bandwidth_among(sp) * efficiency.bandwidth)


def _parts(heads: HeadLayout) -> int:
    """Heads that a rank gets of a layer, and gives back."""
    return heads.per_rank * (2 * heads.size + 2)


def layer_inputs_s(plan: Plan, batch: MicroBatch, hardware: Hardware, efficiency: Efficiency) -> float:
    """Seconds in which a rank's layer inputs move to the host and back in a step, beside computing."""
    if not plan.checkpoints_on_host:
        return 0.0
    size = f.checkpoint_memory(plan, batch.local_rows(plan), len(plan.sizes.layer_params))
    return 2 * batch.count * plan.epochs * size / (hardware.host_bandwidth * efficiency.bandwidth)


def moments_s(plan: Plan, hardware: Hardware, efficiency: Efficiency) -> float:
    """Seconds in which a rank's moments move to the GPU and back in a step, behind computing."""
    if not plan.optimizer_offload:
        return 0.0
    size = 2 * f.trained_memory(plan)
    return 2 * plan.mini_batches * plan.epochs * size / (hardware.host_bandwidth * efficiency.bandwidth)
