"""`ContinuousSampler`: a thread that samples prompts' completions over several updates (`rollout.max_staleness`).

What is under way is cut where the engine gets other weights, and goes on with prompt and tokens so far as a request of
its own: keys and values are computed anew, so every token is drawn by the weights that its version names.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from longrl.engines.activity import EngineActivity
from longrl.engines.turn_requests import ContinuousRequests
from longrl.engines.vllm_turns import take_answer, take_turn, turn_arguments, turn_request, warn_without_room
from longrl.environments.trajectory import Answer, Trajectory
from longrl.io.pulse import PULSE
from longrl.models.base import CausalFamily
from longrl.types import Observed

logger = logging.getLogger(__name__)

CUT_AGAIN_S = 0.2
"""After so long a cut is repeated: what reached the engine later was not cut."""
CLOSE_S = 30.0
"""So long the end of a run waits for the thread."""


@dataclass(eq=False)
class SamplingTask:
    """A prompt whose completions are sampled."""

    number: int
    """Its place in the order in which prompts were asked: the engine is given the oldest first."""
    trajectories: Sequence[Trajectory]
    """Of one prompt, each by its own `sampling`."""
    features: MutableMapping[str, Tensor]
    """media key -> [N, D]; gets those of answers meanwhile."""
    seed: int
    answer: Answer | None = None
    """Asks the environment; None if there is none."""
    is_cancelled: bool = False
    states_before: dict[Trajectory, bytes | None] = field(default_factory=dict)
    """Environments before the turn that they are answering: a checkpoint has it answered once more."""
    first_request: dict[str, Any] | None = None
    """That of all first turns."""
    media: tuple[Any, Any] | None = None
    """Ids and features, on the host, of the media in its first turns: all that have the same share them."""

    @property
    def is_finished(self) -> bool:
        """All its completions have ended."""
        return all(trajectory.finish_reason is not None for trajectory in self.trajectories)

    @property
    def oldest_version(self) -> int | None:
        """The optimizer step whose weights drew its first token, None before one."""
        versions = [trajectory.oldest_version for trajectory in self.trajectories]
        return min((version for version in versions if version is not None), default=None)


class ContinuousSampler:
    """A thread that samples tasks; all methods are for the thread that made it.

    An error of the engine or of an environment ends it, and is raised by the next call that needs it to go on.

    Args:
        family: of the model, in the precision that the engine computes in.
        open_requests: `RolloutEngine.continuous_requests`, which the thread enters.
        limit: tokens of prompt and completion together that the engine takes.
        option: that sets it.
    """

    def __init__(
        self,
        family: CausalFamily,
        open_requests: Callable[[], AbstractContextManager[ContinuousRequests]],
        limit: int,
        option: str,
    ) -> None:
        self.activity = EngineActivity()
        """Requests under way over time."""
        self._family = family
        self._open_requests = open_requests
        self._limit = limit
        self._option = option
        self._requests: ContinuousRequests | None = None
        self._changed = threading.Condition()
        """Held around all below."""
        self._tasks: dict[int, SamplingTask] = {}
        """All that were submitted and neither taken nor cancelled, by number."""
        self._waiting: list[tuple[int, int, SamplingTask, Trajectory]] = []
        """A heap of turns to be requested: those of the oldest task first."""
        self._order = itertools.count()
        self._under_way: dict[Trajectory, SamplingTask] = {}
        self._asked: dict[Future[Observed | None], tuple[SamplingTask, Trajectory]] = {}
        self._wake: Future[None] = Future()
        """Done when the thread is to look for what it may do."""
        self._num_pauses = 0
        self._num_without_room = 0
        self._is_closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="continuous sampler", daemon=True)
        self._thread.start()

    # -- what the run asks for -----------------------------------------------------------------------------------

    def submit(self, tasks: Sequence[SamplingTask]) -> None:
        """Has tasks sampled, also restored ones in the middle of a turn, or before an answer."""
        with self._changed:
            self._raise_error()
            for task in tasks:
                self._tasks[task.number] = task
                for trajectory in task.trajectories:
                    if trajectory.finish_reason is not None:
                        continue
                    if trajectory.turns and trajectory.turns[-1].role == "assistant":
                        self._ask(task, trajectory)
                    else:
                        self._push(task, trajectory)
            self._wake_up()

    def tasks(self) -> list[SamplingTask]:
        """All that were submitted and neither taken nor cancelled, in the order of their numbers."""
        with self._changed:
            return [self._tasks[number] for number in sorted(self._tasks)]

    def progress(self) -> dict[int, tuple[int | None, bool]]:
        """{number: (version of the oldest token, whether it is finished)} of `tasks`."""
        with self._changed:
            return {number: (task.oldest_version, task.is_finished) for number, task in self._tasks.items()}

    def wait_for(self, count: int) -> None:
        """Returns once so many tasks are finished."""
        with self._changed:
            while True:
                self._raise_error()
                if sum(task.is_finished for task in self._tasks.values()) >= count:
                    return
                if self._changed.wait(1.0):
                    PULSE.beats += 1

    def take(self, number: int) -> SamplingTask:
        """Hands a finished task over."""
        with self._changed:
            task = self._tasks.pop(number)
        assert task.is_finished, "it is still under way"
        warn_without_room(self._num_without_room, self._limit, self._option)
        self._num_without_room = 0
        return task

    def cancel(self, number: int) -> None:
        """Gives a task up: what is under way of it ends with the next pause at the latest."""
        with self._changed:
            task = self._tasks.pop(number)
            task.is_cancelled = True
            self._waiting = [entry for entry in self._waiting if entry[2] is not task]
            heapq.heapify(self._waiting)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """No request is under way inside: turns are cut, and go on afterwards. Environments answer meanwhile.

        Pauses may lie within each other. Inside one a task's trajectories stand still, but for answers (`held`). It
        serves also after an error, so that what there is can be saved.
        """
        with self._changed:
            self._num_pauses += 1
        try:
            self._cut()
            yield
        finally:
            with self._changed:
                self._num_pauses -= 1
                self._wake_up()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within a pause: trajectories take no answers either."""
        with self._changed:
            yield

    def close(self) -> None:
        """Ends the thread; what is under way is given up."""
        with self._changed:
            self._is_closed = True
            self._wake_up()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            logger.warning("the thread that samples completions has not ended within %g s; it is left alone", CLOSE_S)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _is_idle(self) -> bool:
        return not self._under_way or self._error is not None

    def _cut(self) -> None:
        """Cuts until nothing is under way."""
        while True:
            with self._changed:
                if self._is_idle():
                    return
                requests = self._requests
            assert requests is not None, "something is under way"
            requests.cut()
            with self._changed:
                self._changed.wait_for(self._is_idle, CUT_AGAIN_S)

    def _wake_up(self) -> None:
        if not self._wake.done():
            self._wake.set_result(None)

    def _push(self, task: SamplingTask, trajectory: Trajectory) -> None:
        heapq.heappush(self._waiting, (task.number, next(self._order), task, trajectory))

    def _ask(self, task: SamplingTask, trajectory: Trajectory) -> None:
        assert task.answer is not None, "without an environment there is one turn"
        task.states_before[trajectory] = trajectory.environment_state
        self._asked[task.answer(trajectory)] = (task, trajectory)

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with self._open_requests() as requests:
                self._requests = requests
                while not self._is_closed:
                    self._send(requests)
                    self._receive(requests)
        except BaseException as error:
            with self._changed:
                self._error = error
        finally:
            with self._changed:
                for trajectory, task in self._under_way.items():  # what they had before is saved
                    self._push(task, trajectory)
                self._under_way.clear()
                self.activity.note(0)
                self._changed.notify_all()

    def _send(self, requests: ContinuousRequests) -> None:
        """Sends all turns that wait on their way, unless there is a pause."""
        while True:
            with self._changed:
                if self._num_pauses or self._is_closed or not self._waiting:
                    return
                _, _, task, trajectory = heapq.heappop(self._waiting)
                self._under_way[trajectory] = task
                self.activity.note(len(self._under_way))
            params = turn_arguments(self._family, trajectory, trajectory.sampling, task.seed, self._limit)
            requests.add(trajectory, self._request(task, trajectory), params)

    def _request(self, task: SamplingTask, trajectory: Trajectory) -> dict[str, Any]:
        if trajectory.turns or trajectory.num_sampled:
            task.first_request = None  # most have begun
            return with_shared_media(turn_request(self._family, trajectory, task.features), task)
        if task.first_request is None:
            task.first_request = with_shared_media(turn_request(self._family, trajectory, task.features), task)
        return task.first_request

    def _receive(self, requests: ContinuousRequests) -> None:
        """Waits for turns that end, for answers, or to be woken, and takes them in."""
        with self._changed:
            wake = self._wake
            answers: list[Future[Any]] = [wake, *self._asked]
        ended: list[tuple[Trajectory, dict[str, Any]]] = []
        if requests.num_pending:
            ended = requests.finished(answers)
        else:
            wait(answers, return_when=FIRST_COMPLETED)
        with self._changed:
            if wake.done():
                self._wake = Future()
            for trajectory, output in ended:
                self._end_turn(trajectory, output)
            for future in [future for future in self._asked if future.done()]:
                self._end_answer(future)
            self.activity.note(len(self._under_way))
            self._changed.notify_all()

    def _end_turn(self, trajectory: Trajectory, output: dict[str, Any]) -> None:
        task = self._under_way.pop(trajectory)
        if task.is_cancelled:
            return
        if take_turn(self._family, trajectory, output, self._limit):
            self._ask(task, trajectory)
        elif trajectory.finish_reason is None:
            self._push(task, trajectory)

    def _end_answer(self, future: Future[Observed | None]) -> None:
        task, trajectory = self._asked[future]
        observed = future.result()  # after an error a checkpoint has the environment as it was before
        del self._asked[future]
        del task.states_before[trajectory]
        if task.is_cancelled:
            return
        self._num_without_room += not take_answer(trajectory, observed, self._limit)
        if trajectory.finish_reason is None:
            self._push(task, trajectory)


def with_shared_media(request: dict[str, Any], task: SamplingTask) -> dict[str, Any]:
    """A turn's request with features on the host, those of the prompt in one copy for the whole task.

    They are large, and of a completion under way its request is kept: a copy of each would fill the trainer's GPU.
    """
    ids = request.get("multi_modal_uuids")  # by which vLLM, too, keeps features
    if ids is None:
        return request
    if task.media is not None and task.media[0] == ids:
        return request | {"multi_modal_data": task.media[1]}
    features = on_host(request["multi_modal_data"])
    if task.media is None:
        task.media = ids, features
    return request | {"multi_modal_data": features}


def on_host(value: Any) -> Any:
    """Nested dicts and lists with their tensors on the host."""
    if isinstance(value, dict):
        return {name: on_host(item) for name, item in value.items()}
    if isinstance(value, list):
        return [on_host(item) for item in value]
    return value.cpu() if isinstance(value, Tensor) else value
