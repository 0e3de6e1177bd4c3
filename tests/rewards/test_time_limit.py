"""A call that takes too long is stopped where it stands, and nothing of the limit is left behind."""

import re
import signal
import threading
import time

import pytest

from longrl.rewards.time_limit import TimeIsUp, call_within


def sleeps():
    time.sleep(60)


def counts_for_ever():
    number = 0
    while True:
        number += 1


def waits_for_a_lock():
    threading.Event().wait()


def matches_for_ever():
    re.fullmatch(r"(a+)+b", "a" * 40)


def tries_for_ever():
    while True:
        try:
            time.sleep(60)
        except Exception:
            continue


@pytest.mark.parametrize("function", [sleeps, counts_for_ever, waits_for_a_lock, matches_for_ever, tries_for_ever])
def test_a_call_that_hangs_is_stopped(function):
    started = time.monotonic()
    with pytest.raises(TimeIsUp) as stop:
        call_within(0.1, function)
    assert time.monotonic() - started < 5
    assert function.__name__ in [entry.name for entry in stop.traceback]


def test_a_call_in_time_gives_its_value_and_its_errors():
    assert call_within(60, divmod, 7, 2) == (3, 1)
    assert call_within(0, int, "ff", base=16) == 255
    with pytest.raises(ZeroDivisionError):
        call_within(60, divmod, 7, 0)


def test_nothing_of_the_limit_is_left():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeIsUp):
        call_within(0.05, sleeps)
    call_within(60, int)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_alarm_that_was_set_before_still_rings():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        call_within(60, time.sleep, 0.1)
        time.sleep(0.05)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert rung == [signal.SIGALRM]


def test_outside_the_main_thread_there_is_no_limit():
    values = []
    thread = threading.Thread(target=lambda: values.append(call_within(0.01, lambda: time.sleep(0.05) or "done")))
    thread.start()
    thread.join()
    assert values == ["done"]
