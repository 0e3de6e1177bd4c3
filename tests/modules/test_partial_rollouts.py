"""Updates on completions that several weights have drawn: against importance weights written out by hand."""

import dataclasses
import itertools
import math

import pytest
import torch

from longrl import algorithms
from longrl.algorithms import Algorithm
from longrl.modules.mini_batches import flatten_groups, make_mini_batches
from longrl.modules.mismatch import MismatchMonitor
from longrl.strategies.axis import SINGLE_RANK
from longrl.types import Completion, Group
from tests.modules.test_policy import (
    BUDGETS,
    REWARDS,
    advantages_by_hand,
    answers_of,
    batch_of,
    policy_of,
    text_prompts,
    tokens_of,
    train,
)
from tests.tiny import (
    assert_same_gradients,
    gradients,
    plain_model,
    random_completions,
    separate_logps,
    text_family,
)

LENGTHS = [[3, 7, 4], [5, 0, 6], [2, 9, 3]]
NUM_TOKENS = sum(map(sum, LENGTHS))
VERSIONS = [
    [[0, 0, 0], [-3, -3, -1, -1, -1, 0, 0], [-1, -1, 0, 0]],
    [[-3, -3, -3, -3, -3], [], [-2, -1, -1, -1, 0, 0]],
    [[-1, 0], [-3, -3, -3, -3, -2, -2, -2, -2, 0], [0, 0, 0]],
]
"""The step of the update is 0."""
CAP = 1.3
CASES = {
    "coupled": {},
    "coupled, truncated token": {"correction": "truncated_token"},
    "coupled, masked token": {"correction": "masked_token"},
    "coupled gspo": {"surrogate": "sequence_clipped"},
    "coupled reinforce": {"surrogate": "reinforce"},
    "truncated token": {"decoupled": True, "correction": "truncated_token"},
    "masked token": {"decoupled": True, "correction": "masked_token"},
    "truncated sequence": {"decoupled": True, "correction": "truncated_sequence"},
    "masked sequence": {"decoupled": True, "correction": "masked_sequence"},
    "gspo": {"decoupled": True, "correction": "truncated_token", "surrogate": "sequence_clipped"},
    "cispo": {"decoupled": True, "correction": "truncated_token", "surrogate": "cispo"},
}


def objective(name, clip=0.2):
    options = dict(CASES[name])
    functions = {
        field: getattr(algorithms, options[field]) for field in ("correction", "surrogate") if field in options
    }
    decoupled = options.get("decoupled", False)
    return Algorithm(clip_low=clip, clip_high=clip, correction_cap=CAP, decoupled=decoupled, **functions)


def cut_groups(family, sampler):
    """Groups of uneven completions, an empty one among them; `sampler` [N] is what drew their tokens."""
    answers = random_completions(family, LENGTHS)
    said = iter(sampler.float().split([length for group in LENGTHS for length in group]))
    groups = []
    for prompt, ids, versions, rewards in zip(text_prompts(family), answers, VERSIONS, REWARDS, strict=True):
        completions = [
            Completion(one, next(said), "", "stop", versions=torch.tensor(drawn_by, dtype=torch.int64))
            for one, drawn_by in zip(ids, versions, strict=True)
        ]
        groups.append(Group(prompt, completions, rewards, {}, torch.ones(3, dtype=torch.bool)))
    return groups


def drawn_groups(model, family):
    """Groups drawn by policies far from a model where they are old, and by an engine that rounds where they are not."""
    groups = cut_groups(family, torch.zeros(NUM_TOKENS))
    with torch.no_grad():
        logp = separate_logps(plain_model(model, family), [group.prompt for group in groups], answers_of(groups))
    spread = torch.where(versions_of(groups) == 0, 0.05, 0.5)
    return cut_groups(family, logp + spread * torch.randn(NUM_TOKENS, generator=torch.Generator().manual_seed(3)))


def versions_of(groups):
    return torch.cat([completion.versions for group in groups for completion in group.completions])


