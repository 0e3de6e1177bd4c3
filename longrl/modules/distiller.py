"""Distillation within a step: which teacher scores which group, and what their scores add to the objective.

Letters: P prompts of a rank, N sampled tokens of what follows them, R scored rows of a micro-batch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longrl.algorithms import Algorithm, LossOutput, function_needs
from longrl.algorithms.distillation import Distillation
from longrl.algorithms.losses import k3
from longrl.models.base import CausalFamily
from longrl.models.teacher_targets import TeacherScores, TeacherSpan, TeacherTargets
from longrl.modules.mini_batches import TokenLoss
from longrl.modules.sft_loss import response_targets
from longrl.modules.teachers import Teacher, TeacherRun
from longrl.packing.pack import Continuations, continuations
from longrl.strategies.axis import Axis
from longrl.types import Batch, Metrics, Packed, PolicyOutput, Prompt, Row, to_device

logger = logging.getLogger(__name__)

NO_TEACHER = -1
"""The number of the teacher of a token that has none."""


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

    def setup(self, student: CausalFamily, algorithm: Algorithm, stage: str, temperature: float = 1.0) -> None:
        """Refuses what cannot be learned, before weights are loaded.

        Args:
            student: the policy's family.
            algorithm: the objective beside the teachers'.
            stage: of the data: in `rl` completions are the policy's own.
            temperature: the policy samples with.

        Raises:
            ValueError: stored texts are taken for the policy's samples, or a teacher cannot teach.
        """
        if stage == "preference":
            raise ValueError(
                "model.teacher teaches rollouts and stored texts, and data.stage=preference trains on pairs; "
                "set model.teacher to null, or data.stage to sft"
            )
        is_rl = stage == "rl"
        if not is_rl and self.distillation.divergence == "sampled":
            raise ValueError(
                "model.distillation.divergence=sampled is for tokens that the policy samples, and data.stage=sft "
                "trains on stored ones; set model.distillation.divergence to forward_kl"
            )
        for field, name, need in function_needs(algorithm):
            if is_rl and field == "select" and need.full_distribution:
                logger.warning(
                    "model.algorithm.select=%s leaves out groups of which rewards say nothing, though a teacher would; "
                    "set model.algorithm.select to longrl.algorithms.keep_all to learn from them",
                    name,
                )
        for teacher in self.teachers:
            teacher.setup(student, self.distillation, temperature)

    def check_tasks(self, rows: Sequence[Row]) -> None:
        """Raises ValueError for a task of a teacher that no row has; without rows nothing is known.

        Args:
            rows: to train on.
        """
        known = dict.fromkeys(row.task for row in rows)
        for teacher in self.teachers if known else ():
            unknown = [task for task in teacher.tasks or () if task not in known]
            if unknown:
                raise ValueError(
                    f"model.teacher.init_args.tasks names {', '.join(unknown)}, but the rows of data.train have the "
                    f"tasks {', '.join(known)}; name those, or leave it out to teach all"
                )

    def start(self, run: TeacherRun) -> None:
        """Has all teachers start; every rank of the run must call it."""
        for teacher in self.teachers:
            teacher.start(run)

    def close(self) -> None:
        """See `Teacher.close`."""
        for teacher in self.teachers:
            teacher.close()

    def score(
        self, prompts: Sequence[Prompt], completions: Continuations, temperature: float, device: torch.device
    ) -> Teaching:
        """What the teachers say of all sampled tokens; every rank of the run must call it.

        Args:
            prompts: this rank's P.
            completions: what follows each.
            temperature: the policy samples with.
            device: of all tensors.
        """
        # 1. Each teacher scores the groups of its rows.
        groups = continuations(completions)
        chosen = [self._teacher_of(prompt) for prompt in prompts]  # [P]
        scores = []
        for number, teacher in enumerate(self.teachers):
            own = [index for index, one in enumerate(chosen) if one == number]
            scores.append(
                teacher.score([prompts[index] for index in own], [groups[index] for index in own], temperature)
            )

        # 2. Where each token's are.
        lengths = torch.tensor([sum(one.num_sampled for one in group) for group in groups], dtype=torch.int64)
        teacher_of_token = torch.tensor(chosen, dtype=torch.int64).repeat_interleave(lengths)  # [N]
        places = torch.zeros(len(teacher_of_token), dtype=torch.int64)
        for number in range(len(self.teachers)):
            is_own = teacher_of_token == number
            places[is_own] = torch.arange(int(is_own.sum()))
        index = to_device(places, device)
        logp = torch.zeros(len(places), device=device)
        for number, said in enumerate(scores):
            tokens = to_device((teacher_of_token == number).nonzero()[:, 0], device)
            logp[tokens] = said.logp[index[tokens]]
        return Teaching(
            distillation=self.distillation,
            temperature=self.distillation.teacher_temperature(temperature),
            scores=tuple(scores),
            teacher=teacher_of_token,
            index=index,
            logp=logp,
            taught=to_device(teacher_of_token != NO_TEACHER, device),
            num_groups=sum(one != NO_TEACHER for one in chosen),
        )

    def score_batch(self, batch: Batch, temperature: float, device: torch.device) -> Teaching:
        """The same of a batch: its groups, or the texts that it teaches."""
        if batch.groups is None:
            return self.score(batch.prompts, response_targets(batch), temperature, device)
        prompts = [group.prompt for group in batch.groups]
        completions = [group.completions for group in batch.groups]
        return self.score(prompts, completions, temperature, device)

    def _teacher_of(self, prompt: Prompt) -> int:
        """The first that teaches the row."""
        for number, teacher in enumerate(self.teachers):
            if teacher.teaches(prompt.row):
                return number
        return NO_TEACHER


@dataclass(frozen=True)
class Teaching:
    """What the teachers say of the N tokens of a rollout or mini-batch."""

    distillation: Distillation
    temperature: float
    """Of the teachers."""
    scores: tuple[TeacherScores, ...]
    """Of each teacher, for the tokens of its groups."""
    teacher: Tensor
    """[N] int64 on the host: number of the teacher of each token, or NO_TEACHER."""
    index: Tensor
    """[N] int64: place of each token among those of its teacher's scores."""
    logp: Tensor
    """[N] log-probability of each token under its teacher, 0 without one."""
    taught: Tensor
    """[N] bool: has a teacher."""
    num_groups: int
    """Of the whole rollout, those that a teacher has scored."""

    def parts(self, sizes: Sequence[int]) -> list[Teaching]:
        """Those of neighbouring tokens, of so many each, as of mini-batches."""
        parts = []
        start = 0
        for size in sizes:
            tokens = slice(start, start + size)
            part = replace(
                self,
                teacher=self.teacher[tokens],
                index=self.index[tokens],
                logp=self.logp[tokens],
                taught=self.taught[tokens],
            )
            parts.append(part)
            start += size
        return parts

    @property
    def has_signal(self) -> bool:
        """True if some token is drawn to a teacher by the loss; advantages speak for themselves."""
        is_term = self.distillation.placement == "loss" and self.distillation.coef > 0
        return is_term and bool((self.teacher != NO_TEACHER).any())

    def token_rewards(self, old_logp: Tensor | None) -> Tensor | None:
        """[N] what is added to advantages, None where the teachers' term is in the loss.

        Args:
            old_logp: [N] of the policy before the update.
        """
        if self.distillation.placement == "loss":
            return None
        assert old_logp is not None
        return self.distillation.token_rewards(old_logp, self.logp).where(self.taught, 0.0)

    def targets(self, packed: Packed | None, here: Packed) -> TeacherTargets | None:
        """What a micro-batch's rows are compared with in its forward pass; None where nothing is.

        Args:
            packed: on the host; None of a micro-batch to wait through.
            here: the same on the device.
        """
        if packed is None or not self.distillation.needs_distribution:
            return None
        numbers, counts = self.teacher[packed.token_index].unique_consecutive(return_counts=True)
        index = self.index[here.token_index]  # [R]
        spans = []
        start = 0
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            if number != NO_TEACHER:
                spans.append(TeacherSpan(start, index[start : start + count], self.scores[number]))
            start += count
        return TeacherTargets(tuple(spans), self.distillation.of_rows, self.temperature)

    def beside_text(self, loss: TokenLoss, num_tokens: int, num_texts: int) -> DistilledLoss:
        """The loss of the SFT stage with the teachers' term.

        Args:
            loss: on the stored texts.
            num_tokens: of all ranks, each of which weighs as much.
            num_texts: of this rank.
        """
        weights = torch.full((num_texts,), 1 / num_tokens, device=self.logp.device)  # [C]
        return DistilledLoss(loss, self, weights, self.distillation.sft_coef)

    def finish(self, metrics: Metrics, dp: Axis) -> Metrics:
        """Metrics of a step, those of teachers as means over the tokens that have one; all ranks must call it.

        `teacher_share` is the part of the tokens, by their weights, and `teacher_passes_per_group` the prompts that
        teachers have read for each group that they scored.
        """
        share = metrics.get("teacher_share")
        if share:
            metrics = metrics | {name: metrics[name] / share for name in ("teacher_kl", "teacher_logp_gap")}
        local = {"passes": sum(one.num_passes for one in self.scores), "groups": float(self.num_groups)}
        totals = dp.sum_dict(local)
        if totals["groups"]:
            metrics = metrics | {"teacher_passes_per_group": totals["passes"] / totals["groups"]}
        return metrics


