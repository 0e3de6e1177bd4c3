"""How much memory a device needs in each phase of a step, by kind, and what to do when that is too much."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from longrl.planning import formulas as f, teachers as t, vllm_formulas as v
from longrl.planning.flops import scoring_passes
from longrl.planning.formulas import MemoryParts
from longrl.planning.hardware import GIB
from longrl.planning.inputs import Plan
from longrl.planning.micro_batches import MicroBatch, micro_batch, needed_budget
from longrl.types import UnusableSample

FramesRule = Callable[[Plan, int], Plan]
"""The same run with another number of frames per video."""
MAX_CHANGES = 12
MAX_FRAMES = 1 << 16
LEAST_CHUNK = 4096
"""A smaller `prefill_chunk_tokens` saves hardly anything, and is slow."""
CHUNK = 8192
"""Value of `mlp_chunk_tokens`: rows enough to keep a GPU's matrix products busy."""
HELPFUL = 0.98
"""A change that leaves more of the peak than this is not worth naming."""

# ------------------------------------------------------------------------------------------------------------ phases


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device."""

    phases: dict[str, MemoryParts]
    """{phase: {kind: bytes}}."""
    peak_phase: str
    """The phase that needs most."""
    peak: float
    """Bytes that a device must have."""


def estimate_memory(plan: Plan) -> MemoryEstimate:
    """All phases of a step. Scoring is left out if there is nothing to score with.

    Raises:
        ValueError: a prompt with one completion is over the budget of a micro-batch.
    """
    batch = micro_batch(plan)
    standing = standing_memory(plan)
    asleep = {"vLLM": v.asleep_memory(plan)} if plan.vllm else {}
    phases = {
        "encode": encoding(plan, awake=plan.resamples),
        **generation_phases(plan, standing),
    }
    of_update = standing | asleep
    if plan.teachers:
        phases["teacher"] = t.teacher_phase(plan, batch, of_update)
        of_update = of_update | {"teachers' scores": t.kept_memory(plan)}
    phases["update"] = max(update_moments(plan, batch, of_update), key=lambda parts: sum(parts.values()))
    if plan.sizes.vision_encoder:  # all batches but the first are encoded beside an engine that is awake
        phases["validate"] = encoding(replace(plan, prompts_per_batch=plan.eval_prompts), awake=True)
    if scoring_passes(plan):  # old and reference log-probabilities, without gradient
        phases["score"] = (
            standing
            | asleep
            | {
                "gathered weights": f.gathered_root(plan) + f.gathered_layers(plan),
                "activations": f.forward_working_set(plan, batch.local_rows(plan)),
                "logits": f.logit_memory(plan, batch.scored, backward=False),
            }
        )
    totals = {phase: sum(parts.values()) for phase, parts in phases.items()}
    peak_phase = max(totals, key=totals.__getitem__)
    return MemoryEstimate(phases, peak_phase, totals[peak_phase])


def standing_memory(plan: Plan) -> MemoryParts:
    """What is there in every phase: of the policy, its reference and its teachers."""
    standing = f.standing_memory(plan)
    return standing | {"teachers": t.teacher_memory(plan)} if plan.teachers else standing


def encoding(plan: Plan, *, awake: bool) -> MemoryParts:
    """The encoder's calls, or gathering features while those of the batch before are still there."""
    parts = {"feature exchange": f.feature_exchange(plan), "encoder activations": f.encoder_activations(plan)}
    largest = max(parts, key=parts.__getitem__)
    held = standing_memory(plan) | {largest: parts[largest]}
    if plan.vllm:
        held["vLLM"] = v.awake_memory(plan) if awake else v.asleep_memory(plan)
    return held


