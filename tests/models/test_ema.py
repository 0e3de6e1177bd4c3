"""The moving average against figures of Flow-GRPO's released rule, and what it leaves alone."""

import pytest
import torch
from torch import nn

from longrl.models.ema import EMASettings, EMAWeights, holds_ema


def model(dtype=torch.float32) -> nn.Module:
    """One number that trains, under a dotted name, and one that does not."""
    found = nn.ModuleDict({"layer": nn.Linear(1, 1)}).to(dtype)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.zero_()
    found["layer"].bias.requires_grad_(False)
    return found


@pytest.mark.parametrize(
    ("step", "decay"),
    [(1, None), (6, None), (7, 8 / 17), (8, None), (15, 16 / 25), (79, 80 / 89), (87, 0.9), (799, 0.9)],
)
def test_the_decay_is_the_released_one_at_every_eighth_step(step, decay):
    assert EMASettings().decay_at(step) == decay


def test_averages_are_those_of_the_released_rule():
    """The weight is t after step t: figures by hand, 0 + (1 - 8/17) * 7, then 36% of the way to 15, 3/11 to 23."""
    trained = model()
    ema = EMAWeights(trained, EMASettings())
    found = []
    for step in range(1, 24):
        nn.init.constant_(trained["layer"].weight, step)
        ema.update(step)
        if step in (7, 14, 15, 23):
            found += [value.item() for value in ema.buffers()]
    assert found == pytest.approx([3.7058824, 3.7058824, 7.7717647, 11.9249198], rel=1e-6)
    assert [name for name, _ in ema.named_buffers()] == ["layer/weight"]


def test_the_first_average_is_the_initial_weight_and_follows_no_later_change():
    trained = model()
    ema = EMAWeights(trained, EMASettings())
    nn.init.ones_(trained["layer"].weight)
    assert [value.item() for value in ema.buffers()] == [0.0]


def test_swapped_weights_come_back_to_the_last_bit_and_averages_stay_in_float32():
    trained = model(torch.bfloat16)
    ema = EMAWeights(trained, EMASettings(decay=0.9, every_n_steps=1))
    nn.init.constant_(trained["layer"].weight, 1.2345)
    before = trained["layer"].weight.clone()
    ema.update(100)
    (average,) = ema.buffers()
    assert average.dtype == torch.float32
    assert average.item() == pytest.approx(0.1 * before.item(), rel=1e-6)
    ema.swap_in()
    assert trained["layer"].weight.item() == average.bfloat16().item()
    kept = average.clone()
    ema.swap_out()
    assert torch.equal(trained["layer"].weight, before)
    assert torch.equal(average, kept)


def test_a_file_says_whether_it_holds_averages(tmp_path):
    for name, saved in {"with": {"ema_weights.a/b": torch.ones(1)}, "without": {"model.a.b": torch.ones(1)}}.items():
        torch.save({"state_dict": saved}, tmp_path / name)
    assert holds_ema(tmp_path / "with")
    assert not holds_ema(tmp_path / "without")


@pytest.mark.parametrize("values", [{"decay": 1.0}, {"decay": -0.1}, {"every_n_steps": 0}])
def test_settings_that_average_nothing_are_refused(values):
    with pytest.raises(ValueError, match=rf"model\.ema\.{next(iter(values))} must be at least"):
        EMASettings(**values)
