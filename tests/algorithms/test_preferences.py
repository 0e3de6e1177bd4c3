"""Losses of pairs: worked out by hand in float64, and figures of TRL on the same numbers.

`TRL` holds what `DPOTrainer._compute_loss` of TRL 1.16.0 says of the pairs below, `SmoothedDPO` what `dpo_loss` of TRL
0.10.1 does (the one of the InternVL authors' MPO), and `BCO` what `bco_loss` of TRL's BCOTrainer does, pair after pair.
"""

import dataclasses
import math

import pytest
import torch

from longrl.algorithms import PairScores, Preference, SimPO, SmoothedDPO, dpo, ipo, length_normalized_dpo
from longrl.algorithms.preferences import bco, generation
from longrl.modules.preference_loss import RewardShift

CHOSEN = [[-0.5, -1.25, -0.25], [-2.0, -0.125], [-0.75, -0.5, -1.5, -0.375]]
REJECTED = [[-1.0, -0.75], [-0.25, -0.5, -1.75, -0.625, -0.375], [-3.0]]
REF_CHOSEN = [[-0.625, -1.0, -0.5], [-1.5, -0.25], [-1.0, -0.75, -1.25, -0.5]]
REF_REJECTED = [[-0.875, -0.5], [-0.5, -0.75, -1.5, -0.5, -0.25], [-2.25]]
"""Log-probabilities of the tokens of three pairs."""
TRL = {
    "dpo": (dpo, 0.5, 0.6060539970098544),
    "ipo": (ipo, 0.5, 0.6762514467592592),
    "length_normalized_dpo": (length_normalized_dpo, 2.0, 0.5192876218982535),
    "smoothed": (SmoothedDPO(0.1), 0.5, 0.6268873303431878),
}
BCO = [(1.2651980706343382, -0.0625), (1.482301723179928, -0.078125), (1.124781512888214, -0.0833333333)]
"""Loss of a pair, shifted by the running mean of all rewards up to its own, and that mean."""


def sums(table):
    return torch.tensor([sum(row) for row in table], dtype=torch.float64, requires_grad=True)


def scores():
    lengths = [torch.tensor([len(row) for row in table]) for table in (CHOSEN, REJECTED)]
    reference = [sums(table).detach() for table in (REF_CHOSEN, REF_REJECTED)]
    return PairScores(sums(CHOSEN), sums(REJECTED), *reference, *lengths)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def by_hand(name, beta, chosen, rejected, ref_chosen, ref_rejected):
    """Loss of one pair from the log-probabilities of its tokens."""
    h_chosen, h_rejected = sum(chosen) - sum(ref_chosen), sum(rejected) - sum(ref_rejected)
    means = h_chosen / len(chosen) - h_rejected / len(rejected)
    margin = beta * (h_chosen - h_rejected)
    plain = sum(chosen) / len(chosen) - sum(rejected) / len(rejected)
    return {
        "dpo": -log_sigmoid(margin),
        "smoothed": -0.9 * log_sigmoid(margin) - 0.1 * log_sigmoid(-margin),
        "ipo": (means - 1 / (2 * beta)) ** 2,
        "length_normalized_dpo": -log_sigmoid(beta * means),
        "simpo": -log_sigmoid(beta * plain - 0.75),
        "bco": -log_sigmoid(beta * h_chosen - 0.25) - log_sigmoid(-(beta * h_rejected - 0.25)),
        "generation": -sum(chosen) / len(chosen),
    }[name]


