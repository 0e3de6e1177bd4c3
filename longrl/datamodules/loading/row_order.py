"""Which rows a rank reads, and when: one endless sequence that all ranks share.

Rank r of W reads positions r, r + W, r + 2W, ... of it. So the ranks share no position, and the number of rows that
each rank consumed says where all of them stand.
"""

from __future__ import annotations

import abc
import functools
import itertools
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from typing_extensions import override

from longrl.types import Metrics

logger = logging.getLogger(__name__)
StateT = TypeVar("StateT")


class RowOutcome(NamedTuple):
    """What the rewards of a group say of its row."""

    row: int
    """Its index."""
    pass_rate: float
    """Mean accuracy of its completions, from 0 to 1."""
    reward: float
    """Mean reward of its completions."""


@functools.lru_cache(maxsize=32)  # of every source of a mix, one or two epochs
def permutation(num_rows: int, seed: int | str, epoch: int) -> tuple[int, ...]:
    """Order of the rows in an epoch; the same on every rank and platform and with any version of torch."""
    order = list(range(num_rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


class RowSequence(abc.ABC):
    """A sequence of rows that all ranks share, each reading every W-th of it; `num_rows` are there to be read."""

    num_rows: int
    rank: int
    world_size: int
    learns: bool = False
    """True if what comes next follows from rewards."""

    @abc.abstractmethod
    def at(self, position: int) -> int:
        """Index of the row at a position of the sequence that all ranks share."""

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """Facts that must be the same for a position to mean the same row."""

    def after(self, position: int) -> Iterator[int]:
        """Indices of the rows that this rank reads from its position on, without end."""
        for turn in itertools.count(position):
            yield self.at(turn * self.world_size + self.rank)

    def settle(self, position: int) -> None:  # noqa: B027 - most have nothing to do
        """Decides which rows come before a position of this rank, where they are not known for ever."""

    def learn(self, outcomes: Sequence[RowOutcome], position: int) -> None:
        """Takes what a step's rewards said. Every rank must call it at the same time.

        Args:
            outcomes: of this rank's groups.
            position: of this rank, at the end of a step: it does not go back behind it.
        """
        assert not self.learns, "what learns says how"

    def metrics(self) -> Metrics:
        """What is known of the rows, for a run's log."""
        return {}

    def state_dict(self, positions: Sequence[int]) -> dict[str, Any]:
        """What a checkpoint needs beside the ranks' positions; each rank must call it at the same time."""
        return {}

    def resume(self, positions: Sequence[int], state: Mapping[str, Any]) -> int:
        """Goes on where ranks had consumed `positions` and had the state.

        Returns:
            Rows that this rank has behind it. With another number of ranks they go on behind as many rows as all of
            them consumed: some rows come again or are left out where they had not read equally far.
        """
        if len(positions) == self.world_size:
            return positions[self.rank]
        # Behind as many rows as all ranks together consumed, in equal parts.
        position = round(sum(positions) / self.world_size)
        first, last = min(positions) * len(positions), max(positions) * len(positions)
        displaced = max(last - position * self.world_size, position * self.world_size - first)
        if displaced:
            logger.warning(
                "the run goes on with %d data-parallel ranks instead of %d, which had not read equally far: up to %d "
                "training rows come again or are left out",
                self.world_size, len(positions), displaced,
            )  # fmt: skip
        return position

    def gather(self, state: StateT) -> list[StateT]:
        """What all data-parallel ranks have, in their order: ranks drift apart as they skip rows and refill."""
        if self.world_size == 1:
            return [state]
        pairs: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(pairs, (self.rank, state))
        states = dict(pairs)  # ranks that share a sequence share their prompts too
        return [states[rank] for rank in range(self.world_size)]


@dataclass(frozen=True)
class RowOrder(RowSequence):
    """Which rows a rank reads, for ever: with n rows, position c is row `permutation(epoch)[c mod n]` of epoch c div n.

    Example:
        Of three rows, rank 0 of 2 reads the first and the last of epoch 0's order, then the second of epoch 1's.
    """

    num_rows: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    @override
    def at(self, position: int) -> int:
        epoch, index = divmod(position, self.num_rows)
        return permutation(self.num_rows, self.seed, epoch)[index]

    @override
    def identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "number_of_rows": self.num_rows}
