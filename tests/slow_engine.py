"""An engine beside the run, in its process: a copy of the tiny model answers turns slowly, some of them very slowly."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace

import torch
from typing_extensions import override

from longrl.engines.rollout_engine import RolloutEngine
from longrl.engines.turn_requests import ContinuousRequests
from longrl.engines.vllm_options import make_completion, sampling_arguments
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
        engine.asked.append((trajectory.prompt.id, trajectory.number, len(trajectory.so_far().input_ids)))
        arguments = params | {"stop_token_ids": [*params["stop_token_ids"], *engine.stop_token_ids]}
        ((tokens, logprobs, reason),) = sample(engine.family, engine.model, [Ask.read(engine.family, request, arguments)])[0]
        seconds = engine.seconds_of(trajectory)
        self.running.append(Running(trajectory, tokens, logprobs, reason, engine.version, time.monotonic(), seconds))

    @override
    def finished(self, answers):
        while True:
            now = time.monotonic()
            if self.was_cut.done():
                self.was_cut = Future()
                ended, self.running = self.running, []
                return [(one.trajectory, one.output(one.num_tokens(now))) for one in ended]
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
    """Samples with weights of its own, `seconds` for a token times a completion's own long-tailed factor."""

    is_remote = True

    def __init__(self, seconds=0.0, tail=0.0, stop_token_ids=()):
        self.seconds, self.tail, self.stop_token_ids = seconds, tail, stop_token_ids
        self.model = None
        self.version = -1
        self.is_syncing = False
        self.asked = []
        """(prompt, number, tokens so far) of every request."""
        self.synced = []

    def seconds_of(self, trajectory):
        factor = random.Random(f"{trajectory.prompt.id} {trajectory.number}").lognormvariate(0, self.tail)
        return self.seconds * factor

    @override
    def sync(self, family, model, step):
        if step == self.version:
            return
        self.is_syncing = True
        self.family = family
        self.model = family.build() if self.model is None else self.model
        self.model.load_state_dict({name: value.detach().clone() for name, value in model.state_dict().items()})
        self.version = step
        self.synced.append(step)
        self.is_syncing = False

    @override
    def invalidate_weights(self):
        self.version = -1

    @override
    def generate(self, family, model, prompts, features, sampling, seed, first=0):
        groups = []
        for prompt in prompts:
            request = family.engine_request(prompt, features)
            params = sampling_arguments(family, prompt, sampling, seed, first)
            outputs = sample(family, self.model, [Ask.read(family, request, params)])[0]
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
        yield SlowRequests(self)
