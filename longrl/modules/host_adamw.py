"""AdamW whose moments rest in host memory and visit the device one parameter at a time.

Weights and gradients stay where they are (FSDP2's own offload moves all of them). A step moves 8 bytes per trained
number to the device and back, 16 GB for a billion of them, through pageable memory: seconds, where an update on
hour-long videos takes minutes.

torchao 0.18 is no choice: its `CPUOffloadOptimizer` copies gradients during the backward pass, before they are
clipped, and does not know sharded tensors; its `AdamW8bit` fails on shards of unequal size, and Lightning cannot read
back a file with its moments (`eight_bit.py` has bitsandbytes'). Moments on the host take less of a device than moments
of 8 bits, and change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer
from typing_extensions import override

MOMENTS = ("exp_avg", "exp_avg_sq")


class HostAdamW(torch.optim.AdamW):
    """Steps are those of `torch.optim.AdamW`, to the last bit of its loop over single tensors (`foreach=False`)."""

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; all moments are in host memory when it ends."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in MOMENTS:
                state[name] = _on_host(torch.zeros_like(parameter))

        # The moments come to the device, and go back changed.
        weight = _local(parameter)
        mean = _local(state["exp_avg"]).to(weight.device)
        square = _local(state["exp_avg_sq"]).to(weight.device)
        adamw(
            [weight],
            [_local(parameter.grad)],
            [mean],
            [square],
            [],
            [state["step"]],
            foreach=False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for name, moment in (("exp_avg", mean), ("exp_avg_sq", square)):
            state[name] = _on_host(state[name])
            _local(state[name]).copy_(moment)


def offload_state(optimizer: Optimizer) -> None:
    """Puts a `HostAdamW`'s moments back into host memory; a checkpoint is restored onto the device."""
    if isinstance(optimizer, HostAdamW):
        for state in optimizer.state.values():
            for name in MOMENTS:
                state[name] = _on_host(state[name])


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.to("cpu")  # of a shard its own rows; it stays a shard of its mesh, as under FSDP2's offload


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
