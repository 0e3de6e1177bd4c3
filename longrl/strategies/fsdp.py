"""FSDP2 on a model family: `RootModule`, the module whose forward pass scores rollouts, and how it is sharded.

PyTorch shards in units: a unit's weights are gathered when its `forward` begins and let go when it ends. longrl calls
parts of a transformers model (its embeddings, its text stack, the weight of its LM head), not the model's own forward,
so the root of the units is a module of longrl's own.

What is sharded, in this order:

    layers of the text stack     one unit each
    embeddings, norm, LM head    the root; together, for they may share a weight
                                 (of a diffusion model: all but its layers)
    vision encoder               a unit of its own if it trains; a frozen one is kept in full on every rank, so that
                                 encoding needs no communication and no rank waits for one without media
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from longrl.types import Dtype


class ShardableFamily(Protocol):
    """A model family as sharding sees it: where the parts of its model are, and how it computes."""

    @property
    def casts_inputs(self) -> bool:
        """True if sharded layers cast what they are given to the precision they compute in."""

    @property
    def supports_sequence_parallel(self) -> bool:
        """True if ranks can share a sequence."""

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """The repeated layers: one unit each."""

    def root_modules(self, model: nn.Module) -> Sequence[nn.Module]:
        """Modules that the forward pass reads beside the layers; they may contain the layers."""

    def media_encoders(self, model: nn.Module) -> Sequence[nn.Module]:
        """All encoders of media."""

    def trained_encoders(self, model: nn.Module) -> Sequence[nn.Module]:
        """Those of them that train."""

    def forward(self, model: nn.Module, *inputs: Any, **options: Any) -> Any:
        """Scores of a micro-batch under the policy."""


class RootModule(nn.Module):
    """The policy as a module: `policy(packed, features, temperature, sequence)` scores a packed micro-batch.

    A diffusion policy is called with `(latents, timesteps, texts, guidance_scale)` and gives velocities. FSDP's root is
    this module. Its submodules are those that the forward pass reads; `model` itself is none, so that the root does not
    gather a vision encoder, and weights have one name in checkpoints, `model.` and their own.

    Args:
        family: says how the model computes.
        model: has the weights.
    """

    model: nn.Module

    def __init__(self, family: ShardableFamily, model: nn.Module) -> None:
        super().__init__()
        self.family = family
        object.__setattr__(self, "model", model)  # past nn.Module's registration
        self.parts = nn.ModuleList(family.root_modules(model))

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """`family.forward`; FSDP gathers the root's weights before, and each layer its own."""
        return self.family.forward(self.model, *inputs, **options)

    @contextlib.contextmanager
    def unsharded(self) -> Iterator[None]:
        """All weights of root and layers are gathered on every rank; layers are sharded again at the end.

        For work in which ranks do not go in step, as generation is: inside, any number of forward passes of any part
        of the model may run. Every rank of the run must enter.
        """
        if not isinstance(self, fsdp.FSDPModule):
            yield
            return
        layers = [module for module in self.modules() if isinstance(module, fsdp.FSDPModule) and module is not self]
        self.gather_root(None)
        for layer in layers:
            layer.set_reshard_after_forward(False, recurse=False)
            layer.unshard()
        try:
            yield
        finally:
            for layer in layers:
                layer.reshard()
                layer.set_reshard_after_forward(True, recurse=False)

    def gather_root(self, nothing: None) -> None:
        """A forward pass of nothing, after which the root's weights stay gathered.

        It has an argument, for torch 2.11 moves a pass's arguments to the GPU and fails where there is none.

        FSDP takes the first module that runs for the root of the units, and refuses another one later: without this,
        generation before the first forward pass would make a layer the root.
        """

    def release_root(self) -> None:
        """Lets go of the root's gathered weights, which otherwise stay for the backward pass of a training step."""
        if isinstance(self, fsdp.FSDPModule):
            self.reshard()

    def release_all(self) -> None:
        """Lets go of all gathered weights, encoders' included, for those in the shards have changed."""
        self.release_root()
        for module in self.model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def move_unsharded(module: nn.Module, device: torch.device) -> None:
    """Moves what is no shard, in place: buffers, and the weights of a frozen encoder.

    Shards stay where they are kept: on the device already, or in host memory, from where FSDP's offload brings them.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if not any(isinstance(tensor, DTensor) for tensor in tensors):
        module.to(device)
        return
    for child in module.children():
        move_unsharded(child, device)
    for name, buffer in module.named_buffers(recurse=False):
        if not isinstance(buffer, DTensor):
            setattr(module, name, buffer.to(device))
    for parameter in module.parameters(recurse=False):
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device)


@dataclass(frozen=True)
class ShardingOptions:
    """Precision and offload of sharded weights."""

    compute_dtype: Dtype | None = None
    """Precision of gathered weights, of activations and of a frozen encoder; None is that of the weights themselves.
    Sharded weights, summed gradients and the optimizer's state keep the family's `dtype`."""
    offload: bool = False
    """Keep sharded weights, gradients and the optimizer's state in host memory, where the optimizer then runs."""


def shard_policy(family: ShardableFamily, model: nn.Module, mesh: DeviceMesh, options: ShardingOptions) -> RootModule:
    """Shards a model in place over all ranks of `mesh` and returns its policy.

    Gradients are sums over the ranks, never means: every rank adds its share of a loss whose weights sum to 1 over all.

    Args:
        family: says where layers and encoders are.
        model: on the CPU, the same on every rank.
        mesh: one axis to shard over, or two: (replicate, shard).
        options: precision and offload.
    """
    # 1. Precision: gradients are summed in float32 whatever the layers compute in.
    dtype = None if options.compute_dtype is None else getattr(torch, options.compute_dtype)
    reduce_dtype = None if dtype is None else torch.float32
    offload = fsdp.CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if options.offload else fsdp.OffloadPolicy()
    of_layers = fsdp.MixedPrecisionPolicy(dtype, reduce_dtype, cast_forward_inputs=family.casts_inputs)
    # The root is given a micro-batch and features, which the family casts where it needs them.
    of_root = fsdp.MixedPrecisionPolicy(dtype, reduce_dtype, cast_forward_inputs=False)

    # 2. Layers first: what has a unit already does not belong to the root's.
    layers = list(family.layers(model))
    for layer in layers:
        fsdp.fully_shard(layer, mesh=mesh, mp_policy=of_layers, offload_policy=offload)

    # 3. The root keeps its weights from the forward to the backward pass: it is needed last and then first.
    policy = RootModule(family, model)
    root = fsdp.fully_shard(policy, mesh=mesh, reshard_after_forward=False, mp_policy=of_root, offload_policy=offload)
    fsdp.register_fsdp_forward_method(policy, "gather_root")

    # 4. Encoders: a frozen one stays in full on every rank, in the precision of the features.
    encoders = list(family.trained_encoders(model))
    for encoder in encoders:
        fsdp.fully_shard(encoder, mesh=mesh, reshard_after_forward=False, mp_policy=of_layers, offload_policy=offload)
    for encoder in family.media_encoders(model):
        if dtype is not None and all(encoder is not sharded for sharded in encoders):
            encoder.to(dtype)

    # 5. Sums instead of means.
    for unit in (*layers, root, *encoders):
        assert isinstance(unit, fsdp.FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
    return policy
