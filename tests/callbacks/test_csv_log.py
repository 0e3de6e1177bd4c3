"""metrics.csv: appended, continued without repeated steps, readable while it is written."""

import csv
import os

import pytest
import torch

from longrl.callbacks.csv_log import CSVLog
from longrl.evaluation.curves import read_metrics


def lines(log):
    return log.path.read_text().splitlines()


def filled(folder, steps=3):
    log = CSVLog(folder)
    for step in range(steps):
        log.log_metrics({"epoch": 0, "loss": 0.5 * step}, step)
    return log


def test_a_line_per_call_in_the_order_of_calls(tmp_path):
    log = filled(tmp_path, 2)
    assert log.path == tmp_path / "logs" / "version_0" / "metrics.csv"
    assert lines(log) == ["step,epoch,loss", "0,0,0.0", "1,0,0.5"]


def test_lines_are_appended_to_the_same_file_unless_a_column_is_new(tmp_path):
    log = filled(tmp_path, 2)
    before = os.stat(log.path)
    log.log_metrics({"epoch": 0, "loss": torch.tensor(0.25)}, 2)
    after = os.stat(log.path)
    assert after.st_ino == before.st_ino
    assert after.st_size == before.st_size + len("2,0,0.25\n")
    log.log_metrics({"val/loss": 4.0}, 2)
    assert os.stat(log.path).st_ino != before.st_ino
    assert lines(log) == ["step,epoch,loss,val/loss", "0,0,0.0,", "1,0,0.5,", "2,0,0.25,", "2,,,4.0"]


def test_a_run_that_goes_on_takes_out_what_it_repeats(tmp_path):
    filled(tmp_path, 5)
    log = CSVLog(tmp_path)
    log.log_metrics({"loss": 9.0}, 3)
    log.log_metrics({"loss": 9.5}, 4)
    assert lines(log) == ["step,epoch,loss", "0,0,0.0", "1,0,0.5", "2,0,1.0", "3,,9.0", "4,,9.5"]
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["version_0"]


@pytest.mark.parametrize("torn", ["3,0", "3,0,1.5", "3,0,1.5,7\n", "\0\0\0\0\n", "nan,0,1.5\n"])
def test_a_line_that_was_not_written_whole_is_taken_out(tmp_path, torn):
    with filled(tmp_path).path.open("a") as file:
        file.write(torn)
    log = CSVLog(tmp_path)
    log.log_metrics({"loss": 2.0}, 3)
    assert lines(log) == ["step,epoch,loss", "0,0,0.0", "1,0,0.5", "2,0,1.0", "3,,2.0"]


def test_a_file_of_lightnings_logger_is_continued(tmp_path):
    for number in (0, 10):
        file = tmp_path / "logs" / f"version_{number}" / "metrics.csv"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"epoch,loss,step\r\n0,3.0,0\r\n0,2.0,1\r\n")
    log = CSVLog(tmp_path)
    log.log_metrics({"loss": 1.0, "reward/mean": 0.5}, 1)
    assert log.version == 10
    assert read_metrics(log.path) == {"loss": {0: 3.0, 1: 1.0}, "reward/mean": {1: 0.5}}


def test_evaluations_have_a_folder_each(tmp_path):
    for number in range(2):
        log = CSVLog(tmp_path, "test_logs", continues=False)
        log.log_metrics({"test/reward": number}, 0)
        assert log.path == tmp_path / "test_logs" / f"version_{number}" / "metrics.csv"


def test_names_from_the_data_break_no_line(tmp_path):
    log = CSVLog(tmp_path)
    log.log_metrics({'val/accuracy/plot, "a"\nb': 0.5}, 0)
    with log.path.open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"step": "0", 'val/accuracy/plot, "a" b': "0.5"}]


def test_a_file_without_steps_is_set_aside(tmp_path):
    log = CSVLog(tmp_path)
    log.path.parent.mkdir(parents=True)
    log.path.write_text("my notes\n")
    log.log_metrics({"loss": 1.0}, 0)
    assert lines(log) == ["step,loss", "0,1.0"]
    assert log.path.with_name("metrics.csv.old1").read_text() == "my notes\n"
