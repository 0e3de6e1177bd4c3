"""Loaders that resume exactly: an endless stream of training prompts, and a finite one for evaluation.

Rank r of W reads positions r, r + W, r + 2W, ... of one endless sequence. With n rows, its position c is row
`permutation(epoch)[c mod n]` of epoch `c div n`. So the ranks share no row, every epoch has every row once, and the
number of rows that each rank consumed says all about where the stream stands. Rows that cannot be used are consumed
too, which keeps that number exact whatever is skipped; the rank's next row goes into the batch instead.

The data module keeps the state. Lightning would also save and restore loaders that have a state of their own, but not
when it resumes after the end of an epoch.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from longrl.datamodules.loading.row_fingerprint import fingerprint_without, row_number, row_text
from longrl.datamodules.loading.skips import CODE_ERRORS, Item, SkipLog
from longrl.datamodules.loading.workers import IPCPayload, end_with_trainer, items_of_workers
from longrl.io.processes import lost_worker_in
from longrl.io.pulse import PULSE
from longrl.strategies.axis import SINGLE_RANK, Axis
from longrl.types import Batch, Prompt, Row, UnusableSample

logger = logging.getLogger(__name__)
FINGERPRINT, USABLE_FINGERPRINT, UNUSABLE = "fingerprint_of_the_rows", "fingerprint_of_usable_rows", "unusable_rows"
"""In a stream's state: of all rows; of all but those that were drawn and could not be used; which these are."""


class RenderedRows(Dataset[Any], Generic[Item]):
    """Rows as prompts, rendered on access. Loader workers have a copy."""

    def __init__(self, rows: Sequence[Row], render: Callable[[Row], Item]) -> None:
        self.rows = rows
        self.render = render

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item | UnusableSample:
        row = self.rows[index]
        PULSE.sample = row.id
        PULSE.beats += 1
        try:
            return self.render(row)
        except UnusableSample as error:
            return error.of_row(index, row.id)
        except CODE_ERRORS:
            raise
        except Exception as error:  # of a processor, a tokenizer or a template: whoever met what the row holds
            if lost_worker_in(error):  # which happens to be told of here
                raise
            logger.info("row %r cannot be rendered", row.id, exc_info=True)
            return UnusableSample.because(error, "it cannot be rendered").of_row(index, row.id)

    @property
    def fingerprint(self) -> str:
        """Hash of what the rows say, in their order."""
        return self._hash_and_sum[0]

    def fingerprint_without(self, left_out: Iterable[int]) -> str:
        """The same of all rows but those of some indices."""
        return fingerprint_without(self.rows, self._hash_and_sum[1], left_out)

    @functools.cached_property
    def _hash_and_sum(self) -> tuple[str, int]:
        digest, total = hashlib.sha256(), 0
        for index, text in enumerate(map(row_text, self.rows)):
            digest.update(text)
            total += row_number(index, text)
        return digest.hexdigest(), total


@dataclass(frozen=True)
class LoaderOptions:
    """How rows are rendered."""

    num_workers: int = 0
    """Processes that decode and render; 0 does it in the trainer's own."""
    prefetch_prompts: int = 1
    """Prompts rendered ahead, over all workers."""
    multiprocessing_context: str | None = None
    """How workers start: `fork`, `spawn` or `forkserver`; None for the platform's default."""
    pin_memory: bool = False
    """Put what workers hand over into pinned memory, for a GPU."""

    def render(self, dataset: RenderedRows[Item], indices: Iterable[int]) -> Iterator[Item | UnusableSample]:
        """The rows at `indices`, in that order. Draws from no global random state: a trainer's stays as it is."""
        if not self.num_workers:
            return (dataset[index] for index in indices)
        drawn: deque[int] = deque()

        def draw() -> Iterator[int]:
            for index in indices:
                drawn.append(index)
                yield index

        parcels = DataLoader(
            dataset,
            batch_size=None,
            sampler=draw(),
            collate_fn=IPCPayload.pack_shared,  # of single items, for there is no batch_size
            num_workers=self.num_workers,
            worker_init_fn=end_with_trainer,
            pin_memory=self.pin_memory,
            prefetch_factor=math.ceil(self.prefetch_prompts / self.num_workers),
            multiprocessing_context=self.multiprocessing_context,
            generator=torch.Generator(),
        )
        return items_of_workers(parcels, dataset.rows, drawn)


