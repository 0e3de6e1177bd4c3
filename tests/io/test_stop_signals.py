"""Signals that ask a command to end; every process here is a fork of the test's."""

import contextlib
import hashlib
import os
import signal
import sys
import threading
import time

import pytest

from longrl.io.exit_codes import INTERRUPTED, STOPPED
from longrl.io.stop_signals import (
    STOP_SIGNALS,
    Interrupted,
    StopRun,
    StopSignals,
    current_signals,
    interruptible,
    stop_signals,
)


def forked(function):
    """(process, pipe to read): the child runs `function(say)`; the pipe has what it says, and its standard error."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.close(reader)
        os.dup2(writer, 2)
        code = 99
        try:
            function(lambda text: os.write(writer, text.encode()))
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException as error:
            os.write(writer, repr(error).encode())
        finally:
            os._exit(code)
    os.close(writer)
    return child, reader


def wait_for(reader, text, found=""):
    while text not in found:
        part = os.read(reader, 4096).decode()
        assert part, found
        found += part
    return found


def ended(child, reader):
    """Exit code and all that was still written."""
    found = b""
    while part := os.read(reader, 4096):
        found += part
    os.close(reader)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), found.decode()


def busy_training(say, limit_s=None, ends=False):
    """A step that never looks for signals, as one that waits in C does not."""
    with stop_signals() as signals:
        signals.defer(limit_s)
        signals.advice = lambda: "checkpoint: last.ckpt"
        say("ready")
        while not (ends and signals.requested):
            threading.Event().wait(0.05)
        time.sleep(0.1)
        raise StopRun(3)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_training_run_is_asked_and_ends_at_a_point_of_its_own(number):
    child, reader = forked(lambda say: busy_training(say, ends=True))
    wait_for(reader, "ready")
    os.kill(child, number)
    code, text = ended(child, reader)
    assert code == STOPPED
    assert (
        text == f"longrl: {number.name}: the run stops after this step, with a checkpoint (a second Ctrl-C: at once)\n"
    )


def test_a_second_ctrl_c_ends_it_at_once_and_one_that_arrives_twice_is_one():
    child, reader = forked(busy_training)
    wait_for(reader, "ready")
    for _ in range(2):  # from the terminal, and from a launcher
        os.kill(child, signal.SIGINT)
    text = wait_for(reader, "stops after this step")
    time.sleep(1.1)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGINT)
    code, more = ended(child, reader)
    assert code == INTERRUPTED
    assert text.count("\n") <= 1
    assert "a second Ctrl-C: ended at once; checkpoint: last.ckpt\n" in more


def test_a_step_that_does_not_end_within_its_limit_is_abandoned():
    child, reader = forked(lambda say: busy_training(say, limit_s=0.2))
    wait_for(reader, "ready")
    os.kill(child, signal.SIGUSR1)
    code, text = ended(child, reader)
    assert code == STOPPED
    assert "did not end within checkpoint.stop_within_s=0.2 and is abandoned; checkpoint: last.ckpt" in text


def test_the_limit_is_kept_while_the_main_thread_is_in_a_call_into_c():
    def step(say):
        with stop_signals() as signals:
            signals.defer(0.2)
            say("ready")
            hashlib.pbkdf2_hmac("sha256", b"", b"", 30_000_000)  # many seconds in which no handler of Python's runs

    child, reader = forked(step)
    wait_for(reader, "ready")
    os.kill(child, signal.SIGTERM)
    assert ended(child, reader)[0] == STOPPED


def test_a_signal_that_was_swallowed_before_training_leaves_the_step_its_time(monkeypatch):
    def step(say):
        with stop_signals() as signals:
            with contextlib.suppress(Interrupted):
                say("ready")
                threading.Event().wait(60)
            signals.defer()
            time.sleep(2)
            assert signals.requested
            raise StopRun(1)

    monkeypatch.setattr("longrl.io.stop_signals.GRACE_S", 1.5)
    child, reader = forked(step)
    wait_for(reader, "ready")
    os.kill(child, signal.SIGTERM)
    assert ended(child, reader)[0] == STOPPED


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_another_command_is_interrupted_with_one_line(number, code):
    def command(say):
        with interruptible("evaluate", "what was answered is kept"):
            try:
                say("ready")
                time.sleep(30)
            except KeyboardInterrupt:
                sys.exit(1)  # as Lightning does

    child, reader = forked(command)
    wait_for(reader, "ready")
    os.kill(child, number)
    name = signal.Signals(number).name
    assert ended(child, reader) == (
        code,
        f"longrl: {name}: `evaluate` is interrupted; what was answered is kept\n",
    )


def test_a_signal_that_does_not_wake_the_main_thread_ends_its_wait():
    """As one that comes just before it begins to wait: Python handles it when the wait is over."""

    def command(say):
        with interruptible("evaluate"):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it goes to the other thread
            say("ready")
            time.sleep(30)

    child, reader = forked(command)
    wait_for(reader, "ready")
    os.kill(child, signal.SIGINT)
    assert ended(child, reader) == (INTERRUPTED, "longrl: SIGINT: `evaluate` is interrupted\n")


def test_a_command_that_does_not_end_by_itself_is_ended(monkeypatch):
    monkeypatch.setattr("longrl.io.stop_signals.GRACE_S", 0.2)

    def command(say):
        with interruptible("pipeline"):
            while True:
                try:
                    say("ready")
                    time.sleep(30)
                except Interrupted:
                    say("swallowed")

    child, reader = forked(command)
    wait_for(reader, "ready")
    os.kill(child, signal.SIGTERM)
    code, text = ended(child, reader)
    assert code == 143
    assert "did not end within 0.2 s" in text


def test_an_error_that_no_signal_caused_stays_what_it_is():
    with pytest.raises(ValueError, match="of the user"), interruptible("export"):
        raise ValueError("of the user")


def test_handlers_are_those_of_before_once_the_block_ends():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with stop_signals() as outer, stop_signals() as inner:
        assert inner is outer is current_signals()
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    assert current_signals() is None
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_other_threads_have_none():
    found = []

    def look():
        with stop_signals() as signals:
            found.append(signals)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [None]


def test_a_forked_worker_outlives_what_is_meant_for_the_run():
    """It is in a group of its own, for `timeout` and Ctrl-C send to all of the trainer's; a SIGTERM to it ends it."""

    def trainer(say):
        with StopSignals() as signals:
            signals.defer()
            worker = os.fork()
            if worker == 0:
                time.sleep(30)
                os._exit(0)
            say(f"{worker} ")
            while signals.requested is None:
                time.sleep(0.02)
            time.sleep(0.1)
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
                os.kill(worker, number)
            time.sleep(0.1)
            say(f"alive {os.waitpid(worker, os.WNOHANG)} ")
            os.kill(worker, signal.SIGTERM)
            say(f"ended {os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])} ")
            say(f"noted {signals.requested.name}")

    child, reader = forked(trainer)
    wait_for(reader, " ")
    time.sleep(0.1)
    os.killpg(child, signal.SIGTERM)
    code, text = ended(child, reader)
    assert code == 0
    assert text.endswith("alive (0, 0) ended -15 noted SIGTERM")


def test_a_run_under_nohup_outlives_its_terminal():
    def train(say):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        busy_training(say, ends=True)

    child, reader = forked(train)
    wait_for(reader, "ready")
    os.kill(child, signal.SIGHUP)
    time.sleep(0.3)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGTERM)
    code, text = ended(child, reader)
    assert code == STOPPED
    assert "SIGHUP" not in text
