"""FSDP2 on a model family: which modules are units, and the one door to everything that reads sharded weights.

PyTorch shards in units: a unit's weights are gathered when its `forward` begins and let go when it ends. longrl calls
parts of a transformers model (its embeddings, its text stack, the weight of its LM head), not the model's own forward,
so the root unit is an `Entry`: whatever runs inside `entry(function)` finds embeddings, final norm and LM head whole,
and each layer gathers itself.

What is sharded, in this order:

    layers of the text stack     one unit each
    embeddings, norm, LM head    the root; together, for they may share a weight; of a flow model all but its layers
    vision encoder                 a unit of its own if it trains; a frozen one is kept whole on every rank, so that
                                 encoding needs no communication and no rank waits for one without media
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

if TYPE_CHECKING:
    from longrl.diffusion.diffusion_family import DiffusionFamily
    from longrl.models.base import CausalFamily

Result = TypeVar("Result")


class Entry(nn.Module):
    """Runs functions that read the text stack's weights. It owns no module: the model's names stay as they are.

    Example:
        `logp = entry(lambda: family.forward(model, packed, features).logp)`; a result must be tensors, or tuples of
        them, for FSDP to see where the backward pass begins.
    """

    def __init__(self, family: CausalFamily | DiffusionFamily, model: nn.Module) -> None:
        super().__init__()
        self._model = (model,)  # a tuple, so that it is no submodule
        self.parts = nn.ModuleList(family.root_modules(model))

    @property
    def model(self) -> nn.Module:
        """The model that the functions read."""
        return self._model[0]

    def forward(self, function: Callable[[], Any]) -> Any:
        """The result of `function`."""
        return function()

    def release(self) -> None:
        """Lets go of the root's gathered weights, which otherwise stay for the backward pass of a training step."""
        if isinstance(self, FSDPModule):
            self.reshard()

    def whole(self, function: Callable[[], Result]) -> Result:
        """The result of `function`, run with all weights gathered on every rank.

        For work in which ranks do not go in step, as generation is: it may run any number of forward passes. Every rank
        of the run must call it.
        """
        layers = [module for module in self.modules() if isinstance(module, FSDPModule) and module is not self]

        def run() -> Result:
            for layer in layers:
                layer.set_reshard_after_forward(False, recurse=False)
                layer.unshard()
            try:
                return function()
            finally:
                for layer in layers:
                    layer.reshard()
                    layer.set_reshard_after_forward(True, recurse=False)

        return self(run)


@dataclass(frozen=True)
class ShardingOptions:
    """What FSDP2 does beside sharding."""

    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of gathered weights, of activations and of a frozen encoder; None is that of the weights themselves.
    Sharded weights, summed gradients and the optimizer's state keep the family's `dtype`."""
    offload: bool = False
    """Keep sharded weights, gradients and the optimizer's state in host memory, where the optimizer then runs."""

    def policies(self, cast_inputs: bool) -> dict[str, Any]:
        """Keywords of `fully_shard`; `cast_inputs` is whether what enters a unit is cast as well."""
        dtype = None if self.compute_dtype is None else getattr(torch, self.compute_dtype)
        reduce_dtype = dtype and torch.float32
        precision = MixedPrecisionPolicy(dtype, reduce_dtype, cast_forward_inputs=cast_inputs)
        offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if self.offload else OffloadPolicy()
        return {"mp_policy": precision, "offload_policy": offload}


def shard(
    family: CausalFamily | DiffusionFamily, model: nn.Module, mesh: DeviceMesh, options: ShardingOptions
) -> Entry:
    """Shards a model in place over all ranks of `mesh` and returns its entry.

    Gradients are sums over the ranks, never means: every rank adds its share of a loss whose weights sum to 1 over all.

    Args:
        family: says where layers and encoder are.
        model: on the CPU, the same on every rank.
        mesh: one axis to shard over, or two: (replicate, shard).
        options: precision and offload.
    """
    policies = options.policies(family.casts_inputs)
    entry = Entry(family, model)
    units: list[nn.Module] = [*family.layers(model), entry]
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=unit is not entry, **policies)
    encoders = family.sharded_encoders(model)
    for vision_encoder in encoders:
        fully_shard(vision_encoder, mesh=mesh, reshard_after_forward=False, **policies)
        units.append(vision_encoder)
    for encoder in family.media_encoders(model):
        if options.compute_dtype is not None and not any(encoder is vision_encoder for vision_encoder in encoders):
            encoder.to(getattr(torch, options.compute_dtype))
    for unit in units:
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
    return entry
