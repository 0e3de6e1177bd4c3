"""AdamW and its schedule."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer

from longrl.io.number_ranges import COUNT, NOT_NEGATIVE, check_ranges
from longrl.modules.eight_bit import eight_bit
from longrl.modules.host_adamw import HostAdamW
from longrl.modules.lr_schedule import Schedule, lr_scheduler

logger = logging.getLogger(__name__)

Kind = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]

HALF = (torch.bfloat16, torch.float16)
SAMPLED = 1 << 16
"""Numbers of each weight that are asked whether a step would move them."""


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its learning-rate schedule, counted in optimizer steps."""

    lr: float = 1e-6
    """Peak learning rate. 1e-6 suits RL of all weights; SFT takes about 1e-5, LoRA 1e-5 to 1e-4."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square, per optimizer step."""
    weight_decay: float = 0.0
    """Share of each weight, times the learning rate, that a step takes off; 0 is usual in RL."""
    schedule: Schedule = "constant"
    """How the learning rate goes on behind the warmup: it stays, or falls to 0 by a line or a cosine."""
    warmup_steps: int = 0
    """Steps of growing rate; the first of them has rate 0, as in transformers' schedules."""
    total_steps: int | None = None
    """End of a linear or cosine schedule; None takes trainer.max_steps, or all batches of all epochs."""
    offload: bool = False
    """Keep the two moments in host memory; each visits the device for its own part of a step. Changes no result."""
    kind: Kind = "adamw"
    """`adamw_8bit`: moments of 8 bits by bitsandbytes, on one device; `paged_adamw_8bit`: and they give way to host
    memory when the device is full. Both change the steps a little."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "model.optimizer.",
            lr=NOT_NEGATIVE,
            weight_decay=NOT_NEGATIVE,
            warmup_steps=NOT_NEGATIVE,
            total_steps=COUNT,
        )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"model.optimizer.betas must be at least 0 and below 1, got {self.betas}")
        if self.offload and self.kind != "adamw":
            raise ValueError(
                f"model.optimizer.offload keeps AdamW's own moments on the host, got kind={self.kind}; set "
                "model.optimizer.kind to adamw, or offload to false"
            )

    def end(self, trainer: Trainer, steps_per_batch: int) -> int | None:
        """Optimizer steps until the end of the schedule; None if it has no end."""
        if self.schedule == "constant" or self.total_steps is not None:
            return self.total_steps
        if trainer.max_steps > 0:
            return trainer.max_steps
        if trainer.estimated_stepping_batches == float("inf"):
            raise ValueError(
                f"model.optimizer.schedule={self.schedule} needs an end, but the run has none; set "
                "model.optimizer.total_steps or trainer.max_steps"
            )
        return int(trainer.estimated_stepping_batches) * steps_per_batch

    def build(self, model: nn.Module, total_steps: int | None) -> OptimizerLRSchedulerConfig:
        """Optimizer and scheduler as Lightning wants them."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        warn_of_lost_steps(parameters, self.lr)
        options = {"fused": True} if self.kind == "adamw" and not self.offload and are_on_gpu(parameters) else {}
        optimizer = self._class(parameters)(
            parameters,
            lr=self.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            **options,
        )
        scheduler = lr_scheduler(self.schedule, optimizer, self.warmup_steps, total_steps)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _class(self, parameters: Sequence[nn.Parameter]) -> Callable[..., Optimizer]:
        if self.kind != "adamw":
            return eight_bit(parameters, paged=self.kind == "paged_adamw_8bit")
        return HostAdamW if self.offload else torch.optim.AdamW


def are_on_gpu(parameters: Sequence[Tensor]) -> bool:
    """True if AdamW can take the whole step in one kernel: its default on a GPU makes a copy of all second moments."""
    return bool(parameters) and all(parameter.device.type == "cuda" for parameter in parameters)


def fuse_by_device(optimizer: Optimizer) -> None:
    """Has a restored `torch.optim.AdamW` step as one that is built here; a checkpoint brings the flag of its own run.

    Runs on a CPU stay bit for bit what they were. The count of steps lies beside fused weights, else on the CPU.
    """
    if type(optimizer) is not torch.optim.AdamW:
        return
    for group in optimizer.param_groups:
        fused = are_on_gpu(group["params"])
        group["fused"] = fused or None
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] = state["step"].to(parameter.device if fused else "cpu")


@rank_zero_only
def warn_of_lost_steps(parameters: Sequence[nn.Parameter], lr: float) -> None:
    """Says that most weights are too large for their precision to show a step, which is about `lr` in each number.

    bfloat16 has 8 significant bits: a step below 2^-9 of a number, half the distance to the next, is rounded away.
    """
    short = [parameter.detach() for parameter in parameters if parameter.dtype in HALF]
    total = 0
    lost = 0
    for parameter in short:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        values = local.flatten()[:SAMPLED]
        total += len(values)
        lost += int((values + lr == values).sum())
    if lr and lost > total / 2:
        logger.warning(
            "a step of model.optimizer.lr=%g is rounded away in %d%% of the weights in %s that train; keep them in "
            "float32 and compute in bfloat16 by --trainer configs/trainer/node.yaml "
            "--model.family.init_args.dtype float32 (with --trainer.devices 1 on one GPU), train adapters "
            "(--model.family.init_args.lora.rank 32), or raise lr",
            lr, 100 * lost / total, str(short[0].dtype).removeprefix("torch."),
        )  # fmt: skip
