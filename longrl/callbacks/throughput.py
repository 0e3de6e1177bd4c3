"""Where each step's time goes, on the progress bar and in the logs."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from longrl.io.number_ranges import check_ranges
from longrl.models.step_flops import GroupTokens, TextCost, peak_flops
from longrl.modules.policy import PolicyModule
from longrl.types import Batch, Continuation, Metrics, Prompt

logger = logging.getLogger(__name__)

MIB = 1 << 20
ON_PROGRESS_BAR = ("encode", "generate", "reward", "update")


class Throughput(Callback):
    """Logs seconds and memory of each phase, tokens per second, how busy devices are and what moved between them.

    docs/metrics.md has all names. The phases come from `PolicyModule.phases`; `data` is what the step waited for its
    batch.

    Args:
        peak_tflops: of a device, dense, in the precision of the products: what `throughput/mfu` is a share of. None is
            the maker's number for bfloat16 where it is known, as of A100, H100 and H200.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        check_ranges(locals(), "the throughput callback's ", peak_tflops=(1e-6, 1e9))
        self._start = 0.0
        self._end_of_last = 0.0
        self._cost: TextCost | None = None
        self._peak = None if peak_tflops is None else peak_tflops * 1e12
        """Operations per second of this rank's device, if it is known."""
        self._phases: set[str] = set()
        """Those of any step: Lightning goes on logging the last value of a name that a step leaves out."""
        self._passes = 0
        self._requested = 0
        self._encoded = 0
        self._encoded_bytes = 0
        self._synced_bytes = 0
        """Of these the module had counted so many at the end of the last step."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PolicyModule)
        self._cost = TextCost.of(pl_module.family, pl_module.model)
        device = pl_module.device
        if self._peak is None and device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            self._peak = peak_flops(name)
            if self._peak is None and trainer.is_global_zero:
                logger.info("throughput/mfu is not logged, for the peak of %s is not known; set peak_tflops", name)
        self._end_of_last = time.perf_counter()  # a run that goes on within an epoch does not start one

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
        step_s = now - self._end_of_last
        seconds = pl_module.phases.collect()
        self._phases |= seconds.keys()
        peaks = pl_module.phases.memory.collect()
        for phase in self._phases - seconds.keys():
            seconds[phase] = 0.0
            peaks[phase] = 0.0
        seconds["data"] = self._start - self._end_of_last
        seconds["step"] = step_s
        self._end_of_last = now
        metrics: Metrics = {}
        for name, value in seconds.items():
            metrics[f"time/{name}"] = value
            if name in ON_PROGRESS_BAR:
                # The bar alone: loggers have the value under `time/`.
                pl_module.log(f"{name}_s", value, prog_bar=True, logger=False, batch_size=1)
        world = pl_module.parallel.world
        metrics |= largest_by_phase(world.gather(peaks))
        update_s = seconds.get("update", 0.0)
        metrics |= self._rates(pl_module, batch, step_s, update_s)
        if batch.groups is not None:
            metrics["throughput/sync_share"] = seconds.get("sync", 0.0) / step_s
            metrics["throughput/trainer_busy"] = 1 - seconds.get("generate", 0.0) / step_s
        pl_module.log_dict(metrics, batch_size=1)

    def _rates(
        self,
        module: PolicyModule,
        batch: Batch,
        step_s: float,
        update_s: float,
    ) -> Metrics:
        """What all ranks did per second; all must call it."""
        # 1. This rank's numbers since the end of the last step.
        features = module.features
        passes = module.num_scoring_passes - self._passes
        local: Metrics = {
            "tokens": num_tokens(batch),
            "flops": self._update_flops(module, batch, passes),
            "requested": features.num_requested - self._requested,
            "encoded": features.num_encoded - self._encoded,
            "all_requested": features.num_requested,
            "encoded_bytes": features.num_encoded_bytes - self._encoded_bytes,
        }
        synced_bytes = module.num_synced_bytes - self._synced_bytes
        self._passes = module.num_scoring_passes
        self._requested = features.num_requested
        self._encoded = features.num_encoded
        self._encoded_bytes = features.num_encoded_bytes
        self._synced_bytes = module.num_synced_bytes

        # 2. Ranks of one sequence-parallel group have the same batch: summed over data-parallel ranks it counts once.
        totals = module.parallel.dp.sum_dict(local)
        rates: Metrics = {
            "throughput/tokens_per_s": totals["tokens"] / step_s,
            "throughput/media_encoded": float(features.num_encoded),
            "throughput/encoded_mib": totals["encoded_bytes"] / MIB,
        }
        if batch.groups is not None:
            rates["throughput/sync_mib"] = synced_bytes / MIB
        if totals["all_requested"] and not features.disk:  # a cache on disk logs its own
            requested = totals["requested"] or 1.0
            missed = totals["encoded"] / requested
            rates["throughput/feature_hit_rate"] = 1 - missed
        if self._cost is not None and update_s:
            num_devices = module.parallel.world.size
            per_device = totals["flops"] / num_devices / update_s
            rates["throughput/update_tflops"] = per_device / 1e12
            if self._peak is not None:
                rates["throughput/mfu"] = per_device / self._peak
        return rates

    def _update_flops(self, module: PolicyModule, batch: Batch, passes: int) -> float:
        """Operations of the update of this batch, and of the passes that scored it before."""
        if self._cost is None:
            return 0.0
        groups = group_tokens(batch)
        epochs = module.epochs_per_rollout
        if batch.groups is None:
            epochs = 1
        scoring = self._cost.forward_flops(groups)
        update = self._cost.update_flops(groups)
        return epochs * update + passes * scoring

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation uses the same phases; its seconds belong to no step."""
        assert isinstance(pl_module, PolicyModule)
        pl_module.phases.collect()
        pl_module.phases.memory.collect()
        self._passes = pl_module.num_scoring_passes
        self._encoded_bytes = pl_module.features.num_encoded_bytes
        self._synced_bytes = pl_module.num_synced_bytes
        self._end_of_last = time.perf_counter()


def largest_by_phase(of_ranks: Sequence[Metrics]) -> Metrics:
    """GiB of each phase on the rank that takes most."""
    largest: Metrics = {}
    for peaks in of_ranks:
        for phase, size in peaks.items():
            name = f"memory/{phase}"
            largest[name] = max(largest.get(name, 0.0), size)
    return largest


def group_tokens(batch: Batch) -> list[GroupTokens]:
    """Tokens of each prompt and of each of its completions; of SFT its answer, of a pair both."""
    groups: Sequence[tuple[Prompt, Sequence[Continuation]]]
    if batch.groups is None:
        groups = [(prompt, prompt.targets) for prompt in batch.prompts]
    else:
        groups = [(group.prompt, group.completions) for group in batch.groups]
    tokens = []
    for prompt, completions in groups:
        lengths = [len(completion.token_ids) for completion in completions]
        num_sampled = sum(completion.num_sampled for completion in completions)
        tokens.append(GroupTokens(len(prompt.input_ids), lengths, sum(lengths) - num_sampled))
    return tokens


def num_tokens(batch: Batch) -> int:
    """Tokens of a step; a prompt, encoded once whatever the number of its completions, counts once."""
    return sum(group.prompt + sum(group.completions) for group in group_tokens(batch))
