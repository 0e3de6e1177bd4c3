"""Whole tensors of shards, bit for bit, whatever shapes, precisions and grids, and in how many messages."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from longrl.engines.weight_stream import engine_weights
from longrl.models.lora import LoRASettings, add_adapters
from longrl.strategies.fsdp import ShardingOptions, shard_policy
from longrl.strategies.whole_tensors import whole_tensors
from tests.distributed import run_distributed
from tests.tiny import qwen3_vl_family, text_family, vl_family

SIZES = ((5, 3), (3,), (8, 4), (1, 7), (6, 2, 5), (2,), (1000, 3), (4,))
"""Rows that divide evenly, that do not, and fewer of them than ranks."""
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.float16)


def originals():
    """Neighbours have other precisions; the bits are any, those of nan included."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for number, size in enumerate(SIZES):
        dtype = DTYPES[number % len(DTYPES)]
        numbers = torch.Size(size).numel() * dtype.itemsize
        tensors.append(torch.randint(256, (numbers,), dtype=torch.uint8, generator=generator).view(dtype).view(size))
    return tensors


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def mesh_of(num_replicas: int):
    size = dist.get_world_size()
    if num_replicas == 1:
        return init_device_mesh("cpu", (size,)), [Shard(0)]
    names = ("replicate", "shard")
    return init_device_mesh("cpu", (num_replicas, size // num_replicas), mesh_dim_names=names), [Replicate(), Shard(0)]


def gathered(num_replicas: int, bucket_bytes: int):
    """Whether all came back, in how many messages, and of how many bytes the largest was."""
    mesh, placements = mesh_of(num_replicas)
    wanted = originals()
    tensors = [distribute_tensor(tensor, mesh, placements) for tensor in wanted]
    tensors[2] = wanted[2]  # one that never was in shards
    with CommDebugMode() as messages:
        found = list(whole_tensors(iter(tensors), bucket_bytes))
    assert not any(isinstance(tensor, DTensor) for tensor in found)
    return [bits(tensor) for tensor in found] == [bits(tensor) for tensor in wanted], messages.get_total_counts()


@pytest.mark.parametrize(
    ("ranks", "num_replicas", "bucket_bytes", "messages"),
    [
        (2, 1, 1 << 30, 1),
        (3, 1, 1 << 30, 1),
        (4, 2, 1 << 30, 1),
        (3, 1, 1, 7),  # a tensor at a time
        (3, 1, 600, 3),  # 1000 x 3 alone, and what is before and behind it
        (1, 1, 1 << 30, 0),
    ],
)
def test_whole_tensors_have_the_bits_of_the_originals(ranks, num_replicas, bucket_bytes, messages):
    for is_same, num_messages in run_distributed(gathered, ranks, num_replicas, bucket_bytes):
        assert is_same
        assert num_messages == messages


def test_tensors_that_are_no_shards_pass_as_they_are():
    tensors = originals()
    assert all(found is tensor for found, tensor in zip(whole_tensors(tensors), tensors, strict=True))


def of_two_meshes():
    """Neighbours on other grids are in other messages; each comes back."""
    wanted = originals()
    grids = [mesh_of(1), mesh_of(2)]
    tensors = [distribute_tensor(tensor, *grids[number // 2 % 2]) for number, tensor in enumerate(wanted)]
    with CommDebugMode() as messages:
        found = list(whole_tensors(tensors))
    return [bits(tensor) for tensor in found] == [bits(tensor) for tensor in wanted], messages.get_total_counts()


def test_a_bucket_is_of_one_grid():
    assert run_distributed(of_two_meshes, 4) == [(True, 4)] * 4


def own_fsdp_units():
    """As FSDP2 itself cuts: a module of 5, 7 and 1 rows on three ranks."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7, bias=False), nn.Linear(7, 1))
    wanted = [parameter.detach().clone() for parameter in module.parameters()]
    fsdp.fully_shard(module, mesh=mesh_of(1)[0])
    found = list(whole_tensors(module.state_dict().values()))
    return all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_parameters_that_fsdp_has_cut():
    assert all(run_distributed(own_fsdp_units, 3))


# ---- what an engine is given ----

FAMILIES = {
    "text, tied": lambda: text_family("qwen2"),
    "text, adapters on bfloat16": lambda: text_family("qwen2", lora=LoRASettings(rank=3, alpha=8), dtype="bfloat16"),
    "vision, encoder frozen": lambda: vl_family(freeze_vision_encoder=True),
    "vision, encoder trained": lambda: vl_family(freeze_vision_encoder=False),
    "experts": lambda: qwen3_vl_family(experts=True),
}


def engine_weights_of_shards(name: str, num_replicas: int, offload: bool):
    """Names whose weights are not those of the same model in one piece, and messages by size of the bucket."""
    family = FAMILIES[name]()
    model = family.build()
    if family.lora is not None:
        add_adapters(family, model)
        for tensor in model.parameters():  # B is zero at the start
            if tensor.requires_grad:
                nn.init.normal_(tensor)
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
    wanted = {name: bits(weight) for name, weight in engine_weights(family, model)}
    shard_policy(family, model, mesh_of(num_replicas)[0], ShardingOptions(offload=offload))
    counts = []
    for bucket_bytes in (1, 1 << 30):
        with CommDebugMode() as messages:
            found = {name: bits(weight) for name, weight in engine_weights(family, model, bucket_bytes)}
        assert list(found) == list(wanted)
        differing = [name for name in wanted if found[name] != wanted[name]]
        assert not differing, differing
        counts.append(messages.get_total_counts())
    return counts, len(wanted)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("ranks", "num_replicas", "offload"), [(3, 1, False), (2, 1, True), (4, 2, False)])
def test_an_engine_is_given_the_weights_of_the_model_in_one_piece(name, ranks, num_replicas, offload):
    for (one_by_one, together), num_weights in run_distributed(
        engine_weights_of_shards, ranks, name, num_replicas, offload
    ):
        assert one_by_one >= num_weights  # with adapters two more each
        assert together == 1
