"""What `rollout.max_staleness` would come to: a run in simulated time, from lengths of completions and seconds.

k = 0 samples, then trains; k = 1 samples the next step's groups during the update; from 2 on the engine samples all the
time, at most (k + 1) steps' prompts are under way or wait (arXiv:2505.24298), and new weights cut what is sampled.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from longrl.io.number_ranges import COUNT, NOT_NEGATIVE, check_ranges
from longrl.planning.async_engine import SimulatedEngine, SimulatedGroup

MAX_TRIES = 3
"""So often a prompt is asked before it is dropped."""


@dataclass(frozen=True)
class Workload:
    """What a step asks of the engine, and what it takes."""

    groups: Sequence[Sequence[int]]
    """Lengths of completions in tokens, by group, of which those of each step are drawn."""
    groups_per_step: int
    slots: int
    """Completions that the engine, or all servers together, decode at once."""
    token_s: float
    """Seconds of a decoding step whatever the number of completions in it."""
    request_s: float
    """Seconds more of it for each completion."""
    update_s: float
    """Of a step from the start of the next rollout on: what an engine of k = 1 has beside it."""
    other_s: float = 0.0
    """Of a step before that: data, encode, reward."""
    sync_s: float = 0.0
    """Seconds that weights take to the engine, while trainer and engine stand still."""
    prompt_tokens: float = 0.0
    """That are computed anew behind a cut, beside what was sampled."""
    prefill_s: float = 0.0
    """Seconds of each such token, in which nothing is decoded."""

    def __post_init__(self) -> None:
        seconds = dict.fromkeys(("token_s", "request_s", "update_s", "other_s", "sync_s", "prefill_s"), NOT_NEGATIVE)
        check_ranges(self, "--", groups_per_step=COUNT, slots=COUNT, prompt_tokens=NOT_NEGATIVE, **seconds)
        if not self.groups or not all(self.groups):
            raise ValueError("a plan of asynchronous rollouts needs lengths of completions, got none")
        if min(map(min, self.groups)) < 1:
            raise ValueError(f"a completion has at least 1 token, got a length of {min(map(min, self.groups))}")
        if self.token_s + self.request_s <= 0 or self.trainer_s <= 0:
            raise ValueError(
                f"decoding and updates take time: token_s {self.token_s} and request_s {self.request_s}, update_s "
                f"{self.update_s} and other_s {self.other_s} must not both be 0"
            )

    @property
    def trainer_s(self) -> float:
        """Seconds of a step that the trainer computes."""
        return self.update_s + self.other_s


@dataclass(frozen=True)
class AsyncOutcome:
    """How a run goes with one `rollout.max_staleness`."""

    max_staleness: int
    seconds_per_step: float
    trainer_busy: float
    """Share of the time in which the trainer does not wait for completions."""
    engine_busy: float
    """Share of the time in which a completion is under way."""
    requests: float
    """Completions under way, mean over time."""
    staleness_mean: float
    """Of a token, in rollouts."""
    staleness_largest: int
    """Of all tokens."""
    asked_again: float
    """Prompts that were cancelled and asked again, as a share of those trained on."""
    dropped: float
    """Prompts that were given up, likewise."""


class SimulatedRun:
    """One run: the trainer's clock is the engine's."""

    def __init__(self, work: Workload, max_staleness: int, seed: int) -> None:
        self.work = work
        self.max_staleness = max_staleness
        self.engine = SimulatedEngine(work.slots, work.token_s, work.request_s)
        self.open: list[SimulatedGroup] = []
        """Submitted, and neither trained on nor given up."""
        self.again: list[SimulatedGroup] = []
        """Given up, to be asked before others."""
        self.drawn = drawn_groups(work.groups, seed)
        self.waited_s = 0.0
        self.asked_again = 0
        self.dropped = 0
        self.trained = 0
        self.tokens = 0.0
        self.staleness = 0.0
        """Sum over tokens."""
        self.oldest = 0

    def ask(self, count: int) -> None:
        """Submits so many prompts."""
        for _ in range(count):
            group = self.again.pop(0) if self.again else next(self.drawn)
            self.open.append(group)
            self.engine.submit(group)

    def take(self, step: int) -> None:
        """Waits for a step's groups and takes the finished ones whose tokens are oldest."""
        begin = self.engine.time
        while len(self.engine.finished) < self.work.groups_per_step:
            self.engine.advance_to_end_of_one()
        self.waited_s += self.engine.time - begin
        ready = sorted(self.engine.finished, key=lambda group: (group.version, group.number))
        for group in ready[: self.work.groups_per_step]:
            self.engine.finished.remove(group)
            self.open.remove(group)
            self.trained += 1
            for version, tokens in self.engine.token_counts(group).items():
                self.tokens += tokens
                self.staleness += tokens * (step - version)
                if tokens > 0:
                    self.oldest = max(self.oldest, step - version)

    def give_up(self, step: int) -> None:
        """Cancels what no step may train on any more, to be asked again or dropped."""
        for group in list(self.open):
            if group.version is None or step - group.version <= self.max_staleness:
                continue
            self.open.remove(group)
            if group.unfinished:
                self.engine.cancel(group)
            else:
                self.engine.finished.remove(group)
            if group.attempts < MAX_TRIES:
                self.asked_again += 1
                self.again.append(group)
            else:
                self.dropped += 1

    def hand_over(self, step: int) -> None:
        """New weights; what is under way is cut and computed anew."""
        context = self.engine.num_running * self.work.prompt_tokens + self.engine.num_tokens_so_far
        self.engine.set_weights(step, self.work.sync_s, context * self.work.prefill_s)

    def compute(self, seconds: float) -> None:
        """The trainer computes; the engine goes on."""
        self.engine.advance(self.engine.time + seconds)

    def step(self, step: int) -> None:
        """One step of the run."""
        work, count = self.work, self.work.groups_per_step
        if self.max_staleness >= 2:
            self.give_up(step)
            self.hand_over(step)
            self.ask((self.max_staleness + 1) * count - len(self.open))
            self.take(step)
            self.compute(work.trainer_s)
            return
        if self.max_staleness == 0 or step == 0:
            self.hand_over(step)
            self.ask(count)
        self.take(step)
        self.compute(work.other_s)
        if self.max_staleness == 1:
            self.hand_over(step)
            self.ask(count)
        self.compute(work.update_s)


