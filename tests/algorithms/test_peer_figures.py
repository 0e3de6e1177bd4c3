"""Figures of verl (b178a3c), TRL (f2cd577) and NVlabs/GDPO (b080e63), whose functions were run once on these inputs.

Six completions of two prompts; ratios between 0.55 and 1.82, engine and trainer apart by up to 5%.
"""

import math

import pytest
import torch

from longrl.algorithms import (
    Algorithm,
    GeometricMask,
    OffPolicySequenceMask,
    Outcomes,
    SequenceDualClipped,
    SoftGated,
    Tokens,
    TwoSidedMask,
    geometric_clipped,
    group_centered_global_std,
    group_centered_rescaled,
    high_entropy,
    length_centered,
    optimal_token_baseline,
    part_normalized,
)

LENGTHS = torch.tensor([3, 1, 2, 4, 2, 3])
INDEX = torch.repeat_interleave(torch.arange(6), LENGTHS)
PLACE = torch.arange(15, dtype=torch.float64)
LOGP = -1.5 + torch.sin(PLACE)
OLD = LOGP - 0.6 * torch.cos(1.7 * PLACE)
SAMPLER = OLD + 0.05 * torch.sin(2.3 * PLACE)
ADVANTAGES = torch.tensor([1.2, -0.4, -0.8, 0.5, -1.5, 1.0], dtype=torch.float64)
REWARDS = torch.tensor([[1.0, 0.25, 0.0], [0.5, 0.5, 2.0]], dtype=torch.float64)
VALID = torch.ones(2, 3, dtype=torch.bool)
LOSSES = {
    "sapo": (
        {"surrogate": SoftGated(1.0, 1.05)},
        0.06796580433316195,
        [-0.103057772539, -0.0616217613918, -0.0355727552361, 0.0821612358351, 0.0989669682934, 0.0452983988784,
         -0.0131678081015, -0.0305311958297, -0.0274251909302, -0.0114878670582, 0.105302650698, 0.189805219035,
         -0.0562359533389, -0.0291047089545, -0.0636310722747],
    ),
    "gspo, clamped": (
        {"surrogate": SequenceDualClipped(bound=None), "clip_low": 0.1, "clip_high": 0.15},
        0.1185290021861493,
        [-0.0654035499239, -0.0654035499239, -0.0654035499239, 0.0836374773676, 0.07223471512, 0.07223471512,
         -0.0198140433025, -0.0198140433025, -0.0198140433025, -0.0198140433025, 0.154843655504, 0.154843655504,
         -0.0479327978157, -0.0479327978157, -0.0479327978157],
    ),
    "geo_mean": (
        {"surrogate": geometric_clipped, "clip_low": 0.4, "clip_high": 0.4},
        0.13259010241079275,
        [0.0, -0.0611854776132, -0.0611854776132, 0.0836374763415, 0.0722347147299, 0.0722347147299,
         -0.0194623221152, 0.0, -0.0194623221152, -0.0194623221152, 0.154843654564, 0.154843654564,
         -0.0479327976796, -0.0479327976796, -0.0479327976796],
    ),
}  # fmt: skip
"""Algorithm, and what verl's `compute_policy_loss_*` gives; its lengths have 1e-8 more."""


def outcomes(**options) -> Outcomes:
    return Outcomes(REWARDS, VALID, LENGTHS, **options)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_those_of_verl(name):
    options, loss, gradient = LOSSES[name]
    algorithm = Algorithm(**options)
    logp = LOGP.clone().requires_grad_()
    weights = (1 / (6 * LENGTHS.double()))[INDEX]
    output = algorithm.loss(logp, OLD, None, None, ADVANTAGES[INDEX], weights, INDEX)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(loss, rel=1e-7)
    assert logp.grad.tolist() == pytest.approx(gradient, rel=1e-7)


def test_the_length_weighted_baseline_is_verls():
    found = length_centered(outcomes()).flatten().tolist()
    assert found == pytest.approx([11 / 24, -7 / 24, -13 / 24, -0.5, -0.5, 1.0])


def test_verl_scales_gpg_by_the_rewards_that_are_not_zero():
    """Its factor is 6 / 5, for one reward is 0; here both groups have a signal, and the factor is 1."""
    verl = [0.7, -0.2, -0.5, -0.6, -0.6, 1.2]
    assert (group_centered_rescaled(outcomes()) * 6 / 5).flatten().tolist() == pytest.approx(verl)


