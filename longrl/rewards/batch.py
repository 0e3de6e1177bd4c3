"""Rewards that judge all completions of a step together, such as one that asks a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from longrl.types import Row

Judged = TypeVar("Judged")
"""A sample to judge: a `Completion` of text, or the frames of a picture or video, [F, 3, H, W] uint8."""


class BatchReward(ABC, Generic[Judged]):
    """A reward function that `RewardSum` hands everything at once; called with one completion it judges that one."""

    def prepare(self) -> None:
        """Loads what the reward needs, the first time; called before anything is judged.

        Raises:
            ValueError: something is missing. It ends the run: a reward that can judge nothing masks everything.
        """

    @abstractmethod
    def score_all(self, completions: Sequence[Judged], rows: Sequence[Row]) -> Sequence[float | Exception | None]:
        """The value of each completion, None where the reward does not apply, or the error that makes it invalid.

        Args:
            completions: of any number of prompts.
            rows: what each of them answers.
        """

    def __call__(self, completion: Judged, row: Row) -> float | None:
        """The value of one completion, None where the reward does not apply.

        Raises:
            Exception: it has none.
        """
        self.prepare()
        (value,) = self.score_all([completion], [row])
        if isinstance(value, Exception):
            raise value
        return value


class SampleReward(BatchReward[Judged]):
    """A reward that loads something beforehand, and then judges each completion alone."""

    @abstractmethod
    def score_one(self, completion: Judged, row: Row) -> float | None:
        """The value of one completion; raises an error for one that has none."""

    def score_all(self, completions: Sequence[Judged], rows: Sequence[Row]) -> list[float | Exception | None]:
        """See `BatchReward.score_all`."""
        results: list[float | Exception | None] = []
        for completion, row in zip(completions, rows, strict=True):
            try:
                results.append(self.score_one(completion, row))
            except Exception as error:  # one sample must not mask the others
                results.append(error)
        return results
