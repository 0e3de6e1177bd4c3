"""Rows as prompts, rendered here or by workers; and an endless stream of training prompts that resumes exactly.

The ranks read one endless sequence of rows (`row_order`), and the number of rows that each consumed says where it
stands. Rows that cannot be used are consumed too, which keeps that number exact whatever is skipped; the rank's next
row goes into the batch instead.

The data module keeps the state. Lightning would also save and restore loaders that have a state of their own, but not
when it resumes after the end of an epoch.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch.utils.data import DataLoader, Dataset

from longrl.datamodules.loading.row_fingerprint import fingerprint_without, row_number, row_text
from longrl.datamodules.loading.row_marks import Budget, RowDraw, marked
from longrl.datamodules.loading.row_order import RowSequence
from longrl.datamodules.loading.schedules import StepBudgets, budget_metrics
from longrl.datamodules.loading.skips import CODE_ERRORS, Item, SkipLog
from longrl.datamodules.loading.workers import IPCPayload, end_with_trainer, items_of_workers
from longrl.io.processes import lost_worker_in
from longrl.io.pulse import PULSE
from longrl.strategies.axis import SINGLE_RANK, Axis
from longrl.types import Metrics, Prompt, Row, UnusableSample

logger = logging.getLogger(__name__)
FINGERPRINT, USABLE_FINGERPRINT, UNUSABLE = "fingerprint_of_the_rows", "fingerprint_of_usable_rows", "unusable_rows"
"""In a stream's state: of all rows; of all but those that were drawn and could not be used; which these are."""
DRAWS = "draws"
"""There too: the state of an order that draws rows by what is known of them."""


class RenderedRows(Dataset[Any], Generic[Item]):
    """Rows as prompts, rendered on access. Loader workers have a copy."""

    def __init__(self, rows: Sequence[Row], render: Callable[[Row], Item]) -> None:
        self.rows = rows
        self.render = render

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: int | RowDraw) -> Item | UnusableSample:
        index = draw.index if isinstance(draw, RowDraw) else draw
        row = self.rows[index]
        if isinstance(draw, RowDraw):
            row = marked(row, draw)
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

    @property
    def rendered_ahead(self) -> int:
        """Prompts that workers hold at most."""
        return self.prompts_per_worker * self.num_workers

    @property
    def prompts_per_worker(self) -> int:
        """Prompts that each worker holds at most."""
        return math.ceil(self.prefetch_prompts / max(1, self.num_workers))

    def render(self, dataset: RenderedRows[Item], indices: Iterable[int | RowDraw]) -> Iterator[Item | UnusableSample]:
        """The rows at `indices`, in that order. Draws from no global random state: a trainer's stays as it is."""
        if not self.num_workers:
            return (dataset[index] for index in indices)
        drawn: deque[int] = deque()

        def draw() -> Iterator[int | RowDraw]:
            for index in indices:
                drawn.append(index.index if isinstance(index, RowDraw) else index)
                yield index

        parcels = DataLoader(
            dataset,
            batch_size=None,
            sampler=draw(),
            collate_fn=IPCPayload.pack_shared,  # of single items, for there is no batch_size
            num_workers=self.num_workers,
            worker_init_fn=end_with_trainer,
            pin_memory=self.pin_memory,
            prefetch_factor=self.prompts_per_worker,
            multiprocessing_context=self.multiprocessing_context,
            generator=torch.Generator(),
        )
        return items_of_workers(parcels, dataset.rows, drawn)


def usable_items(items: Sequence[Item | UnusableSample], skips: SkipLog, sp_group: Axis = SINGLE_RANK) -> list[Item]:
    """The usable ones of the items that were drawn, as all ranks of `sp_group` agree; notes the others.

    Args:
        items: of consecutive draws.
        skips: is told of every draw.
        sp_group: ranks that read shards of the same samples: what one of them could not read is skipped by all.

    Raises:
        ValueError: too many rows were skipped, or ranks see other frames of one.
    """
    # 1. The first error of any rank counts for all.
    errors = [item if isinstance(item, UnusableSample) else None for item in items]
    if sp_group.size > 1:
        frames = [item.frame_indices if isinstance(item, Prompt) else () for item in items]
        of_items = zip(*sp_group.gather(list(zip(errors, frames, strict=True))), strict=True)
        errors = [_first_error(of_ranks) for of_ranks in of_items]
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


def _first_error(of_ranks: Sequence[tuple[UnusableSample | None, Any]]) -> UnusableSample | None:
    """Why a sample is skipped by all ranks that share it, None if it is not.

    Raises:
        ValueError: its frames are not the same on all of them: each would encode a part of another video.
    """
    errors = [error for error, _ in of_ranks if error is not None]
    if not errors and any(frames != of_ranks[0][1] for _, frames in of_ranks):
        raise ValueError(
            "ranks of a sequence-parallel group chose different frames of one video: their processors round "
            "differently, or a function of yours is not the same in every process; name a folder that all of them "
            "see in data.selection.init_args.cache_dir, or correct the function"
        )
    return next(iter(errors), None)