def generation_phases(plan: Plan, standing: MemoryParts) -> dict[str, MemoryParts]:
    """Between encoding and the update: by the trainer's own model, by vLLM on its devices, or elsewhere.

    vLLM wakes up twice: first for its weights, while they are handed over bucket by bucket, then for its cache.
    """
    if plan.generates_elsewhere:
        return {"sync": standing | {"gathered weights": v.gathered_bucket(plan)}}
    if plan.vllm:
        woken = {"vLLM": v.asleep_memory(plan) + v.engine_weights(plan)}
        handed_over = {"gathered weights": v.handed_over(plan)}
        generating = {"vLLM": v.awake_memory(plan), "vLLM's features": v.engine_features(plan)}
        return {"sync": standing | woken | handed_over, "generate": standing | generating}
    rollout = {
        "gathered weights": float(plan.gathered_bytes * plan.sizes.text_params),  # `RootModule.unsharded`
        "KV cache": f.kv_cache(plan),
        "activations": max(f.prefill_memory(plan), f.decoding_memory(plan)),
    }
    return {"rollout": standing | rollout}


def update_moments(plan: Plan, batch: MicroBatch, standing: MemoryParts) -> list[MemoryParts]:
    """The LM head goes backward; the last layer; the one before; the root's gradients are summed; the optimizer.

    The first micro-batch of a step finds no gradients: they count before the end only if there are more.
    """
    rows = batch.local_rows(plan)
    all_gradients = f.trained_memory(plan)  # in the precision of what trains
    earlier = (all_gradients if batch.count > plan.mini_batches else 0.0) + f.head_gradient(plan)
    saved, ends = f.layers_saved(plan, rows), f.ends_saved(plan, rows)
    one_layer = saved / len(plan.sizes.layer_params)
    work = f.layer_backward(plan, rows)
    root, casts = f.gathered_root(plan), f.weight_casts(plan)
    layers = root + f.gathered_layers(plan) + casts
    first, second = f.layer_gradients(plan, before=False), f.layer_gradients(plan, before=True)
    logits = f.logit_memory(plan, batch.scored, backward=True)
    moments: list[MemoryParts] = [
        {"gathered weights": root + casts, "activations": saved + ends, "gradients": earlier, "logits": logits},
        {"gathered weights": layers, "activations": saved + ends + work, "gradients": earlier + first},
        {"gathered weights": layers, "activations": saved - one_layer + ends + work, "gradients": earlier + second},
        {"gathered weights": root, "gradients": all_gradients + f.root_reduction(plan)},
        {"gradients": all_gradients, "optimizer": standing["optimizer"] + f.optimizer_working_set(plan)},
    ]
    return [standing | moment for moment in moments]


def pinned(size: float) -> int:
    """Bytes of pinned host memory for a tensor of so many: torch takes powers of two."""
    return 2 ** math.ceil(math.log2(max(size, 1)))


def host_memory(plan: Plan, prefetched_prompts: int) -> MemoryParts:
    """Bytes in the host memory of each node.

    Patches of this batch and of the prompts rendered ahead, this rank's part of each, in the precision of computing;
    what is offloaded; and at the start the model that every rank builds before it is sharded.
    """
    num_ranks = min(plan.devices, plan.devices_per_node)
    encoder = plan.sizes.vision_encoder
    patches = plan.local_patches * encoder.patch_values * plan.gathered_bytes if encoder else 0
    params = plan.sizes.text_params + plan.sizes.encoder_params
    offloaded = 2 * f.trained_memory(plan) if plan.optimizer_offload else 0.0
    if plan.offload:  # weights, gradients, moments and the reference
        on_device = replace(plan, offload=False)
        offloaded = f.weight_memory(on_device) + f.adapter_memory(on_device) + 3 * f.trained_memory(on_device)
        if plan.reference and plan.moving_reference:
            offloaded += f.reference_memory(on_device)
        elif plan.reference and not plan.sizes.adapter_params:
            offloaded += plan.weight_bytes * plan.sizes.text_params / plan.shards
    offloaded += t.host_bytes(plan)
    if plan.checkpoints_on_host:  # of one micro-batch
        one = f.checkpoint_memory(plan, micro_batch(plan).local_rows(plan), 1)
        offloaded += float(len(plan.sizes.layer_params) * pinned(one))
    if plan.cuda and patches:
        patches = pinned(patches)
    return {
        "patches": float(num_ranks * patches * (plan.prompts_per_batch + prefetched_prompts)),
        "offloaded": num_ranks * offloaded,
        "models while loading": float(num_ranks * plan.weight_bytes * params),
    }


