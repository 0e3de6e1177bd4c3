"""What runs in the processes of environments: one forks the others, and each of these answers turn after turn.

The first one imports what all need and keeps to one thread, so that another process in the place of one that was killed
is there at once, and forking is safe. No process outlives the trainer: the first one looks for it every second and ends
the others, and on Linux the kernel ends them with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import pickle
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from typing_extensions import override

from longrl.environments.environment import Environment, Observation
from longrl.environments.messages import receive_message, send_message
from longrl.environments.rendering import as_observation, render_observation
from longrl.environments.tool_environment import error_response, first_line
from longrl.io.functions import resolve_function
from longrl.io.processes import PR_SET_PDEATHSIG
from longrl.models.reading import RendersPrompts
from longrl.types import Observed, Row

logger = logging.getLogger(__name__)

COMMAND = struct.Struct("!cq")
"""`F` forks a process that answers on the socket sent along; `K` kills one by its id. The answer is an id."""
MAX_LOG_CHARS = 4000
MAX_LOGS = 20
"""Warnings of a turn that are handed on."""


@dataclass(frozen=True)
class WorkerSetup:
    """What the processes are started with."""

    import_paths: Sequence[str]
    make: Callable[..., Environment] | str
    options: Mapping[str, Any]
    family: RendersPrompts


@dataclass(frozen=True)
class StepRequest:
    """A turn that is to be answered."""

    state: bytes | None
    """The environment, pickled; None before the first turn."""
    row: Row
    text: str
    ended: bool
    """The turn has its end token."""
    tokens_left: int
    """That may still be shown."""


@dataclass(frozen=True)
class StepReply:
    """What became of it."""

    state: bytes | None
    """The environment behind the turn."""
    observed: Observed | None
    """None ends the completion."""
    warnings: tuple[str, ...] = ()
    """What was logged meanwhile."""
    problem: str | None = None
    """Why no environment can run: that ends the run."""


# ---- the process that forks ----


def main() -> None:
    """Forks processes as the trainer asks for them, by the socket that is standard input, until the trainer ends."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):  # meant for the run, which ends its processes
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    parent = os.getppid()
    control = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what tools print
    try:
        content = receive_message(control)
        sys.path[:] = content["import_paths"]
        setup: WorkerSetup = pickle.loads(content["setup"])
        setup.family.load_processing()
        make = resolve_function(setup.make, "rollout.environment.make", classes=True)
    except EOFError:
        return
    except Exception as error:
        send_message(control, f"{type(error).__name__}: {first_line(error)}")
        return
    send_message(control, "")
    pids: set[int] = set()
    try:
        while os.getppid() == parent:
            for pid in [pid for pid in pids if os.waitpid(pid, os.WNOHANG) != (0, 0)]:
                pids.remove(pid)
                _kill_group(pid)  # it ended by itself, and what it started may be there
            if not select.select([control], [], [], 1.0)[0]:
                continue
            content, fds, _, _ = socket.recv_fds(control, COMMAND.size, 1)
            if len(content) < COMMAND.size:
                return
            command, pid = COMMAND.unpack(content)
            if command == b"F":
                pid = _fork(fds[0], control, make, setup)
                pids.add(pid)
            elif pid in pids:
                pids.remove(pid)
                _kill(pid)
            control.sendall(COMMAND.pack(command, pid))
    except OSError:  # the trainer has gone
        pass
    finally:
        for pid in pids:
            _kill(pid)
        os._exit(0)  # at once: there is nothing to flush


def _fork(fd: int, control: socket.socket, make: Callable[..., Environment], setup: WorkerSetup) -> int:
    """A process that answers on a socket."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        os.close(fd)
        return pid
    try:
        os.setsid()  # what tools start is killed with it
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        control.close()
        if os.getppid() == parent:
            serve(socket.socket(fileno=fd), make, setup)
    finally:
        os._exit(0)


def _kill(pid: int) -> None:
    _kill_group(pid)
    with contextlib.suppress(ProcessLookupError):  # it may not have its group yet
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


# ---- a process that answers ----


class TrainerGone(BaseException):
    """The trainer has ended; no `EOFError` or `ConnectionError`, for environments may raise these."""


def serve(connection: socket.socket, make: Callable[..., Environment], setup: WorkerSetup) -> None:
    """Answers turns until the other side has gone."""
    log = WarningList()
    logging.getLogger().addHandler(log)
    with contextlib.suppress(EOFError, OSError, TrainerGone):
        while True:
            request: StepRequest = receive_message(connection)

            def needed(keys: Sequence[str]) -> frozenset[str]:
                try:
                    send_message(connection, list(keys))
                    return receive_message(connection)
                except (EOFError, OSError) as error:
                    raise TrainerGone from error

            reply = answer_turn(request, make, setup, needed)
            try:
                send_message(connection, replace(reply, warnings=log.take()))
            except (pickle.PicklingError, AttributeError, TypeError) as error:  # a source that is a lambda, say
                failed = failed_turn(request, setup, error)
                send_message(connection, replace(failed, warnings=log.take()))


def answer_turn(
    request: StepRequest,
    make: Callable[..., Environment],
    setup: WorkerSetup,
    needed: Callable[[Sequence[str]], frozenset[str]],
) -> StepReply:
    """What an environment answers to a turn, rendered."""
    state = request.state
    start = time.perf_counter()
    try:
        # 1. The environment, as it was behind the last turn.
        if state is None:
            environment = make(**setup.options)
            environment.reset(request.row)
        else:
            environment = pickle.loads(state)
        # 2. Its answer, and what that makes of it.
        answer = environment.step(request.text)
        try:
            new_state = pickle.dumps(environment)
        except Exception as error:
            return StepReply(None, None, problem=_unpicklable(environment, error))
        if answer is None:
            return StepReply(new_state, None)
        observation = as_observation(answer)
        # 3. Tokens and patches.
        observed = render_observation(setup.family, observation, request.ended, request.tokens_left, needed)
        return StepReply(new_state, observed)
    except TrainerGone:
        raise
    except BaseException as error:  # whatever an environment raises, `exit()` included: no completion may end a run
        return failed_turn(request, setup, error, time.perf_counter() - start)


def failed_turn(request: StepRequest, setup: WorkerSetup, error: BaseException, seconds: float = 0.0) -> StepReply:
    """The answer to a turn where an environment raised something, which a warning has with its traceback."""
    logger.warning("an environment failed", exc_info=error)  # of many rows alike: equal texts are logged once
    problem = f"the environment failed ({type(error).__name__}: {first_line(error)}); try something else"
    observation = Observation((error_response("", {}, problem, seconds),))
    return StepReply(request.state, render_observation(setup.family, observation, request.ended, request.tokens_left))


def _unpicklable(environment: object, error: Exception) -> str:
    return (
        f"an environment is copied between processes at every turn, but {type(environment).__name__} cannot be pickled "
        f"({type(error).__name__}: {first_line(error)}); let it hold plain values, and open files and connections in "
        "`step`"
    )


class WarningList(logging.Handler):
    """Warnings and errors as texts, for the trainer's log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._texts: list[str] = []

    @override
    def emit(self, record: logging.LogRecord) -> None:
        if len(self._texts) < MAX_LOGS:
            self._texts.append(self.format(record)[-MAX_LOG_CHARS:])

    def take(self) -> tuple[str, ...]:
        """Those since the last call."""
        texts, self._texts = tuple(self._texts), []
        return texts


if __name__ == "__main__":
    main()