# ----------------------------------------------------------------------------------------------------------- training


@functools.lru_cache(maxsize=32)  # of every source of a mix, one or two epochs
def permutation(num_rows: int, seed: int | str, epoch: int) -> tuple[int, ...]:
    """Order of the rows in an epoch; the same on every rank and platform and with any version of torch."""
    order = list(range(num_rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


@dataclass(frozen=True)
class RowOrder:
    """Which rows a rank reads, for ever.

    Example:
        Of three rows, rank 0 of 2 reads the first and the last of epoch 0's order, then the second of epoch 1's.
    """

    num_rows: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def at(self, position: int) -> int:
        """Index of the row at a position of the sequence that all ranks share."""
        epoch, index = divmod(position, self.num_rows)
        return permutation(self.num_rows, self.seed, epoch)[index]

    def after(self, position: int) -> Iterator[int]:
        """Indices of the rows from `position` on, without end."""
        for turn in itertools.count(position):
            yield self.at(turn * self.world_size + self.rank)

    def identity(self) -> dict[str, Any]:
        """Facts that must be the same for a position to mean the same row."""
        return {"seed": self.seed, "number_of_rows": self.num_rows}


def usable_items(items: Sequence[Item | UnusableSample], skips: SkipLog, sp_group: Axis = SINGLE_RANK) -> list[Item]:
    """The usable ones of the items that were drawn, as all ranks of `sp_group` agree; notes the others.

    Args:
        items: of consecutive draws.
        skips: is told of every draw.
        sp_group: ranks that read shards of the same samples: what one of them could not read is skipped by all.

    Raises:
        ValueError: too many rows were skipped.
    """
    # 1. The first error of any rank counts for all.
    errors = [item if isinstance(item, UnusableSample) else None for item in items]
    if sp_group.size > 1:
        of_items = zip(*sp_group.gather(errors), strict=True)
        errors = [next(filter(None, of_ranks), None) for of_ranks in of_items]
    # 2. Each draw is counted before its error, for the limit depends on the number of draws.
    usable = []
    for item, error in zip(items, errors, strict=True):
        skips.num_drawn += 1
        if error is not None:
            skips.add_drawn(error)
        elif not isinstance(item, UnusableSample):
            usable.append(item)
            if isinstance(item, Prompt) and item.torn_videos:
                skips.add_torn(item.id, item.torn_videos)
    return usable


class PromptStream(Generic[Item]):
    """An endless stream of prompts. Its only state is the number of rows it consumed.

    Args:
        dataset: what to read.
        order: in which order; its rank and world size are the data-parallel ones.
        skips: counts the rows that cannot be used.
        options: how rows are rendered.
        sp_group: the ranks that read the same rows, each its shard of the frames.

    Example:
        `stream.take(8)` is a batch, and a following `stream.take(3)` what dynamic sampling asks for besides.
    """

    def __init__(
        self,
        dataset: RenderedRows[Item],
        order: RowOrder,
        skips: SkipLog,
        options: LoaderOptions | None = None,
        sp_group: Axis = SINGLE_RANK,
    ) -> None:
        self.dataset = dataset
        self.sp_group = sp_group
        self.order = order
        self.skips = skips
        self.options = options or LoaderOptions()
        self.position = 0
        """Rows handed out or skipped on this rank; what workers rendered ahead does not count."""
        self._unusable: set[int] = set()
        """Rows that could not be used before the run was resumed."""
        self._items: Iterator[Item | UnusableSample] | None = None

    def take(self, count: int) -> list[Item]:
        """The next `count` prompts.

        Raises:
            ValueError: too many rows on the way cannot be used.
        """
        prompts: list[Item] = []
        outer = PULSE.phase
        PULSE.phase = "data"
        PULSE.since = time.perf_counter()
        if self._items is None:
            self._items = self.options.render(self.dataset, self.order.after(self.position))
        while len(prompts) < count:
            items = list(itertools.islice(self._items, count - len(prompts)))
            PULSE.sample = ""
            # Unusable rows are consumed too; further rows come instead of them.
            self.position += len(items)
            prompts += usable_items(items, self.skips, self.sp_group)
        PULSE.phase = outer
        PULSE.beats += 1
        return prompts

    def close(self) -> None:
        """Ends the workers; the next `take` starts new ones where the stream stands."""
        self._items = None

    def state_dict(self) -> dict[str, Any]:
        """Where all ranks stand. Under data parallelism every rank must call it at the same time."""
        of_ranks = _gather((self.position, sorted({*self._unusable, *self.skips.drawn_unusable})), self.order)
        unusable = sorted({index for _, indices in of_ranks for index in indices})
        return {
            "positions": [position for position, _ in of_ranks],
            UNUSABLE: unusable,
            USABLE_FINGERPRINT: self.dataset.fingerprint_without(unusable),
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken, with any number of data-parallel ranks.

        With another number the ranks go on behind the same rows if none was skipped and none drawn for a refill; else
        as near as they can: some rows come again or are left out in this epoch, and a warning says how many.

        Raises:
            ValueError: the state belongs to other rows or another seed.
        """
        here = self._identity()
        if self._is_repaired(state):
            logger.warning("some of the %d rows that could not be used say something else now", len(state[UNUSABLE]))
            state = {**state, FINGERPRINT: here[FINGERPRINT]}
        self._unusable = set(state.get(UNUSABLE, ()))
        state = {name: value for name, value in state.items() if name not in (UNUSABLE, USABLE_FINGERPRINT)}
        for name in [*here, *(state.keys() - here.keys() - {"positions"})]:
            if state.get(name) != here.get(name):
                raise ValueError(
                    f"the data of a resumed run must be the checkpoint's, but its {name.replace('_', ' ')} was "
                    f"{state.get(name)} and is now {here.get(name)}; restore data.train and data.seed, or "
                    "start a new run from the weights alone with --model.init_from"
                )
        self.close()
        self.position = self._position_after(state["positions"])

    def _is_repaired(self, state: dict[str, Any]) -> bool:
        """Whether only rows differ that could not be used, as far as the checkpoint knows."""
        if state.get(FINGERPRINT) == self.dataset.fingerprint or UNUSABLE not in state:
            return False
        return state[USABLE_FINGERPRINT] == self.dataset.fingerprint_without(state[UNUSABLE])

    def _position_after(self, positions: Sequence[int]) -> int:
        """Rows this rank has behind it when ranks that had consumed `positions` stopped."""
        if len(positions) == self.order.world_size:
            return positions[self.order.rank]
        # Behind as many rows as all ranks together consumed, in equal parts.
        position = round(sum(positions) / self.order.world_size)
        first, last = min(positions) * len(positions), max(positions) * len(positions)
        displaced = max(last - position * self.order.world_size, position * self.order.world_size - first)
        if displaced:
            logger.warning(
                "the run goes on with %d data-parallel ranks instead of %d, which had not read equally far: up to %d "
                "training rows come again or are left out",
                self.order.world_size, len(positions), displaced,
            )  # fmt: skip
        return position

    def _identity(self) -> dict[str, Any]:
        return self.order.identity() | {FINGERPRINT: self.dataset.fingerprint}


def _gather(state: Item, order: RowOrder) -> list[Item]:
    """What all data-parallel ranks have, in their order: ranks drift apart as they skip rows and refill."""
    if order.world_size == 1:
        return [state]
    pairs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pairs, (order.rank, state))
    states = dict(pairs)  # ranks that share a sequence share their prompts too
    return [states[rank] for rank in range(order.world_size)]


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


# --------------------------------------------------------------------------------------------------------- evaluation


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
