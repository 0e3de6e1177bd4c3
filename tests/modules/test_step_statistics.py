"""Norms by part against torch, statistics of advantages and entropies by hand."""

import math

import pytest
import torch
from torch import nn

from longrl.modules.phase_memory import PhaseMemory, resident_bytes
from longrl.modules.step_statistics import (
    StepSums,
    advantage_metrics,
    advantage_sums,
    completion_means,
    gradient_norms,
    lowest_over_ranks,
    total_norm,
)
from longrl.strategies.axis import SINGLE_RANK
from tests.tiny import text_family, vl_family


def with_gradients(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def plain_norm(model, wanted):
    """As torch computes the norm of one long vector, in float64."""
    chosen = [p.grad.double().flatten() for name, p in model.named_parameters() if wanted(name)]
    return float(torch.cat(chosen).norm())


def test_norms_of_the_parts_of_a_vision_language_model_are_torchs():
    family = vl_family(freeze_vision_encoder=False)
    model = family.build()
    model.lm_head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features, bias=False)  # the tiny one is tied
    model = with_gradients(model)
    total, found = gradient_norms(model, family.model_parts(model))
    assert found.pop("grad_norm") == float(total)
    is_merger = lambda name: ".visual.merger." in name  # noqa: E731
    wanted = {
        "grad_norm_projector": plain_norm(model, is_merger),
        "grad_norm_vision_encoder": plain_norm(model, lambda name: ".visual." in name and not is_merger(name)),
        "grad_norm_language_model": plain_norm(model, lambda name: ".language_model." in name),
        "grad_norm_lm_head": plain_norm(model, lambda name: name.startswith("lm_head")),
    }
    assert found == pytest.approx(wanted, rel=1e-5)
    every = plain_norm(model, lambda name: True)
    assert math.hypot(*found.values()) == pytest.approx(every, rel=1e-5)
    assert float(total) == float(nn.utils.get_total_norm([p.grad for p in model.parameters()]))  # to the last bit


def test_norms_of_gradients_in_bfloat16_are_summed_in_float32():
    family = text_family()
    model = with_gradients(family.build().bfloat16())
    wanted = plain_norm(model, lambda name: True)
    total, found = gradient_norms(model, family.model_parts(model))
    assert total.dtype == torch.float32
    assert found["grad_norm"] == found["grad_norm_language_model"] == pytest.approx(wanted, rel=1e-6)
    assert float(total_norm([p.grad for p in model.parameters()])) == float(total)
    in_bfloat16 = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert float(in_bfloat16) != pytest.approx(wanted, rel=1e-4)  # what this is for
    nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, total)
    assert plain_norm(model, lambda name: True) == pytest.approx(1.0, rel=1e-3)


def test_the_host_is_one_micro_batch_ahead_of_a_gpu(monkeypatch):
    seen = []

    class Event:
        def __init__(self):
            self.number = len([one for one in seen if one[0] == "queued"])

        def record(self):
            seen.append(("queued", self.number))

        def synchronize(self):
            seen.append(("awaited", self.number))

    class OnGPU(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "Event", Event)
    sums = StepSums()
    for _ in range(3):
        sums.add({"loss": torch.zeros(()).as_subclass(OnGPU)})
    assert seen == [("queued", 0), ("awaited", 0), ("queued", 1), ("awaited", 1), ("queued", 2)]


def test_no_gradients_have_norm_zero():
    assert float(total_norm([])) == 0


def test_a_part_without_gradients_has_no_norm():
    family = text_family()
    model = with_gradients(family.build())
    _, found = gradient_norms(model, family.model_parts(model))
    assert found.keys() == {"grad_norm", "grad_norm_language_model"}  # its head is tied
    assert gradient_norms(model, {})[1].keys() == {"grad_norm"}
    model.zero_grad(set_to_none=True)
    assert gradient_norms(model, family.model_parts(model))[1] == {"grad_norm": 0.0}


def test_a_parameter_counts_in_the_first_of_its_parts():
    inner = nn.Linear(2, 1, bias=False)
    outer = nn.Sequential(nn.Linear(2, 2, bias=False), inner)
    outer[0].weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    inner.weight.grad = torch.tensor([[5.0, 12.0]])
    _, found = gradient_norms(outer, {"inner": [inner], "outer": [outer]})
    assert found == {
        "grad_norm": pytest.approx(math.hypot(5, 13)),
        "grad_norm_outer": 5.0,
        "grad_norm_inner": 13.0,
    }


def test_advantages_of_two_ranks():
    """1, -1, 0 and 2: mean 0.5, squares 6 of 4."""
    one, other = advantage_sums(torch.tensor([1.0, -1.0])), advantage_sums(torch.tensor([0.0, 2.0]))
    found = advantage_metrics({name: one[name] + other[name] for name in one})
    assert found == {
        "advantage_abs": 1.0,
        "advantage_std": pytest.approx(math.sqrt(1.5 - 0.25)),
        "advantage_zero": 0.25,
    }


def test_without_a_token_advantages_are_nan():
    assert all(map(math.isnan, advantage_metrics(advantage_sums(torch.zeros(0))).values()))


def test_entropies_are_means_of_completions_and_the_lowest_counts():
    index = torch.tensor([4, 4, 7, 7, 7, 9])
    means = completion_means(torch.tensor([1.0, 3.0, 0.0, 1.0, 2.0, 5.0]), index, 10)
    none = math.inf
    assert means.tolist() == [none, none, none, none, 2.0, none, none, 1.0, none, 5.0]
    assert lowest_over_ranks([means, torch.tensor([1.5])], SINGLE_RANK) == 1.0
    assert math.isnan(lowest_over_ranks([], SINGLE_RANK))
    assert math.isnan(lowest_over_ranks([torch.tensor([none])], SINGLE_RANK))


def test_sums_of_a_step_are_those_of_numbers_taken_one_by_one():
    values = [{"loss": torch.rand(()), "b": torch.rand((), dtype=torch.float64)} for _ in range(7)]
    values[3] = {"c": torch.rand(()), **values[3]}
    wanted = dict.fromkeys(("loss", "b", "c"), 0.0)
    sums = StepSums()
    for each in values:
        sums.add(each)
        for name, value in each.items():
            wanted[name] += value.item()
    assert sums.collect() == wanted  # to the last bit
    assert StepSums().collect() == {}


def test_memory_of_a_phase_is_its_largest_of_the_step(monkeypatch):
    sizes = iter([3 << 30, 5 << 30, 4 << 30, 1 << 30])
    monkeypatch.setattr("longrl.modules.phase_memory.resident_bytes", lambda: next(sizes))
    memory = PhaseMemory()
    for phase in ("encode", "update", "encode"):
        memory.begin()
        memory.end(phase)
    assert memory.collect() == {"encode": 4.0, "update": 5.0}
    memory.end("update")
    assert memory.collect() == {"update": 1.0}


def test_resident_memory_grows_with_what_is_written():
    before = resident_bytes()
    block = torch.ones(128 << 20, dtype=torch.uint8)  # above 32 MiB malloc takes no memory that was freed before
    assert resident_bytes() - before > 64 << 20
    assert len(block) == 128 << 20