def test_the_optimal_token_baseline_is_verls():
    old = OLD.clamp(max=-0.01)
    squares = old.exp().square() + 0.3 * torch.cos(PLACE).square() * (1 - old.exp()).square()
    norms = 1 - 2 * old.exp() + squares
    verl = [
        0.571193383473, 0.594905022324, 0.0, -0.178806616527, -0.428806616527, -0.405094977676, -0.554494813038,
        -0.393210730461, -0.672677462459, 0.0, -0.554494813038, -0.393210730461, 0.945505186962, 1.10678926954,
        0.827322537541,
    ]  # fmt: skip
    found = optimal_token_baseline(outcomes(gradient_norms=norms))
    assert found.tolist() == pytest.approx(verl, rel=1e-7, abs=1e-7)


def test_parts_are_normalised_as_by_trl():
    """`multi_objective_aggregation="normalize_then_sum"`, weights 1 and 0.5; one part does not apply to one completion.

    Its mean over the batch, 0 but for rounding, is taken off there.
    """
    parts = {
        "accuracy": torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.5]], dtype=torch.float64),
        "format": torch.tensor([[0.2, 0.3, math.nan], [1.0, 0.0, 0.5]], dtype=torch.float64),
    }
    weights = {"accuracy": torch.tensor([1.0, 1.0]), "format": torch.tensor([0.5, 0.5])}
    trl = [0.954501684899, -0.267011768399, -0.6874899165, 1.28273866345, 0.092003098523, -1.37474176198]
    rewards = parts["accuracy"] + 0.5 * parts["format"].nan_to_num(0.0)
    found = part_normalized(Outcomes(rewards, VALID, LENGTHS, parts=parts, part_weights=weights))
    assert found.flatten().tolist() == pytest.approx(trl, rel=1e-9)


def test_the_deviation_over_the_batch_is_trls_but_for_its_degrees_of_freedom():
    """`scale_rewards="batch"` divides by the unbiased deviation + 1e-4."""
    trl = torch.tensor([0.816382311208, -0.233252088917, -0.583130222291, -0.69975626675, -0.69975626675, 1.3995125335])
    found = group_centered_global_std(outcomes()).flatten()
    torch.testing.assert_close(found, trl.double() * math.sqrt(6 / 5), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("share", "chosen"),
    [(0.05, [13]), (0.2, [9, 11, 13]), (0.33, [5, 7, 9, 11, 13]), (0.5, [0, 1, 3, 5, 7, 9, 11, 13])],
)
def test_tokens_of_high_entropy_are_trls(share, chosen):
    """`get_high_entropy_mask` with the quantile 1 - share."""
    entropies = (1 + torch.sin(3.1 * PLACE)).float()
    found = high_entropy(entropies, torch.ones(15, dtype=torch.bool), share)
    assert found.chosen.nonzero().flatten().tolist() == chosen


@pytest.mark.parametrize(("max_kl", "dropped"), [(0.0, [2, 4]), (0.1, [4]), (0.15, [4])])
def test_sequences_that_have_drifted_are_masked_as_by_trl(max_kl, dropped):
    """`get_off_policy_mask`."""
    sampler = LOGP + 0.4 * torch.cos(1.1 * PLACE)
    tokens = Tokens(LOGP, OLD, ADVANTAGES[INDEX], INDEX, sampler)
    factors = OffPolicySequenceMask(max_kl)(tokens, 2.0)
    assert INDEX[factors == 0].unique().tolist() == dropped


@pytest.mark.parametrize(
    ("mask", "kept"),
    [
        (TwoSidedMask(0.97, 1.03), [0, 3, 4, 7, 8, 11]),
        (GeometricMask(0.99, 1.01), [0, 1, 2, 12, 13, 14]),
        (TwoSidedMask(0.97, 1.03, over_completion=True), [0, 1, 2, 3, 12, 13, 14]),
    ],
    ids=["token_k1", "seq_mean_k1", "seq_sum_k1"],
)
def test_masks_keep_the_tokens_that_verl_keeps(mask, kept):
    """`compute_rollout_rejection_mask`, whose bounds are those of sampler / trainer: 1 / high to 1 / low.

    So near 1 that the difference drops no other token here.
    """
    factors = mask(Tokens(LOGP, OLD, ADVANTAGES[INDEX], INDEX, SAMPLER), 2.0)
    assert factors.nonzero().flatten().tolist() == kept
