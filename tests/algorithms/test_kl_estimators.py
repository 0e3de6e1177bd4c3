"""KL estimators: values by hand, gradients by hand, and expectations over a whole vocabulary."""

import math

import pytest
import torch

from longrl.algorithms import k1, k2, k3

DIFFERENCES = [-2.0, -0.5, 0.0, 0.5, 2.0]


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [
        (k1, lambda x: x, lambda x: 1.0),
        (k2, lambda x: x * x / 2, lambda x: x),
        (k3, lambda x: math.exp(-x) - 1 + x, lambda x: 1 - math.exp(-x)),
    ],
)
def test_values_and_gradients_are_those_of_the_formulas(estimator, value, gradient):
    ref = torch.tensor([-1.0, -0.1, -3.0, -2.0, -5.0], dtype=torch.float64)
    logp = (ref + torch.tensor(DIFFERENCES, dtype=torch.float64)).requires_grad_()
    estimate = estimator(logp, ref)
    torch.testing.assert_close(estimate, torch.tensor([value(x) for x in DIFFERENCES], dtype=torch.float64))
    estimate.sum().backward()
    torch.testing.assert_close(logp.grad, torch.tensor([gradient(x) for x in DIFFERENCES], dtype=torch.float64))


def distributions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, dtype=torch.float64, generator=generator)
    return logits[0].clone().requires_grad_(), logits[1].log_softmax(0)


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_unbiased(estimator):
    logits, ref = distributions()
    logp = logits.log_softmax(0).detach()
    exact = (logp.exp() * (logp - ref)).sum()
    torch.testing.assert_close((logp.exp() * estimator(logp, ref)).sum(), exact)


@pytest.mark.parametrize(
    ("estimator", "divergence"),
    [
        (k1, lambda logp, ref: 0 * logp.sum()),
        (k2, lambda logp, ref: (logp.exp() * (logp - ref)).sum()),  # KL(policy || reference)
        (k3, lambda logp, ref: (ref.exp() * (ref - logp)).sum()),  # KL(reference || policy)
    ],
)
def test_expected_gradients_in_the_loss_are_what_the_docstrings_say(estimator, divergence):
    logits, ref = distributions()
    logp = logits.log_softmax(0)
    sampled = (logp.detach().exp() * estimator(logp, ref)).sum()  # expectation over tokens drawn from the policy
    (actual,) = torch.autograd.grad(sampled, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(divergence(logp, ref), logits)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", [k1, k2, k3])
@pytest.mark.parametrize("distance", [-1e4, 1e4])
def test_far_apart_policies_give_finite_values_and_gradients(estimator, distance):
    logp = torch.tensor([distance], requires_grad=True)
    estimate = estimator(logp, torch.zeros(1))
    torch.testing.assert_close(estimate, estimator(torch.tensor([math.copysign(20.0, distance)]), torch.zeros(1)))
    estimate.sum().backward()
    assert logp.grad.item() == 0
