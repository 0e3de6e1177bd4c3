"""What stands still: rewards, ranks and loader workers that hang, stop or die, and how soon the run has ended."""

from __future__ import annotations

import contextlib
import ctypes
import gzip
import itertools
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from lightning.pytorch import Callback

from fault_cases.fault import Fault, Outcome
from fault_cases.small_runs import Config, Ended, become_command, fit, kept_checkpoint, steps_lost, text_rows, text_run
from longrl.datamodules.loading import workers
from longrl.io.exit_codes import HUNG, MISTAKE
from longrl.io.pulse import PULSE
from longrl.rewards.judge import Judge
from longrl.types import Completion, Row
from tests.chat.server import Dripping, Server, completion
from tests.runs import arguments, rollouts

FAILED = 1
LIMIT_S = 4.0
WATCHED = (f"--watchdog.limit_s={LIMIT_S:g}", "--watchdog.silent_s=2")
RANKS_WATCHED = ("--watchdog.limit_s=120", "--watchdog.silent_s=4")
NAP_S = 1000


# ---- rewards ----


def loops(completion: Any, row: Any) -> float:
    """Hangs at one row."""
    while row.id == "q3":
        pass
    return float(len(completion.text) % 2)


def waits_in_c(completion: Any, row: Any) -> float:
    """Hangs in C, which goes on waiting when a signal comes."""
    libc = ctypes.CDLL(None)
    while True:
        libc.sleep(NAP_S)
        with mock.patch.object(sys, "exc_info"):  # a signal's exception would come between two lines of Python
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})


def keeps_the_lock(completion: Any, row: Any) -> float:
    """Hangs in C that never lets another thread of Python run."""
    return float(ctypes.PyDLL(None).sleep(NAP_S))


def kills_a_worker(completion: Any, row: Any) -> float:
    """Meets the death of a loader worker, and swallows what torch says of it."""
    for pid in list(PULSE.workers):
        try:
            os.kill(pid, signal.SIGKILL)
            time.sleep(0.5)
        except Exception:
            return 0.0
    return 1.0


def run_of(reward: Callable[..., Any], limit_s: float) -> Callable[[Path], Config]:
    """Makes the config of an RL run with a reward of this file."""

    def make(folder: Path) -> Config:
        values = text_run(folder, "rl")
        values["rollout"] = rollouts(f"{__file__}:{reward.__name__}")
        values["rollout"]["reward"]["time_limit_s"] = limit_s
        return values

    return make


def ended(make: Callable[[Path], Config], words: str, *more: str) -> Callable[[Path], Outcome]:
    """Runs it, watched, and reads the line with the words."""

    def does(folder: Path) -> Outcome:
        return outcome(folder, fit(folder, make(folder), *WATCHED, *more), words)

    return does


def outcome(folder: Path, found: Ended, words: str) -> Outcome:
    return Outcome(found.line_with(words), found.exit_code, kept_checkpoint(folder), steps_lost(folder))


# ---- loader workers ----


class Harm(Callback):
    """Sends a signal to a loader worker, or to a rank, once two steps are done."""

    def __init__(self, whom: str, signal_number: int) -> None:
        self.whom, self.signal_number = whom, signal_number

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step < 2:
            return
        if self.whom == "worker" and PULSE.workers:
            os.kill(next(iter(PULSE.workers)), self.signal_number)
        if self.whom == f"rank {trainer.global_rank}":
            os.kill(os.getpid(), self.signal_number)


def harmed(whom: str, signal_number: int) -> Callable[[Path], Config]:
    """Makes the config of a run that loses a worker or a rank."""

    def make(folder: Path) -> Config:
        values = text_run(folder, steps=200)
        options = {"whom": whom, "signal_number": int(signal_number)}
        values["trainer"]["callbacks"].append({"class_path": "fault_cases.hangs.Harm", "init_args": options})
        if whom == "worker":
            values["data"]["num_workers"] = 2
        return values

    return make


def small_shared_memory(folder: Path) -> Outcome:
    """As in a container of 64 KiB of /dev/shm, with rows that are larger."""

    def shrink() -> None:
        workers.SHARED_BYTES = 1
        workers.WAIT_FOR_ROOM_S = 0.5
        workers.free_shared_bytes = lambda: 64.0

    found = fit(folder, text_run(folder), *WATCHED, "--data.num_workers=2", before=shrink)
    return outcome(folder, found, "shared memory")


