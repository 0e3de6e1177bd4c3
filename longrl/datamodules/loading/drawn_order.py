"""`DrawnOrder`: rows drawn by what is known of them, the same on all ranks, and exact when a run is resumed.

A row is drawn once for a position of the sequence that all ranks share, and stays that position's. Draws follow from
the seed, the number of the draw and what is known: all ranks know the same, for they learn of each other's rewards
together, once a step (`learn`). Ranks may have drawn different numbers of rows by then. So first those that drew fewer
catch up, by what was known before; then all learn.

When a row is drawn does not depend on loader workers: a step settles what it reads and `ahead` rows of the next steps,
and workers render no further.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from typing_extensions import override

from longrl.datamodules.loading.learning_progress import SourceProgress
from longrl.datamodules.loading.pass_rates import RowPool, pool_metrics
from longrl.datamodules.loading.row_order import RowOutcome, RowSequence
from longrl.types import Metrics


class DrawnOrder(RowSequence):
    """Rows drawn from pools, one of each source, that lie one after the other in the data set.

    Args:
        pools: rows and how they are drawn.
        seed: of the draws.
        rank: data-parallel.
        world_size: data-parallel.
        ahead: rows of each rank, beside those of a step, that are settled by what was known before the step.
        weights: of the pools; they add up to 1.
        progress: gives the weights in their place, if it is there.
        rates_learn: whether pass rates follow outcomes.
    """

    def __init__(
        self,
        pools: Sequence[RowPool],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        ahead: int = 0,
        weights: Sequence[float] = (1.0,),
        progress: SourceProgress | None = None,
        rates_learn: bool = True,
    ) -> None:
        self.pools = list(pools)
        sizes = [len(pool.rates) for pool in self.pools]
        if not all(sizes):
            raise ValueError(
                f"every source of data.train needs a row that can be used, got {sizes} rows; leave the empty one out"
            )
        self.num_rows = sum(sizes)
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.ahead = ahead
        self.progress = progress
        self.rates_learn = rates_learn
        self.learns = rates_learn or progress is not None
        self._weights = list(weights)
        self._starts = [0, *accumulate(sizes)]
        self._first = 0
        """Position of the first row below."""
        self._rows: list[int] = []
        """Rows that were drawn, of positions that not all ranks have behind them."""
        self._num_draws = 0
        """Of the whole run: what the next one is drawn by."""

    # -- the sequence --------------------------------------------------------------------------------------------

    @override
    def at(self, position: int) -> int:
        self._draw_to(position + 1)
        return self._rows[position - self._first]

    @override
    def settle(self, position: int) -> None:
        self._draw_to((position + self.ahead) * self.world_size)

    @override
    def identity(self) -> dict[str, Any]:
        sizes = [len(pool.rates) for pool in self.pools]
        return {
            "seed": self.seed,
            "number_of_rows": self.num_rows,
            "curriculum_of_the_sources": sizes,
        }

    def _draw_to(self, end: int) -> None:
        """Draws the rows of all positions before `end`."""
        while self._first + len(self._rows) < end:
            draws = random.Random(f"{self.seed}/draw/{self._num_draws}")
            of_source, of_row = draws.random(), draws.random()
            source = self._source(of_source)
            self._rows.append(self._starts[source] + self.pools[source].draw(of_row))
            self._num_draws += 1

    def _source(self, uniform: float) -> int:
        """The pool that a number in [0, 1) falls to."""
        weights = self._weights if self.progress is None else self.progress.weights()
        for source, end in enumerate(accumulate(weights)):
            if uniform < end:
                return source
        return len(weights) - 1

    # -- learning ------------------------------------------------------------------------------------------------

    @override
    def learn(self, outcomes: Sequence[RowOutcome], position: int) -> None:
        by_rank = self.gather((self._first + len(self._rows), position, list(outcomes)))
        # 1. What some rank has drawn, all draw: by what was known until now.
        self._draw_to(max(end for end, _, _ in by_rank))
        # 2. Now all know more: in an order that does not depend on how many ranks there are.
        for outcome in sorted(outcome for _, _, of_rank in by_rank for outcome in of_rank):
            self._observe(outcome)
        # 3. No rank goes back behind where it stands at the end of a step.
        self._forget(min(where for _, where, _ in by_rank) * self.world_size)

    def _observe(self, outcome: RowOutcome) -> None:
        source = next(n for n, end in enumerate(self._starts[1:]) if outcome.row < end)
        if self.rates_learn:
            self.pools[source].observe(outcome.row - self._starts[source], outcome.pass_rate)
        if self.progress is not None:
            self.progress.observe(source, outcome.reward)

    def _forget(self, before: int) -> None:
        """Lets go of rows whose positions all ranks have behind them."""
        count = max(0, before - self._first)
        del self._rows[:count]
        self._first += count

    @override
    def metrics(self) -> Metrics:
        of_sources = {} if self.progress is None else self.progress.metrics()
        return pool_metrics(self.pools) | of_sources

    # -- checkpoints ---------------------------------------------------------------------------------------------

    @override
    def state_dict(self, positions: Sequence[int]) -> dict[str, Any]:
        ends = self.gather(self._first + len(self._rows))
        self._draw_to(max(ends))
        self._forget(min(positions) * self.world_size)
        saved: dict[str, Any] = {
            "first": self._first,
            "rows": torch.tensor(self._rows, dtype=torch.int64),
            "num_draws": self._num_draws,
            "pools": [pool.state_dict() for pool in self.pools],
        }
        if self.progress is not None:
            saved["progress"] = self.progress.state_dict()
        return saved

    @override
    def resume(self, positions: Sequence[int], state: Mapping[str, Any]) -> int:
        """As of `RowSequence`; with another number of ranks they share what is left of the draws: no row is lost."""
        self._num_draws = state["num_draws"]
        for pool, saved in zip(self.pools, state["pools"], strict=True):
            pool.load_state_dict(saved)
        if self.progress is not None and "progress" in state:
            self.progress.load_state_dict(state["progress"])
        self._first, self._rows = state["first"], state["rows"].tolist()
        if len(positions) == self.world_size:
            return positions[self.rank]
        self._rows = [row for place, row in enumerate(self._rows, self._first) if not _is_behind(place, positions)]
        self._first = 0
        return 0


def _is_behind(place: int, positions: Sequence[int]) -> bool:
    """True if the rank that reads a place of the sequence has it behind itself."""
    turn, rank = divmod(place, len(positions))
    return turn < positions[rank]