@dataclass(frozen=True)
class DistilledLoss(TokenLoss):
    """An objective and the teachers' term beside it: a `TokenLoss`."""

    inner: TokenLoss
    teaching: Teaching
    weights: Tensor
    """[C] weight of every token of a completion."""
    factor: float = 1.0
    """Of the inner loss."""
    drawn_logp: Tensor | None = None
    """[N] of the policy that drew each token, None where it is the one being updated."""
    cap: float = 2.0
    """Above which weights of sampled tokens are truncated."""

    def __call__(self, packed: Packed, output: PolicyOutput) -> LossOutput:
        """See `TokenLoss`."""
        result = self.inner(packed, output)
        distillation = self.teaching.distillation
        rows = packed.token_index
        taught = self.teaching.taught[rows]  # [R]
        teacher_logp = self.teaching.logp[rows]
        logp = output.logp.detach()
        weights = self.weights[packed.completion_index].to(logp.device) * taught  # [R]
        if output.divergence is None:
            drawn_logp = None if self.drawn_logp is None else self.drawn_logp[rows]
            losses = distillation.of_samples(output.logp, teacher_logp, drawn_logp, self.cap)
            distance = k3(logp, teacher_logp)
        else:
            losses = output.divergence
            distance = losses.detach()
        loss = self.factor * result.loss
        if distillation.placement == "loss":
            loss = loss + distillation.coef * (weights * losses).sum()
        metrics = {
            "teacher_kl": (weights * distance).sum(),
            "teacher_logp_gap": (weights * (teacher_logp - logp)).sum(),
            "teacher_share": weights.sum(),
        }
        return LossOutput(loss, {**result.metrics, **metrics})

    def forward_options(self, packed: Packed | None, here: Packed) -> dict[str, Any]:
        """See `TokenLoss` and `Teaching.targets`."""
        return {**self.inner.forward_options(packed, here), "teacher": self.teaching.targets(packed, here)}

    def tensors(self) -> dict[str, Tensor]:
        """See `TokenLoss`."""
        return {**self.inner.tensors(), "teacher_logp": self.teaching.logp}
