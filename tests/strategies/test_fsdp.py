"""How a policy is sharded: the precision of what it computes in, and of what ranks sum."""

import types
from unittest import mock

import torch
from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh

from longrl.strategies.fsdp import ShardingOptions, shard_policy
from tests.distributed import run_distributed
from tests.tiny import qwen3_vl_family


def two_weights():
    """A family of two layers of one weight each, the second one in the root, that multiplies what it is given."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    nn.init.ones_(model[0].weight)
    nn.init.ones_(model[1].weight)
    family = types.SimpleNamespace(
        casts_inputs=True,
        layers=lambda model: [model[0]],
        root_modules=lambda model: [model[1]],
        media_encoders=lambda model: [],
        trained_encoders=lambda model: [],
        forward=lambda model, states: model(states),
    )
    return family, model


def gradients_of(rank_values):
    """(precision of the output, gradients of both weights) after a backward pass of each rank on its value."""
    family, model = two_weights()
    mesh = init_device_mesh("cpu", (len(rank_values),))
    policy = shard_policy(family, model, mesh, ShardingOptions(compute_dtype="bfloat16"))
    value = rank_values[torch.distributed.get_rank()]
    output = policy(torch.full((1, 1), value, dtype=torch.bfloat16))
    output.sum().backward()
    return output.dtype, [layer.weight.grad.full_tensor() for layer in model]


def test_gradients_of_bfloat16_layers_are_summed_in_float32():
    """256 + 1 is no number of bfloat16, whose next one is 258."""
    for dtype, grads in run_distributed(gradients_of, 2, [256.0, 1.0]):
        assert dtype == torch.bfloat16
        for grad in grads:
            assert grad.dtype == torch.float32
            assert grad.item() == 257


def shards_of_experts():
    """(shape of the whole, of this rank's part) of every weight of the layers' experts, and which modules are units."""
    family = qwen3_vl_family(experts=True)
    model = family.build()
    policy = shard_policy(family, model, init_device_mesh("cpu", (2,)), ShardingOptions())
    shapes = {
        name: (tuple(weight.shape), tuple(weight.to_local().shape))
        for name, weight in model.named_parameters()
        if ".mlp.experts." in name
    }
    return shapes, [type(module).__name__ for module in policy.modules() if isinstance(module, fsdp.FSDPModule)]


def test_every_rank_holds_its_part_of_the_experts():
    """They belong to the unit of their layer; their gradients on two ranks: test_mr_sp.py."""
    for shapes, units in run_distributed(shards_of_experts, 2):
        assert len(shapes) == 3 * 2
        for whole, part in shapes.values():
            assert part == (whole[0] // 2, *whole[1:])
        assert not [name for name in units if "Expert" in name]
        assert sum("DecoderLayer" in name for name in units) == 3


def arguments_while_unsharded():
    """What FSDP was given to move to the device, in every pass in which it took the module for the root."""
    policy = shard_policy(*two_weights(), init_device_mesh("cpu", (1,)), ShardingOptions())
    state = policy._get_fsdp_state()
    with mock.patch.object(state, "_root_pre_forward", wraps=state._root_pre_forward) as seen, policy.unsharded():
        policy(torch.ones(1, 1))
    return [(len(call.args[1]), len(call.args[2])) for call in seen.call_args_list]


def test_the_root_is_gathered_by_a_pass_that_has_an_argument():
    """Seen on a GPU: torch 2.11 moves a pass's arguments there, and fails where there is none."""
    (found,) = run_distributed(arguments_while_unsharded, 1)
    assert len(found) >= 2
    assert all(any(counts) for counts in found), found
