"""Moments of 8 bits: near AdamW's steps, a quarter of its memory, exact resume, and what bitsandbytes cannot do."""

import sys

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from longrl.modules.eight_bit import MOMENT_BYTES, eight_bit
from longrl.modules.optimizer import OptimizerSettings
from tests.distributed import run_distributed
from tests.modules.test_optimizer import sft, stopped_and_resumed
from tests.runs import checkpoint, metrics, run
from tests.test_resume import differences

bitsandbytes = pytest.importorskip("bitsandbytes")


def stepped(kind):
    """(optimizer, weight) after 20 steps from the same start down the same slope."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 256, generator=generator))
    optimizer = OptimizerSettings(lr=1e-2, weight_decay=0.1, kind=kind).build(nn.ParameterList([weight]), None)[
        "optimizer"
    ]
    goal = torch.randn(64, 256, generator=generator)
    for _ in range(20):
        weight.grad = weight.detach() - goal
        optimizer.step()
    return optimizer, weight.detach()


def test_steps_are_near_those_of_adamw():
    (_, found), (_, wanted) = stepped("adamw_8bit"), stepped("adamw")
    assert 0 < (found - wanted).abs().mean() < 0.005  # of 20 steps of about 0.01


def test_moments_take_the_bytes_that_plan_counts():
    optimizer, weight = stepped("adamw_8bit")
    (state,) = optimizer.state.values()
    names = ("state1", "state2", "absmax1", "absmax2")
    assert sum(state[name].nbytes for name in names) == 2 * MOMENT_BYTES * weight.numel()


def test_a_run_resumes_bit_for_bit(tmp_path):
    plain = run(tmp_path / "plain", sft(kind="adamw_8bit"))
    found = stopped_and_resumed(tmp_path / "run", sft(kind="adamw_8bit"))
    assert metrics(found) == metrics(plain)
    for part in ("state_dict", "optimizer_states"):
        assert differences(checkpoint(found)[part], checkpoint(plain)[part]) == []


def test_the_host_holds_only_moments_of_full_size():
    with pytest.raises(ValueError, match=r"model.optimizer.offload .* got kind=adamw_8bit; set model.optimizer.kind"):
        OptimizerSettings(kind="adamw_8bit", offload=True)


def test_paging_needs_cuda():
    with pytest.raises(ValueError, match=r"paged_adamw_8bit needs CUDA's managed memory, got weights on cpu"):
        eight_bit([nn.Parameter(torch.zeros(2))], paged=True)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"pip install 'longrl\[eight-bit\]'"):
        eight_bit([nn.Parameter(torch.zeros(2))], paged=False)


def refused():
    weight = nn.Parameter(distribute_tensor(torch.zeros(4, 4), init_device_mesh("cpu", (1,))))
    with pytest.raises(ValueError, match=r"knows no sharded weights.*use model.optimizer.offload"):
        eight_bit([weight], paged=False)


def test_sharded_weights_are_refused():
    run_distributed(refused, 1)
