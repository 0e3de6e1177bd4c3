"""How far an evaluation is, also where a batch takes longer than rich's half minute."""

import io

from rich.console import Console

from longrl.callbacks import evaluation_bar
from longrl.callbacks.evaluation_bar import EvaluationBar, batch_count


class Clock:
    """A clock that a test turns."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_lines_come_at_the_first_batch_and_every_half_minute(monkeypatch):
    clock, lines = Clock(), []
    monkeypatch.setattr(evaluation_bar.time, "perf_counter", clock)
    bar = EvaluationBar("test", 10, False, lines.append)
    for seconds in (40.0, 5.0, 5.0, 40.0):
        clock.now += seconds
        bar.advance()
    assert lines == ["test batch 1/10 | 40 s/batch | ETA 6 min 0 s", "test batch 4/10 | 22.5 s/batch | ETA 2 min 15 s"]
    bar.stop({"test/accuracy": 0.5, "test/accuracy/spatial": 0.25, "test/nothing": float("nan")})
    assert lines[-1] == "test: 4 batches in 1 min 30 s | test/accuracy 0.5"


def test_a_bar_has_a_time_left_where_a_batch_takes_longer_than_half_a_minute(monkeypatch):
    clock, lines = Clock(), []
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    bar = EvaluationBar("test", 10, True, lines.append, console)
    bar._bar.get_time = clock
    bar._bar.tasks[0].start_time = clock.now
    for _ in range(4):
        clock.now += 45
        bar.advance()
    task = bar._bar.tasks[0]
    assert task.time_remaining == 6 * 45
    bar.stop()
    assert "4/10" in console.file.getvalue()
    assert lines[0].startswith("test: 4 batches in")


def test_loaders_count_together_and_an_endless_one_has_no_total():
    assert batch_count([2, 3]) == 5
    assert batch_count(float("inf")) is None
    assert EvaluationBar("test", None, False, print).line().startswith("test batch 0 | ")
