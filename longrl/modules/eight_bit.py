"""AdamW with moments of 8 bits (arXiv:2110.02861), by bitsandbytes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer

MOMENT_BYTES = 1 + 4 / 256
"""Bytes per parameter and moment: 8 bits, and a float32 scale for each block of 256. Weights of fewer than 4,096
parameters keep moments of 32 bits."""


def eight_bit(parameters: Sequence[nn.Parameter], paged: bool) -> type[Optimizer]:
    """The optimizer class; a third the memory of AdamW in bfloat16 and less of one in float32, its steps not the same.

    Args:
        parameters: what it will change.
        paged: let the moments give way to host memory while the device is full; CUDA alone can.

    Raises:
        ValueError: bitsandbytes is missing, the weights are sharded, or paging is asked of a CPU.
    """
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        raise ValueError(
            "model.optimizer.kind: bitsandbytes knows no sharded weights, as MRSPStrategy makes them; use "
            "model.optimizer.offload, which takes less of a device than moments of 8 bits, or trainer.strategy auto "
            "on one device"
        )
    if paged and any(not parameter.is_cuda for parameter in parameters):
        raise ValueError(
            "model.optimizer.kind=paged_adamw_8bit needs CUDA's managed memory, got weights on "
            f"{parameters[0].device.type}; set it to adamw_8bit"
        )
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            "model.optimizer.kind needs bitsandbytes; pip install 'longrl[eight-bit]', or set it to adamw"
        ) from error
    return bitsandbytes.optim.PagedAdamW8bit if paged else bitsandbytes.optim.AdamW8bit
