"""The view of a run: lines where nobody watches, a screen where somebody does, and nothing left behind."""

import io
import logging
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from longrl.callbacks.live_display import LiveDisplay
from longrl.callbacks.run_watch import RunWatch
from longrl.callbacks.terminal_view import TerminalView, _write_line, first_sample, total_steps
from longrl.io.stop_signals import stop_signals
from longrl.modules.policy import PolicyModule
from longrl.types import Batch, Completion, Group, Prompt, Row
from tests.runs import run, text_config
from tests.tiny import text_family


def batch(text="<answer>B</answer>"):
    row = Row(id="q1", problem="Which?", answer="B")
    prompt = Prompt("q1", torch.zeros(1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), (), row)
    answer = Completion(torch.zeros(1), torch.zeros(1), text, "stop")
    return Batch([prompt], groups=[Group(prompt, [answer], rewards=torch.ones(1))])


@pytest.fixture
def module():
    return PolicyModule(text_family())


def trainer(view, **options):
    watch = RunWatch()
    known = {
        "default_root_dir": "runs/mine",
        "global_step": 0,
        "max_steps": 25,
        "max_epochs": None,
        "num_training_batches": float("inf"),
        "is_global_zero": True,
        "log_every_n_steps": 1,
        "world_size": 1,
        "precision": "32-true",
        "strategy": SimpleNamespace(root_device=torch.device("cpu")),
        "callbacks": [watch, view],
        "loggers": [],
        "callback_metrics": {
            "reward/mean": torch.tensor(0.5),
            "time/generate": torch.tensor(1.25),
            "throughput/tokens_per_s": torch.tensor(900.0),
        },
    }
    return SimpleNamespace(**(known | options))


def train(view, fake, module, steps, per_batch=1):
    view.setup(fake, module, "fit")
    for callback in fake.callbacks:
        callback.on_train_start(fake, module)
    for _ in range(steps):
        fake.global_step += per_batch
        for callback in fake.callbacks:
            callback.on_train_batch_end(fake, module, None, batch(), 0)


def test_a_signal_is_told_on_the_screen_which_draws_over_its_line():
    view = TerminalView("plain")
    with stop_signals(speaks=False) as signals:
        signals.defer()
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 10
        while not view.progress().notice and time.monotonic() < deadline:
            time.sleep(0.01)
        assert view.progress().notice.startswith("SIGINT: the run stops after this step")
    assert view.progress().notice == ""


# ---- lines ----


def test_a_line_comes_at_the_first_step_at_multiples_and_at_the_end(module, capsys):
    view = TerminalView("auto", every_n_steps=10)  # the output of a test is no terminal
    train(view, trainer(view), module, 25)
    first, question, answer, *lines = capsys.readouterr().out.splitlines()
    assert (first, question) == ("first completion (row q1, reward 1)", "  question:   Which?")
    assert answer == "  completion: <answer>B</answer>"
    assert [line.split(" | ")[0] for line in lines] == [
        "step 1/25 4%",
        "step 10/25 40%",
        "step 20/25 80%",
        "step 25/25 100%",
    ]
    assert lines[1].split(" | ")[1] == "reward 0.5"
    assert "900 tokens/s | generate 1.2 | ETA" in lines[1]


def test_a_rollout_of_several_steps_that_passes_a_multiple_is_told(module, capsys):
    view = TerminalView("plain", every_n_steps=10)
    train(view, trainer(view, max_steps=-1), module, 6, per_batch=4)
    lines = capsys.readouterr().out.splitlines()[3:]  # behind the first completion
    assert [line.split(" | ")[0] for line in lines] == ["step 4", "step 12", "step 20"]


def test_other_ranks_say_nothing(module, capsys):
    view = TerminalView("plain", every_n_steps=1)
    train(view, trainer(view, is_global_zero=False), module, 3)
    assert capsys.readouterr().out == ""


def test_a_reader_that_is_gone_does_not_end_the_run_and_changes_no_status():
    read, write = os.pipe()
    os.close(read)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(write, 1)
            sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False))
            _write_line("first")
            _write_line("second")
            sys.stdout.flush()  # as Python does at its end
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("limits", "steps"),
    [({}, None), ({"max_epochs": 3}, 42), ({"max_epochs": 3, "max_steps": 5}, 5), ({"max_steps": 99}, 99)],
)
def test_steps_of_a_run_come_from_its_nearest_end(limits, steps):
    known = {"max_steps": -1, "max_epochs": -1, "num_training_batches": 7}
    module = SimpleNamespace(is_rl=lambda: True, steps_per_rollout=2)
    assert total_steps(SimpleNamespace(**(known | limits)), module) == steps
    endless = SimpleNamespace(**(known | limits | {"num_training_batches": float("inf")}))
    assert total_steps(endless, module) == limits.get("max_steps")