def loss_by_hand(logp, start, groups, name, clip=0.2, token_mean=False):
    """Float64 loss of [N] log-probabilities; `start` are those before the first update."""
    options = CASES[name]
    table = advantages_by_hand(torch.stack([group.rewards for group in groups]), torch.ones(len(groups), 3))
    completions = [completion for group in groups for completion in group.completions]
    num_counted = sum(completion.num_sampled > 0 for completion in completions)
    low, high = 1 - clip, 1 + clip
    total, place = logp.new_zeros(()), 0
    for completion, a in zip(completions, itertools.chain(*table), strict=True):
        length = completion.num_sampled
        part = slice(place, place + length)
        place += length
        if not length:
            continue
        drawn = completion.logprobs.double()
        old = start[part]
        if not options.get("decoupled"):
            old = torch.where(completion.versions == 0, old, drawn)
        factor = correction_by_hand((old - drawn).exp(), options.get("correction"))
        ratio = (logp[part] - old).exp()
        if options.get("surrogate") == "sequence_clipped":
            ratio = (logp[part] - old).mean().exp().expand(length)
            if factor.unique().numel() > 1:  # each token keeps its own gradient, sec. 4.3 of the paper
                ratio = ratio.detach() * (logp[part] - logp[part].detach()).exp()
        losses = -torch.minimum(ratio * a, ratio.clamp(low, high) * a)
        if options.get("surrogate") == "cispo":
            losses = -ratio.detach().clamp(low, high) * a * logp[part]
        if options.get("surrogate") == "reinforce":
            losses = -ratio.detach().clamp(max=high) * a * logp[part]
        weight = 1 / len(logp) if token_mean else 1 / (num_counted * length)
        total = total + (weight * factor * losses).sum()
    return total


def correction_by_hand(q, name):
    if name is None:
        return torch.ones_like(q)
    if name.endswith("sequence"):
        q = q.prod().expand(len(q))
    if name.startswith("masked"):
        return torch.where(q <= CAP, q, 0.0)
    return q.clamp(max=CAP)


def gradients_by_hand(plain, start, groups, name, **options):
    """Loss and gradients of a stock model, one forward per completion."""
    plain.zero_grad()
    logp = separate_logps(plain, [group.prompt for group in groups], answers_of(groups))
    loss = loss_by_hand(logp, logp.detach() if start is None else start, groups, name, **options)
    loss.backward()
    return loss.item(), gradients(plain)


@pytest.fixture(scope="module")
def drawn():
    """Stock weights, and groups that they and others have drawn."""
    family = text_family()
    policy = policy_of(family)
    policy.configure_model()
    return plain_model(policy.model, family), drawn_groups(policy.model, family)


@pytest.mark.parametrize("name", CASES)
def test_every_token_counts_by_the_weights_that_drew_it(drawn, name):
    """Whatever the split into micro-batches, packed or not."""
    plain, groups = drawn
    loss, expected = gradients_by_hand(plain, None, groups, name)
    for budget in BUDGETS.values():
        policy = policy_of(text_family(), algorithm=objective(name), max_tokens_per_micro_batch=budget)
        seen = train(policy, batch_of(policy, groups))
        assert seen.metrics[0]["train/loss"] == pytest.approx(loss, rel=1e-5, abs=1e-7)
        assert_same_gradients(seen.gradients[0], expected, 2e-5)
    decoupled = CASES[name].get("decoupled")
    assert policy.num_scoring_passes == (0 if decoupled else 1)
    clipped_sides = sum(seen.metrics[0][f"train/clip_fraction_{side}"] > 0 for side in ("low", "high"))
    assert (clipped_sides > 0) != bool(decoupled)  # the first update of a decoupled one is at a ratio of 1


@pytest.mark.parametrize("name", ["coupled, truncated token", "truncated token", "masked sequence"])
def test_later_updates_keep_versions_and_weights_of_the_first(drawn, name):
    """Two mini-batches: the second is clipped around the policy before both, or around what drew its tokens."""
    family = text_family()
    prompts = text_prompts(family)
    groups = drawn[1]
    fresh = policy_of(family)
    fresh.configure_model()
    plain = plain_model(fresh.model, family)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    with torch.no_grad():
        start = separate_logps(plain, prompts, tokens_of(groups))
    losses, expected = [], []
    first = sum(LENGTHS[0])
    for part, before in ((groups[:1], start[:first]), (groups[1:], start[first:])):
        loss, grads = gradients_by_hand(plain, before, part, name, clip=0.02)
        losses.append(loss)
        expected.append(grads)
        optimizer.step()
    policy = policy_of(
        family, algorithm=objective(name, 0.02), mini_batches_per_rollout=2, max_tokens_per_micro_batch=100
    )
    if policy.algorithm.decoupled:  # an engine that was found to agree does not stand for the policy before the update
        policy.mismatch_monitor = MismatchMonitor(bypass_below=1.0)
        policy.mismatch_monitor.last_mean = 0.0
    seen = train(policy, batch_of(policy, groups))
    assert seen.steps == 2
    assert seen.metrics[0]["train/loss"] == pytest.approx(sum(losses) / 2, abs=1e-4)
    for found, wanted in zip(seen.gradients, expected, strict=True):
        assert_same_gradients(found, wanted, 2e-3)  # Adam's first steps enlarge rounding noise
    assert seen.metrics[0]["train/clip_fraction_low"] + seen.metrics[0]["train/clip_fraction_high"] > 0


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_kl_penalty_in_the_reward_is_at_the_old_policy(drawn, decoupled):
    """Before the first update policy and reference are one, what drew older tokens is not."""
    plain = objective("truncated token" if decoupled else "coupled")
    with_kl = dataclasses.replace(plain, kl=algorithms.k2, kl_coef=1.0, kl_placement="reward")
    found = []
    for algorithm in (plain, with_kl):
        policy = policy_of(text_family(), algorithm=algorithm)
        found.append(train(policy, batch_of(policy, drawn[1])).gradients[0])
    assert same(*found) == decoupled


