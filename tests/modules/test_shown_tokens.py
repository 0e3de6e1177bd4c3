"""Advantages, weights, losses and metrics of completions that are shown tokens: as if they were their sampled ones."""

from dataclasses import replace

import pytest
import torch

from longrl.algorithms import Algorithm, Constant, group_centered, sequence_clipped, token_mean
from longrl.modules.mini_batches import RolloutLoss, flatten_groups, make_mini_batches
from longrl.modules.mismatch import MismatchMonitor
from longrl.packing.pack import pack
from longrl.rewards.length import CosineLength, SoftOverlong
from longrl.strategies.axis import SINGLE_RANK
from longrl.types import Completion, Group, PolicyOutput
from tests.modules.test_policy import REWARDS, answers_of, sampled, text_prompts, with_turns
from tests.tiny import row, text_family

ALGORITHMS = {
    "grpo": Algorithm(kl_coef=0.1),
    "dapo": Algorithm(token_weights=token_mean, clip_high=0.28),
    "dr_grpo": Algorithm(advantage=group_centered, token_weights=Constant(12)),
    "gspo": Algorithm(surrogate=sequence_clipped),
    "kl in the reward": Algorithm(kl_coef=0.1, kl_placement="reward", token_weights=token_mean),
}


def groups_of_both():
    """Groups whose completions were shown something, and the same with their sampled tokens alone."""
    generator = torch.Generator().manual_seed(2)
    family = text_family()
    with_shown = []
    alone = []
    for group in with_turns(family, sampled(family, text_prompts(family))):
        shown = [replace(one, logprobs=-torch.rand(one.num_sampled, generator=generator)) for one in group.completions]
        with_shown.append(replace(group, completions=shown))
        alone.append(replace(group, completions=[without_shown(one) for one in shown]))
    return with_shown, alone


def without_shown(completion):
    ids = completion.token_ids if completion.sampled is None else completion.token_ids[completion.sampled]
    return Completion(ids, completion.logprobs, "", "stop")


def step(groups, algorithm, num_mini_batches=2):
    """Mini-batches of a rollout and what the losses of their tokens say, by scores drawn for each sampled token."""
    generator = torch.Generator().manual_seed(5)
    flat = flatten_groups(groups, torch.device("cpu"))
    old, reference = (-torch.rand(len(flat.sampler_logp), generator=generator) for _ in range(2))
    mini_batches = make_mini_batches(flat, num_mini_batches, algorithm, SINGLE_RANK, old, reference)
    said = []
    for mini_batch in mini_batches:
        monitor = MismatchMonitor(max_mismatch=10.0)
        loss = RolloutLoss(algorithm, mini_batch, monitor)
        logp, entropy = (-torch.rand(len(mini_batch.advantages), generator=generator) for _ in range(2))
        logp.requires_grad_()
        prompts = [group.prompt for group in mini_batch.groups]
        sums = {}
        for packed in pack(prompts, answers_of(mini_batch.groups), 1 << 30):
            rows = packed.token_index
            result = loss(packed, PolicyOutput(logp[rows], entropy[rows].neg()))
            result.loss.backward()
            sums = {"loss": result.loss.item(), **{name: float(value) for name, value in result.metrics.items()}}
        monitor.finish_rollout(SINGLE_RANK)
        said.append((sums, monitor.metrics, torch.cat(loss.entropies), logp.grad))
    return flat, mini_batches, said


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_step_is_that_of_the_sampled_tokens_alone(name):
    shown, alone = (step(groups, ALGORITHMS[name]) for groups in groups_of_both())
    assert torch.equal(shown[0].lengths, alone[0].lengths)
    for found, wanted in zip(shown[1], alone[1], strict=True):
        for part in ("advantages", "weights", "sampler_logp", "staleness", "nonfinite"):
            assert torch.equal(getattr(found, part), getattr(wanted, part)), part
    for found, wanted in zip(shown[2], alone[2], strict=True):
        assert found[:2] == wanted[:2]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[2:], wanted[2:], strict=True))


def test_weights_by_hand():
    """2, 1 and 1 sampled tokens of 30, 1 and 9: GRPO divides by each length, DAPO by all, Dr.GRPO by its constant.

    Rewards 1, 0 and 0.5 have the mean 0.5 and the deviation 0.5.
    """
    family = text_family()
    (prompt,) = text_prompts(family, 1)
    completions = [
        Completion(torch.zeros(30, dtype=torch.int64), torch.zeros(2), "", "stop", sampled=torch.arange(30) > 27),
        Completion(torch.zeros(1, dtype=torch.int64), torch.zeros(1), "", "stop"),
        Completion(torch.zeros(9, dtype=torch.int64), torch.zeros(1), "", "stop", sampled=torch.arange(9) == 4),
    ]
    group = Group(prompt, completions, REWARDS[0], {}, torch.ones(3, dtype=torch.bool))
    flat = flatten_groups([group], torch.device("cpu"))
    wanted = {"grpo": [1 / 6, 1 / 3, 1 / 3], "dapo": [1 / 4] * 3, "dr_grpo": [1 / 36] * 3}
    for name, weights in wanted.items():
        (mini_batch,) = make_mini_batches(flat, 1, ALGORITHMS[name], SINGLE_RANK, None, None)
        torch.testing.assert_close(mini_batch.weights, torch.tensor(weights))
    (mini_batch,) = make_mini_batches(flat, 1, ALGORITHMS["grpo"], SINGLE_RANK, None, None)
    torch.testing.assert_close(mini_batch.advantages, torch.tensor([1.0, 1.0, -1.0, 0.0]), atol=1e-5, rtol=0)


def test_rewards_for_length_count_sampled_tokens():
    for group, plain in zip(*groups_of_both(), strict=True):
        for ours, theirs in zip(group.completions, plain.completions, strict=True):
            for reward in (SoftOverlong(10, 10), CosineLength(10)):
                assert reward(ours, row()) == reward(theirs, row())
