"""Teachers: whatever scores the tokens that a policy sampled, for the policy to become like it.

Letters: P prompts of a call, N sampled tokens of all that follows them, completion after completion; V rows of a
teacher's LM head, D its hidden size, k tokens that it finds likeliest.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longrl.algorithms.distillation import Distillation
from longrl.models.base import CausalFamily
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


@dataclass(frozen=True)
class TeacherScores:
    """What a teacher says of N sampled tokens, without gradient, on the run's device.

    Its distributions, where the divergence needs them, are the `top_k` likeliest tokens, or hidden states and LM head.
    All ranks of a sequence-parallel group have the same.
    """

    logp: Tensor
    """[N] float32 log-probability of each sampled token, at the teacher's temperature."""
    top_ids: Tensor | None = None
    """[N, k] int64 ids of the likeliest tokens, all different, in any order."""
    top_logp: Tensor | None = None
    """[N, k] float32 log-probabilities of those, at the teacher's temperature, of the whole vocabulary."""
    hidden: Tensor | None = None
    """[N, D] last hidden states that predict the tokens."""
    lm_head: Tensor | None = None
    """[V, D]; fewer rows than the policy's head, or more, are padding."""
    num_passes: float = 0.0
    """Prompts that were read for it: P, if each was read once with all that follows it."""


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
    def setup(self, student: CausalFamily, distillation: Distillation) -> None:
        """Refuses what it cannot teach, before weights are loaded: another tokenizer, distributions it has not.

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