LOSSES = {name: (loss, beta) for name, (loss, beta, _) in TRL.items()} | {
    "simpo": (SimPO(0.75), 2.0),
    "bco": (lambda pairs, beta: bco(pairs, beta, 0.25), 0.5),
    "generation": (lambda pairs, beta: generation(pairs), 1.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_is_the_one_by_hand(name):
    loss, beta = LOSSES[name]
    found = loss(scores(), beta)
    tables = zip(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, strict=True)
    assert found.tolist() == pytest.approx([by_hand(name, beta, *pair) for pair in tables], rel=1e-12)


@pytest.mark.parametrize("name", TRL)
def test_losses_are_those_of_trl(name):
    loss, beta, wanted = TRL[name]
    assert loss(scores(), beta).mean().item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_raise_the_chosen_answer_and_lower_the_other(name):
    """And they are those of the loss: differences in float64."""
    loss, beta = LOSSES[name]
    pairs = scores()
    loss(pairs, beta).sum().backward()
    step = 1e-6
    for tensor in (pairs.chosen_logp, pairs.rejected_logp):
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                shifted = {tensor: tensor + sign * step}
                fields = [getattr(pairs, field.name) for field in dataclasses.fields(pairs)]
                values.append(loss(PairScores(*(shifted.get(value, value) for value in fields)), beta))
        slope = (values[0] - values[1]) / (2 * step)
        grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        torch.testing.assert_close(grad, slope, rtol=1e-6, atol=1e-8)
    assert (pairs.chosen_logp.grad <= 0).all()
    if pairs.rejected_logp.grad is not None:
        assert (pairs.rejected_logp.grad >= 0).all()


def test_the_shift_is_the_mean_of_the_rewards_of_the_steps_before():
    """TRL's counts a step's own rewards, too: ours of the step after has its value."""
    shift = RewardShift()
    assert shift.mean == 0.0
    objective = Preference(beta=0.5, quality_weight=1.0)
    chosen, rejected = (rewards.tolist() for rewards in objective.rewards(scores()))
    for number, (loss, mean) in enumerate(BCO):
        shift.add((chosen[number] + rejected[number]) / 2, 2)
        assert shift.mean == pytest.approx(mean, rel=1e-6)
        assert bco(scores(), 0.5, shift.mean)[number].item() == pytest.approx(loss, rel=1e-6)
    restored = RewardShift()
    restored.load_state_dict(shift.state_dict())
    assert restored == shift


def test_mpo_is_the_weighted_sum_of_three_losses():
    """As TRL sums them up, which has the log-likelihood per token of the batch where the paper has the answer's own."""
    objective = Preference(beta=0.5, preference_weight=0.8, quality_weight=0.2, generation_weight=1.0)
    parts = objective.losses(scores(), shift=0.0)
    assert list(parts) == ["preference", "quality", "generation"]
    assert parts["quality"].mean().item() == pytest.approx(1.2925038985747817, rel=1e-12)
    trl = 0.8 * parts["preference"].mean() + 0.2 * parts["quality"].mean() - sum(map(sum, CHOSEN)) / 9
    assert trl.item() == pytest.approx(1.5488995328783957, rel=1e-12)
    assert parts["generation"].tolist() == pytest.approx([2 / 3, 2.125 / 2, 3.125 / 4])


def test_parts_without_a_weight_are_not_computed():
    assert list(Preference().losses(scores(), 0.0)) == ["preference"]
    assert list(Preference(preference_weight=0.0, quality_weight=1.0).losses(scores(), 0.0)) == ["quality"]


def test_rewards_are_scaled_log_ratios_or_means_without_a_reference():
    chosen, rejected = Preference(beta=0.5).rewards(scores())
    assert (chosen.mean().item(), rejected.mean().item()) == pytest.approx((0.0208333333, -0.1875))  # TRL's
    chosen, _ = Preference(loss=SimPO(), beta=2.0).rewards(scores())
    assert chosen.tolist() == pytest.approx([-4 / 3, -2.125, -6.25 / 4])


def test_who_needs_a_reference():
    assert Preference().needs_reference
    assert not Preference(loss=SimPO()).needs_reference
    assert Preference(loss=SimPO(), quality_weight=0.2).needs_reference
    assert Preference(loss=SimPO(), preference_weight=0.0, quality_weight=1.0).needs_reference


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "model.preference.beta must be above 0, got 0.0"),
        ({"beta": math.nan}, "model.preference.beta must be above 0, got nan"),
        ({"quality_weight": -1.0}, "model.preference.quality_weight must be at least 0, got -1.0"),
        ({"preference_weight": 0.0, "generation_weight": 1.0}, "learns no preference; raise one, or set data.stage"),
        ({"loss": SmoothedDPO}, "must be a function, got the class SmoothedDPO"),
        ({"loss": "longrl.algorithms.dpp"}, "has no 'dpp'"),
        ({"loss": generation}, r"is called as \(pairs, beta\)"),
    ],
)
def test_options_without_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Preference(**options)


@pytest.mark.parametrize("share", [-0.1, 0.5, math.nan])
def test_label_smoothing_is_a_share_below_a_half(share):
    with pytest.raises(ValueError, match="label_smoothing of SmoothedDPO must be at least 0 and below 0.5"):
        SmoothedDPO(share)