# -------------------------------------------------------------------------------------------- does it fit, and if not


@dataclass(frozen=True)
class FitVerdict:
    """Answer to the question if a run fits its devices."""

    fits: bool
    text: str
    """One line for the user, with the remedy if it does not."""


def fit_verdict(plan: Plan, available_bytes: float, with_frames: FramesRule | None = None) -> FitVerdict:
    """Verdict on the largest phase: if it fits, what takes most, and what to change.

    Args:
        plan: the run.
        available_bytes: memory of a device.
        with_frames: lets the remedy name a number of frames.
    """
    need = estimate_memory(plan)
    parts = need.phases[need.peak_phase]
    largest = max(parts, key=parts.__getitem__)
    text = (
        f"needs {need.peak / GIB:.1f} GiB of {available_bytes / GIB:.1f} GiB; the largest part is {largest} "
        f"({parts[largest] / GIB:.1f} GiB, in the {need.peak_phase} phase)"
    )
    if v.cache_shortfall(plan):
        text += (
            f"; vLLM takes {v.awake_memory(plan) / GIB:.1f} GiB, and what its weights and activations leave of it "
            f"lacks {v.cache_shortfall(plan) / GIB:.1f} GiB for keys and values of {v.model_length(plan)} tokens"
        )
    if missing_memory(plan, available_bytes) == 0:
        return FitVerdict(True, f"fits: {text}")
    remedy = "; ".join(find_remedies(plan, available_bytes, with_frames))
    return FitVerdict(False, f"does not fit: {text}; remedy: {remedy}")


def missing_memory(plan: Plan, available_bytes: float) -> float:
    """Bytes that a device lacks, and those that vLLM's share of it lacks; 0 if the run fits."""
    return max(0.0, estimate_memory(plan).peak - available_bytes) + v.cache_shortfall(plan)


def find_remedies(plan: Plan, available_bytes: float, with_frames: FramesRule | None = None) -> list[str]:
    """Options to set, so that the run fits: one if one is enough, else several, the cheapest that help first."""
    changed: dict[str, str] = {}
    for _ in range(MAX_CHANGES):
        enough = missing_memory(plan, available_bytes) - (1 - HELPFUL) * estimate_memory(plan).peak
        options = [(*option, missing_memory(option[2], available_bytes)) for option in _changes(plan)]
        fitting = [option for option in options if option[3] == 0]
        helpful = fitting or [option for option in options if option[3] < enough]
        if not helpful:
            break
        name, value, plan, _ = helpful[0]
        changed[name] = f"{name}={value}"
        if fitting:
            return [*changed.values()]
    frames = largest_frames(plan, available_bytes, with_frames) if with_frames else 0
    last = f"data.video.max_frames={frames}" if frames else "lower data.video.max_frames, or take larger devices"
    return [*changed.values(), last]


