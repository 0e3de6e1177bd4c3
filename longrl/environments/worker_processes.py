"""The trainer's side of the processes in which environments run: starting, asking, ending."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from longrl.environments.messages import receive_message, send_message
from longrl.environments.worker import COMMAND, StepReply, StepRequest, WorkerSetup

START_S = 300.0
"""For a process to import what environments need."""
_ENTRY = "from longrl.environments.worker import main; main()"


class LostProcess(RuntimeError):
    """A process that ended by itself."""


class EnvironmentProcess:
    """A process that answers turns.

    Args:
        connection: to it.
        pid: its id.
        end: kills it.
    """

    def __init__(self, connection: socket.socket, pid: int, end: Callable[[int], None]) -> None:
        self.pid = pid
        self._connection = connection
        self._end = end

    def ask(self, request: StepRequest, seconds: float, needed: Callable[[Sequence[str]], frozenset[str]]) -> StepReply:
        """The answer to a turn.

        Args:
            request: the turn.
            seconds: after so long it counts as hung.
            needed: asked for the media whose pixels are wanted.

        Raises:
            TimeoutError: it hangs.
            LostProcess: it has ended.
        """
        deadline = time.monotonic() + seconds
        try:
            send_message(self._connection, request, deadline)
            while True:
                answer = receive_message(self._connection, deadline)
                if isinstance(answer, StepReply):
                    return answer
                send_message(self._connection, needed(answer), deadline)
        except TimeoutError:
            raise
        except (EOFError, OSError) as error:
            raise LostProcess("it ended by itself") from error

    def close(self) -> None:
        """Ends it, whatever it does, and all that it started."""
        self._connection.close()
        self._end(self.pid)


class EnvironmentProcesses:
    """Starts processes that answer turns, by way of one that forks them: it has imported what they need.

    Args:
        setup: what they are.
    """

    def __init__(self, setup: WorkerSetup) -> None:
        self._setup = setup
        self._lock = threading.Lock()
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._is_closed = False

    def start(self) -> EnvironmentProcess:
        """A new process.

        Raises:
            RuntimeError: none can be started; the message says why.
            ValueError: the setup cannot be pickled.
        """
        with self._lock:
            try:
                return self._fork()
            except OSError:  # the one that forks was killed, perhaps where memory ran out
                self._stop()
                return self._fork()

    def _fork(self) -> EnvironmentProcess:
        control = self._control or self._start_server()
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(control, [COMMAND.pack(b"F", 0)], [theirs.fileno()])
        try:
            pid = self._reply(control)
        except OSError:
            ours.close()
            raise
        return EnvironmentProcess(ours, pid, self._kill)

    def _start_server(self) -> socket.socket:
        """Starts the process that forks, in one thread, with the trainer's paths."""
        if self._is_closed:
            raise RuntimeError("the environments of this run have been closed")
        try:
            setup = pickle.dumps(self._setup)
        except Exception as error:  # a class within a function, say
            raise ValueError(
                f"rollout.environment cannot be sent to its processes ({type(error).__name__}: {error}); name classes "
                "by import path or file.py:Class"
            ) from error
        ours, theirs = socket.socketpair()
        paths = [path or os.getcwd() for path in sys.path]
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        variables = os.environ | one_thread | {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
        variables["CUDA_VISIBLE_DEVICES"] = ""  # no process of environments computes on a GPU
        with theirs:
            self._server = subprocess.Popen([sys.executable, "-c", _ENTRY], stdin=theirs.fileno(), env=variables)
        self._control = ours
        deadline = time.monotonic() + START_S
        try:
            send_message(ours, {"import_paths": paths, "setup": setup}, deadline)
            problem = receive_message(ours, deadline)
        except (EOFError, OSError) as error:
            self._stop()
            raise RuntimeError(
                f"the process of rollout.environment did not start ({type(error).__name__}: {error}); what it wrote "
                "stands above"
            ) from error
        if problem:
            self._stop()
            raise RuntimeError(
                f"the process of rollout.environment did not start: {problem}; classes of environments and families "
                "must be importable there, from a module or by file.py:Class"
            )
        return ours

    def _reply(self, control: socket.socket) -> int:
        control.settimeout(START_S)
        content = control.recv(COMMAND.size, socket.MSG_WAITALL)
        if len(content) < COMMAND.size:
            raise ConnectionError("the process that forks has ended")
        return COMMAND.unpack(content)[1]

    def _kill(self, pid: int) -> None:
        """Ends a process; that it is this one, and no later one of its id, the process that forked it knows."""
        with self._lock, contextlib.suppress(OSError):
            if self._control is not None:
                self._control.sendall(COMMAND.pack(b"K", pid))
                self._reply(self._control)

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._server is not None:
            try:
                self._server.wait(5.0)  # it ends its own first
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
        self._control = self._server = None

    def close(self) -> None:
        """Ends all of them."""
        with self._lock:
            self._is_closed = True
            self._stop()
