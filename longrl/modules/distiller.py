"""Distillation within a step: which teacher scores which group, and what their scores add to the objective."""

from __future__ import annotations

from collections.abc import Sequence

from longrl.algorithms.distillation import Distillation
from longrl.modules.teachers import Teacher


class Distiller:
    """The teachers of a run, and how the policy learns from them.

    Args:
        teachers: at least one.
        distillation: the term.
    """

    def __init__(self, teachers: Sequence[Teacher], distillation: Distillation) -> None:
        self.teachers = teachers
        self.distillation = distillation

    @classmethod
    def of(cls, teacher: Teacher | list[Teacher] | None, distillation: Distillation | None) -> Distiller | None:
        """The options of a run; None without a teacher.

        Raises:
            ValueError: they say how to distil, but not from whom.
        """
        teachers = [teacher] if isinstance(teacher, Teacher) else list(teacher or ())
        if teachers:
            return cls(teachers, distillation or Distillation())
        if distillation is not None:
            raise ValueError(
                "model.distillation needs a teacher, got none; set model.teacher to a "
                "longrl.modules.local_teacher.LocalTeacher, or model.distillation to null"
            )
        return None
