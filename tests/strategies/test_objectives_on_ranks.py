"""Objectives that look at all tokens or completions of a step, on ranks that share sequences or have other groups."""

import dataclasses
import math

import pytest
import torch

from longrl.algorithms import Algorithm, optimal_token_baseline, part_normalized, token_mean
from tests.distributed import run_distributed
from tests.modules.test_policy import REWARDS, batch_of, policy_of, train
from tests.strategies.test_mr_sp import Case, on_every_rank
from tests.tiny import assert_same_gradients

OBJECTIVES = {
    "parts": {"advantage": part_normalized},
    "token baseline, top entropy": {"advantage": optimal_token_baseline, "top_entropy_share": 0.3},
}


@dataclasses.dataclass(frozen=True)
class ObjectiveCase(Case):
    """A grid that trains on texts by one of the objectives."""

    prompts: str = "text"
    model: str = "qwen3 text"
    objective: str = "parts"

    def algorithm(self):
        return Algorithm(token_weights=token_mean, **OBJECTIVES[self.objective])

    def groups(self, shard=None, pixels_left_out=False):
        groups = super().groups()
        for group, rewards in zip(groups, REWARDS, strict=True):
            group.reward_parts = {"accuracy": rewards, "format": 1 - rewards.round()}
            group.part_weights = {"accuracy": 1.0, "format": 0.5}
        groups[1].reward_parts["format"] = torch.full((3,), math.nan)
        for group in groups:
            parts = group.reward_parts
            group.rewards = parts["accuracy"] + 0.5 * parts["format"].nan_to_num(0.0)
        return groups


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_any_grid_gives_the_gradients_of_one_process(objective):
    """Two ranks share each sequence, or have two groups and one; one micro-batch or several."""
    whole = ObjectiveCase(objective=objective)
    policy = policy_of(whole.family(), algorithm=whole.algorithm())
    alone = train(policy, batch_of(policy, whole.groups()))
    cases = [ObjectiveCase(objective=objective, sp=sp, budget=budget) for sp in (1, 2) for budget in (57, 10_000)]
    for of_rank in run_distributed(on_every_rank, 2, cases, 2):
        for metrics, grads in of_rank:
            assert_same_gradients(grads, alone.gradients[0], 1e-5)
            for name in ("loss", "entropy_threshold", "high_entropy_share"):
                expected = alone.metrics[0].get(f"train/{name}")
                if expected is not None:
                    assert metrics[f"train/{name}"] == pytest.approx(expected, rel=1e-4, abs=2e-6)
