"""Where each step's time goes, on the progress bar and in the logs."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from typing_extensions import override

from longrl.modules.policy import PolicyModule
from longrl.types import Batch

ON_PROGRESS_BAR = ("encode", "generate", "reward", "update")


class Throughput(Callback):
    """Logs seconds per phase (`time/encode`, `generate`, `reward`, `update`, `data`), tokens per second and encodes.

    The phases come from `PolicyModule.phases`; `data` is what the step waited for its batch.
    """

    def __init__(self) -> None:
        self._start = 0.0
        self._end_of_last = 0.0

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_of_last = time.perf_counter()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._start = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PolicyModule)
        # What the step waited for its batch lies between the end of the last step and the start of this one.
        now = time.perf_counter()
        seconds = pl_module.phases.collect()
        seconds["data"] = self._start - self._end_of_last
        for name, value in seconds.items():
            pl_module.log(f"time/{name}", value, batch_size=1)
            if name in ON_PROGRESS_BAR:
                # The bar alone: loggers have the value under `time/`.
                pl_module.log(f"{name}_s", value, prog_bar=True, logger=False, batch_size=1)
        # Ranks of one sequence-parallel group have the same batch: summed over data-parallel ranks it counts once.
        totals = pl_module.parallel.dp.sum_dict({"tokens": num_tokens(batch)})
        tokens_per_s = totals["tokens"] / (now - self._end_of_last)
        pl_module.log("throughput/tokens_per_s", tokens_per_s, batch_size=1)
        num_encoded = float(pl_module.features.num_encoded)
        pl_module.log("throughput/media_encoded", num_encoded, batch_size=1)
        self._end_of_last = now

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation uses the same phases; its seconds belong to no step."""
        assert isinstance(pl_module, PolicyModule)
        pl_module.phases.collect()
        self._end_of_last = time.perf_counter()


def num_tokens(batch: Batch) -> int:
    """Tokens of a step, a prompt counted once."""
    count = 0
    if batch.groups is None:  # SFT
        for prompt in batch.prompts:
            count += len(prompt.input_ids)
            if prompt.response_ids is not None:
                count += len(prompt.response_ids)
        return count
    # The prompt is encoded once, whatever the number of its completions.
    for group in batch.groups:
        count += len(group.prompt.input_ids)
        count += sum(len(completion.token_ids) for completion in group.completions)
    return count


class ProgressBar(RichProgressBar):
    """Lightning's rich bar without the version number."""

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
