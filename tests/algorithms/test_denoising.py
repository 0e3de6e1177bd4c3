"""Surrogate and KL estimators of denoising steps, and what such rows cannot have."""

import math

import pytest
import torch

from longrl.algorithms import (
    Algorithm,
    DrawnSteps,
    Tokens,
    clipped,
    gaussian_mean,
    grpo_guard,
    k3,
    raw,
    sequence_clipped,
    truncated_token,
)
from longrl.types import SamplingParams

TWO_STEPS = torch.tensor([0, 1])


def steps(mean, old_mean, ref_mean=None, std=(0.5, 0.25), length=(0.1, 0.2)):
    return DrawnSteps(mean, torch.tensor(std), torch.tensor(length), old_mean, ref_mean)


def logp_of(drawn, mean, std):
    return -((drawn - mean) / std[:, None]).square().mean(-1) / 2  # up to a constant


def test_guards_ratio_is_the_mean_of_noise_times_movement_and_its_loss_is_divided_by_the_length():
    std, advantages = torch.tensor([0.5, 0.25]), torch.tensor([2.0, -1.0])
    noise = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 3.0]])
    old_mean = torch.zeros(2, 3)
    mean = torch.tensor([[0.1, 0.0, -0.2], [0.3, 0.1, 0.0]], requires_grad=True)
    drawn = old_mean + std[:, None] * noise
    tokens = Tokens(
        logp_of(drawn, mean, std), logp_of(drawn, old_mean, std), advantages, TWO_STEPS, steps=steps(mean, old_mean)
    )
    moved = (noise * mean.detach()).mean(-1)  # 0 and 1/30
    found = grpo_guard(tokens, 10.0, 10.0)
    torch.testing.assert_close(found.loss, -advantages * moved.exp() / torch.tensor([0.1, 0.2]))
    found.loss.sum().backward()
    expected = -(advantages * moved.exp() / torch.tensor([0.1, 0.2]))[:, None] * noise / 3
    torch.testing.assert_close(mean.grad, expected)


def test_guard_clips_on_either_side():
    std, noise, zero = torch.tensor([0.5, 0.5]), torch.tensor([[1.0], [1.0]]), torch.zeros(2, 1)
    mean = torch.tensor([[0.1], [-0.1]])
    tokens = Tokens(
        logp_of(noise / 2, mean, std), logp_of(noise / 2, zero, std), torch.tensor([1.0, -1.0]), TWO_STEPS,
        steps=steps(mean, zero, std=(0.5, 0.5), length=(1.0, 1.0)),
    )  # fmt: skip
    found = grpo_guard(tokens, 0.01, 0.02)
    assert found.loss.tolist() == pytest.approx([-1.02, 0.99])
    assert (found.clipped_high.tolist(), found.clipped_low.tolist()) == ([True, False], [False, True])


def test_guard_refuses_tokens():
    with pytest.raises(ValueError, match="grpo_guard is for denoising steps"):
        grpo_guard(Tokens(*torch.zeros(3, 2), TWO_STEPS), 0.2, 0.2)


def test_the_kl_term_is_scaled_by_the_variance_and_its_gradient_is_exact():
    mean, ref = torch.tensor([[1.0, 3.0], [0.0, 0.5]], requires_grad=True), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    algorithm = Algorithm(kl=gaussian_mean, kl_coef=0.1)
    weights, zero = torch.tensor([0.5, 0.5]), torch.zeros(2)
    drawn = steps(mean, mean.detach(), ref)
    found = algorithm.loss(zero, zero, None, None, zero, weights, TWO_STEPS, drawn)
    kl = [(1 + 4) / 2 / (2 * 0.25), 0.25 / 2 / (2 * 0.0625)]
    assert float(found.metrics["kl_ref"]) == pytest.approx(sum(kl) / 2)
    assert float(found.loss.detach()) == pytest.approx(0.1 * sum(kl) / 2)
    found.loss.backward()
    assert mean.grad.flatten().tolist() == pytest.approx([0.1 * 0.5 * g for g in (1 / 0.5, 2 / 0.5, 0.0, 0.5 / 0.125)])


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        (Algorithm(kl=k3, kl_coef=0.1), "gaussian_mean in the loss, got k3"),
        (Algorithm(kl=gaussian_mean, kl_coef=0.1, kl_placement="reward"), "in the reward"),
        (Algorithm(surrogate=sequence_clipped), "scored apart"),
        (Algorithm(correction=truncated_token), "scored apart"),
    ],
)
def test_what_steps_cannot_have_is_refused(algorithm, words):
    with pytest.raises(ValueError, match=words):
        algorithm.validate_steps(4, 1)


def test_a_group_of_one_is_refused_unless_nothing_is_compared():
    with pytest.raises(ValueError, match="needs num_generations >= 2"):
        Algorithm().validate_steps(1, 1)
    Algorithm(advantage=raw).validate_steps(1, 1)


@pytest.mark.parametrize("algorithm", [Algorithm(kl=gaussian_mean), Algorithm(surrogate=grpo_guard)])
def test_a_policy_that_writes_tokens_refuses_what_is_for_steps(algorithm):
    with pytest.raises(ValueError, match="is for denoising steps"):
        algorithm.validate(SamplingParams(), 1)


def test_clipped_reads_steps_as_tokens():
    tokens = Tokens(torch.tensor([0.1, 0.0]), torch.zeros(2), torch.tensor([1.0, 1.0]), TWO_STEPS)
    assert clipped(tokens, 0.2, 0.05).loss.tolist() == pytest.approx([-1.05, -1.0])
    assert math.exp(0.1) > 1.05
