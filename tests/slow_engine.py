"""An engine beside the run, in its process: a copy of the tiny model answers turns slowly, some of them very slowly."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from longrl.engines.rollout_engine import RolloutEngine
from longrl.engines.turn_requests import ContinuousRequests
from longrl.engines.vllm_options import make_completion, sampling_arguments
from longrl.engines.weight_stream import engine_weights
from longrl.testing.stand_in_engine import StandInWorker
from longrl.testing.stand_in_sampler import Ask, sample


@dataclass
class Running:
    """A turn that is being sampled: all its tokens are known, and come one after the other."""

    trajectory: object
    tokens: list
    logprobs: list
    reason: str
    version: int
    start: float
    seconds: float
    """Of a token."""

    def num_tokens(self, now):
        return min(len(self.tokens), int((now - self.start) / self.seconds)) if self.seconds else len(self.tokens)

    def num_until_cut(self, now):
        """The first one is always there."""
        return max(self.num_tokens(now), min(1, len(self.tokens) - 1))

    def output(self, count):
        reason = self.reason if count == len(self.tokens) else "cut"
        fields = {"token_ids": self.tokens[:count], "logprobs": self.logprobs[:count], "finish_reason": reason}
        return fields | {"version": self.version}


class SlowRequests(ContinuousRequests):
    def __init__(self, engine):
        self.engine = engine
        self.running: list[Running] = []
        self.was_cut: Future = Future()

    @property
    @override
    def num_pending(self):
        return len(self.running)

    @override
    def add(self, trajectory, request, params):
        engine = self.engine
        assert not engine.is_syncing, "asked while weights change"
        engine.note(trajectory)
        arguments = params | {"stop_token_ids": [*params["stop_token_ids"], *engine.stop_token_ids]}
        ask = Ask.read(engine.family, request, arguments)
        ((tokens, logprobs, reason),) = sample(engine.family, engine.worker.model, [ask])[0]
        seconds = engine.seconds_of(trajectory)
        self.running.append(Running(trajectory, tokens, logprobs, reason, engine.version, time.monotonic(), seconds))

    @override
    def finished(self, answers):
        while True:
            now = time.monotonic()
            if self.was_cut.done():
                self.was_cut = Future()
                ended, self.running = self.running, []
                return [(one.trajectory, one.output(one.num_until_cut(now))) for one in ended]
            ended = [one for one in self.running if one.num_tokens(now) == len(one.tokens)]
            if ended or any(answer.done() for answer in answers):
                self.running = [one for one in self.running if one not in ended]
                return [(one.trajectory, one.output(len(one.tokens))) for one in ended]
            wait([*answers, self.was_cut], 0.002, return_when=FIRST_COMPLETED)

    @override
    def cut(self):
        with contextlib.suppress(Exception):
            self.was_cut.set_result(None)


class SlowEngine(RolloutEngine):
    """Samples with weights of its own, `seconds` for a token times a completion's own long-tailed factor.

    Args:
        seconds: of a token on average.
        tail: of the log-normal factor.
        stop_token_ids: end a turn, too.
        record: file that says what was asked, also of runs that are killed.
    """

    is_remote = True

    def __init__(
        self, seconds: float = 0.0, tail: float = 0.0, stop_token_ids: Sequence[int] = (), record: str | None = None
    ) -> None:
        self.seconds, self.tail, self.stop_token_ids, self.record = seconds, tail, stop_token_ids, record
        self.worker = self.requests = None
        self.version = -1
        self.is_syncing = False
        self.num_generated = 0
        self.asked = []
        """(prompt, number, tokens sampled, tokens shown) of every request."""
        self.synced = []

    def note(self, trajectory):
        asked = (trajectory.prompt.id, trajectory.number, trajectory.num_sampled, trajectory.num_observed)
        self.asked.append(asked)
        if self.record is not None:
            with Path(self.record).open("a") as file:
                file.write(json.dumps(asked) + "\n")

    def seconds_of(self, trajectory):
        factor = random.Random(f"{trajectory.prompt.id} {trajectory.number}").lognormvariate(0, self.tail)
        return self.seconds * factor

    @override
    def sync(self, family, model, step):
        if step == self.version:
            return
        self.is_syncing = True
        self.family = family
        self.worker = StandInWorker(family) if self.worker is None else self.worker
        self.worker.reload_weights(engine_weights(family, model, 1 << 20))
        self.version = step
        self.synced.append(step)
        self.is_syncing = False

    @override
    def invalidate_weights(self):
        self.version = -1

    @override
    def generate(self, family, model, prompts, features, sampling, seed, first=0):
        self.num_generated += 1
        assert self.requests is None or not self.requests.running, "an evaluation is not disturbed"
        groups = []
        for prompt in prompts:
            request = family.engine_request(prompt, features)
            params = sampling_arguments(family, prompt, sampling, seed, first)
            outputs = sample(family, self.worker.model, [Ask.read(family, request, params)])[0]
            fields = [dict(zip(("token_ids", "logprobs", "finish_reason"), one, strict=True)) for one in outputs]
            groups.append([make_completion(family, one) for one in fields])
        return groups

    @override
    def staleness_problem(self):
        return None

    @override
    def environment_problem(self):
        return None

    @override
    @contextlib.contextmanager
    def continuous_requests(self):
        self.requests = SlowRequests(self)
        yield self.requests
