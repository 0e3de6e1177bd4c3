"""Divergences between two distributions: by hand, and as TRL and verl compute them."""

import itertools
import math

import pytest
import torch

from longrl.algorithms import Distillation, Outcomes, no_advantage
from longrl.models.teacher_targets import policy_at, with_rest

POLICY = torch.tensor([[1.0, 0.0, -1.0, 0.5], [0.2, 0.3, 2.0, -1.0]])
TEACHER = torch.tensor([[0.5, 1.5, -0.5, 0.0], [1.0, -1.0, 0.0, 2.0]])

# By `GKDTrainer.generalized_jsd_loss` of TRL, of the logits above, at temperatures 1 and 0.7: its beta of 0 is the
# forward KL, of 1 the reverse.
TRL = {
    ("forward_kl", 0.5): ([0.43747205633, 1.79997225180], [0.88309240334, 3.22712425374]),
    ("reverse_kl", 0.5): ([0.38654846006, 1.50460439949], [0.76578149296, 2.54601391157]),
    ("jensen_shannon", 0.5): ([0.09851624230, 0.33208178256], [0.18923398479, 0.48834823431]),
    ("jensen_shannon", 0.1): ([0.03818223647, 0.14095020246], [0.07543337303, 0.21849970705]),
}
VERL_TOP_2 = [0.41569496693, 1.79487235303]
"""By verl's `kl_divergence` and `compute_tail_bucket_kl` of the two likeliest tokens: forward KL, temperature 1."""


@pytest.mark.parametrize(("name", "beta"), list(TRL))
def test_divergences_are_those_of_trl(name, beta):
    distillation = Distillation(name, beta=beta)
    for temperature, expected in zip((1.0, 0.7), TRL[name, beta], strict=True):
        policy = (POLICY.double() / temperature).log_softmax(-1)
        teacher = (TEACHER.double() / temperature).log_softmax(-1)
        found = distillation.of_rows(policy, teacher)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


def test_the_likeliest_tokens_and_one_for_all_others_are_compared_as_by_verl():
    teacher = TEACHER.double().log_softmax(-1)
    top = teacher.topk(2, -1)
    policy = policy_at(POLICY.double(), POLICY.double().logsumexp(-1), top.indices)
    found = Distillation("forward_kl", top_k=2).of_rows(policy, with_rest(top.values))
    torch.testing.assert_close(found, torch.tensor(VERL_TOP_2, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon"])
def test_a_coarser_distribution_is_no_further_and_one_of_all_tokens_is_as_far(name):
    distillation = Distillation(name)
    normaliser = POLICY.logsumexp(-1)
    teacher = TEACHER.log_softmax(-1)
    whole = distillation.of_rows(POLICY.log_softmax(-1), teacher)
    distances = []
    for k in range(1, 5):
        top = teacher.topk(k, -1)
        distances.append(distillation.of_rows(policy_at(POLICY, normaliser, top.indices), with_rest(top.values)))
    for coarse, finer in itertools.pairwise(distances):
        assert (coarse <= finer + 1e-6).all()
    torch.testing.assert_close(distances[-1], whole, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_the_sampled_loss_is_that_of_the_reverse_kl_on_average():
    policy = POLICY.double().requires_grad_()
    logp, teacher = policy.log_softmax(-1), TEACHER.double().log_softmax(-1)
    every_token = Distillation("sampled").of_samples(logp, teacher)  # [2, V]
    on_average = (logp.exp().detach() * every_token).sum()
    (found,) = torch.autograd.grad(on_average, policy, retain_graph=True)
    (expected,) = torch.autograd.grad(Distillation("reverse_kl").of_rows(logp, teacher).sum(), policy)
    torch.testing.assert_close(found, expected)


def test_a_token_is_rewarded_by_how_much_likelier_the_teacher_finds_it():
    rewards = Distillation("sampled", placement="advantage", coef=2.0).token_rewards(
        torch.tensor([-1.0, -3.0]), torch.tensor([-1.5, -1.0])
    )
    assert rewards.tolist() == [-1.0, 4.0]


def test_without_rewards_nothing_has_an_advantage():
    rewards = torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    outcomes = Outcomes(rewards, torch.ones(2, 2, dtype=torch.bool), torch.tensor([1, 2, 3, 0]))
    assert torch.equal(no_advantage(outcomes), torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_k": 0}, "model.distillation.top_k must be at least 1, got 0"),
        ({"beta": 1.0}, "model.distillation.beta must be above 0 and below 1, got 1.0"),
        ({"beta": math.nan}, "model.distillation.beta must be above 0"),
        ({"temperature": 0.0}, "model.distillation.temperature must be above 0, got 0.0"),
        ({"coef": -1.0}, "model.distillation.coef must be at least 0, got -1.0"),
        ({"sft_coef": math.inf}, "model.distillation.sft_coef must be at least 0, got inf"),
        ({"divergence": "sampled", "top_k": 4}, "compares the sampled token alone, got top_k=4"),
        ({"placement": "advantage"}, "rewards the tokens that were sampled, got divergence=reverse_kl"),
    ],
)
def test_options_that_say_nothing_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Distillation(**options)
