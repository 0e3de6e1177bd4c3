"""What waits in host memory, and how long the way there takes."""

from __future__ import annotations

import dataclasses
import math

from longrl.planning import formulas as f
from longrl.planning.formulas import Parts
from longrl.planning.hardware import Hardware
from longrl.planning.inputs import Plan, micro_batch


def host(plan: Plan, prefetched_prompts: int) -> Parts:
    """Bytes on each node.

    Patches in float32 of this batch and of the prompts rendered ahead, this rank's cells of each; what is
    offloaded; and at the start the model that every rank builds whole before it is sharded.
    """
    here = min(plan.devices, plan.devices_per_node)
    vision_encoder = plan.sizes.vision_encoder
    values = plan.share_patches * vision_encoder.patch_values * 4 if vision_encoder else 0
    params = plan.sizes.text_params + (vision_encoder.params if vision_encoder else 0)
    return {
        "patches": float(here * values * (plan.prompts_per_batch + prefetched_prompts)),
        "offloaded": here * (shards(plan) + layer_inputs(plan)),
        "models while loading": float(here * plan.weight_bytes * params),
    }


def shards(plan: Plan) -> float:
    """Of one rank: weights, gradients, moments and the reference under `sharding.offload`; or the moments alone."""
    if not plan.offload:
        return 2 * f.trained(plan) if plan.optimizer_offload else 0.0
    kept = dataclasses.replace(plan, offload=False)
    second = 0 if not plan.reference or plan.sizes.adapter_params else plan.sizes.text_params
    return f.weights(kept) + f.adapters(kept) + 3 * f.trained(kept) + plan.weight_bytes * second / plan.shards


def layer_inputs(plan: Plan) -> float:
    """Of one rank, while a micro-batch goes forward and backward; torch pins memory in powers of two."""
    if not plan.checkpoints_on_host:
        return 0.0
    one = f.checkpoints(plan, rows(plan), 1)
    return float(len(plan.sizes.layer_params) * 2 ** math.ceil(math.log2(max(one, 1))))


def transfers_s(plan: Plan, hardware: Hardware, bandwidth: float) -> float:
    """Seconds of a step in which a rank moves layer inputs and moments to the host and back, nothing overlapping.

    Args:
        plan: the run.
        hardware: its devices.
        bandwidth: share of the maker's peak that is reached.
    """
    passes, steps = micro_batch(plan).count * plan.epochs, plan.mini_batches * plan.epochs
    layers = f.checkpoints(plan, rows(plan), len(plan.sizes.layer_params)) if plan.checkpoints_on_host else 0.0
    moments = 2 * f.trained(plan) if plan.optimizer_offload else 0.0
    return 2 * (passes * layers + steps * moments) / (hardware.host_bandwidth * bandwidth)


def rows(plan: Plan) -> int:
    """Of the largest micro-batch on one rank."""
    return math.ceil(micro_batch(plan).tokens / plan.sequence_parallel_size)
