"""Whose weights are evaluated into which folder, and what `fit` does not begin anew."""

import os

import pytest

from longrl.commands.run_folders import check_checkpoints, check_tested_weights, run_of
from longrl.modules.initial_weights import find_checkpoint, saved_checkpoints


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.fixture
def run(tmp_path):
    """A run's folder with a checkpoint."""
    folder = tmp_path / "run"
    touch(folder / "config.yaml", folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.fixture
def slurm(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "longrl")


def check(run_dir, ckpt_path=None, init_from=None, base_weights=False, command="test"):
    paths = (None if path is None else str(path) for path in (ckpt_path, init_from))
    check_tested_weights(command, str(run_dir), *paths, base_weights)


# ---- weights that nobody named ----


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_weights_that_nobody_named_are_refused_with_what_is_there(run, command):
    with pytest.raises(ValueError, match=rf"^`{command}` is not told which weights .* by --ckpt_path \S*last\.ckpt"):
        check(run, command=command)


@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_folder_is_no_checkpoint_and_the_one_in_it_is_named(run, tmp_path, command):
    with pytest.raises(
        ValueError, match=r"is a folder and no checkpoint; name one in it, such as \S*run/checkpoints/last"
    ):
        check_checkpoints(command, str(tmp_path / "new"), str(run))
    with pytest.raises(ValueError, match=r"is a folder and no checkpoint; .* by --model\.init_from"):
        check_checkpoints(command, str(tmp_path / "new"), str(tmp_path))
    touch(tmp_path / "sharded.ckpt" / "meta.pt")
    check_checkpoints(command, str(tmp_path / "new"), str(tmp_path / "sharded.ckpt"))


@pytest.mark.parametrize("left", [None, "config.yaml"])
def test_a_run_without_a_checkpoint_or_no_run_at_all_is_refused_too(tmp_path, left):
    if left:
        touch(tmp_path / "run" / left)
    with pytest.raises(ValueError, match=r"which has no checkpoint\. .*--model\.init_from; .*--base_weights=true"):
        check(tmp_path / "run")


def test_base_weights_are_evaluated_on_purpose_in_a_folder_of_their_own(tmp_path, run):
    check(tmp_path / "base", base_weights=True)
    with pytest.raises(ValueError, match=r"--run_dir=\S*run holds a run, under whose name"):
        check(run, base_weights=True)
    with pytest.raises(ValueError, match="some/model is named too"):
        check(tmp_path / "base", init_from="some/model", base_weights=True)


def test_lightnings_last_is_no_way_to_the_weights_that_a_run_began_with(tmp_path, run):
    touch(tmp_path / "other" / "config.yaml")
    with pytest.raises(ValueError, match=r"^--ckpt_path=last, but there is no \S*last\.ckpt"):
        check_checkpoints("test", str(tmp_path / "other"), "last")
    check_checkpoints("test", str(run), "last")
    check(run, "last")


# ---- weights of another run ----


def test_a_runs_own_weights_may_be_named_in_any_way(run):
    check(run, run / "checkpoints" / "last.ckpt")
    check(run, init_from=run)
    check(os.path.relpath(run), init_from=run / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("name", ["elsewhere", "org/model"])
def test_results_of_other_weights_do_not_go_into_a_run(run, name):
    with pytest.raises(ValueError, match=rf"results of {name} into .*another run; .*name a --run_dir of their own"):
        check(run, init_from=name)
    check(run.with_name("test_of_it"), init_from=name)


def test_the_run_of_weights(run, tmp_path):
    assert run_of(str(run)) == run_of(str(run / "checkpoints" / "last.ckpt")) == run
    touch(run / "hpc_ckpt_2.ckpt")
    assert run_of(str(run / "hpc_ckpt_2.ckpt")) == run
    assert [run_of(name) for name in (None, "last", "org/model", str(tmp_path))] == [None] * 4


# ---- checkpoints that a signal left ----


def test_the_last_signals_checkpoint_is_taken_where_there_is_no_other_and_is_told(tmp_path, caplog):
    for n in (1, 2, 10):
        touch(tmp_path / f"hpc_ckpt_{n}.ckpt")
    assert find_checkpoint(str(tmp_path)) == tmp_path / "hpc_ckpt_10.ckpt"
    assert "hpc_ckpt_10.ckpt is used, which a signal left" in caplog.text
    touch(tmp_path / "checkpoints" / "last.ckpt")
    assert find_checkpoint(str(tmp_path)) == saved_checkpoints(tmp_path)[0] == tmp_path / "checkpoints" / "last.ckpt"


def test_other_checkpoints_are_listed_for_they_are_no_clear_choice(tmp_path):
    touch(tmp_path / "checkpoints" / "epoch=0-step=50.ckpt")
    with pytest.raises(ValueError, match=r"holds neither .* it has \S*step=50\.ckpt, one of which may be named"):
        find_checkpoint(str(tmp_path))


@pytest.mark.usefixtures("slurm")
def test_under_slurm_lightning_takes_a_signals_checkpoint_by_itself_which_is_told(tmp_path, caplog):
    touch(tmp_path / "hpc_ckpt_3.ckpt")
    check(tmp_path)
    assert "hpc_ckpt_3.ckpt is evaluated, which SLURM's signal left" in caplog.text
    check_checkpoints("fit", str(tmp_path), None)
    assert "goes on from" in caplog.text


@pytest.mark.usefixtures("slurm")
def test_under_slurm_an_older_signals_checkpoint_does_not_undo_later_steps(run):
    touch(run / "hpc_ckpt_1.ckpt")
    os.utime(run / "hpc_ckpt_1.ckpt", (1, 1))
    with pytest.raises(ValueError, match=r"go on with it by --ckpt_path \S*last\.ckpt"):
        check_checkpoints("fit", str(run), None)


def test_elsewhere_a_signals_checkpoint_is_a_run_that_fit_does_not_replace(tmp_path):
    touch(tmp_path / "hpc_ckpt_3.ckpt")
    with pytest.raises(ValueError, match=r"go on with it by --ckpt_path \S*hpc_ckpt_3\.ckpt"):
        check_checkpoints("fit", str(tmp_path), None)


# ---- runs without a checkpoint ----


@pytest.mark.parametrize(
    ("name", "content"), [("logs/version_0/metrics.csv", "step,loss\n1,2\n"), ("samples.jsonl", "")]
)
def test_fit_does_not_mix_with_a_run_that_ended_before_its_first_checkpoint(tmp_path, name, content, caplog):
    touch(tmp_path / "config.yaml", tmp_path / name)
    (tmp_path / "config.yaml").write_text("model: {a: 1}\ndata: {b: 2}\ntrainer: {max_steps: 3}\n")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="another run, which ended before its first checkpoint"):
        check_checkpoints("fit", str(tmp_path), None, "model: {a: 1}\ndata: {b: 3}\n")
    check_checkpoints("fit", str(tmp_path), None, "model: {a: 1}\ndata: {b: 2}\n")
    assert "it begins anew, over its metrics and samples" in caplog.text
    check_checkpoints("fit", str(tmp_path), "last")


def test_a_start_that_failed_before_its_first_step_may_be_repeated(tmp_path):
    touch(tmp_path / "config.yaml", tmp_path / "logs" / "version_0" / "metrics.csv")
    check_checkpoints("fit", str(tmp_path), None)
