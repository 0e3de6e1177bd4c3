"""A teacher whose weights are here: any family with the policy's tokenizer, frozen, sharded as the policy is."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from longrl.algorithms.distillation import Distillation
from longrl.models.base import CausalFamily
from longrl.modules.teachers import Teacher, TeacherRun, TeacherScores
from longrl.packing.pack import Continuations
from longrl.types import Prompt


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

    def __init__(
        self,
        family: CausalFamily,
        init_from: str | None = None,
        tasks: list[str] | None = None,
        offload: bool = False,
        feature_cache_bytes: int = 1 << 30,
    ) -> None:
        super().__init__(tasks)
        self.family = family
        self.init_from = init_from
        self.offload = offload
        self.feature_cache_bytes = feature_cache_bytes

    @override
    def setup(self, student: CausalFamily, distillation: Distillation) -> None:
        raise NotImplementedError

    @override
    def start(self, run: TeacherRun) -> None:
        raise NotImplementedError

    @override
    def score(self, prompts: Sequence[Prompt], completions: Continuations, temperature: float) -> TeacherScores:
        raise NotImplementedError
