"""What teachers add to a run: weights, a pass over every group, and what is kept of their distributions.

Letters as in `longrl.planning.formulas`; N sampled tokens of a sequence-parallel group, k likeliest tokens. A teacher
is planned with the policy's prompts: what it alone is shown (`data.teacher_view`) is not counted.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch

from longrl.modules.distiller import Distiller
from longrl.modules.local_teacher import LocalTeacher
from longrl.planning import formulas as f, shapes
from longrl.planning.inputs import ModelSizes, Plan, PlannedTeacher
from longrl.planning.micro_batches import MicroBatch

ID_AND_LOGP_BYTES = 8 + 4
"""Of one of the likeliest tokens."""


def planned_teachers(distiller: Distiller | None, compute_dtype: str | None) -> tuple[PlannedTeacher, ...]:
    """The run's local teachers; others take nothing of its devices.

    Args:
        distiller: of the policy; None is a run without teachers.
        compute_dtype: `sharding.compute_dtype`; None is each family's own.
    """
    planned = []
    for teacher in [] if distiller is None else distiller.teachers:
        if not isinstance(teacher, LocalTeacher):
            continue
        assert distiller is not None
        family = shapes.find_config(copy.copy(teacher.family))  # it may be given what a plan alone can use
        planned.append(
            PlannedTeacher(
                sizes=ModelSizes.from_family(family),
                weight_bytes=getattr(torch, family.dtype).itemsize,
                gathered_bytes=getattr(torch, compute_dtype or family.dtype).itemsize,
                offload=teacher.offload,
                keeps_hidden=distiller.distillation.needs_distribution and distiller.distillation.top_k is None,
                top_k=distiller.distillation.top_k or 0,
            )
        )
    return tuple(planned)


def as_policy(plan: Plan, teacher: PlannedTeacher) -> Plan:
    """The run with the teacher in the policy's place, for formulas of a pass without gradient."""
    return replace(
        plan,
        sizes=teacher.sizes,
        weight_bytes=teacher.weight_bytes,
        gathered_bytes=teacher.gathered_bytes,
        offload=plan.offload or teacher.offload,
        reference=False,
        teachers=(),
    )


def teacher_memory(plan: Plan) -> float:
    """Shards of all teachers and their encoders in full, w text / m + c encoder, and features of a batch.

    With `offload` shards lie in host memory, and on one device all of the weights.
    """
    total = 0.0
    for teacher in plan.teachers:
        own = as_policy(plan, teacher)
        encoder = min(own.weight_bytes, own.gathered_bytes) * own.sizes.encoder_params
        if teacher.offload and plan.devices == 1:
            encoder = 0
        total += f.weight_memory(own) + encoder + f.feature_memory(own)
    return total


def kept_memory(plan: Plan) -> float:
    """From the pass to the end of the update: hidden states, N D c, and the head, V D c; or k ids and numbers, 12 N k.

    Of several teachers each has some of the groups, so rows are those of the largest, but all heads are there. That of
    a teacher whose weights stay on one device is not copied.
    """
    tokens = plan.prompts_per_batch * plan.num_generations * plan.sampled_tokens
    rows = [0]
    heads = 0
    for teacher in plan.teachers:
        width = teacher.sizes.hidden * teacher.gathered_bytes if teacher.keeps_hidden else 0
        rows.append(tokens * (width + teacher.top_k * ID_AND_LOGP_BYTES))
        if teacher.offload or plan.devices > 1:
            heads += teacher.sizes.vocabulary * width
    return float(max(rows) + heads)


def teacher_phase(plan: Plan, batch: MicroBatch, standing: Mapping[str, float]) -> f.MemoryParts:
    """The pass of the teacher that needs most, beside all that stands."""
    moments = []
    for teacher in plan.teachers:
        own = as_policy(plan, teacher)
        parts = {
            "gathered weights": f.gathered_root(own) + f.gathered_layers(own),
            "activations": f.forward_working_set(own, batch.local_rows(own)),
            "logits": f.logit_memory(own, batch.scored, backward=False),
            "teachers' scores": kept_memory(plan),
        }
        if teacher.offload and plan.devices == 1:  # all of it comes to the device
            parts["gathered weights"] = float(own.weight_bytes * (own.sizes.text_params + own.sizes.encoder_params))
        moments.append({**standing, **parts})
    return max(moments, key=lambda parts: sum(parts.values()))


def host_bytes(plan: Plan) -> float:
    """Host memory of a rank: weights of teachers that are offloaded."""
    total = 0.0
    for teacher in plan.teachers:
        if teacher.offload or plan.offload:
            encoder = teacher.sizes.encoder_params if plan.devices == 1 else 0
            total += teacher.weight_bytes * (teacher.sizes.text_params / plan.shards + encoder)
    return total
