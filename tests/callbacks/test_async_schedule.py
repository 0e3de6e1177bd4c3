"""Which prompts are asked, trained on and given up: bounds that hold whatever completions take."""

import itertools
import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings, strategies as st

from longrl.callbacks.async_schedule import MAX_TRIES, AskedState, age_of, num_to_ask, oldest_finished, too_old


def test_ages_count_rollouts_and_round_up():
    assert [age_of(4, step, 2) for step in (4, 5, 6, 7)] == [0, 1, 1, 2]
    assert age_of(None, 9, 1) == 0


def test_the_oldest_tokens_go_first_whatever_the_order_of_asking():
    states = [AskedState(0, 1, True), AskedState(1, 2, True), AskedState(2, 2, False), AskedState(3, 1, True)]
    assert oldest_finished(states, 2) == [1, 0]
    assert oldest_finished(states, 9) == [1, 0, 3]
    assert too_old([*states, AskedState(4, 3, True)], 1) == [1, 2, 4]


@dataclass
class Asked:
    """A prompt of the simulation."""

    name: int
    version: int
    ends: float
    tries: int


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.floats(0.1, 3),
    st.floats(0.0, 0.8),
    st.integers(0, 2),
    st.integers(0, 1 << 30),
)
def test_no_group_is_too_old_and_no_step_waits_without_need(staleness, num_groups, tail, filtered, resamples, seed):
    rng = random.Random(seed)
    fresh = itertools.count()
    numbers = itertools.count()
    queue, asked, now, gone = [], {}, 0.0, []
    for step in range(25):
        states = [AskedState(n, step - one.version, one.ends <= now) for n, one in asked.items()]
        for number in reversed(too_old(states, staleness)):
            one = asked.pop(number)
            if one.tries < MAX_TRIES:
                queue.insert(0, (one.name, one.tries + 1))
            else:
                gone.append(one.name)
        queue += [(next(fresh), 1) for _ in range(num_groups)]
        kept = []
        sampled = 0
        while len(kept) < num_groups and sampled < (1 + resamples) * num_groups:
            for _ in range(num_to_ask(staleness, num_groups, len(asked) + len(kept))):
                name, tries = queue.pop(0) if queue else (next(fresh), 1)
                asked[next(numbers)] = Asked(name, step, now + rng.lognormvariate(0, tail), tries)
            assert len(asked) + len(kept) <= (staleness + 1) * num_groups
            missing = min(num_groups - len(kept), (1 + resamples) * num_groups - sampled)
            assert len(asked) >= missing  # there is always enough to wait for
            now = max(now, sorted(one.ends for one in asked.values())[missing - 1])  # not longer than it must
            states = [AskedState(n, step - one.version, one.ends <= now) for n, one in asked.items()]
            taken = oldest_finished(states, missing)
            assert len(taken) == missing
            for number in taken:
                one = asked.pop(number)
                assert step - one.version <= staleness
                sampled += 1
                gone.append(one.name)
                if rng.random() >= filtered:
                    kept.append(one.name)
        now += rng.random()
    waiting = [one.name for one in asked.values()] + [name for name, _ in queue]
    assert sorted(gone + waiting) == list(range(next(fresh)))  # each once: trained on, filtered, dropped, or to come


@pytest.mark.parametrize("staleness", [1, 2, 5])
def test_alike_prompts_all_get_their_turn(staleness):
    """Where none overtakes another nothing is given up, and the last asked waits exactly `staleness` rollouts."""
    asked, numbers, oldest = {}, itertools.count(), 0
    for step in range(20):
        states = [AskedState(n, step - version, True) for n, version in asked.items()]
        assert not too_old(states, staleness)
        for _ in range(num_to_ask(staleness, 3, len(asked))):
            asked[next(numbers)] = step
        states = [AskedState(n, step - version, True) for n, version in asked.items()]
        for number in oldest_finished(states, 3):
            oldest = max(oldest, step - asked.pop(number))
    assert oldest == staleness
