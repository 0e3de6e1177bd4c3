"""`EnvironmentRunner`: runs environments beside the engine, renders what they answer and has its media encoded.

A turn goes to one of `num_workers` processes, which answers, renders and decodes; the trainer has a thread for each of
them, and one that encodes. Whatever an environment does, raise, hang, end its process, the policy is told, and the
environment stays as it was before the turn.
"""

from __future__ import annotations

import atexit
import inspect
import logging
import queue
import sys
import threading
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from concurrent.futures import Future
from typing import Any

from torch import Tensor, nn

from longrl.environments.encoding import RolloutEncoder
from longrl.environments.environment import Observation
from longrl.environments.rendering import render_observation
from longrl.environments.settings import EnvironmentSettings
from longrl.environments.tool_environment import error_response
from longrl.environments.trajectory import Answer, Trajectory, begin
from longrl.environments.worker import StepReply, StepRequest, WorkerSetup
from longrl.environments.worker_processes import EnvironmentProcess, EnvironmentProcesses, LostProcess
from longrl.io.functions import resolve_function
from longrl.io.pulse import PULSE
from longrl.models.base import CausalFamily
from longrl.types import Observed, Prompt, SamplingParams

logger = logging.getLogger(__name__)

CALL_END = "</tool_call>"
CALL_TAGS = ("<tool_call>", CALL_END)
ATTEMPTS = 3
"""A turn is asked again where another one that was to decode the same was killed meanwhile."""
MAX_LOST_S = 300.0
"""Of each process to calls that hang in one rollout, then its other turns are not tried: ranks wait for each other."""
MAX_DISTINCT_WARNINGS = 200
"""Of a run; equal ones are logged once."""
Job = Callable[["Lane"], None]


class EnvironmentRunner:
    """The environments of a rank's rollouts. Processes start with the first turn, and end by `close`.

    Args:
        settings: which environment, and its limits.
        family: renders what it answers.

    Raises:
        ValueError: there is no such environment, or no token that ends a call where turns are to end with it.
    """

    def __init__(self, settings: EnvironmentSettings, family: CausalFamily) -> None:
        self.settings = settings
        self.family = family
        self._make = resolve_function(settings.make, "rollout.environment.make", classes=True)
        self.stop_token_ids = (call_end_token(family),) if settings.stop_at_call else ()
        """Tokens that end a turn beside the family's end tokens."""
        self._processes = EnvironmentProcesses(WorkerSetup(sys.path, settings.make, settings.options, family))
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lanes: list[Lane] = []
        self._lost_s = 0.0
        """Seconds of all processes that hung in this rollout."""
        self._warned: set[str] = set()
        self._is_closed = False

    @property
    def tools(self) -> tuple[Mapping[str, Any], ...]:
        """Schemas of the tools that prompts describe; () with `show_tools` off.

        Raises:
            ValueError: the environment does not take its options.
        """
        try:
            inspect.signature(self._make).bind(**self.settings.options)
        except TypeError as error:
            raise ValueError(
                f"rollout.environment.options do not fit {self._make.__name__} ({error}); it takes "
                f"{', '.join(inspect.signature(self._make).parameters) or 'none'}"
            ) from error
        environment = self._make(**self.settings.options)
        return tuple(environment.tools) if self.settings.show_tools else ()

    def begin(self, prompts: Sequence[Prompt], sampling: SamplingParams, first: int = 0) -> list[list[Trajectory]]:
        """The trajectories of each prompt under the environment's limits; see `trajectory.begin`."""
        groups = begin(prompts, sampling, self.settings.max_turns, first)
        for group in groups:
            for trajectory in group:
                trajectory.stop_token_ids = self.stop_token_ids
                trajectory.max_observed_tokens = self.settings.max_observed_tokens
        return groups

    def answers(self, model: nn.Module, features: MutableMapping[str, Tensor]) -> Answer:
        """Asks environments for a rollout; what they show goes through the encoder once, into `features`.

        It is encoded as the caller would: on its device and stream, in its autocast context, without gradient.
        """
        assert not self._is_closed, "it was closed"
        if not self._lanes:
            self._lanes = [Lane(self._processes, self._jobs) for _ in range(self.settings.num_workers)]
            atexit.register(self.close)
        encoder = RolloutEncoder(self.family, model, features)
        self._lost_s = 0.0

        def answer(trajectory: Trajectory) -> Future[Observed | None]:
            future: Future[Observed | None] = Future()

            def job(lane: Lane) -> None:
                try:
                    self._answer(lane, trajectory, encoder, future)
                except BaseException as error:  # it ends the run, in the thread that waits for the future
                    if not future.done():
                        future.set_exception(error)

            self._jobs.put(job)
            return future

        return answer

    def close(self) -> None:
        """Ends the processes, also those that are asked something."""
        if self._is_closed:
            return
        self._is_closed = True
        for _ in self._lanes:
            self._jobs.put(None)
        self._processes.close()
        atexit.unregister(self.close)

    # -- a turn, in a lane's thread ------------------------------------------------------------------------------

    def _answer(
        self, lane: Lane, trajectory: Trajectory, encoder: RolloutEncoder, future: Future[Observed | None]
    ) -> None:
        left = self.settings.max_observed_tokens - trajectory.num_observed
        ended = int(trajectory.turn_ids[-1]) in self.family.end_token_ids
        text = turn_text(self.family, trajectory)
        request = StepRequest(trajectory.environment_state, trajectory.prompt.row, text, ended, left)
        for _ in range(ATTEMPTS):
            with encoder.claims() as claims:
                reply = self._ask(lane, request, claims.needed)
                self._log(reply.warnings)
                if reply.problem is not None:
                    raise ValueError(reply.problem)
                trajectory.environment_state = reply.state
                if reply.observed is None:
                    future.set_result(None)
                    return
                if claims.encode(reply.observed, future):
                    return
        trajectory.environment_state = request.state
        future.set_result(self._error(request, "what it shows cannot be decoded; ask for something else"))

    def _ask(self, lane: Lane, request: StepRequest, needed: Callable[[Sequence[str]], frozenset[str]]) -> StepReply:
        """What a process answers; an error for the policy where it hangs or ends."""
        seconds = self.settings.seconds_per_call
        if self._lost_s >= MAX_LOST_S * self.settings.num_workers:
            self._log([f"calls hung for {self._lost_s:.0f} s in a rollout; others in it are not tried"])
            return StepReply(request.state, self._error(request, "tools do not answer now; go on without them"))
        process = lane.process()
        try:
            return process.ask(request, seconds, needed)
        except TimeoutError:
            problem = f"no answer within {seconds:g} s; ask for less"
            self._lost_s += seconds
        except LostProcess:
            if self._is_closed:
                raise
            problem = "the tool's process ended without an answer; ask for something else"
        lane.drop()
        self._log([f"row {request.row.id!r}: {problem}"])
        return StepReply(request.state, self._error(request, problem, seconds))

    def _error(self, request: StepRequest, problem: str, seconds: float = 0.0) -> Observed | None:
        """What the policy is shown in the place of an answer; None if it does not fit."""
        observation = Observation((error_response("", {}, problem, seconds),))
        return render_observation(self.family, observation, request.ended, request.tokens_left)

    def _log(self, warnings: Sequence[str]) -> None:
        for text in warnings:
            if text not in self._warned and len(self._warned) < MAX_DISTINCT_WARNINGS:
                self._warned.add(text)
                logger.warning("rollout.environment: %s", text)


