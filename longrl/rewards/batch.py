"""Rewards that judge all completions of a step together, such as one that asks a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longrl.types import Completion, Row


class BatchReward(ABC):
    """A reward function that `RewardSum` hands everything at once; called with one completion it judges that one."""

    @abstractmethod
    def score_all(self, completions: Sequence[Completion], rows: Sequence[Row]) -> list[float | Exception]:
        """The value of each completion, or the error that makes it invalid.

        Args:
            completions: of any number of prompts.
            rows: what each of them answers.
        """

    def __call__(self, completion: Completion, row: Row) -> float:
        """The value of one completion.

        Raises:
            Exception: it has none.
        """
        (value,) = self.score_all([completion], [row])
        if isinstance(value, Exception):
            raise value
        return value
