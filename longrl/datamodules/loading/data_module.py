"""`StreamedData`: a data module whose training prompts are one resumable stream, shared out over ranks."""

from __future__ import annotations

import abc
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from longrl.datamodules.loading.batches import EvalLoader, TrainLoader
from longrl.datamodules.loading.curriculum import group_outcomes
from longrl.datamodules.loading.loader import PromptStream
from longrl.io.hub_errors import DATA, naming_option
from longrl.types import Group, Metrics

logger = logging.getLogger(__name__)

Split = Literal["train", "val", "test"]
SPLITS: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
}
"""Which sources a Lightning stage reads; the first is needed."""


class StreamedData(LightningDataModule, abc.ABC):
    """Loaders of one stream of training prompts and of the rows of evaluation; goes on exactly where it was saved."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: Mapping[Split, Sequence[Any]] = {}
        """Sources of each split; none where it is not configured."""
        self._stream: PromptStream[Any] | None = None
        self._state: dict[str, Any] = {}
        """Loaded before there was a stream to load it into."""

    # -- what a subclass says ------------------------------------------------------------------------------------

    @abc.abstractmethod
    def read_split(self, split: Split) -> None:
        """Reads and checks the rows of a split."""

    @abc.abstractmethod
    def start_stream(self) -> None:
        """Makes the stream of training prompts and passes it to `start`."""

    @abc.abstractmethod
    def eval_loader(self, split: Split) -> EvalLoader:
        """This rank's part of a split, once."""

    @override
    @abc.abstractmethod
    def train_dataloader(self) -> TrainLoader:
        """Batches of `stream`."""

    # -- reading the sources -------------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        """Reads and checks the sources that `stage` needs; Lightning calls it before weights are loaded.

        Raises:
            ValueError: a source is missing, or a row of it cannot be used.
        """
        required = SPLITS[stage][0]
        if not self.sources[required]:
            command = TrainerFn(stage).value  # Lightning's own stage prints as a member of an enum
            raise ValueError(f"`{command}` reads data.{required}, which is not set; give it a file or a hub id")
        self.read(SPLITS[stage])
        if stage == "fit":
            self.start_stream()

    def read(self, splits: Sequence[Split]) -> None:
        """Reads and checks those of the splits that are configured."""
        for split in splits:
            if not self.sources[split]:
                continue
            logger.info("reading data.%s", split)
            with naming_option(f"data.{split}", DATA):
                self.read_split(split)

    # -- loaders -------------------------------------------------------------------------------------------------

    @property
    def stream(self) -> PromptStream[Any]:
        """The training prompts, once `setup("fit")` has been called."""
        assert self._stream is not None, "setup('fit') comes first"
        return self._stream

    def start(self, stream: PromptStream[Any]) -> None:
        """Takes the stream of training prompts, and goes on where a state that was loaded before it says."""
        self._stream = stream
        self.train_dataloader()  # a batch larger than the source is an error now, not after the weights are loaded
        if self._state:
            stream.load_state_dict(self._state)
        self._state = {}

    def data_parallel(self) -> tuple[int, int]:
        """Rank and number of data-parallel ranks; ranks that share a sequence share their prompts."""
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return (kwargs["rank"], kwargs["num_replicas"]) if kwargs else (0, 1)

    def draw_prompts(self, count: int) -> list[Any]:
        """`count` further training prompts, for dynamic sampling; they count as consumed."""
        return self.stream.take(count)

    def learn(self, groups: Sequence[Group[Any, Any]]) -> None:
        """Tells a curriculum the rewards of a step's groups, selected or not. Every rank must call it once a step."""
        if self.stream.order.learns:
            self.stream.order.learn(group_outcomes(groups), self.stream.position)

    def metrics(self) -> Metrics:
        """What a curriculum knows, and what it chose for the step; nothing without one."""
        return {} if self._stream is None else self._stream.metrics()

    def counts(self) -> Metrics:
        """What this rank alone has counted so far, by the same names on all ranks, which are to sum it."""
        return {}

    @override
    def val_dataloader(self) -> EvalLoader | list[EvalLoader]:
        return self.eval_loader("val") if self.sources["val"] else []

    @override
    def test_dataloader(self) -> EvalLoader:
        return self.eval_loader("test")

    predict_dataloader = test_dataloader

    @override
    def teardown(self, stage: str) -> None:
        """Ends the training workers."""
        if self._stream is not None:
            self._stream.close()

    # -- resuming ------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """Where all ranks stand in the training rows; Lightning calls it on every rank and saves rank 0's."""
        return self._stream.state_dict() if self._stream is not None else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the state was saved: now, or once `setup("fit")` is called.

        Raises:
            ValueError: the state belongs to other rows or another seed.
        """
        if self._stream is not None:
            self._stream.load_state_dict(state_dict)
        else:
            self._state = state_dict


def check_at_least(least: int, **options: int | None) -> None:
    """Raises ValueError for an option of `data` that is set, and too small."""
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"data.{name} must be at least {least}, got {value}")
