"""`sharding.offload` beside a device: shards stay in host memory, all else goes. `meta` stands in for a GPU."""

from __future__ import annotations

import functools
from unittest import mock

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from longrl.algorithms import Algorithm
from longrl.models.ema import EMASettings, EMAWeights
from longrl.models.expert_routing import expert_rows
from longrl.modules.policy import PolicyModule
from longrl.modules.step_statistics import tensor_norms
from longrl.strategies.fsdp import ShardingOptions, shard_policy
from longrl.strategies.mr_sp import MRSPStrategy
from longrl.strategies.parallel import Parallel
from longrl.types import Frames
from tests.distributed import run_distributed
from tests.tiny import qwen3_vl_family, vila_family, vl_family

GPU = torch.device("meta")


def devices(module):
    """Where shards are, and where all else is."""
    tensors = [*module.parameters(), *module.buffers()]
    shards = {tensor.device.type for tensor in tensors if isinstance(tensor, DTensor)}
    others = {tensor.device.type for tensor in tensors if not isinstance(tensor, DTensor)}
    return shards, others


def offloaded_policy(freeze: bool) -> PolicyModule:
    """As `MRSPStrategy` builds it where FSDP computes elsewhere than on the CPU."""
    mesh = init_device_mesh("cpu", (1,))
    wrap = functools.partial(shard_policy, mesh=mesh, options=ShardingOptions(offload=True))
    family = vl_family(freeze_vision_encoder=freeze)
    policy = PolicyModule(family, Algorithm(kl_coef=0.1))
    policy.parallel = Parallel(device=GPU, wrap=wrap)
    policy.configure_model()
    return policy


def move(freeze: bool):
    """Devices of policy, of its averages, and of its reference, and what the module says of its own."""
    policy = offloaded_policy(freeze)
    policy.ema_weights = EMAWeights(policy.model, EMASettings())
    strategy = MRSPStrategy(sharding=ShardingOptions(offload=True))
    strategy.model = policy
    with mock.patch.object(MRSPStrategy, "root_device", GPU):
        strategy.model_to_device()
    policy.reference = policy._make_reference()
    model, averages, reference = map(devices, (policy.model, policy.ema_weights, policy.reference.model))
    return model, averages, reference, str(policy.device)


@pytest.mark.parametrize("freeze", [True, False])
def test_shards_stay_in_host_memory_and_all_else_goes(freeze):
    ((model, averages, reference, device),) = run_distributed(move, 1, freeze)
    assert model == reference == ({"cpu"}, {"meta"})
    assert averages == ({"cpu"}, set())
    assert device == "meta"


def test_vila_encodes_where_its_encoder_is():
    family = vila_family()
    model = family.build()
    model.visual.to(GPU)
    media = family.patch(Frames("image", torch.zeros(1, 3, 56, 56, dtype=torch.uint8), (0.0,), "black"))
    (rows,) = family.encode_media(model, [media])
    assert rows.device == GPU


def test_experts_are_noted_where_the_rows_are():
    """Not where the routers' shards are: a layer gathers them for its own forward pass alone."""
    family = qwen3_vl_family(experts=True)
    model = family.build()
    model.get_input_embeddings().to(GPU)
    rows = expert_rows(family, model, 7)
    assert rows.chosen.device == GPU
    assert family.layers(model)[0].mlp.gate.weight.device.type == "cpu"


def norms_of_shards(num_replicas: int, dtype: torch.dtype):
    """Norms of uneven shards, one of which has no row on the last rank, and how many messages they took."""
    from torch.distributed.tensor.debug import CommDebugMode

    size = torch.distributed.get_world_size()
    if num_replicas > 1:
        mesh = init_device_mesh("cpu", (num_replicas, size // num_replicas), mesh_dim_names=("replicate", "shard"))
        placements = [Replicate(), Shard(0)]
    else:
        mesh = init_device_mesh("cpu", (size,))
        placements = [Shard(0)]
    shards = [distribute_tensor(tensor, mesh, placements) for tensor in gradients(dtype)]
    with CommDebugMode() as messages:
        norms = tensor_norms(shards)
    return norms, messages.get_total_counts()


def gradients(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    sizes = ((5, 300), (3,), (8, 2000), (1,))
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


@pytest.mark.parametrize(("ranks", "num_replicas"), [(3, 1), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_shards_are_those_of_whole_gradients_by_one_message(ranks, num_replicas, dtype):
    wanted = torch.stack([gradient.double().norm() for gradient in gradients(dtype)])
    for norms, num_messages in run_distributed(norms_of_shards, ranks, num_replicas, dtype):
        torch.testing.assert_close(norms.double(), wanted, rtol=1e-6, atol=0)
        assert num_messages == 1
