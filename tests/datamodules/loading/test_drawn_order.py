"""Rows drawn by what is known of them: the same on all ranks, resumed exactly, shared by any number of ranks."""

import io
import math
import threading
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies as st

from longrl.datamodules.loading.curriculum import Curriculum, group_outcomes
from longrl.datamodules.loading.drawn_order import DrawnOrder
from longrl.datamodules.loading.learning_progress import LearningProgress, SourceProgress
from longrl.datamodules.loading.loader import LoaderOptions, PromptStream
from longrl.datamodules.loading.mixing import DataSource
from longrl.datamodules.loading.pass_rates import PassRates, RowPool
from longrl.datamodules.loading.row_marks import RowDraw, drawn_index, marked
from longrl.datamodules.loading.row_order import RowOutcome
from longrl.datamodules.loading.schedules import Schedule, StepBudgets, VideoSchedule
from longrl.datamodules.media.sampling import VideoSampling
from longrl.types import Group
from tests.datamodules.loading.test_loader import FakeRender, dataset, ids, rows, skip_log
from tests.distributed import run_distributed

RULE = PassRates(low=0.1, high=0.9, weight="variance", pass_share=0.5, retry_after=3, memory=0.0)
SIZES = (7, 5)
PER_STEP = 6
"""Rows of a step of all ranks."""


def order_of(rank=0, world_size=1, delay_steps=2, mixed=True):
    sizes = SIZES if mixed else (sum(SIZES),)
    progress = None
    if mixed:
        progress = SourceProgress(LearningProgress(window=3, floor=0.3), ["a", "b"], [0.5, 0.5])
    pools = [RowPool(RULE, [float("nan")] * size) for size in sizes]
    weights = [1 / len(sizes)] * len(sizes)
    ahead = (delay_steps - 1) * PER_STEP // world_size
    return DrawnOrder(pools, 4, rank, world_size, ahead=ahead, weights=weights, progress=progress)


def outcome(row, step):
    """What a row's completions are worth in a step: some rows are learned, some never."""
    rate = (0.0, 0.5, 1.0, min(1.0, step / 4))[row % 4]
    return RowOutcome(row, rate, 2 * rate)


class Ranks:
    """Ranks as threads, whose gathers meet at a barrier."""

    def __init__(self, world_size, **options):
        self.orders = [order_of(rank, world_size, **options) for rank in range(world_size)]
        self.positions = [0] * world_size
        self._barrier = threading.Barrier(world_size)
        self._slots = [None] * world_size
        for order in self.orders:
            order.gather = lambda state, rank=order.rank: self._gather(rank, state)

    def _gather(self, rank, state):
        self._slots[rank] = state
        self._barrier.wait(20)
        states = list(self._slots)
        self._barrier.wait(20)
        return states

    def all(self, call):
        results = [None] * len(self.orders)

        def run(rank):
            results[rank] = call(rank)

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(self.orders))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return results

    def take(self, rank, count):
        order, start = self.orders[rank], self.positions[rank]
        order.settle(start + count)
        self.positions[rank] = start + count
        places = [(start + turn) * order.world_size + rank for turn in range(count)]
        return {place: order.at(place) for place in places}

    def step(self, number, refills=()):
        """Every rank's rows of a step, by their place, and what was learned of them."""
        count = PER_STEP // len(self.orders)
        taken = [self.take(rank, count) for rank in range(len(self.orders))]
        for rank, more in enumerate(refills[: len(self.orders)]):
            taken[rank] |= self.take(rank, more)

        def learn(rank):
            seen = [outcome(row, number) for row in taken[rank].values()]
            self.orders[rank].learn(seen, self.positions[rank])

        self.all(learn)
        return dict(sorted(chain.from_iterable(one.items() for one in taken)))

    def state(self):
        """As a checkpoint holds it."""
        states = self.all(lambda rank: self.orders[rank].state_dict(self.positions))
        file = io.BytesIO()
        torch.save({"positions": self.positions, "draws": states[0]}, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def resume(self, state):
        self.positions = [order.resume(state["positions"], state["draws"]) for order in self.orders]
        return self


# ---- ranks ----


@settings(max_examples=25, deadline=None)
@given(
    world_size=st.integers(1, 3),
    refills=st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=8, max_size=8),
    delay_steps=st.integers(1, 3),
    mixed=st.booleans(),
)
def test_ranks_agree_on_every_draw_and_a_resumed_run_goes_on_as_the_uninterrupted_one(
    world_size, refills, delay_steps, mixed
):
    ranks = Ranks(world_size, delay_steps=delay_steps, mixed=mixed)
    seen: dict[int, int] = {}
    states = []
    for step, more in enumerate(refills):
        states.append(ranks.state())
        found = ranks.step(step, more)
        assert not seen.keys() & found.keys()
        seen |= found
        states_of_ranks = [(order._first, order._rows, order.metrics()) for order in ranks.orders]
        assert repr(states_of_ranks) == repr(states_of_ranks[:1] * world_size)
    # From every step on.
    end = ranks.state()
    for start, state in enumerate(states):
        again = Ranks(world_size, delay_steps=delay_steps, mixed=mixed).resume(state)
        for step, more in enumerate(refills[start:], start):
            found = again.step(step, more)
            assert found == {place: seen[place] for place in found}
        assert repr(again.state()) == repr(end)


