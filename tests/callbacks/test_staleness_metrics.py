"""Ages of tokens by hand, and what other options of a rollout make of completions that several weights have drawn."""

import contextlib
import logging
import math

import pytest
import torch

from longrl.algorithms import Algorithm, truncated_token
from longrl.callbacks.generations import group_samples
from longrl.callbacks.staleness_checks import check_stale_tokens
from longrl.callbacks.staleness_metrics import staleness_metrics
from longrl.modules.policy import PolicyModule
from longrl.strategies.axis import SINGLE_RANK
from longrl.types import Completion, Group, Prompt, Row
from tests.tiny import qwen3_vl_family, text_family

PROMPT = Prompt("1", torch.zeros(1), torch.zeros(1, 1), (), Row("1", "", ""))


def group(*versions, carried_over=False):
    completions = []
    for of_tokens in versions:
        known = None if of_tokens is None else torch.tensor(of_tokens, dtype=torch.int64)
        size = 2 if known is None else len(known)
        completions.append(Completion(torch.zeros(size), torch.zeros(size), "", "stop", versions=known))
    return Group(PROMPT, completions, torch.zeros(len(versions)), {}, torch.ones(1), carried_over=carried_over)


class TwoRanks:
    """The other one has groups of its own."""

    def __init__(self, other):
        self.other = other

    def sum_dict(self, values):
        if not isinstance(self.other, dict):
            self.other = self._sums_of(self.other)
        return {name: value + self.other.get(name, 0.0) for name, value in values.items()}

    def max(self, number):
        return max(number, 3)

    def _sums_of(self, groups):
        noted = {}
        first = type(
            "Noting", (), {"max": lambda _, n: n, "sum_dict": lambda _, values: noted.update(values) or values}
        )
        staleness_metrics(groups, 8, 2, 2, first())
        return noted


def test_ages_are_rollouts_of_two_steps_over_the_tokens_of_all_ranks():
    """Step 8: tokens of steps 8, 7, 6, 5 are 0, 1, 1 and 2 rollouts old, and one of step 3 three, on the other rank."""
    here = [group([8, 8], [6, 7, 7, 8], []), group([5], [5, 5])]
    found = staleness_metrics(here, 8, 2, 2, TwoRanks([group([3], [8, 8])]))
    assert found == {
        "rollout/staleness_mean": (0 * 3 + 1 * 3 + 2 * 3 + 3) / 12,
        "rollout/staleness_max": 3.0,
        "rollout/staleness_share_0": 5 / 12,
        "rollout/staleness_share_1": 3 / 12,
        "rollout/staleness_share_2": 4 / 12,
        "rollout/cut_share": 1 / 7,
    }


def test_groups_that_wait_grow_older_and_those_without_versions_are_one_rollout_old():
    waiting = [group([0, 1], [2, 2])]
    assert [staleness_metrics(waiting, step, 1, 4, SINGLE_RANK)["rollout/staleness_max"] for step in (2, 3, 6)] == [
        2,
        3,
        6,
    ]
    assert staleness_metrics(waiting, 6, 1, 4, SINGLE_RANK)["rollout/staleness_share_4"] == 1.0
    for carried_over in (False, True):
        flagged = staleness_metrics([group(None, None, carried_over=carried_over)], 9, 1, 1, SINGLE_RANK)
        assert flagged["rollout/staleness_mean"] == flagged["rollout/staleness_share_1"] == carried_over
        assert flagged["rollout/cut_share"] == 0
    none = staleness_metrics([], 1, 1, 1, SINGLE_RANK)
    assert none.pop("rollout/staleness_max") == 0
    assert all(map(math.isnan, none.values()))


def test_samples_say_which_weights_drew_how_many_tokens():
    cut, empty, plain = group_samples(group([3, 3, 5, 5, 5], [], None), 7, 3)
    assert cut["versions"] == [[3, 2], [5, 3]]
    assert empty["versions"] == []
    assert "versions" not in plain


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_experts_are_not_replayed_where_weights_change_within_a_completion(max_staleness):
    family = qwen3_vl_family(True)
    family.router_replay = True
    refused = pytest.raises(
        ValueError, match=r"rollout.max_staleness=2 weights change .*; set rollout.max_staleness to 1"
    )
    with refused if max_staleness == 2 else contextlib.nullcontext():
        check_stale_tokens(PolicyModule(family), max_staleness, 0.0)


def test_a_decoupled_objective_never_takes_the_engines_log_probabilities(caplog):
    algorithm = Algorithm(decoupled=True, correction=truncated_token)
    with caplog.at_level(logging.WARNING):
        check_stale_tokens(PolicyModule(text_family(), algorithm), 2, 0.0)
        check_stale_tokens(PolicyModule(text_family()), 2, 0.1)
        assert not caplog.records
        check_stale_tokens(PolicyModule(text_family(), algorithm), 2, 0.1)
    assert "bypass_old_logp_below has no effect with model.algorithm.decoupled=true" in caplog.text
