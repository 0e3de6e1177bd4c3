"""Loaders of batches that Lightning iterates over: of a stream that goes on, and of the rows of a split once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from longrl.datamodules.loading.loader import LoaderOptions, PromptStream, RenderedRows, usable_items
from longrl.datamodules.loading.skips import SkipLog
from longrl.strategies.axis import SINGLE_RANK, Axis
from longrl.types import Batch


class TrainLoader:
    """Batches that Lightning iterates over in `fit`: as many batches per Lightning epoch as one pass over the rows has.

    It is no torch `DataLoader`, so Lightning puts no sampler into it; and it is sized, so Lightning asks for no batch
    before the one in hand has been trained on. A Lightning epoch takes up where the last one ended in the stream; with
    skipped rows and refills it ends elsewhere than the pass over the rows.
    """

    def __init__(
        self, stream: PromptStream[Any], prompts_per_batch: int, make_batch: Callable[[list[Any]], Any] = Batch
    ) -> None:
        order = stream.order
        self.stream = stream
        self.make_batch = make_batch
        self.prompts_per_batch = prompts_per_batch
        self.num_batches = order.num_rows // (prompts_per_batch * order.world_size)
        if self.num_batches < 1:
            raise ValueError(
                f"a step reads data.prompts_per_batch={prompts_per_batch} prompts on each of {order.world_size} data-"
                f"parallel ranks, but data.train has {order.num_rows} rows; lower data.prompts_per_batch to at most "
                f"{order.num_rows // order.world_size}"
            )

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.num_batches):
            yield self.make_batch(self.stream.take(self.prompts_per_batch))

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module has the state. Without these methods Lightning warns that we cannot resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""


class EvalLoader:
    """The rows once and in order; rank r of W reads rows r, r + W, ... Rows that cannot be used are left out.

    A batch holds the usable ones of `prompts_per_batch` consecutive rows of its rank. All ranks have the same number of
    batches, so a batch may be empty when there are several ranks; one rank alone leaves empty batches out.
    """

    def __init__(
        self,
        dataset: RenderedRows[Any],
        skips: SkipLog,
        prompts_per_batch: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        options: LoaderOptions | None = None,
        sp_group: Axis = SINGLE_RANK,
        make_batch: Callable[[list[Any]], Any] = Batch,
    ) -> None:
        self.dataset = dataset
        self.sp_group = sp_group
        self.make_batch = make_batch
        self.skips = skips
        self.prompts_per_batch = prompts_per_batch
        self.rank = rank
        self.world_size = world_size
        self.options = options or LoaderOptions()

    def __len__(self) -> int:
        return math.ceil(math.ceil(len(self.dataset) / self.world_size) / self.prompts_per_batch)

    def __iter__(self) -> Iterator[Any]:
        items = self.options.render(self.dataset, range(self.rank, len(self.dataset), self.world_size))
        for _ in range(len(self)):
            prompts = usable_items(list(itertools.islice(items, self.prompts_per_batch)), self.skips, self.sp_group)
            if prompts or self.world_size > 1:
                yield self.make_batch(prompts)