@pytest.mark.parametrize("mixed", [False, True])
def test_any_number_of_ranks_reads_the_same_rows(mixed):
    found = []
    for world_size in (1, 2, 3):
        ranks = Ranks(world_size, mixed=mixed)
        found.append([list(ranks.step(step).values()) for step in range(8)])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 3), (3, 2), (1, 3)])
def test_another_number_of_ranks_shares_what_is_left_and_no_row_is_lost(before, after):
    ranks = Ranks(before)
    for step in range(3):
        ranks.step(step, (2, 0, 1))  # ranks drift apart
    state = ranks.state()
    # What no rank has taken, in the order in which it was drawn.
    places = range(state["draws"]["first"], state["draws"]["first"] + len(state["draws"]["rows"]))
    left = [
        int(row)
        for place, row in zip(places, state["draws"]["rows"], strict=True)
        if place // before >= state["positions"][place % before]
    ]
    assert left
    resumed = Ranks(after).resume(state)
    rows_read: list[int] = []
    step = 3
    while len(rows_read) < len(left):
        rows_read += resumed.step(step).values()
        step += 1
    assert rows_read[: len(left)] == left
    assert [order._num_draws for order in resumed.orders] == [resumed.orders[0]._num_draws] * after


def test_draws_follow_what_was_known_a_defined_number_of_steps_before():
    """A step whose rewards are other changes rows from `delay_steps` steps later on, and none before."""
    for delay in (1, 2, 3):
        runs = []
        for shift in (0, 1):
            ranks = Ranks(1, delay_steps=delay, mixed=False)
            order = ranks.orders[0]
            steps = []
            for number in range(8):
                taken = ranks.take(0, PER_STEP)
                rate = 1.0 if number == 3 and shift else 0.5
                order.learn([RowOutcome(row, rate, rate) for row in taken.values()], ranks.positions[0])
                steps.append(list(taken.values()))
            runs.append(steps)
        plain, other = runs
        assert plain[: 3 + delay] == other[: 3 + delay]
        assert plain[3 + delay :] != other[3 + delay :]