def _changes(plan: Plan) -> list[tuple[str, object, Plan]]:
    """(Option, value, the run with it), those that cost least first."""
    family, strategy, engine = "model.family.init_args", "trainer.strategy.init_args", "rollout.engine.init_args"
    limit, budget, sp = plan.max_tokens_per_micro_batch, needed_budget(plan), plan.sequence_parallel_size
    prompts = plan.prompts_per_batch // 2
    checkpoints_offloadable = plan.gradient_checkpointing and not plan.offload_checkpoints
    moments_offloadable = not plan.optimizer_offload and not plan.offload
    tokens = max(budget, limit) * sp  # of one micro-batch, however many ranks share it
    sharing = [
        (more > sp and plan.devices % more == 0, f"{strategy}.sequence_parallel_size", more, {
            "sequence_parallel_size": more, "sp_group_size": more, "max_tokens_per_micro_batch": -(-tokens // more),
        })
        for more in (2, 4, 8)
    ]  # fmt: skip
    changes: list[tuple[bool, str, object, dict[str, Any]]] = [
        (not plan.gradient_checkpointing, f"{family}.gradient_checkpointing", "true", {"gradient_checkpointing": True}),
        (plan.mlp_chunk_tokens is None, f"{family}.mlp_chunk_tokens", CHUNK, {"mlp_chunk_tokens": CHUNK}),
        (limit > budget, "model.max_tokens_per_micro_batch", budget, {"max_tokens_per_micro_batch": budget}),
        *_engine_changes(plan, engine),
        *sharing,
        (checkpoints_offloadable, f"{family}.offload_checkpoints", "true", {"offload_checkpoints": True}),
        (moments_offloadable, "model.optimizer.offload", "true", {"optimizer_offload": True}),
        (plan.gathered_bytes > 2, f"{strategy}.sharding.compute_dtype", "bfloat16", {"gathered_bytes": 2}),
        (prompts > 0, "data.prompts_per_batch", prompts, {"prompts_per_batch": prompts}),
        (
            any(not one.offload for one in plan.teachers),
            "model.teacher.init_args.offload",
            "true",
            {
                "teachers": tuple(replace(one, offload=True) for one in plan.teachers),
            },
        ),
        (not plan.offload, f"{strategy}.sharding.offload", "true", {"offload": True}),
        (plan.reference and not plan.pairs, "model.algorithm.kl_coef", 0, {"reference": False}),
    ]
    return [(name, value, replace(plan, **fields)) for applies, name, value, fields in changes if applies]


def _engine_changes(plan: Plan, engine: str) -> list[tuple[bool, str, object, dict[str, Any]]]:
    """Those of whatever generates on the trainer's devices."""
    count, chunk, vllm = plan.num_generations, {"prefill_chunk_tokens": LEAST_CHUNK}, plan.vllm
    if plan.generates_elsewhere:
        return []
    if vllm is None:
        return [
            (f.prefilled_prompts(plan) > 1, f"{engine}.max_sequences", count, {"max_sequences": count}),
            (plan.prefill_chunk_tokens > LEAST_CHUNK, f"{engine}.prefill_chunk_tokens", LEAST_CHUNK, chunk),
        ]
    least = v.least_utilization(plan)
    has_room = sum(f.standing_memory(plan).values()) + least * vllm.device_bytes <= vllm.device_bytes
    takes_share = vllm.kv_cache_bytes is None and has_room and least != vllm.gpu_memory_utilization
    utilization = {"vllm": replace(vllm, gpu_memory_utilization=least)}
    changes: list[tuple[bool, str, object, dict[str, Any]]] = [
        (takes_share, f"{engine}.gpu_memory_utilization", least, utilization)
    ]
    for ranks in (2, 4, 8):
        splits = ranks > vllm.ranks and plan.sp_group % ranks == 0 and plan.sizes.num_heads % ranks == 0
        changes.append((splits, f"{engine}.tensor_parallel_size", ranks, {"vllm": replace(vllm, ranks=ranks)}))
    return changes


def largest_frames(plan: Plan, available_bytes: float, with_frames: FramesRule) -> int:
    """The longest video, in frames, with which the run still fits; 0 if none does."""

    def fits(frames: int) -> bool:
        try:
            longer = with_frames(plan, frames)
        except UnusableSample:  # more than `max_kept_tokens` can hold: the run would skip it
            return False
        return missing_memory(longer, available_bytes) == 0

    low, high = 0, 1
    while fits(high):  # upwards, for far beyond the pixel budget of a video rounding makes longer ones smaller
        if high == MAX_FRAMES:
            return MAX_FRAMES
        low, high = high, 2 * high
    return bisect.bisect_left(range(low + 1, high), True, key=lambda frames: not fits(frames)) + low
