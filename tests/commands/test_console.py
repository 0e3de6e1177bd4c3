"""What a command says beside its results."""

import logging
import warnings

import pytest

from longrl.commands import console
from longrl.commands.console import quiet_libraries, say


@pytest.fixture
def log(monkeypatch):
    """The logger of longrl's modules, as it was before."""
    own = logging.getLogger("longrl")
    monkeypatch.setattr(own, "handlers", [])
    monkeypatch.setattr(own, "level", own.level)
    yield own
    own.setLevel(logging.NOTSET)


@pytest.fixture
def speak(monkeypatch):
    """`speak` on a command line that nobody configured; pytest adds handlers of its own before each test."""

    def call():
        with monkeypatch.context() as patch:
            patch.setattr(logging.getLogger(), "handlers", [])
            console.speak()

    return call


def test_lines_have_the_time_and_warnings_their_kind(log, monkeypatch, speak, capsys):
    monkeypatch.setattr(console, "STARTED", console.time.monotonic())
    speak()
    logging.getLogger("longrl.models.building").info("loading weights of %s", "x")
    log.warning("few videos")
    assert capsys.readouterr().err.splitlines() == ["[0.0 s] loading weights of x", "warning: few videos"]


def test_other_ranks_only_warn_and_say_who_they_are(log, monkeypatch, speak, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    speak()
    log.info("loading")
    log.warning("few videos")
    assert capsys.readouterr().err == "warning (rank 1): few videos\n"


def test_whoever_configured_logging_has_chosen(log, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])
    console.speak()
    assert log.handlers == []


@pytest.mark.parametrize(
    ("logger", "text", "is_shown"),
    [
        ("lightning.pytorch.utilities.rank_zero", "💡 Tip: For seamless cloud logging, try [litlogger]", False),
        ("lightning.pytorch.utilities.rank_zero", "GPU available: False, used: False", False),
        ("lightning.pytorch.utilities.rank_zero", "GPU available but not used.", True),
        ("lightning.pytorch.utilities.rank_zero", "`Trainer.fit` stopped: `max_steps=3` reached.", False),
        ("huggingface_hub.utils._http", "Retrying in 8s [Retry 4/5].", False),
        ("huggingface_hub.utils._http", "'[Errno -2]' thrown while requesting HEAD", True),
        ("lightning.fabric.utilities.seed", "Seed set to 0", False),
    ],
)
def test_what_libraries_say_in_every_run_is_left_out_by_name(logger, text, is_shown):
    quiet_libraries()
    record = logging.LogRecord(logger, logging.INFO, "", 0, text, None, None)
    assert bool(logging.getLogger(logger).filter(record)) == is_shown


def test_other_warnings_are_shown():
    with warnings.catch_warnings(record=True) as caught:
        quiet_libraries()
        warnings.warn("Total length of `DataLoader` across ranks is zero.", stacklevel=1)
        resumed = "Be aware that when using `ckpt_path`, callbacks used ... Please add the following callbacks: ['{}']."
        warnings.warn(resumed.format("RunWatch"), stacklevel=1)
        warnings.warn(resumed.format("Mine"), stacklevel=1)
        warnings.warn("something new", FutureWarning, stacklevel=1)
    assert [str(one.message) for one in caught] == [resumed.format("Mine"), "something new"]


def test_results_are_said_by_the_first_rank(capsys, monkeypatch):
    say("written: x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    say("written: y")
    assert capsys.readouterr().out == "written: x\n"
