"""The watchdog's judgement, look by look; runs that hang are rows of bench/fault_cases/hangs.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from longrl.callbacks.watch_thread import WatchLimits, WatchThread
from longrl.callbacks.watchdog import Watchdog
from longrl.io.checkpoint_files import save_file
from longrl.io.checksums import check_zip, file_checksum
from longrl.io.exit_codes import HUNG, STOPPED
from longrl.io.heartbeats import Heartbeats
from longrl.io.processes import LostWorker, kill_descendants, machine
from longrl.io.pulse import PULSE
from longrl.io.stop_signals import StopSignals

LIMITS = {"data": 10.0, "reward": 20.0}


@pytest.fixture(autouse=True)
def pulse(monkeypatch):
    for name, value in {"phase": "data", "sample": "", "beats": 0, "workers": {}}.items():
        monkeypatch.setattr(PULSE, name, value)


@pytest.fixture(autouse=True)
def _no_last_gasp(monkeypatch):
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda *args, **kwargs: None)


def watch(folder, rank=0, world_size=1, run="run") -> WatchThread:
    limits = WatchLimits(LIMITS.__getitem__, 20.0, silent_s=8.0)
    return WatchThread(limits, Heartbeats(folder, run, rank, world_size), folder / "stacks.txt")


def messages(thread: WatchThread, looks: int, seconds: float = 1.0) -> list[str]:
    found = [thread.look(seconds) for _ in range(looks)]
    return [trouble.message for trouble in found if trouble is not None]


# ---- phases ----


def test_a_phase_that_gets_nothing_done_is_named_with_rank_row_and_limit(tmp_path):
    thread = watch(tmp_path)
    PULSE.sample = "row 7"
    assert not messages(thread, 11)
    (message,) = messages(thread, 1)
    assert "rank 0 has got nothing done for 11 s in the phase data, at row 'row 7', where 10 s" in message
    assert "watchdog.limits_s" in message


def test_each_phase_has_its_limit_and_whatever_gets_done_starts_it_anew(tmp_path):
    thread = watch(tmp_path)
    PULSE.enter("reward")
    assert not messages(thread, 20)
    PULSE.beats += 1
    assert not messages(thread, 21)
    assert messages(thread, 1)


def test_a_heartbeat_says_what_a_rank_does(tmp_path):
    thread = watch(tmp_path)
    PULSE.sample = "q1"
    thread.look(1.0)
    beat = json.loads((tmp_path / "heartbeats" / "rank0.json").read_text())
    assert (beat["phase"], beat["sample"], beat["pid"], beat["rank"]) == ("data", "q1", os.getpid(), 0)
    thread.stop()
    assert not (tmp_path / "heartbeats").exists()


def test_who_waits_for_others_lets_them_speak_first(tmp_path, monkeypatch):
    thread = watch(tmp_path)
    monkeypatch.setattr("longrl.callbacks.watch_thread.waits_for_others", lambda: True)
    assert not messages(thread, 14)  # 10 s and four beats of a second
    (message,) = messages(thread, 2)[:1]
    assert "rank 0 has waited for other ranks" in message


# ---- ranks ----


@pytest.mark.parametrize("beats", [0, 20], ids=["stopped after its first beat", "after many"])
def test_a_silent_rank_is_named_and_one_that_beats_is_not(tmp_path, beats):
    thread, other = watch(tmp_path, 0, 2), watch(tmp_path, 1, 2)
    for _ in range(beats):
        assert thread.look(1.0) is None
        other.look(1.0)
        PULSE.beats += 1
    PULSE.sample = "q5"
    other.look(1.0)
    found = []
    while not found:
        PULSE.beats += 1
        found = [trouble for trouble in [thread.look(1.0)] if trouble]
    assert f"rank 1 (pid {os.getpid()} on " in found[0].message
    assert "no sign of life for 9 s" in found[0].message
    assert "its last words: data, row 'q5'. It is killed" in found[0].message
    assert found[0].victim == os.getpid()
    assert found[0].exit_code == HUNG


def test_a_rank_that_never_beat_or_is_of_another_start_is_not_missed(tmp_path):
    old = watch(tmp_path, 1, 2, run="yesterday")
    old.look(1.0)
    old.look(1.0)
    thread = watch(tmp_path, 0, 2)
    for _ in range(30):
        PULSE.beats += 1
        assert thread.look(1.0) is None


def test_a_rank_whose_process_is_gone_is_missed_at_once(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    other = Heartbeats(tmp_path, "run", 1, 2)
    other.write("update", "", 0.0)
    path = tmp_path / "heartbeats" / "rank1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": child.pid}))
    child.wait()
    (message,) = messages(watch(tmp_path, 0, 2), 1)
    assert message.startswith(f"rank 1 (pid {child.pid} on ")
    assert "has died without a word" in message


def test_a_clock_that_is_set_and_process_ids_of_another_container_make_no_rank_dead(tmp_path, monkeypatch):
    other = Heartbeats(tmp_path, "run", 1, 2)
    other.write("update", "", 0.0)
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: 1000.0)
    assert messages(watch(tmp_path, 0, 2), 1) == []
    path = tmp_path / "heartbeats" / "rank1.json"
    of_container = {"pid": 2**22 + 1, "machine": f"{machine().rpartition(' ')[0]} pid:[17]"}
    path.write_text(json.dumps(json.loads(path.read_text()) | of_container))
    assert messages(watch(tmp_path, 0, 2), 1) == []


def test_what_a_rank_says_last_ends_the_others_with_its_code(tmp_path):
    Heartbeats(tmp_path, "run", 1, 3).end_all("rank 1 is done for", HUNG)
    Heartbeats(tmp_path, "run", 2, 3).end_all("rank 2, too", 1)
    trouble = watch(tmp_path, 0, 3).look(1.0)
    assert (trouble.message, trouble.exit_code, trouble.found_by) == ("rank 1 is done for", HUNG, 1)


def test_a_full_disk_is_no_silence(tmp_path, monkeypatch):
    beats, other = Heartbeats(tmp_path, "run", 1, 2), Heartbeats(tmp_path, "run", 0, 2)
    beats.write("data", "", 0.0)
    before = other.neighbour()
    monkeypatch.setattr("pathlib.Path.write_text", lambda *args: (_ for _ in ()).throw(OSError(28, "disk full")))
    time.sleep(0.02)
    beats.write("data", "", 0.0)
    assert other.neighbour()[0] == before[0]
    assert other.neighbour() != before


# ---- loader workers ----


@pytest.fixture
def process():
    child = subprocess.Popen(["sleep", "60"])
    yield child
    child.kill()
    child.wait()


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGKILL, "dead"), (signal.SIGSTOP, "stopped")])
def test_a_worker_that_dies_or_stops_is_named_in_its_third_look(tmp_path, process, number, kind):
    PULSE.workers = {process.pid: "loader worker 3"}
    thread = watch(tmp_path)
    assert not messages(thread, 5)
    process.send_signal(number)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
    assert not messages(thread, 2)
    (message,) = messages(thread, 1)
    assert message.startswith(f"loader worker 3 (pid {process.pid}) is {kind}: ")


def test_a_worker_that_nobody_reads_from_may_end(tmp_path, process):
    PULSE.workers = {process.pid: "loader worker 3"}
    thread = watch(tmp_path)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    thread.look(1.0)
    PULSE.workers = {}
    assert not messages(thread, 5)


# ---- the callback ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limits_s": {"rewards": 3.0}}, "knows the phases .*reward.*, got rewards"),
        ({"limit_s": -1.0}, "limit_s must be at least 0"),
        ({"limits_s": {"reward": float("nan")}}, "reward must be at least 0"),
        ({"silent_s": 0.0}, "silent_s must be above 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Watchdog(**options)


def test_limits_of_phases():
    dog = Watchdog(limit_s=100, limits_s={"reward": 7.0, "save": 0.0})
    assert [dog.limit_of(phase) for phase in ("update", "generate", "start", "reward")] == [100, 200, 400, 7]
    assert dog.limit_of("save") == float("inf")


def started(folder, world_size=1, limit_s=1000.0):
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(broadcast=lambda run: run, _timeout=timedelta(hours=2)),
        default_root_dir=str(folder),
        global_rank=0,
        world_size=world_size,
    )
    dog = Watchdog(limit_s=limit_s)
    dog.setup(trainer, None, "fit")
    return dog, trainer


def test_the_thread_lives_from_setup_to_teardown_and_the_first_beat_does_not_wait_for_it(tmp_path, monkeypatch):
    armed = []
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda seconds, **options: armed.append(seconds))
    monkeypatch.setattr(WatchThread, "run", lambda thread: thread._stopping.wait())
    dog, trainer = started(tmp_path)
    assert (tmp_path / "heartbeats" / "rank0.json").exists()
    assert armed == [2 * 4 * 1000.0]
    thread = dog._thread
    assert thread.is_alive()
    dog.teardown(trainer, None, "fit")
    assert not thread.is_alive()
    dog = Watchdog(limit_s=0)
    dog.setup(trainer, None, "fit")
    assert dog._thread is None


@pytest.mark.parametrize(("world_size", "limit_s", "expected"), [(1, None, 1800), (2, None, 7200), (2, 100.0, 100)])
def test_ranks_may_wait_for_each_other_as_long_as_the_strategy_lets_them(tmp_path, world_size, limit_s, expected):
    dog, trainer = started(tmp_path, world_size, limit_s)
    dog.teardown(trainer, None, "fit")
    assert dog.limit_of("update") == expected


def test_a_file_that_is_written_or_read_for_long_gets_something_done(tmp_path, monkeypatch):
    monkeypatch.setattr("longrl.io.checksums.CHUNK_BYTES", 1024)
    path = tmp_path / "last.ckpt"
    save_file({"state_dict": {"weight": torch.ones(1024)}}, path)
    written = PULSE.beats
    assert written > 0
    check_zip(path)
    read = PULSE.beats - written
    assert read > 4
    file_checksum(path)
    assert PULSE.beats - written - read > 4


def test_an_error_is_told_to_the_other_ranks(tmp_path):
    dog, trainer = started(tmp_path, world_size=2)
    run = dog._thread.beats.run
    dog.on_exception(trainer, None, ValueError("no good"))
    verdict = Heartbeats(tmp_path, run, 1, 2).verdict()
    assert (verdict.message, verdict.exit_code) == ("rank 0 failed: ValueError: no good", 1)


def test_a_step_that_fails_after_a_signal_ends_all_ranks_as_stopped(tmp_path):
    dog, trainer = started(tmp_path, world_size=2)
    beats = dog._thread.beats
    with StopSignals(speaks=False) as signals:
        signals.defer()
        signals.requested = signal.SIGTERM
        PULSE.workers[2**22 + 1] = "loader worker 0"  # gone, for it got the signal too
        for _ in range(5):
            assert dog._thread._find_lost_worker() is None
        dog.on_exception(trainer, None, RuntimeError("a worker is gone"))
    verdict = Heartbeats(tmp_path, beats.run, 1, 2).verdict()
    assert (verdict.message, verdict.exit_code) == ("rank 0 abandoned its step", STOPPED)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(75)])
def test_a_run_that_is_asked_to_end_says_nothing(tmp_path, error):
    dog, trainer = started(tmp_path, world_size=2)
    run = dog._thread.beats.run
    dog.on_exception(trainer, None, error)
    assert Heartbeats(tmp_path, run, 1, 2).verdict() is None


def test_a_lost_worker_ends_the_run_as_hung(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("longrl.callbacks.watchdog.kill_descendants", lambda: None)
    dog, trainer = started(tmp_path)
    with pytest.raises(SystemExit) as ending:
        dog.on_exception(trainer, None, LostWorker("loader worker 0 (pid 3) is dead"))
    assert ending.value.code == HUNG
    assert "loader worker 0 (pid 3) is dead; the run ends with status 70" in capfd.readouterr().err


# ---- processes ----


def test_a_rank_ends_with_the_process_that_started_it(tmp_path):
    """The rank is stopped, too, which no signal but SIGKILL and SIGCONT wakes."""
    rank = "import os, signal, time; from longrl.io.processes import end_with_parent as end; end(); print(os.getpid(), "
    rank += "flush=True); os.kill(os.getpid(), signal.SIGSTOP); time.sleep(60)"
    launcher = f"import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', {rank!r}], env=os.environ | "
    launcher += "{'LOCAL_RANK': '1'}).wait()"
    parent = subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline, "the rank outlives its launcher"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return os.path.exists(f"/proc/{pid}") and "Z" not in open(f"/proc/{pid}/stat").read().rpartition(")")[2]


def test_all_that_a_process_started_is_killed():
    child = os.fork()
    if child == 0:
        subprocess.Popen(["sleep", "60"])
        process = subprocess.Popen(["sleep", "60"])
        os.kill(process.pid, signal.SIGSTOP)
        kill_descendants()
        os._exit(0 if process.wait() == -signal.SIGKILL else 1)
    assert os.waitpid(child, 0)[1] == 0
