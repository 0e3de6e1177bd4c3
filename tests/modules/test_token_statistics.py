"""What objectives read of tokens before an update: entropies, norms, parts of rewards; against a stock model."""

import itertools
import math

import pytest
import torch

from longrl import algorithms
from longrl.algorithms import Algorithm, optimal_token_baseline, part_normalized, token_mean
from longrl.modules.mini_batches import flatten_groups, make_mini_batches, reward_parts
from longrl.modules.token_statistics import NO_STATISTICS, TokenStatistics, gradient_norms, token_statistics
from longrl.rewards.reward_sum import RewardSum, RewardTerm
from longrl.strategies.axis import SINGLE_RANK
from longrl.types import Completion, Group
from tests.modules.test_policy import (
    BUDGETS,
    LENGTHS,
    REWARDS,
    advantages_by_hand,
    answers_of,
    batch_of,
    disturb_text,
    policy_of,
    sampled,
    text_prompts,
    train,
)
from tests.tiny import assert_same_gradients, gradients, plain_model, separate_logps, text_family

SHARE = 0.3


def logits_of(plain, groups):
    """[N, V] float64 logits that predict each completion token, one ordinary forward per completion."""
    rows = []
    for group in groups:
        for completion in group.completions:
            ids = torch.cat([group.prompt.input_ids, completion.token_ids])
            with torch.no_grad():
                logits = plain(input_ids=ids[None]).logits[0].double()
            first = len(group.prompt.input_ids) - 1
            rows.append(logits[first : first + len(completion.token_ids)])
    return torch.cat(rows)


def entropies_of(logits):
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def targets_of(groups):
    return torch.cat([completion.token_ids for group in groups for completion in group.completions])


def per_token(values):
    lengths = torch.tensor(list(itertools.chain(*LENGTHS)))
    return torch.as_tensor(values, dtype=torch.float64).flatten().repeat_interleave(lengths)


@pytest.fixture
def setup():
    family = text_family()
    policy = policy_of(family)
    policy.configure_model()
    groups = sampled(family, text_prompts(family))
    return family, plain_model(policy.model, family), groups


# ---- gradient norms ----


def test_the_norm_is_that_of_the_gradient_with_respect_to_the_logits():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 9, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    targets = torch.tensor([0, 3, 8, 1, 1, 5])
    logp = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(logp.sum(), logits)
    halved = (2 * logits).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(gradient_norms(logp, halved), gradient.square().sum(1))


def test_most_objectives_read_nothing():
    def never(temperature):
        raise AssertionError("a forward pass more than needed")

    assert token_statistics(Algorithm(), never, 1.0) is NO_STATISTICS


@pytest.mark.parametrize("budget", [57, 10_000])
def test_a_step_with_the_optimal_token_baseline_is_the_loss_by_hand(setup, budget):
    family, plain, groups = setup
    logits = logits_of(plain, groups)
    pi = logits.softmax(-1)
    norms = 1 - 2 * pi.gather(1, targets_of(groups)[:, None])[:, 0] + pi.square().sum(1)
    parts = iter(norms.split(list(itertools.chain(*LENGTHS))))
    advantages = []
    for rewards, lengths in zip(REWARDS.double(), LENGTHS, strict=True):
        energies = [next(parts).cumsum(0) for _ in lengths]
        for reward, length in zip(rewards, lengths, strict=True):
            for t in range(length):
                alive = [i for i, other in enumerate(lengths) if other > t]
                top = sum(energies[i][t] * rewards[i] for i in alive)
                advantages.append(reward - top / sum(energies[i][t] for i in alive))
    logp = separate_logps(plain, [group.prompt for group in groups], answers_of(groups))
    loss = -(torch.stack(advantages) * logp).mean()
    loss.backward()
    algorithm = Algorithm(advantage=optimal_token_baseline, token_weights=token_mean)
    policy = policy_of(family, algorithm=algorithm, max_tokens_per_micro_batch=budget)
    seen = train(policy, batch_of(policy, groups))
    assert policy.num_scoring_passes == 2
    assert_same_gradients(seen.gradients[0], gradients(plain), 1e-5)


# ---- top entropy ----


def chosen_by_hand(entropies):
    wanted = math.floor(SHARE * (len(entropies) - 1)) + 1
    threshold = entropies.sort(descending=True).values[wanted - 1]
    return entropies >= threshold, threshold