class PromptStream(Generic[Item]):
    """An endless stream of prompts. Its only state is the number of rows it consumed.

    Args:
        dataset: what to read.
        order: in which order; its rank and world size are the data-parallel ones.
        skips: counts the rows that cannot be used.
        options: how rows are rendered.
        sp_group: the ranks that read the same rows, each its shard of the frames.
        budgets: which frames each step shows, if that changes.
        marks: note on each row that it was drawn (`row_marks`), as a curriculum needs it.

    Example:
        `stream.take(8)` is a batch, and a following `stream.take(3)` what dynamic sampling asks for besides.
    """

    def __init__(
        self,
        dataset: RenderedRows[Item],
        order: RowSequence,
        skips: SkipLog,
        options: LoaderOptions | None = None,
        sp_group: Axis = SINGLE_RANK,
        budgets: StepBudgets | None = None,
        marks: bool = False,
    ) -> None:
        self.dataset = dataset
        self.sp_group = sp_group
        self.budgets = budgets
        self.marks = marks
        self.order = order
        self.skips = skips
        self.options = options or LoaderOptions()
        self.position = 0
        """Rows handed out or skipped on this rank; what workers rendered ahead does not count."""
        self._unusable: set[int] = set()
        """Rows that could not be used before the run was resumed."""
        self._items: Iterator[Item | UnusableSample] | None = None
        self._budget: Budget = ()
        """Of what is drawn now."""
        self._drawn: deque[RowDraw] = deque()
        """Marked draws that were not handed out yet."""

    def take(self, count: int) -> list[Item]:
        """The next `count` prompts.

        Raises:
            ValueError: too many rows on the way cannot be used, or no others come.
        """
        prompts: list[Item] = []
        num_lost = 0
        outer = PULSE.phase
        PULSE.phase = "data"
        PULSE.since = time.perf_counter()
        if self.budgets is not None:
            self._budget = self.budgets.begin(self.position)
        if self._items is None:
            self._items = self.options.render(self.dataset, self._draws())
        while len(prompts) < count:
            num_missing = count - len(prompts)
            self.order.settle(self.position + num_missing)
            items = [self._as_budgeted(item) for item in itertools.islice(self._items, num_missing)]
            PULSE.sample = ""
            # Unusable rows are consumed too; further rows come instead of them.
            self.position += len(items)
            usable = usable_items(items, self.skips, self.sp_group)
            prompts += usable
            num_lost = 0 if usable else num_lost + len(items)
            if num_lost > self.order.num_rows * self.order.world_size:
                raise ValueError(
                    f"the last {num_lost} draws of training rows gave none that can be used: of those that data."
                    f"curriculum draws all are listed in {self.skips.path}; widen its band, or raise retry_after"
                )
        PULSE.phase = outer
        PULSE.beats += 1
        return prompts

    def _draws(self) -> Iterator[int | RowDraw]:
        """What workers render, from where the stream stands on: where rows are marked, with their marks."""
        if not self.marks:
            yield from self.order.after(self.position)
            return
        budgets = itertools.repeat(()) if self.budgets is None else self.budgets.expected(self.position)
        for index, budget in zip(self.order.after(self.position), budgets, strict=False):
            draw = RowDraw(index, budget)
            self._drawn.append(draw)
            yield draw

    def _as_budgeted(self, item: Item | UnusableSample) -> Item | UnusableSample:
        """The item, or what takes its place where workers rendered it for another step's frames."""
        if not self.marks:
            return item
        draw = self._drawn.popleft()
        return item if draw.video == self._budget else self.dataset[RowDraw(draw.index, self._budget)]

    def close(self) -> None:
        """Ends the workers; the next `take` starts new ones where the stream stands."""
        self._items = None
        self._drawn.clear()

    def metrics(self) -> Metrics:
        """What the last step read, and what is known of the rows."""
        return budget_metrics(self._budget) | self.order.metrics()

    def state_dict(self) -> dict[str, Any]:
        """Where all ranks stand. Under data parallelism every rank must call it at the same time."""
        of_ranks = self.order.gather((self.position, sorted({*self._unusable, *self.skips.drawn_unusable})))
        unusable = sorted({index for _, indices in of_ranks for index in indices})
        positions = [position for position, _ in of_ranks]
        of_order = self.order.state_dict(positions)
        return {
            "positions": positions,
            UNUSABLE: unusable,
            USABLE_FINGERPRINT: self.dataset.fingerprint_without(unusable),
            **self._identity(),
            **({DRAWS: of_order} if of_order else {}),
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
        for name in [*here, *(state.keys() - here.keys() - {"positions", DRAWS})]:
            if state.get(name) != here.get(name):
                raise ValueError(
                    f"the data of a resumed run must be the checkpoint's, but its {name.replace('_', ' ')} was "
                    f"{state.get(name)} and is now {here.get(name)}; restore data.train and data.seed, or "
                    "start a new run from the weights alone with --model.init_from"
                )
        self.close()
        self.position = self.order.resume(state["positions"], state.get(DRAWS, {}))

    def _is_repaired(self, state: dict[str, Any]) -> bool:
        """Whether only rows differ that could not be used, as far as the checkpoint knows."""
        if state.get(FINGERPRINT) == self.dataset.fingerprint or UNUSABLE not in state:
            return False
        return state[USABLE_FINGERPRINT] == self.dataset.fingerprint_without(state[UNUSABLE])

    def _identity(self) -> dict[str, Any]:
        return self.order.identity() | {FINGERPRINT: self.dataset.fingerprint}