def drawn_groups(groups: Sequence[Sequence[int]], seed: int) -> Iterator[SimulatedGroup]:
    """Groups without end, drawn with replacement: the same ones whatever takes them."""
    draw = random.Random(seed)
    while True:
        yield SimulatedGroup(groups[draw.randrange(len(groups))])


def simulate(work: Workload, max_staleness: int, num_steps: int = 60, seed: int = 0) -> AsyncOutcome:
    """Runs steps in simulated time; the first ones, in which the engine fills up, are left out of the means.

    Args:
        work: of each step.
        max_staleness: k.
        num_steps: that are counted.
        seed: of the lengths; the same whatever k is.
    """
    check_ranges(locals(), "--", max_staleness=NOT_NEGATIVE, num_steps=COUNT)
    run = SimulatedRun(work, max_staleness, seed)
    warm_up = 0 if max_staleness == 0 else 2 * (max_staleness + 1)
    for step in range(warm_up):
        run.step(step)
    engine = run.engine
    begin, busy_s, request_seconds, waited_s = engine.time, engine.busy_s, engine.request_seconds, run.waited_s
    trained, asked_again, dropped = run.trained, run.asked_again, run.dropped
    run.tokens = run.staleness = 0.0
    for step in range(warm_up, warm_up + num_steps):
        run.step(step)
    seconds = engine.time - begin
    num_trained = run.trained - trained
    return AsyncOutcome(
        max_staleness,
        seconds_per_step=seconds / num_steps,
        trainer_busy=1 - (run.waited_s - waited_s) / seconds,
        engine_busy=(engine.busy_s - busy_s) / seconds,
        requests=(engine.request_seconds - request_seconds) / seconds,
        staleness_mean=run.staleness / run.tokens,
        staleness_largest=run.oldest,
        asked_again=(run.asked_again - asked_again) / num_trained,
        dropped=(run.dropped - dropped) / num_trained,
    )


PAYS_FROM = 1.05
"""A speed-up below is not worth older tokens."""
ENOUGH = 0.95
"""The smallest k that reaches this share of the largest speed-up is the one to take."""
MAX_DROPPED = 0.02
"""Of prompts: more are no choice, for long completions would be missing from training."""


def advised_staleness(outcomes: Sequence[AsyncOutcome]) -> int:
    """The k to take; 0 where no other one pays.

    Args:
        outcomes: that of k = 0 among them.
    """
    slow = next(one.seconds_per_step for one in outcomes if one.max_staleness == 0)
    useful = [one for one in outcomes if one.dropped <= MAX_DROPPED]
    fastest = min((one.seconds_per_step for one in useful), default=slow)
    if slow / fastest < PAYS_FROM:
        return 0
    return min(one.max_staleness for one in useful if one.seconds_per_step * ENOUGH <= fastest)


def verdict(outcomes: Sequence[AsyncOutcome]) -> str:
    """Whether k > 0 pays, in one sentence."""
    by_k = {one.max_staleness: one for one in outcomes}
    start, k = by_k[0], advised_staleness(outcomes)
    if not k:
        best = min(outcomes, key=lambda one: one.seconds_per_step)
        gain = start.seconds_per_step / best.seconds_per_step
        return (
            f"k > 0 does not pay: the trainer waits {100 * (1 - start.trainer_busy):.0f} % of a step at k = 0, and the "
            f"best of the others, k = {best.max_staleness}, is {gain:.2f} times as fast"
            if best.max_staleness
            else "k > 0 does not pay: no other k is faster than 0"
        )
    chosen = by_k[k]
    return (
        f"rollout.max_staleness: {k} pays: {start.seconds_per_step / chosen.seconds_per_step:.2f} times as fast as "
        f"k = 0, the trainer busy {100 * chosen.trainer_busy:.0f} % of the time instead of "
        f"{100 * start.trainer_busy:.0f} %, tokens {chosen.staleness_mean:.1f} rollouts old on average"
    )
