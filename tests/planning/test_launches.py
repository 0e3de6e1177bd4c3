"""Kernels that a layer launches: the planner's numbers against those of the code, and what they cost."""

import collections
import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longrl.engines.hf import HFEngine
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.packing.pack import pack
from longrl.planning import flops, launches
from longrl.planning.hardware import HARDWARE
from longrl.planning.inputs import VLLMShare
from longrl.planning.micro_batches import micro_batch
from longrl.testing.tiny import tiny_qwen2_5_vl
from longrl.types import SamplingParams
from tests.planning.test_formulas import RUN
from tests.tiny import row

VIEWS = (
    "view", "_unsafe_view", "t", "transpose", "slice", "select", "expand", "unsqueeze", "squeeze", "permute", "detach",
    "alias", "as_strided", "split", "split_with_sizes", "unbind", "empty", "new_empty", "empty_like", "empty_strided",
)  # fmt: skip
"""Operations that launch nothing."""
MORE_LAYERS, FEW_LAYERS = 6, 2


class Counted(TorchDispatchMode):
    """Counts operations that compute."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[operation.__name__.split(".")[0] not in VIEWS] += 1
        return operation(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{layers: (family, model)}"""
    made = {}
    for layers in (FEW_LAYERS, MORE_LAYERS):
        folder = tiny_qwen2_5_vl(tmp_path_factory.mktemp("tiny"), text={"num_hidden_layers": layers})
        family = Qwen2_5_VLFamily(str(folder), random_init=True)
        made[layers] = (family, family.build())
    return made


def per_layer(models, run):
    """Operations of `run(family, model)` that one more layer makes."""
    counts = []
    for layers in (FEW_LAYERS, MORE_LAYERS):
        with Counted() as counted:
            run(*models[layers])
        counts.append(counted.counts[True])
    return (counts[1] - counts[0]) / (MORE_LAYERS - FEW_LAYERS)


def test_a_decode_step(models):
    def generate(tokens):
        def run(family, model):
            prompts = [family.render(row("a"), "What?", [])]
            HFEngine().generate(family, model, prompts, {}, SamplingParams(4, tokens), seed=0)

        return per_layer(models, run)

    assert (generate(8) - generate(4)) / 4 == pytest.approx(launches.DECODE_KERNELS, rel=0.35)


def test_forward_and_backward_passes(models):
    def score(family, model, backward):
        completions = [torch.tensor([1, 2, 3]), torch.tensor([4, 5])]
        (packed,) = pack([family.render(row("a"), "What?", [])], [completions], 1 << 20)
        logp = family.forward(model, packed, {}).logp.mean()
        if backward:
            logp.backward()

    forward = per_layer(models, lambda *model: score(*model, backward=False))
    both = per_layer(models, lambda *model: score(*model, backward=True))
    assert forward == pytest.approx(launches.FORWARD_KERNELS, rel=0.35)
    assert both - forward == pytest.approx(launches.BACKWARD_KERNELS, rel=0.35)


def test_what_they_cost():
    batch = micro_batch(RUN)  # two of them, of two layers; four videos of 20 temporal patches on one rank of two
    assert launches.decode_launch_s(RUN, 1e-6) == pytest.approx(2 * 65e-6)
    assert launches.prefill_launch_s(RUN, 1e-6) == pytest.approx(2 * 65e-6)
    assert launches.prefill_launch_s(dataclasses.replace(RUN, prefill_chunk_tokens=50), 1e-6) == pytest.approx(
        4 * 2 * 65e-6
    )
    assert launches.score_launch_s(RUN, batch, 1e-6) == pytest.approx(2 * 2 * 65e-6)
    assert launches.update_launch_s(RUN, batch, 1e-6) == pytest.approx(2 * 2 * (65 + 115) * 1e-6)
    checkpointed = dataclasses.replace(RUN, gradient_checkpointing=True, epochs=3)
    assert launches.update_launch_s(checkpointed, batch, 1e-6) == pytest.approx(3 * 2 * 2 * (2 * 65 + 115) * 1e-6)
    assert launches.encode_launch_s(RUN, 1e-6) == pytest.approx(2 * 2 * 65e-6)
    assert launches.encode_launch_s(dataclasses.replace(RUN, encoded_together=5), 1e-6) == pytest.approx(
        2 * 4 * 2 * 65e-6
    )


def test_vllm_replays_graphs():
    share = VLLMShare(device_bytes=4e9, gpu_memory_utilization=0.5)
    plan = dataclasses.replace(RUN, vllm=share)
    assert launches.decode_launch_s(plan, 7e-6) == pytest.approx(2e-3 + 2 * 12 * 1e-6)
    eager = dataclasses.replace(plan, vllm=dataclasses.replace(share, enforce_eager=True))
    assert launches.decode_launch_s(eager, 7e-6) == pytest.approx(2e-3 + 2 * 12 * 7e-6)


def test_a_phase_is_as_long_as_its_launches_if_the_device_is_faster():
    def seconds(launch_s):
        return flops.step_times(RUN, HARDWARE["H100"], flops.Efficiency(launch_s=launch_s))

    none, some = seconds(0), seconds(1e-5)
    assert some["decode"] == pytest.approx(10 * 2 * 65e-5)  # ten tokens, two prompts together
    assert none["decode"] < some["decode"]
    assert none["step"] < some["step"]
