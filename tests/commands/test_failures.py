"""What a command says of an error, and where the traceback of one that nobody foresaw goes."""

import sys
from pathlib import Path

import pytest

from longrl.commands import failures
from longrl.commands.main import main
from longrl.io.exit_codes import MISTAKE
from tests.runs import arguments, text_config

LONG_LINE = 4000


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "WORLD_SIZE", "LONGRL_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(failures.tempfile, "tempdir", str(tmp_path / "tmp"))


def typed(monkeypatch, capsys, raised, folder=None):
    """Status and printed lines of a command that raises."""

    def run_command(args):
        failures.keep_tracebacks_in(folder)
        raise raised

    monkeypatch.setattr("longrl.commands.main.run_command", run_command)
    monkeypatch.setattr(sys, "argv", ["longrl", "fit"])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, capsys.readouterr().err


def test_an_unexpected_error_is_one_line_that_names_the_file_with_its_traceback(monkeypatch, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    status, said = typed(monkeypatch, capsys, KeyError("nothing"), tmp_path / "run")
    path = tmp_path / "run" / "traceback.txt"
    assert status == 1
    assert said.startswith("longrl: error: KeyError: 'nothing' (longrl/commands/main.py, line ")
    assert said.endswith(f"; the traceback is in {path}\n")
    assert path.read_text().startswith("Traceback (most recent call last)")
    assert "KeyError: 'nothing'" in path.read_text()


@pytest.mark.parametrize("folder", [None, "missing", "file"])
def test_without_a_run_folder_the_traceback_is_a_temporary_file(monkeypatch, capsys, tmp_path, folder):
    (tmp_path / "file").write_text("")
    _, said = typed(monkeypatch, capsys, OSError(28, "No space left"), folder and tmp_path / folder)
    path = Path(said.rpartition("the traceback is in ")[2].strip())
    assert path.parent == tmp_path / "tmp"
    assert "No space left" in path.read_text()


def test_a_rank_says_which_it_is_and_has_a_file_of_its_own(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "3")
    status, said = typed(monkeypatch, capsys, RuntimeError("gloo\n  broke"), tmp_path)
    assert status == 1
    assert said.startswith("longrl: error on rank 3: RuntimeError: gloo broke (")
    assert said.endswith(f"{tmp_path / 'rank3.traceback.txt'}\n")


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "5"}, 5),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "LOCAL_RANK": "3"}, 3),  # started from an interactive job
        ({"WORLD_SIZE": "2"}, 0),
    ],
)
def test_ranks_of_torchrun_lightning_and_slurm_are_told_apart(monkeypatch, environment, rank):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert failures.own_rank() == rank


def test_a_mistake_in_a_run_of_several_ranks_leaves_its_traceback_too(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["longrl", "export", "--run", str(tmp_path), "--out", str(tmp_path / "new")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == MISTAKE
    said = capsys.readouterr().err
    assert said.startswith("longrl: error on rank 0: --run=")
    assert "has no config.yaml" in Path(said.rpartition(" ")[2].strip()).read_text()


def test_the_traceback_is_printed_on_demand(monkeypatch, capsys):
    monkeypatch.setenv("LONGRL_TRACEBACK", "1")
    _, said = typed(monkeypatch, capsys, RuntimeError("broken"))
    assert "Traceback (most recent call last)" in said
    assert said.splitlines()[-1].startswith("longrl: error: RuntimeError: broken")


def test_what_an_error_holds_cannot_act_on_the_terminal(monkeypatch, capsys):
    _, said = typed(monkeypatch, capsys, RuntimeError("\x1b[2Jrow\x07\ud800" + "x" * LONG_LINE))
    assert said.count("\n") == 1
    assert r"\x1b[2Jrow\x07\ud800xxx" in said
    assert len(said) < LONG_LINE


def test_a_closed_terminal_is_no_second_error(monkeypatch, tmp_path):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    assert failures.tell_error(RuntimeError("broken")) == 1


def test_the_folder_of_the_run_is_found_where_a_config_alone_names_it(tmp_path, monkeypatch, capsys):
    """An error of the run itself: a reward that the config names is fine, and building the model is not."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"problem_id": 1, "problem": "What?", "answer": "A", "reasoning": "r"}\n' * 4)
    values = text_config(rows) | {"run_dir": str(tmp_path / "run")}
    (tmp_path / "run").mkdir()
    monkeypatch.setattr("longrl.modules.policy.build_from", lambda *args: 1 // 0)
    args = [arg for arg in arguments(tmp_path, values) if not arg.startswith("--run_dir")]
    monkeypatch.setattr(sys, "argv", ["longrl", *args])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert "ZeroDivisionError" in (tmp_path / "run" / "traceback.txt").read_text()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("longrl: error: ZeroDivisionError: integer division or modulo by zero (longrl/")
