"""A run's teachers as the planner sees them."""

from __future__ import annotations

import torch

from longrl.modules.distiller import Distiller
from longrl.modules.local_teacher import LocalTeacher
from longrl.planning import shapes
from longrl.planning.inputs import ModelSizes
from longrl.planning.teacher_share import TeacherShare


def teacher_shares(distiller: Distiller | None) -> tuple[TeacherShare, ...]:
    """The teachers whose weights are on the trainer's devices."""
    shares = []
    for teacher in [] if distiller is None else distiller.teachers:
        if isinstance(teacher, LocalTeacher):
            shares.append(_share_of(teacher))
    return tuple(shares)


def _share_of(teacher: LocalTeacher) -> TeacherShare:
    """Counts the teacher's model on the meta device."""
    family = shapes.find_config(teacher.family)
    sizes = ModelSizes.from_family(family)
    return TeacherShare(
        text_params=sizes.text_params,
        encoder_params=sizes.encoder_params,
        root_params=sizes.root_params,
        hidden=sizes.hidden,
        weight_bytes=getattr(torch, family.dtype).itemsize,
        offload=teacher.offload,
        feature_cache_bytes=teacher.feature_cache_bytes if sizes.encoder_params else 0,
    )


def teacher_numbers(distiller: Distiller | None) -> int | None:
    """Numbers that teachers say of a token: of the likeliest ones, or one of its own; None is a hidden state."""
    if distiller is None or not distiller.distillation.needs_distribution:
        return 1
    return distiller.distillation.top_k


def teacher_notes(distiller: Distiller | None) -> list[str]:
    """Says what is not counted."""
    if distiller is None:
        return []
    return [
        "model.teacher: its weights and what it says are counted, not the time of its pass (one of every group) nor "
        "what encoding and reading a longer data.teacher_view take beside those of the policy"
    ]
