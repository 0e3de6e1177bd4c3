"""What waits in host memory, and how long the way there takes."""

from __future__ import annotations

import dataclasses
import math

from longrl.planning import formulas as f
from longrl.planning.formulas import MemoryParts
from longrl.planning.hardware import Hardware
from longrl.planning.inputs import Plan, micro_batch


def host_memory(plan: Plan, prefetched_prompts: int) -> MemoryParts:
    """Bytes on each node.

    Patches in float32 of this batch and of the prompts rendered ahead, this rank's part of each; what is offloaded; and
    at the start the model that every rank builds before it is sharded.
    """
    num_ranks = min(plan.devices, plan.devices_per_node)
    encoder = plan.sizes.vision_encoder
    patches = plan.local_patches * encoder.patch_values * 4 if encoder else 0
    params = plan.sizes.text_params + plan.sizes.encoder_params
    offloaded = 2 * f.trained_memory(plan) if plan.optimizer_offload else 0.0
    if plan.offload:  # weights, gradients, moments and the reference
        on_device = dataclasses.replace(plan, offload=False)
        offloaded = f.weight_memory(on_device) + f.adapter_memory(on_device) + 3 * f.trained_memory(on_device)
        has_reference = plan.reference and not plan.sizes.adapter_params
        offloaded += plan.weight_bytes * plan.sizes.text_params / plan.shards if has_reference else 0.0
    if plan.checkpoints_on_host:  # of one micro-batch; torch pins memory in powers of two
        one = f.checkpoint_memory(plan, micro_batch(plan).local_rows(plan), 1)
        offloaded += float(len(plan.sizes.layer_params) * 2 ** math.ceil(math.log2(max(one, 1))))
    return {
        "patches": float(num_ranks * patches * (plan.prompts_per_batch + prefetched_prompts)),
        "offloaded": num_ranks * offloaded,
        "models while loading": float(num_ranks * plan.weight_bytes * params),
    }


def transfers_s(plan: Plan, hardware: Hardware, bandwidth: float) -> float:
    """Seconds of a step in which a rank moves layer inputs and moments to the host and back, nothing overlapping.

    Args:
        plan: the run.
        hardware: its devices.
        bandwidth: share of the maker's peak that is reached.
    """
    batch = micro_batch(plan)
    passes, steps = batch.count * plan.epochs, plan.mini_batches * plan.epochs
    layers = 0.0
    if plan.checkpoints_on_host:
        layers = f.checkpoint_memory(plan, batch.local_rows(plan), len(plan.sizes.layer_params))
    moments = 2 * f.trained_memory(plan) if plan.optimizer_offload else 0.0
    return 2 * (passes * layers + steps * moments) / (hardware.host_bandwidth * bandwidth)
