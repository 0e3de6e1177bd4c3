"""Asynchronous rollouts in simulated time, against closed forms, bounds and hand-drawn schedules."""

import math
import random
from dataclasses import replace

import pytest

from longrl.planning.async_engine import SimulatedEngine, SimulatedGroup
from longrl.planning.async_model import SimulatedRun, Workload, advised_staleness, drawn_groups, simulate, verdict


def long_tailed(seed: int, num_groups: int = 24, size: int = 4) -> list[list[int]]:
    draw = random.Random(seed)
    return [[max(1, int(draw.lognormvariate(4, 1))) for _ in range(size)] for _ in range(num_groups)]


def workload(seed: int = 0, **options) -> Workload:
    """A random one; all completions of a step have a slot unless options say otherwise."""
    draw = random.Random(seed)
    known = {
        "groups": long_tailed(seed),
        "groups_per_step": draw.randint(1, 6),
        "slots": 1000,
        "token_s": draw.uniform(0.001, 0.1),
        "request_s": draw.choice([0.0, 0.001]),
        "update_s": draw.uniform(0.1, 20),
        "other_s": draw.uniform(0, 2),
        "sync_s": draw.uniform(0, 1),
        "prompt_tokens": 100.0,
        "prefill_s": draw.choice([0.0, 1e-4]),
    }
    return Workload(**known | options)


# ---- the engine, by hand ----


def test_completions_that_decode_together_take_the_longest_and_each_of_its_tokens():
    """1 s a step and 0.5 s for each in it: 2 tokens at 2 requests (2 s each), then 3 more at 1 (1.5 s)."""
    engine = SimulatedEngine(slots=2, token_s=1.0, request_s=0.5)
    engine.submit(SimulatedGroup([2, 5]))
    engine.advance_to_end_of_one()
    assert engine.time == pytest.approx(4.0)
    engine.advance_to_end_of_one()
    assert engine.time == pytest.approx(8.5)
    assert engine.busy_s == pytest.approx(8.5)
    assert engine.request_seconds == pytest.approx(2 * 4 + 4.5)


def test_weights_that_change_between_two_tokens_cost_what_is_computed_anew():
    """3 tokens by weights 0, then 1 s of sync and 2 s of prefill, then 2 tokens by weights 1."""
    engine = SimulatedEngine(slots=1, token_s=1.0, request_s=0.0)
    group = SimulatedGroup([5])
    engine.submit(group)
    engine.advance(3.0)
    assert engine.num_tokens_so_far == pytest.approx(3.0)
    engine.set_weights(1, pause_s=1.0, recomputed_s=2.0)
    engine.advance_to_end_of_one()
    assert engine.time == pytest.approx(3 + 1 + 2 + 2)
    assert engine.busy_s == pytest.approx(7.0)  # nothing is under way while weights travel
    assert engine.token_counts(group) == {0: pytest.approx(3.0), 1: pytest.approx(2.0)}


def test_what_is_cancelled_leaves_its_slot_and_begins_anew():
    engine = SimulatedEngine(slots=1, token_s=1.0, request_s=0.0)
    first, second = SimulatedGroup([10]), SimulatedGroup([2])
    engine.submit(first)
    engine.submit(second)
    engine.advance(4.0)
    engine.cancel(first)
    engine.advance(6.0)
    assert engine.finished == [second]
    engine.submit(first)
    engine.advance_to_end_of_one()
    assert engine.time == pytest.approx(16.0)


# ---- a run ----


@pytest.mark.parametrize("seed", range(8))
def test_without_staleness_a_step_is_the_closed_form(seed):
    """sync + token_s longest + request_s all tokens + trainer, over the groups that were drawn."""
    work = workload(seed)
    drawn = drawn_groups(work.groups, seed)
    seconds = rollout = 0.0
    for _ in range(7):
        lengths = [length for _ in range(work.groups_per_step) for length in next(drawn).lengths]
        sampling = work.token_s * max(lengths) + work.request_s * sum(lengths)
        rollout += sampling
        seconds += work.sync_s + sampling + work.trainer_s
    found = simulate(work, 0, 7, seed)
    assert found.seconds_per_step == pytest.approx(seconds / 7)
    assert found.trainer_busy == pytest.approx(1 - rollout / seconds)
    assert found.engine_busy == pytest.approx(rollout / seconds)
    assert found.staleness_mean == found.asked_again == found.dropped == 0


def test_one_rollout_ahead_takes_the_longer_of_rollout_and_update():
    """Every completion has 10 tokens of 1 s; sync 1 s, rewards 2 s."""
    work = Workload([[10, 10]], 3, 100, 1.0, 0.0, update_s=4.0, other_s=2.0, sync_s=1.0)
    assert simulate(work, 1).seconds_per_step == pytest.approx(1 + 2 + 10)
    assert simulate(replace(work, update_s=25.0), 1).seconds_per_step == pytest.approx(1 + 2 + 25)
    assert simulate(work, 1).staleness_mean == pytest.approx(1.0)
    assert simulate(work, 0).seconds_per_step == pytest.approx(1 + 10 + 2 + 4)


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("length", [5, 40, 100])
def test_equal_completions_over_several_updates_are_a_closed_form(k, length):
    """Asked at step s, needed at s + k: k updates, and a wait once in k + 1 steps, hold their seconds."""
    work = Workload([[length] * 2], 3, 100, 1.0, 0.0, update_s=7.0, other_s=1.0, sync_s=0.5)
    found = simulate(work, k, num_steps=6 * (k + 1))
    waits = max(0.0, length - 8.0 * k) / (k + 1)
    assert found.seconds_per_step == pytest.approx(8.5 + waits)
    assert found.trainer_busy == pytest.approx(8.5 / (8.5 + waits))
    assert found.staleness_largest <= k
    assert found.asked_again == 0


