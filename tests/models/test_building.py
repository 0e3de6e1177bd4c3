"""Where random weights are made."""

import pytest
import torch

from longrl.models.text import TextFamily
from longrl.planning.shapes import build_on_meta
from longrl.testing.tiny import tiny_text


@pytest.fixture
def family(tmp_path):
    folder = tiny_text(tmp_path)
    return lambda **options: TextFamily(str(folder), random_init=True, **options)


def test_random_weights_are_made_on_the_device_that_is_named(family):
    """`meta` stands for a GPU."""
    assert {weight.device.type for weight in family(init_device="meta").build().parameters()} == {"meta"}


def test_the_cpu_by_name_gives_the_numbers_of_none(family):
    named, none = family(init_device="cpu").build().state_dict(), family().build().state_dict()
    assert all(torch.equal(named[name], none[name]) for name in none)


def test_a_plan_allocates_nothing_whatever_the_device(family):
    model = build_on_meta(family(init_device="cpu"))
    assert {weight.device.type for weight in model.parameters()} == {"meta"}


def test_random_numbers_of_the_run_go_on_as_if_nothing_was_built(family):
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    family(init_device="cpu").build()
    assert torch.equal(torch.rand(2), wanted)


def test_a_gpus_random_numbers_are_kept_too(family, monkeypatch):
    kept = []
    fork = torch.random.fork_rng

    def noted(devices):
        kept.extend(devices)
        return fork(devices=[])

    monkeypatch.setattr(torch.random, "fork_rng", noted)
    with pytest.raises((AssertionError, RuntimeError)):  # there is none here
        family(init_device="cuda:3").build()
    assert kept == [torch.device("cuda:3")]