def same(grads, others):
    return all(torch.allclose(grads[name], others[name], rtol=1e-4, atol=1e-6) for name in others)


def test_staleness_counts_rollouts_and_mini_batches_keep_it(drawn):
    groups = drawn[1]
    flat = flatten_groups(groups, torch.device("cpu"), step=4, steps_per_rollout=2)
    ages = {-3: 4, -2: 3, -1: 3, 0: 2}  # 7, 6, 5 and 4 steps
    assert flat.staleness.tolist() == [ages[version] for version in versions_of(groups).tolist()]
    assert flat.num_stale == NUM_TOKENS
    assert flatten_groups(groups, torch.device("cpu")).num_stale == int((versions_of(groups) < 0).sum())
    parts = make_mini_batches(flat, 2, Algorithm(), SINGLE_RANK, None, None)
    assert torch.equal(torch.cat([part.staleness for part in parts]), flat.staleness)


@pytest.mark.parametrize("carried_over", [False, True])
def test_without_versions_the_groups_flag_says_all(drawn, carried_over):
    groups = [
        dataclasses.replace(
            group,
            completions=[dataclasses.replace(one, versions=None) for one in group.completions],
            carried_over=carried_over,
        )
        for group in drawn[1]
    ]
    flat = flatten_groups(groups, torch.device("cpu"), step=9)
    assert flat.staleness.tolist() == [int(carried_over)] * NUM_TOKENS
    # Where there are versions, they alone count: a step that was left out has made nothing older.
    flagged = [dataclasses.replace(group, carried_over=carried_over) for group in drawn[1]]
    assert torch.equal(
        flatten_groups(flagged, torch.device("cpu")).staleness, flatten_groups(drawn[1], torch.device("cpu")).staleness
    )


def test_mismatch_is_told_by_age_and_that_of_older_weights_ends_no_run(drawn):
    """The second step trains on the same tokens, which are a rollout older then."""
    policy = policy_of(text_family(), algorithm=objective("truncated token"))
    policy.mismatch_monitor = MismatchMonitor(max_mismatch=0.1, max_staleness=4)
    seen = train(policy, *[batch_of(policy, drawn[1])] * 2)
    first, second = seen.metrics
    names = [f"train/mismatch_mean_staleness_{age}" for age in range(5)]
    assert first[names[0]] == first["train/mismatch_mean"] < 0.1
    assert all(first[name] > 0.2 for name in names[1:4])
    assert math.isnan(first[names[4]])
    assert math.isnan(second[names[0]])
    assert math.isnan(second["train/mismatch_mean"])
    assert all(second[name] > 0 for name in names[1:])
    policy = policy_of(text_family(), algorithm=objective("truncated token"))
    policy.mismatch_monitor = MismatchMonitor(max_mismatch=0.01, max_staleness=4)
    with pytest.raises(RuntimeError, match="engine and trainer have parted"):
        train(policy, batch_of(policy, drawn[1]))


@pytest.mark.parametrize(("max_staleness", "counted"), [(0, [0.1]), (1, [0.1, 0.3, 0.5]), (2, [0.1])])
def test_one_rollout_ahead_all_tokens_are_compared_else_those_of_this_step(max_staleness, counted):
    monitor = MismatchMonitor(max_mismatch=1.0, max_staleness=max_staleness)
    monitor.add_tokens(torch.tensor([-1.1, -1.3, -1.5]), torch.full((3,), -1.0), torch.tensor([0, 1, 3]))
    monitor.finish_rollout(SINGLE_RANK)
    assert monitor.metrics["mismatch_mean"] == pytest.approx(sum(counted) / len(counted))
    by_age = {name: value for name, value in monitor.metrics.items() if "staleness" in name}
    wanted = {0: [], 1: [0.1, 0.4], 2: [0.1, 0.3, 0.5]}[max_staleness]  # the last one counts all that is older
    assert list(by_age.values()) == pytest.approx(wanted)