# ---- judges and servers ----


class AskAlways(Judge):
    """A judge that is asked about any completion: those of a random model have no answer in its tag."""

    def score_all(self, completions: Sequence[Completion], rows: Sequence[Row]) -> list[float | Exception]:
        """See `Judge`."""
        tagged = [replace(completion, text=f"<answer>{completion.text}</answer>") for completion in completions]
        return super().score_all(tagged, rows)


class Odd(Server):
    """Answers as a judge does, but for one question: there the body is sent in pieces without an end."""

    def __init__(self, pieces: Callable[[], Iterator[bytes]], packing: str = "identity") -> None:
        super().__init__(lambda body: completion("odd" if "What is 3 and 3?" in str(body) else "SCORE: 1"))
        self.pieces, self.packing = pieces, packing

    def send(self, handler: Any, status: int, content: bytes) -> None:
        """The reply to a request."""
        if b'"odd"' not in content:
            return super().send(handler, status, content)
        handler.send_response(200)
        handler.send_header("Content-Encoding", self.packing)
        handler.end_headers()
        with contextlib.suppress(OSError):  # who asked has hung up
            for piece in self.pieces():
                handler.wfile.write(piece)
        return None


def drops() -> Iterator[bytes]:
    """A byte now and then."""
    while True:
        time.sleep(0.05)
        yield b" "


def floods() -> Iterator[bytes]:
    """As much as fits the line."""
    return itertools.repeat(b" " * (1 << 20))


def bomb() -> Iterator[bytes]:
    """A few kilobytes that are 16 MiB unpacked, and the same again."""
    return itertools.repeat(gzip.compress(bytes(16 << 20)))


def odd_judge(pieces: Callable[[], Iterator[bytes]], packing: str = "identity") -> Callable[[Path], Outcome]:
    """A run whose judge is odd about one row."""

    def does(folder: Path) -> Outcome:
        values = text_run(folder, "rl", [row | {"task": "open_ended"} for row in text_rows()])
        with Odd(pieces, packing) as server:
            timeout_s = 1.0 if pieces is drops else 20.0
            endpoint = {"model": "j", "url": server.url, "timeout_s": timeout_s, "max_reply_mib": 4, "retries": 0}
            options = {"endpoint": endpoint, "cache_dir": str(folder / "judge")}
            function = {"class_path": "fault_cases.hangs.AskAlways", "init_args": options}
            values["rollout"] = rollouts()
            values["rollout"]["reward"] = {"terms": [{"function": function, "name": "accuracy"}]}
            return outcome(folder, fit(folder, values, *WATCHED), "CallFailed")

    return does


def dripping_engine(folder: Path) -> Outcome:
    """A rollout server that answers a byte at a time."""
    values = text_run(folder, "rl")
    values["rollout"] = rollouts()
    with Dripping(404, endless=b" ") as server:
        options = {"urls": [server.url.removesuffix("/v1")], "timeout_s": 1.0, "start_timeout_s": 2.0}
        values["rollout"]["engine"] = {"class_path": "longrl.engines.server.VLLMServerEngine", "init_args": options}
        return outcome(folder, fit(folder, values, *WATCHED), "did not answer")


# ---- ranks ----


def two_ranks(make: Callable[[Path], Config], words: str) -> Callable[[Path], Outcome]:
    """Runs it on two ranks, in two forked processes as a launcher starts them; the code is that of rank 0."""

    def does(folder: Path) -> Outcome:
        values = make(folder)
        strategy = {"class_path": "longrl.strategies.mr_sp.MRSPStrategy", "init_args": {"timeout_s": 600.0}}
        values["trainer"] |= {"devices": 2, "strategy": strategy}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def place(rank: int) -> None:
            os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

        args = arguments(folder / "run", values, *RANKS_WATCHED)
        other = os.fork()
        if other == 0:
            become_command(args, folder / "rank1.txt", lambda: place(1))
        found = fit(folder, values, *RANKS_WATCHED, before=lambda: place(0), limit_s=300)
        status = end_of(other)
        found = Ended(found.exit_code, found.output + "\n" + (folder / "rank1.txt").read_text())
        seen = outcome(folder, found, words)
        return Outcome(f"{seen.seen} (rank 1 ended with {status})", seen.exit_code, seen.kept, seen.lost_steps)

    return does


