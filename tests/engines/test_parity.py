"""The comparison of engine and trainer, by hand, and in front of a run."""

import math

import pytest
import torch

from longrl.callbacks.rollout_checks import check_mismatch, engine_logps
from longrl.modules.mismatch import Mismatch
from longrl.types import Completion
from tests.tiny import row, text_family


def completion(ids, logprobs):
    return Completion(torch.tensor(ids), torch.tensor(logprobs), "", "stop")


def test_metrics_by_hand():
    gap = Mismatch(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.5]))
    found = gap.metrics()
    assert (found["mean"], found["max"]) == (0.25, 0.5)
    assert found["k3"] == pytest.approx((math.exp(0.5) - 1.5) / 2)
    weights = (1.0, math.exp(0.5))
    assert found["effective_share"] == pytest.approx(sum(weights) ** 2 / (2 * sum(w * w for w in weights)))


def test_nothing_sampled_has_no_gap():
    assert Mismatch(engine_logps([]), torch.zeros(0)).metrics() == {}
    check_mismatch(Mismatch(engine_logps([]), torch.zeros(0)), [], [], 0.1)


def test_a_mismatch_names_the_tokens():
    prompts = [text_family().render(row(name), "What?") for name in ("one", "two")]
    completions = [[completion([5, 6], [-1.0, -2.0])], [completion([7], [-3.0])]]
    trainer = torch.tensor([-1.0, -2.01, -0.5])
    check_mismatch(Mismatch(engine_logps(completions), trainer), prompts, completions, max_mismatch=2.6)
    with pytest.raises(RuntimeError) as error:
        check_mismatch(Mismatch(engine_logps(completions), trainer), prompts, completions, max_mismatch=0.1)
    lines = str(error.value).splitlines()
    assert "disagree by up to 2.5000" in lines[0]
    assert lines[1] == "  prompt 'two', token 0 (id 7): engine -3.0000, trainer -0.5000"
