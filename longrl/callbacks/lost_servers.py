"""A run whose rollout servers are gone for good saves what it was before the step, and ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lightning.pytorch import Trainer

from longrl.callbacks.checkpoint import Checkpoint
from longrl.callbacks.rollout_steps import GroupSource
from longrl.engines.server_pool import lost_servers
from longrl.modules.trained import data_module_of


class DataPosition:
    """Where training prompts stood before the batch that a step was given."""

    def __init__(self) -> None:
        self._position: int | None = None

    def note(self, trainer: Trainer) -> None:
        """No batch is drawn that no step has been made of."""
        self._position = data_module_of(trainer).stream.position

    def go_back(self, trainer: Trainer) -> None:
        """Has the last batch, and what was drawn since, read again."""
        assert self._position is not None, "a step has begun"
        stream = data_module_of(trainer).stream
        stream.close()
        stream.position = self._position


@contextlib.contextmanager
def saved_without_servers(trainer: Trainer, source: GroupSource, data: DataPosition) -> Iterator[None]:
    """Around a step's rollouts: has the run saved as if the step had not begun, and ended, where servers are lost.

    Every rank must enter. What is raised on one rank is raised on all, as the engine and `raise_on_any_rank` do it.

    Args:
        trainer: of the run.
        source: of the step's groups.
        data: before the step's batch.

    Raises:
        StopRun: servers were lost, and there is a checkpoint callback.
    """
    try:
        yield
    except Exception as error:
        problem = lost_servers(error)
        checkpoint = trainer.checkpoint_callback
        if problem is None or not isinstance(checkpoint, Checkpoint):
            raise
        if source.undo_step():
            data.go_back(trainer)
        checkpoint.save_and_end(trainer, problem)