def end_of(process: int, limit_s: float = 60.0) -> int | str:
    """Exit code of a child; what is left after so long is killed."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        pid, status = os.waitpid(process, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return "nothing, it outlived the command"


FAULTS = [
    Fault(
        kind="rewards",
        fault="a reward that loops for ever at one row",
        does=ended(run_of(loops, 0.3), "TookTooLong"),
        exit_code=0,
        seen="TookTooLong: no value within 0.3 s.*q3|q3.*TookTooLong: no value within 0.3 s",
        quick=False,
    ),
    Fault(
        kind="rewards",
        fault="a reward that waits in C and takes no signal",
        does=ended(run_of(waits_in_c, 0), "the run ends"),
        exit_code=HUNG,
        seen=r"rank 0 has got nothing done for 4 s in the phase reward, at row 'q\d+'.*stacks_rank0",
        limit_s=20,
    ),
    Fault(
        kind="rewards",
        fault="a reward in C that keeps the interpreter's lock",
        does=ended(run_of(keeps_the_lock, 0), "keeps_the_lock"),
        exit_code=FAILED,
        seen="hangs.py.* in keeps_the_lock",
        quick=False,
    ),
    Fault(
        kind="rewards",
        fault="a reward that swallows the death of a loader worker",
        does=ended(run_of(kills_a_worker, 0), "the run ends", "--data.num_workers=2"),
        exit_code=HUNG,
        seen=r"loader worker \d \(pid \d+\) is dead",
        quick=False,
    ),
    Fault(
        kind="workers",
        fault="a loader worker is killed",
        does=ended(harmed("worker", signal.SIGKILL), "the run ends"),
        exit_code=HUNG,
        seen=r"loader worker \d \(pid \d+\) is dead",
        lost_steps=2,
        quick=False,
    ),
    Fault(
        kind="workers",
        fault="a loader worker is stopped",
        does=ended(harmed("worker", signal.SIGSTOP), "the run ends"),
        exit_code=HUNG,
        seen=r"loader worker \d \(pid \d+\) is stopped",
        lost_steps=2,
    ),
    Fault(
        kind="workers",
        fault="/dev/shm too small for what workers hand over",
        does=small_shared_memory,
        exit_code=MISTAKE,
        seen="shared memory.*--shm-size.*data.num_workers=0",
    ),
    Fault(
        kind="ranks",
        fault="rank 1 is stopped",
        does=two_ranks(harmed("rank 1", signal.SIGSTOP), "the run ends"),
        exit_code=HUNG,
        seen=r"rank 1 \(pid \d+ on .*\) has given no sign of life.*ended with -9",
        lost_steps=2,
    ),
    Fault(
        kind="ranks",
        fault="rank 0 is stopped",
        does=two_ranks(harmed("rank 0", signal.SIGSTOP), "the run ends"),
        exit_code=-signal.SIGKILL,
        seen=r"rank 0 \(pid \d+ on .*\) has given no sign of life.*ended with 70",
        lost_steps=2,
        quick=False,
    ),
    Fault(
        kind="ranks",
        fault="rank 1 is killed",
        does=two_ranks(harmed("rank 1", signal.SIGKILL), "rank 0 failed"),
        exit_code=FAILED,
        seen="ended with -9",
        lost_steps=2,
        quick=False,
    ),
    Fault(
        kind="judges",
        fault="a judge that drips",
        does=odd_judge(drops),
        exit_code=0,
        seen="of row 'q3' .*no answer within timeout_s=1",
        limit_s=180,
        quick=False,
    ),
    Fault(
        kind="judges",
        fault="a judge whose reply has no end",
        does=odd_judge(floods),
        exit_code=0,
        seen="of row 'q3' .*larger than 4 MiB",
        limit_s=180,
        quick=False,
    ),
    Fault(
        kind="judges",
        fault="a judge that sends a packed bomb",
        does=odd_judge(bomb, "gzip"),
        exit_code=0,
        seen="of row 'q3' .*larger than 4 MiB",
        limit_s=180,
        quick=False,
    ),
    Fault(
        kind="engines",
        fault="a rollout server that drips",
        does=dripping_engine,
        exit_code=FAILED,
        seen="did not answer /info within timeout_s=1; raise timeout_s of VLLMServerEngine",
        quick=False,
    ),
]