def test_a_norm_that_is_no_number_leaves_out_its_completion_alone():
    """Sums over tokens run through all completions of a rank."""
    family = text_family()
    flat = flatten_groups(sampled(family, text_prompts(family)), torch.device("cpu"))
    algorithm = Algorithm(advantage=optimal_token_baseline)
    norms = torch.rand(int(flat.lengths.sum()), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    norms[4] = math.nan  # of the second completion
    (found,) = make_mini_batches(flat, 1, algorithm, SINGLE_RANK, None, None, TokenStatistics(gradient_norms=norms))
    assert found.nonfinite.tolist() == [False, True] + [False] * 7
    flat.valid[0, 1] = flat.in_loss[0, 1] = False
    known = TokenStatistics(gradient_norms=norms.nan_to_num(0.0))
    (wanted,) = make_mini_batches(flat, 1, algorithm, SINGLE_RANK, None, None, known)
    torch.testing.assert_close(found.advantages, wanted.advantages)
    assert found.advantages.any()


@pytest.mark.parametrize("surrogate", ["clipped", "sequence_clipped", "geometric_clipped", "cispo"])
def test_only_tokens_of_high_entropy_get_the_policy_gradient_whatever_the_micro_batches(setup, surrogate):
    family, plain, groups = setup
    chosen, threshold = chosen_by_hand(entropies_of(logits_of(plain, groups)))
    assert 0 < chosen.sum() < len(chosen) / 2
    advantages = per_token(advantages_by_hand(REWARDS, torch.ones(3, 3)))
    logp = separate_logps(plain, [group.prompt for group in groups], answers_of(groups))
    loss = -(advantages * chosen * logp).mean()  # all tokens count in the mean
    loss.backward()
    for budget in BUDGETS.values():
        algorithm = Algorithm(
            surrogate=getattr(algorithms, surrogate), token_weights=token_mean, top_entropy_share=SHARE
        )
        policy = policy_of(family, algorithm=algorithm, max_tokens_per_micro_batch=budget)
        seen = train(policy, batch_of(policy, groups))
        assert policy.num_scoring_passes == 1
        assert_same_gradients(seen.gradients[0], gradients(plain), 1e-5)
        metrics = seen.metrics[0]
        assert metrics["train/entropy_threshold"] == pytest.approx(threshold.item(), rel=1e-5)
        assert metrics["train/high_entropy_share"] == pytest.approx(chosen.double().mean().item())


def test_every_update_has_a_threshold_of_its_own_and_a_kl_term_keeps_all_tokens(setup):
    """Two mini-batches: groups 0, and 1 and 2. The reference is the policy before it was disturbed."""
    family, plain, groups = setup
    with torch.no_grad():
        reference = separate_logps(plain, [group.prompt for group in groups], answers_of(groups))
    policy = policy_of(family)
    policy.configure_model()
    disturb_text(policy)
    plain = plain_model(policy.model, family)
    first = slice(0, sum(LENGTHS[0]))
    chosen, _ = chosen_by_hand(entropies_of(logits_of(plain, groups))[first])
    advantages = per_token(advantages_by_hand(REWARDS, torch.ones(3, 3)))[first]
    logp = separate_logps(plain, [group.prompt for group in groups], answers_of(groups))[first]
    x = reference[first] - logp
    loss = (-advantages * chosen * logp + 0.3 * (x.exp() - 1 - x)).mean()
    loss.backward()
    algorithm = Algorithm(token_weights=token_mean, top_entropy_share=SHARE, kl_coef=0.3)
    policy = policy_of(family, algorithm=algorithm, mini_batches_per_rollout=2)
    seen = train(policy, batch_of(policy, groups), before=disturb_text)
    assert policy.num_scoring_passes == 2  # the policy's and the reference's
    assert_same_gradients(seen.gradients[0], gradients(plain), 1e-5)


# ---- parts of rewards ----


def in_parts(groups, parts, weights):
    for index, group in enumerate(groups):
        group.reward_parts = {name: values[index] for name, values in parts.items()}
        group.part_weights = dict(weights)
        group.rewards = sum(weights[name] * part.nan_to_num(0.0) for name, part in group.reward_parts.items())
    return groups


def test_rewards_reach_the_advantage_in_parts_with_their_weights(setup):
    family, plain, groups = setup
    parts = {"accuracy": REWARDS, "format": 1 - REWARDS.round()}
    parts["format"][1] = math.nan  # does not apply to the row
    weights = {"accuracy": 1.0, "format": 0.25}
    total = torch.zeros(3, 3, dtype=torch.float64)
    for name, values in parts.items():
        centered = (values - values.mean(1, keepdim=True)).double()
        normalised = centered / (values.double().std(1, keepdim=True) + 1e-4)
        total += weights[name] * normalised.nan_to_num(0.0)
    advantages = per_token(total / (total.std() + 1e-4))
    logp = separate_logps(plain, [group.prompt for group in groups], answers_of(groups))
    (-(advantages * logp).mean()).backward()
    policy = policy_of(family, algorithm=Algorithm(advantage=part_normalized, token_weights=token_mean))
    seen = train(policy, batch_of(policy, in_parts(groups, parts, weights)))
    assert policy.num_scoring_passes == 0
    assert_same_gradients(seen.gradients[0], gradients(plain), 1e-5)


def answers(text):
    return [Completion(torch.tensor([1]), torch.zeros(1), one, "stop") for one in text]


def test_a_reward_says_the_weights_of_its_parts(setup):
    _, _, groups = setup
    terms = [
        RewardTerm(lambda completion, row: len(completion.text), weight=0.5, name="length"),
        RewardTerm(lambda completion, row: None, weight=2.0, name="none"),
    ]
    scored = [Group(group.prompt, answers(["", "abc"])) for group in groups]
    RewardSum(terms).score(scored)
    assert scored[0].part_weights == {"length": 0.5, "none": 2.0}
    flat = flatten_groups(scored, torch.device("cpu"))
    assert flat.parts["length"].tolist() == [[0.0, 3.0]] * 3
    assert flat.parts["none"].isnan().all()
    assert {name: weights.tolist() for name, weights in flat.part_weights.items()} == {
        "length": [0.5] * 3,
        "none": [2.0] * 3,
    }


def test_groups_of_another_reward_lack_its_parts(setup):
    """As those of a checkpoint, whose run had other options."""
    _, _, groups = setup
    in_parts(groups[:2], {"accuracy": REWARDS}, {"accuracy": 1.0})
    in_parts(groups[1:2], {"format": REWARDS}, {"format": 0.5})
    values, weights = reward_parts(groups)
    assert values["accuracy"].isnan().any(1).tolist() == [False, True, True]
    assert weights["accuracy"].tolist() == [1.0, 0.0, 0.0]
    assert weights["format"].tolist() == [0.0, 0.5, 0.0]
    assert reward_parts([]) == ({}, {})
