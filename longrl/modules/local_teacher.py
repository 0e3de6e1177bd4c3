"""A teacher whose weights are here: any family with the policy's tokenizer, frozen, sharded as the policy is.

Letters: N sampled tokens of what follows the prompts of a call, R scored rows of a micro-batch, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from typing_extensions import override

from longrl.algorithms.distillation import Distillation
from longrl.features.cache import FeatureCache
from longrl.io.hub_errors import naming_option
from longrl.io.number_ranges import NOT_NEGATIVE, check_ranges
from longrl.io.pulse import PULSE
from longrl.models.base import CausalFamily
from longrl.models.chunked_mlp import chunk_mlps
from longrl.models.compiled_layers import compile_layers
from longrl.models.kept_distributions import KeptDistributions
from longrl.models.same_tokens import check_same_tokens
from longrl.modules.initial_weights import find_checkpoint, plain_from
from longrl.modules.offloaded_weights import OffloadedWeights
from longrl.modules.scoring import PackedScoring, all_media
from longrl.modules.teachers import OPTION, Teacher, TeacherRun, TeacherScores
from longrl.packing.pack import Continuations, continuations
from longrl.strategies.axis import Axis
from longrl.strategies.fsdp import move_unsharded
from longrl.types import Continuation, Features, PolicyOutput, Prompt

INIT_FROM = f"{OPTION}.init_args.init_from"
WEIGHTS = f"{OPTION}.init_args.family.init_args.model"


class LocalTeacher(Teacher):
    """A frozen model of this process, or of all ranks together.

    Args:
        family: the model; its tokenizer must be the policy's.
        init_from: its weights, as `model.init_from` has them: a Lightning checkpoint or run folder (adapters are
            merged), an exported folder or a hub id. None is the family's own.
        tasks: of rows that it teaches; None is all.
        offload: keep the weights in host memory while nobody is scored.
        feature_cache_bytes: features of its encoder kept between steps.
    """

    family: CausalFamily
    model: nn.Module
    """Once it has started."""

    def __init__(
        self,
        family: CausalFamily,
        init_from: str | None = None,
        tasks: list[str] | None = None,
        offload: bool = False,
        feature_cache_bytes: int = 1 << 30,
    ) -> None:
        super().__init__(tasks)
        check_ranges(locals(), f"{OPTION}.init_args.", feature_cache_bytes=NOT_NEGATIVE)
        if family.lora is not None:
            raise ValueError(
                f"a teacher is not trained, got {OPTION}.init_args.family.init_args.lora={family.lora}; set it to "
                f"null: adapters of {INIT_FROM} are merged into its weights"
            )
        self.family = family
        self.init_from = init_from
        self.offload = offload
        self.feature_cache_bytes = feature_cache_bytes

    @override
    def setup(self, student: CausalFamily, distillation: Distillation, temperature: float = 1.0) -> None:
        with naming_option(WEIGHTS):
            check_same_tokens(student, self.family)
        if self.init_from is not None:
            find_checkpoint(self.init_from, INIT_FROM)
        self.family.fp32_lm_head = student.fp32_lm_head

    # -- building ------------------------------------------------------------------------------------------------

    @override
    def start(self, run: TeacherRun) -> None:
        parallel = run.parallel
        self._run = run
        self.scoring = PackedScoring(parallel, run.max_tokens_per_micro_batch, self.family.num_axes, run.device)
        self.features = FeatureCache(self.family, self.feature_cache_bytes, parallel)
        self.model = self._build()
        self._offloaded: OffloadedWeights | None = None
        if self.offload and parallel.wrap_offloaded is not None:
            self.root = parallel.wrap_offloaded(self.family, self.model)
            move_unsharded(self.model, run.device)
            return
        self.root = parallel.wrap(self.family, self.model)
        if self.offload:
            self._offloaded = OffloadedWeights(self.model, run.device)
        else:
            move_unsharded(self.model, run.device)

    def _build(self) -> nn.Module:
        """The frozen model, without adapters, in the family's precision."""
        with naming_option(WEIGHTS):
            model = plain_from(self.family, self.init_from, INIT_FROM)
        model = compile_layers(self.family, chunk_mlps(self.family, model))
        return model.eval().requires_grad_(False)

    # -- scores --------------------------------------------------------------------------------------------------

    @override
    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt], completions: Continuations, temperature: float) -> TeacherScores:
        if not self._run.parallel.world.max(len(prompts)):
            return TeacherScores(torch.zeros(0, device=self._run.device))
        groups = continuations(completions)
        read = [self._prompt(prompt, group) for prompt, group in zip(prompts, groups, strict=True)]
        groups = [[self._continuation(one) for one in group] for group in groups]
        with self._offloaded.on_device() if self._offloaded is not None else contextlib.nullcontext():
            features = self.features.get_or_encode(self.model, all_media(read, groups))
            scores = self._pass(read, groups, features, temperature)
            head = self._head()
            self.root.release_root()
        return replace(scores, lm_head=head if scores.hidden is not None else None)

    def _prompt(self, prompt: Prompt, group: Sequence[Continuation]) -> Prompt:
        """What it reads in place of the policy's prompt: that of its own, or the same tokens.

        Raises:
            ValueError: there are media, and it would read them otherwise than the policy does.
        """
        student = self._run.student
        shows_media = any(completion.media for completion in group)
        is_same = type(self.family) is type(student)
        is_alone = prompt.teacher is None and bool(prompt.media)
        if not is_same and (shows_media or is_alone):
            raise ValueError(
                f"{OPTION} is a {type(self.family).__name__} and reads media otherwise than the policy's "
                f"{type(student).__name__}, but prompt {prompt.id!r} has none of its own for it; take a teacher of "
                "the policy's family, or rows without media"
            )
        if prompt.teacher is not None:
            return prompt.teacher
        if is_same:
            return prompt
        return replace(prompt, position_ids=self.family.position_ids(prompt.input_ids, ()))

    def _continuation(self, completion: Continuation) -> Continuation:
        """The same with positions of its own axes."""
        positions = completion.position_ids
        if positions is None or len(positions) == self.family.num_axes:
            return completion
        return replace(completion, position_ids=None)  # text alone, see above: one position after the other

    def _pass(
        self,
        prompts: Sequence[Prompt],
        groups: Sequence[Sequence[Continuation]],
        features: Features,
        temperature: float,
    ) -> TeacherScores:
        """All scores but the head's weight, from one pass over every group."""
        distillation = self._run.distillation
        keep = None
        if distillation.needs_distribution:
            vocabulary = self._run.student.config.get_text_config().vocab_size
            keep = KeptDistributions(distillation.top_k, vocabulary)
        micro_batches, sequence = self.scoring.micro_batches(prompts, groups, replays_experts=False)
        num_tokens = sum(completion.num_sampled for group in groups for completion in group)
        collected = CollectedRows(num_tokens, self._run.device)
        num_read = 0
        own = distillation.teacher_temperature(temperature)
        for packed in micro_batches:
            PULSE.beats += 1
            here = self.scoring.on_device(packed)
            output: PolicyOutput = self.root(here, features, own, sequence, keep=keep)
            rows = here.token_index
            if packed is None:  # one to wait through, whose row is nobody's
                rows = rows[:0]
            else:
                num_read += len(packed.spans)
            collected.add(rows, sequence.share(len(rows)), output)
        sp_group = self.scoring.parallel.sp_group
        num_passes = sp_group.sum_dict({"passes": num_read / sequence.size})["passes"]
        return TeacherScores(**collected.scores(sp_group), num_passes=num_passes)

    def _head(self) -> Tensor:
        """[V, D] its LM head on the device, for as long as the update needs it."""
        model: Any = self.model
        head: Tensor = model.get_output_embeddings().weight.detach()
        # A copy of what the root has gathered and is about to let go, or offload to take back.
        return head.clone() if self.offload or isinstance(self.root, FSDPModule) else head


class CollectedRows:
    """Scores of rows that ranks of a sequence-parallel group have computed, each row on one of them.

    Args:
        num_tokens: N of the group's prompts.
        device: of the scores.
    """

    def __init__(self, num_tokens: int, device: torch.device) -> None:
        self.num_tokens = num_tokens
        self.device = device
        self._values: dict[str, Tensor] = {}

    def add(self, rows: Tensor, share: slice, output: PolicyOutput) -> None:
        """Takes a micro-batch's.

        Args:
            rows: [R] of each its place among the N.
            share: of the R rows, those of this rank.
            output: of the forward pass, with `distributions` where they are kept.
        """
        values: dict[str, Tensor | None] = {"logp": output.logp[share]}
        if output.distributions is not None:
            values |= output.distributions._asdict()
        for name, value in values.items():
            if value is None:
                continue
            if name not in self._values:
                self._values[name] = value.new_zeros(self.num_tokens, *value.shape[1:])
            self._values[name][rows[share]] = value[: len(rows[share])]

    def scores(self, sp_group: Axis) -> dict[str, Tensor]:
        """All N rows on every rank: a sum of what is 0 on all ranks but one, which rounds nothing."""
        return {name: sp_group.sum(value) for name, value in self._values.items()}