def test_the_sample_is_the_first_completion_in_words():
    sample = first_sample(batch("\x1b[2J"))
    assert (sample.id, sample.prompt, sample.completion, sample.reward) == ("q1", "Which?", "\x1b[2J", 1.0)
    assert first_sample(SimpleNamespace(groups=None)) is None
    picture = SimpleNamespace(completions=[SimpleNamespace(steps=[])])
    assert first_sample(SimpleNamespace(groups=[picture])) is None


# ---- the screen ----


def test_a_live_view_draws_the_phase_under_way_and_leaves_the_terminal_as_it_was(module):
    out = io.StringIO()
    before = sys.stdout
    view = TerminalView("live", console=Console(file=out, force_terminal=True, width=80, height=24))
    fake = trainer(view)
    train(view, fake, module, 3)
    with module.phases("generate"):
        deadline = time.monotonic() + 20
        while "generate 0 s" not in out.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.02)
    view.on_exception(fake, module, KeyboardInterrupt())
    view.teardown(fake, module, "fit")
    assert sys.stdout is before
    text = out.getvalue()
    assert "runs/mine" in text
    assert "step 3/25 12%" in text
    assert "<answer>B</answer>" in text
    assert text.rstrip("\n").endswith("\x1b[?25h")  # the cursor is back


def test_logs_that_remember_their_stream_are_written_above_the_screen(monkeypatch):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=24)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    handler = logging.StreamHandler()  # as Lightning's, made before
    log = logging.getLogger("tests.view")
    log.addHandler(handler)
    display = LiveDisplay(lambda console: "picture", console)
    try:
        display.start()
        log.warning("row 7 is skipped")
        display.stop()
        log.warning("later")
    finally:
        log.removeHandler(handler)
    assert "row 7 is skipped" in out.getvalue()
    assert stream.getvalue() == "later\n"


def test_a_child_writes_where_its_parent_did_before_and_draws_nothing():
    out = io.StringIO()
    read, write = os.pipe()
    before = sys.stdout
    display = LiveDisplay(lambda console: "picture", Console(file=out, force_terminal=True, width=80, height=24))
    display.start()
    child = os.fork()
    if child == 0:
        drawn = len(out.getvalue())
        time.sleep(0.6)
        is_quiet = sys.stdout is before and len(out.getvalue()) == drawn
        os.write(write, b"quiet" if is_quiet else b"loud")
        os._exit(0)
    os.waitpid(child, 0)
    display.draw()  # the parent's lock is free
    display.stop()
    assert os.read(read, 10) == b"quiet"


def test_a_terminal_that_is_gone_ends_the_view_and_not_the_run(caplog):
    def fail(console):
        raise OSError("no terminal")

    display = LiveDisplay(fail, Console(file=io.StringIO(), force_terminal=True, width=80, height=24))
    with caplog.at_level(logging.WARNING):
        display.start()
        deadline = time.monotonic() + 20
        while not caplog.records:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert "the view ends, for drawing it failed: OSError('no terminal'); the run goes on" in caplog.text
    display.stop()


# ---- the command line ----


def test_fit_shows_lines_where_nobody_watches(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "problem": "1 + 1?", "answer": "2"}\n' * 3)
    values = text_config(tmp_path / "rows.jsonl", "rl")
    values["trainer"] |= {"max_steps": 2}
    del values["trainer"]["enable_progress_bar"]
    values["rollout"]["max_resample_rounds"] = 0
    run(tmp_path / "run", values)
    out = capsys.readouterr().out
    assert out.startswith("first completion (row ")
    lines = out.splitlines()[3:]
    assert [line.split(" | ")[0] for line in lines[:2]] == ["step 1/2 50%", "step 2/2 100%"]
    assert lines[2].startswith("done: step 2, checkpoint ")
    assert all(figure in out for figure in ("reward ", "loss ", "entropy ", "grad norm ", "generate ", "tokens/s"))


@pytest.mark.parametrize(("options", "classes"), [([], [TerminalView]), (["--view=off"], [])])
def test_which_bar_a_trainer_has(tmp_path, monkeypatch, options, classes):
    from longrl.commands.trainer import LongRLCLI
    from tests.runs import arguments

    (tmp_path / "rows.jsonl").write_text('{"id": "a", "problem": "1 + 1?", "answer": "2"}\n')
    values = text_config(tmp_path / "rows.jsonl")
    del values["trainer"]["enable_progress_bar"]
    monkeypatch.setattr(LongRLCLI, "_run_subcommand", lambda self, subcommand: None)
    cli = LongRLCLI.run(arguments(tmp_path / "run", values, *options))
    shown = [type(one) for one in cli.trainer.callbacks if isinstance(one, TerminalView)]
    assert shown == classes
