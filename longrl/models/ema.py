"""Exponential moving average (EMA) of the weights that train, as Flow-GRPO's released recipes have it.

The rule is the released one, the update that of `torch.optim.swa_utils`. Lightning's `WeightAveraging` copies the whole
module, frozen weights included, and knows no shards; here trained weights alone are kept, each rank its shards of them.

Memory: 4 bytes for each trained number, beside weights, gradients and moments; and as much again during validation, for
the weights themselves. Of SD3.5 medium with LoRA of rank 32 these are 100 MB, of the whole transformer 10 GB.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from longrl.io.checkpoint_files import load_state, read_metadata

EMA_PREFIX = "ema_weights."
"""Where a module keeps the averages in a checkpoint, beside `model.`."""


@dataclass(frozen=True)
class EMASettings:
    """When and how fast the average follows.

    Step t counts optimizer steps, the first is 1. At every t with (t + 1) a multiple of `every_n_steps`:

        average += (1 - d) * (weights - average),    d = min(decay, (1 + t) / (10 + t))

    The released loop asks after every micro-batch, so where gradients are accumulated it takes the same update several
    times; here it is one.
    """

    decay: float = 0.9
    """Share of the average that stays at an update, late in a run; nearer to 1 averages over more steps."""
    every_n_steps: int = 8
    """Optimizer steps between two updates of the average."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"model.ema.decay must be at least 0 and below 1, got {self.decay}; the released is 0.9")
        if self.every_n_steps < 1:
            raise ValueError(f"model.ema.every_n_steps must be at least 1, got {self.every_n_steps}; the released is 8")

    def decay_at(self, step: int) -> float | None:
        """The share of the average that stays after optimizer step `step`; None if the step changes nothing."""
        if (step + 1) % self.every_n_steps:
            return None
        return min(self.decay, (1 + step) / (10 + step))


class AveragingRule(Protocol):
    """When and how fast averages follow: `EMASettings`, or another rule."""

    def decay_at(self, step: int) -> float | None:
        """The share of the average that stays after optimizer step `step`; None if the step changes nothing."""


class EMAWeights(nn.Module):
    """The averages of a model's trained weights; as a submodule they are saved, resharded and restored with it.

    Args:
        model: its weights, sharded or not, are what the average begins with.
        settings: when and how fast it follows.
    """

    def __init__(self, model: nn.Module, settings: AveragingRule) -> None:
        super().__init__()
        self.settings = settings
        object.__setattr__(self, "model", model)  # past nn.Module's registration: its names in checkpoints stay its own
        for name, parameter in _trained(model):
            # In float32, for in bfloat16 small changes would be rounded away.
            self.register_buffer(_escape(name), parameter.detach().clone().float())
        self._raw: list[Tensor] | None = None
        """The weights themselves, while the model has the averages."""

    model: nn.Module

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follows the weights after optimizer step `step`, the first of which is 1."""
        decay = self.settings.decay_at(step)
        if decay is None:
            return
        averages = []
        weights = []
        for (_, parameter), buffer in zip(_trained(self.model), self.buffers(), strict=True):
            average = _local(buffer)
            averages.append(average)
            weights.append(_local(parameter.detach()).to(average))  # its precision, and its device under offload
        follow = get_ema_multi_avg_fn(decay)
        follow(averages, weights, None)

    @torch.no_grad()
    def swap_in(self) -> None:
        """Gives the model the averages, until `swap_out`; does nothing if it has them."""
        if self._raw is not None:
            return
        parameters = [_local(parameter.detach()) for _, parameter in _trained(self.model)]
        self._raw = [parameter.clone() for parameter in parameters]
        for parameter, average in zip(parameters, self.buffers(), strict=True):
            parameter.copy_(_local(average))

    @torch.no_grad()
    def swap_out(self) -> None:
        """Gives the model its own weights back, to the last bit; does nothing if it has them."""
        if self._raw is None:
            return
        for (_, parameter), raw in zip(_trained(self.model), self._raw, strict=True):
            _local(parameter.detach()).copy_(raw)
        self._raw = None


def averages_by_weight(saved: Iterable[str]) -> dict[str, str]:
    """The names of averages in a checkpoint's state, by those of their weights in the model."""
    averages = {}
    for name in saved:
        if name.startswith(EMA_PREFIX):
            weight = name.removeprefix(EMA_PREFIX).replace("/", ".")
            averages[weight] = name
    return averages


def holds_ema(checkpoint: Path, prefix: str = EMA_PREFIX) -> bool:
    """True if averages are saved in a Lightning checkpoint, a file or a folder of shards, under a prefix."""
    if not checkpoint.is_dir():
        saved = load_state(checkpoint)["state_dict"]
        return any(name.startswith(prefix) for name in saved)
    saved = read_metadata(checkpoint).state_dict_metadata
    return any(name.startswith(f"state_dict.{prefix}") for name in saved)


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    named = model.named_parameters()
    return [(name, parameter) for name, parameter in named if parameter.requires_grad]


def _escape(name: str) -> str:
    """A buffer's name may have no dots."""
    return name.replace(".", "/")


def _local(value: Tensor) -> Tensor:
    """This rank's part; the rule is elementwise."""
    return value.to_local() if isinstance(value, DTensor) else value
