"""Teachers: whatever scores the tokens that a policy sampled, for the policy to become like it.

What a teacher says are `TeacherScores` (longrl/models/teacher_targets.py).
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longrl.algorithms.distillation import Distillation
from longrl.models.base import CausalFamily
from longrl.models.teacher_targets import TeacherScores as TeacherScores
from longrl.packing.pack import Continuations
from longrl.strategies.parallel import Parallel
from longrl.types import Prompt, Row

OPTION = "model.teacher"


@dataclass(frozen=True)
class TeacherRun:
    """What a teacher is told of the run, once there are weights."""

    student: CausalFamily
    """The policy's family."""
    distillation: Distillation
    parallel: Parallel
    max_tokens_per_micro_batch: int
    device: torch.device
    """Of all tensors of `TeacherScores`."""


class Teacher(abc.ABC):
    """Scores what the policy sampled. A subclass says where its model is.

    Args:
        tasks: of rows (`Row.task`) that it teaches; None is all. Of several teachers the first that teaches a row's
            task scores its group.
    """

    family: CausalFamily | None = None
    """Of its model, which renders what it reads (`Prompt.teacher`); None reads the policy's prompts."""

    def __init__(self, tasks: list[str] | None = None) -> None:
        if tasks is not None and not tasks:
            raise ValueError(f"{OPTION}.init_args.tasks must name a task, got none; null is all of them")
        self.tasks = tasks

    def teaches(self, row: Row) -> bool:
        """True for rows of its tasks."""
        return self.tasks is None or row.task in self.tasks

    @abc.abstractmethod
    def setup(self, student: CausalFamily, distillation: Distillation, temperature: float = 1.0) -> None:
        """Refuses what it cannot teach, before weights are loaded: another tokenizer, distributions it has not.

        Args:
            student: the policy's family.
            distillation: the term.
            temperature: the policy samples with.

        Raises:
            ValueError: with rule, value and remedy.
        """

    @abc.abstractmethod
    def start(self, run: TeacherRun) -> None:
        """Loads or connects, when training begins. Every rank of the run must call it."""

    @abc.abstractmethod
    def score(self, prompts: Sequence[Prompt], completions: Continuations, temperature: float) -> TeacherScores:
        """Scores all sampled tokens of what follows the prompts. Every rank must call it; one may have no prompts.

        Args:
            prompts: this rank's; of one with `Prompt.teacher` that is read in its place.
            completions: what follows each.
            temperature: the policy samples with; the teacher's is `Distillation.teacher_temperature` of it.
        """

    def close(self) -> None:
        """Lets go of what it holds beside weights, when training ends."""
        return