@pytest.mark.parametrize("seed", range(12))
def test_shares_staleness_and_seconds_keep_their_bounds(seed):
    slots = random.Random(seed).choice([2, 5, 1000])
    work = workload(seed, slots=slots)
    tokens = sum(map(sum, work.groups)) / len(work.groups) * work.groups_per_step
    for k in (0, 1, 2, 3):
        found = simulate(work, k, 20, seed)
        assert -1e-9 <= found.trainer_busy <= 1 + 1e-9
        assert 0 < found.engine_busy <= 1 + 1e-9
        assert found.staleness_largest <= k
        assert 0 <= found.staleness_mean <= k
        assert found.requests <= work.slots
        assert found.seconds_per_step >= work.sync_s + work.trainer_s - 1e-9
        assert found.seconds_per_step >= 0.5 * work.request_s * tokens  # what was drawn may be shorter than the mean
        assert found == simulate(work, k, 20, seed)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [0, 1])
def test_more_slots_are_never_slower(seed, k):
    seconds = [simulate(workload(seed, slots=slots), k, 10, seed).seconds_per_step for slots in (1, 2, 3, 8, 1000)]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize("k", [2, 4])
def test_prompts_are_bounded_in_number_and_each_is_trained_on_or_dropped_once(k):
    work = workload(5, slots=6, update_s=1.0)
    run = SimulatedRun(work, k, seed=5)
    drawn = []
    run.drawn = (drawn.append(group) or group for group in run.drawn)
    for step in range(40):
        run.step(step)
        assert len(run.open) <= k * work.groups_per_step  # and a step's groups more while it goes on
    assert run.trained == 40 * work.groups_per_step
    assert run.trained + run.dropped + len(run.open) + len(run.again) == len(drawn)


def test_prompts_that_cannot_end_in_time_are_asked_again_twice_and_dropped():
    """One of 8 prompts takes 100 s where a step takes 1: with k = 2 it never ends, with k = 200 it does."""
    groups = [[1], [1], [1], [1], [1], [1], [1], [100]]
    work = Workload(groups, 4, 100, 1.0, 0.0, update_s=1.0)
    found = simulate(work, 2, 200)
    assert found.asked_again == pytest.approx(2 * found.dropped, rel=0.2)
    assert found.dropped == pytest.approx(1 / 7, rel=0.4)
    assert simulate(work, 200, 200).dropped == 0


def test_the_trainer_waits_for_nobody_while_others_are_ready():
    """One of 16 takes 20 s where an update takes 4: k = 0 waits for it in most steps, k = 8 in none."""
    work = Workload([[1]] * 15 + [[20]], 8, 1000, 1.0, 0.0, update_s=4.0)
    assert simulate(work, 0, 100).trainer_busy < 0.4
    found = simulate(work, 8, 100)
    assert found.trainer_busy == pytest.approx(1.0)
    assert found.dropped == 0


def test_cuts_cost_prefill():
    work = workload(3, prefill_s=0.0, slots=4, update_s=1.0)
    free = simulate(work, 4)
    paid = simulate(replace(work, prefill_s=0.01), 4)
    assert paid.seconds_per_step > free.seconds_per_step


# ---- what is advised ----


def test_long_tails_pay_and_an_update_that_is_all_of_a_step_does_not():
    tails = Workload([[1]] * 15 + [[20]], 8, 1000, 1.0, 0.0, update_s=4.0)
    outcomes = [simulate(tails, k, 100) for k in (0, 1, 8, 16)]
    assert advised_staleness(outcomes) == 8
    assert verdict(outcomes).startswith("rollout.max_staleness: 8 pays: ")
    flat = Workload([[1]], 8, 1000, 0.01, 0.0, update_s=4.0)
    outcomes = [simulate(flat, k, 20) for k in (0, 1, 2)]
    assert advised_staleness(outcomes) == 0
    assert verdict(outcomes).startswith("k > 0 does not pay: the trainer waits 0 % of a step at k = 0")
    assert verdict(outcomes[:1]) == "k > 0 does not pay: no other k is faster than 0"


def test_a_staleness_that_drops_long_prompts_is_not_advised():
    work = Workload([[1]] * 7 + [[100]], 4, 100, 1.0, 0.0, update_s=1.0)
    outcomes = [simulate(work, k, 100) for k in (0, 2)]
    assert outcomes[1].seconds_per_step < outcomes[0].seconds_per_step / 2
    assert advised_staleness(outcomes) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"groups": []}, "needs lengths of completions, got none"),
        ({"groups": [[0]]}, "a completion has at least 1 token"),
        ({"slots": 0}, "--slots must be at least 1"),
        ({"update_s": math.nan}, "--update_s must be at least 0"),
        ({"token_s": 0.0, "request_s": 0.0}, "decoding and updates take time"),
    ],
)
def test_what_cannot_be_simulated_is_said(options, said):
    with pytest.raises(ValueError, match=said):
        workload(0, **options)