def of_rank():
    rank, world_size = dist.get_rank(), dist.get_world_size()
    stream = PromptStream(dataset(12), order_of(rank, world_size), skip_log_of_rank(rank), marks=True)
    taken = []
    for step in range(5):
        prompts = stream.take(PER_STEP // world_size) + stream.take(rank)  # one refills
        seen = [outcome(drawn_index(prompt.row), step) for prompt in prompts]
        stream.order.learn(seen, stream.position)
        taken += ids(prompts)
    state = stream.state_dict()
    return taken, stream.metrics(), {**state, "draws": repr(state["draws"])}


def skip_log_of_rank(rank):
    return skip_log(Path(f"rank{rank}"), 12)  # nothing is skipped, so nothing is written


def test_ranks_of_a_run_know_the_same():
    (one, known, state), (other, known_there, state_there) = run_distributed(of_rank, 2)
    assert len(one) == 5 * 3
    assert len(other) == 5 * 4
    assert repr(known) == repr(known_there)
    assert state == state_there
    assert state["positions"] == [15, 20]


# ---- the stream ----


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_change_no_draw_and_a_stream_is_resumed_where_it_stood(tmp_path, workers):
    def opened(num_workers):
        options = LoaderOptions(num_workers=num_workers, prefetch_prompts=PER_STEP)
        order = order_of(mixed=False)
        return PromptStream(dataset(12, {5}), order, skip_log(tmp_path, 12), options, marks=True)

    def step(stream, number):
        prompts = stream.take(PER_STEP) + stream.take(number % 3)
        stream.order.learn([outcome(drawn_index(prompt.row), number) for prompt in prompts], stream.position)
        return ids(prompts)

    plain = opened(0)
    wanted = [step(plain, number) for number in range(8)]
    assert 5 not in chain.from_iterable(wanted)
    first = opened(workers)
    assert [step(first, number) for number in range(4)] == wanted[:4]
    state = first.state_dict()
    again = opened(2 - workers)
    again.load_state_dict(state)
    assert [step(again, number) for number in range(4, 8)] == wanted[4:]
    plain_order = PromptStream(dataset(12), order_of(mixed=True), skip_log(tmp_path, 12))
    with pytest.raises(ValueError, match=r"its curriculum of the sources was \[12\] and is now \[7, 5\]"):
        plain_order.load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_prompt_shows_the_frames_of_the_step_that_draws_it(tmp_path, workers):
    """Though workers render ahead, and refills make them render for another step than they thought."""
    now = [0]
    schedule = VideoSchedule(max_frames=Schedule([0, 3, 5, 12], [4, 8, 16, 64], "linear"))
    budgets = StepBudgets(schedule, 2, lambda: now[0], lambda: 2, prompts_per_batch=3)
    options = LoaderOptions(num_workers=workers, prefetch_prompts=4)
    order = order_of(mixed=False)
    stream = PromptStream(dataset(12), order, skip_log(tmp_path, 12), options, budgets=budgets, marks=True)
    for step in range(0, 16, 2):
        now[0] = step
        prompts = stream.take(3) + stream.take((0, 0, 4, 1)[step // 2 % 4])
        shown = {dict(prompt.row.draw["video"])["max_frames"] for prompt in prompts}
        assert shown == {int(schedule.max_frames.at(step, 2))}
        assert stream.metrics()["data/max_frames"] == schedule.max_frames.at(step, 2)


def test_a_band_of_nothing_but_rows_that_cannot_be_used_ends_a_run(tmp_path):
    rule = PassRates(low=0.4, high=0.6, retry_after=0)
    rates = [1.0, 0.0, math.nan, 1.0]  # the third is broken: nothing is ever known of it
    order = DrawnOrder([RowPool(rule, rates)], seed=3)
    stream = PromptStream(dataset(4, {2}), order, skip_log(tmp_path, 4), marks=True)
    with pytest.raises(ValueError, match=r"the last 5 draws .* none that can be used.*widen its band"):
        stream.take(1)


# ---- options ----


def group(row, rewards, valid=None, **parts):
    drawn = FakeRender()(marked(row, RowDraw(int(row.id))))
    rewards = torch.tensor(rewards)
    valid = torch.ones(len(rewards), dtype=torch.bool) if valid is None else torch.tensor(valid)
    return Group(drawn, [], rewards, {name: torch.tensor(part) for name, part in parts.items()}, valid)


def test_what_a_group_says_of_its_row():
    few = rows(3)
    nan = float("nan")
    assert group_outcomes([
        group(few[0], [3.0, 1.0], accuracy=[1.0, 0.0]),
        group(few[1], [3.0, -4.0], [True, False], accuracy=[nan, 1.0]),  # no accuracy that counts: the reward, cut to 1
        group(few[2], [1.0], [False]),
    ]) == [RowOutcome(0, 0.5, 2.0), RowOutcome(1, 1.0, 3.0)]  # fmt: skip
    unmarked = group(few[0], [1.0])
    unmarked.prompt = FakeRender()(few[0])
    assert group_outcomes([unmarked]) == []


@pytest.mark.parametrize(
    ("curriculum", "place", "message"),
    [
        ({"pass_rates": PassRates()}, {"stage": "sft"}, "follows rewards, which data.stage=sft has none of"),
        ({"learning_progress": LearningProgress()}, {}, "weighs the sources of data.train, which has one: a.jsonl"),
        ({"pass_rates": PassRates(), "delay_steps": 1}, {"rendered_ahead": 5},
         "delay_steps=1 draws 0 rows ahead, but .* render up to 5; raise data.curriculum.delay_steps to 3"),
        ({"video": VideoSchedule(max_frames=Schedule([0], [9999]))}, {}, "above data.video.max_frames=768"),
    ],
)  # fmt: skip
def test_what_a_run_cannot_do_is_refused(curriculum, place, message):
    here = {"stage": "rl", "prompts_per_batch": 4, "rendered_ahead": 0, **place}
    with pytest.raises(ValueError, match=message):
        Curriculum(**curriculum).check(sources=[DataSource("a.jsonl")], video=VideoSampling(), **here)


def test_a_curriculum_of_nothing_is_refused():
    with pytest.raises(ValueError, match="needs pass_rates, learning_progress or video"):
        Curriculum()


def test_sources_have_pools_of_their_own_where_something_weighs_them():
    def pools(*weights, **options):
        sources = [DataSource(f"{n}.jsonl", weight) for n, weight in enumerate(weights)]
        order = Curriculum(**options).order(rows(5), (3, 2), sources, 0, 0, 1, 2)
        return [len(pool.rates) for pool in order.pools], order._weights

    assert pools(None, None, pass_rates=PassRates()) == ([5], [1.0])
    assert pools(3, 1, pass_rates=PassRates()) == ([3, 2], [0.75, 0.25])
    assert pools(None, None, learning_progress=LearningProgress()) == ([3, 2], [0.5, 0.5])