class Lane:
    """A thread of the trainer with a process of its own, which it starts when it needs one.

    Args:
        processes: where it gets them.
        jobs: what all lanes do; None ends one.
    """

    def __init__(self, processes: EnvironmentProcesses, jobs: queue.SimpleQueue[Job | None]) -> None:
        self._processes = processes
        self._jobs = jobs
        self._process: EnvironmentProcess | None = None
        threading.Thread(target=self._run, name="environments", daemon=True).start()

    def process(self) -> EnvironmentProcess:
        """Its process."""
        if self._process is None:
            self._process = self._processes.start()
        return self._process

    def drop(self) -> None:
        """Ends its process."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job(self)
            PULSE.beats += 1  # the engine may wait for many turns, each of which takes its time
        self.drop()


def call_end_token(family: CausalFamily) -> int:
    """The token `</tool_call>`.

    Raises:
        ValueError: the tokenizer has none.
    """
    ids = family.tokenizer(CALL_END, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(
            f"rollout.environment.stop_at_call needs a tokenizer with {CALL_END} as one token, and that of "
            f"{type(family).__name__} writes it as {len(ids)}; set it to false, and turns end with the end token"
        )
    return int(ids[0])


def turn_text(family: CausalFamily, trajectory: Trajectory) -> str:
    """The last turn as environments read it: with its tags, also where they are special tokens."""
    tokenizer = family.tokenizer
    ids = trajectory.turn_ids.tolist()
    tags = [tag for tag in CALL_TAGS if tokenizer.convert_tokens_to_ids(tag) in ids]
    if all(tag in trajectory.text for tag in tags):
        return trajectory.text
    if ids[-1] in family.end_token_ids:
        ids.pop()
    return family.chat.opening + tokenizer.decode(ids, skip_special_tokens=False)
