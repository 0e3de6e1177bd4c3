"""`--resume auto`: from the last good checkpoint, or from the beginning; and a config.yaml that is never replaced."""

import json
import logging
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp

from longrl.callbacks.checkpoint import check_same_start
from longrl.commands.resuming import last_good_checkpoint
from longrl.commands.run_folders import check_checkpoints
from longrl.commands.saved_config import write_config
from longrl.io.folder_lock import FolderLock
from tests.runs import checkpoint, run, text_config


def save(path, time_s=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {"weight": torch.ones(64)}}, path)
    if time_s:
        os.utime(path, (time_s, time_s))
    return path


def save_shards(path):
    save(path / "meta.pt")
    dcp.save({"weight": torch.ones(64)}, checkpoint_id=path, no_dist=True)
    return path


# ---- which checkpoint ----


def test_a_run_without_a_checkpoint_begins(tmp_path):
    assert last_good_checkpoint(str(tmp_path / "nowhere")) is None
    (tmp_path / "config.yaml").write_text("model: {}\n")
    assert last_good_checkpoint(str(tmp_path)) is None


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_a_damaged_one_is_skipped_for_the_newest_other(tmp_path, damage, caplog):
    last = save(tmp_path / "checkpoints" / "last.ckpt")
    save(tmp_path / "checkpoints" / "step=4.ckpt", 2_000)
    other = save(tmp_path / "checkpoints" / "step=30.ckpt", 3_000)
    content = last.read_bytes()
    at = content.index(torch.ones(64).numpy().tobytes()) + 5
    flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    last.write_bytes({"cut": content[:-300], "flip": flipped, "empty": b"", "text": b"no checkpoint"}[damage])
    assert last_good_checkpoint(str(tmp_path)) == other
    assert f"skips {last}" in caplog.text


def test_only_the_rank_whose_choice_counts_reads_all(tmp_path, monkeypatch):
    last = save(tmp_path / "checkpoints" / "last.ckpt")
    monkeypatch.setattr("longrl.io.checksums._first_bad_entry", lambda archive: "a tensor")
    assert last_good_checkpoint(str(tmp_path), reads=False) == last
    with pytest.raises(ValueError, match="a tensor"):
        last_good_checkpoint(str(tmp_path))


def test_ranks_of_which_some_see_no_checkpoint_say_so_instead_of_waiting(monkeypatch):
    check_same_start(None)
    check_same_start("last.ckpt")
    seen = [(False, "node1"), (True, "node2")]
    monkeypatch.setattr("longrl.callbacks.checkpoint.world_axis", lambda: SimpleNamespace(gather=lambda _: seen))
    with pytest.raises(ValueError, match="ranks on node2 do not see; name a --run_dir on a disk that all nodes share"):
        check_same_start("last.ckpt")


def test_where_all_are_damaged_nothing_is_begun_over_them(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"^--resume auto finds no checkpoint in --run_dir=\S+ that can be read: "):
        last_good_checkpoint(str(tmp_path))


def test_shards_between_the_two_renames_are_found_under_the_name_that_the_strategy_gives_back(tmp_path):
    before = save_shards(tmp_path / "checkpoints" / ".last.ckpt.before")
    last = before.with_name("last.ckpt")
    assert last_good_checkpoint(str(tmp_path)) == last
    save_shards(last)
    assert last_good_checkpoint(str(tmp_path)) == last
    (last / "__0_0.distcp").unlink()
    assert last_good_checkpoint(str(tmp_path)) == before


def test_a_signals_checkpoint_of_an_older_release_counts_where_it_is_newer(tmp_path):
    last = save(tmp_path / "checkpoints" / "last.ckpt", 2_000)
    signals = save(tmp_path / "hpc_ckpt_1.ckpt", 1_000)
    assert last_good_checkpoint(str(tmp_path)) == last
    os.utime(signals, (3_000, 3_000))
    assert last_good_checkpoint(str(tmp_path)) == signals


# ---- runs ----


@pytest.fixture
def values(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"problem": f"{n} + 1?", "answer": str(n + 1)}) + "\n" for n in range(4)))
    found = text_config(rows)
    found["trainer"]["max_steps"] = 1
    return found


def test_one_command_begins_a_run_goes_on_with_it_and_leaves_its_config(tmp_path, values):
    folder = run(tmp_path / "run", values, "--resume=auto")
    first = (folder / "config.yaml").read_text()
    assert "resume: auto" not in first
    run(folder, values, "--resume", "auto")  # it has ended
    assert not list(folder.glob("config.resumed*"))
    values["trainer"]["max_steps"] = 2
    for _ in range(2):
        run(folder, values, "--resume=auto")
    assert checkpoint(folder)["global_step"] == 2
    assert (folder / "config.yaml").read_text() == first
    (resumed,) = folder.glob("config.resumed*")
    assert resumed.name == "config.resumed1.yaml"
    assert "max_steps: 2" in resumed.read_text()


def test_it_is_of_fit_alone(tmp_path, values):
    with pytest.raises(ValueError, match=r"^--resume=auto is of `fit`; name what `test` reads by --ckpt_path"):
        run(tmp_path / "run", values, "--resume=auto", command="test")


def test_two_runs_in_one_folder_are_refused_before_anything_is_written(tmp_path, values):
    lock = FolderLock(tmp_path / "run", "--run_dir")
    with pytest.raises(ValueError, match=r"^--run_dir=\S+ is in use by process \d+"):
        run(tmp_path / "run", values, "--resume=auto")
    assert not (tmp_path / "run" / "config.yaml").exists()
    lock.release()


# ---- config.yaml ----


def test_a_config_of_another_run_is_kept(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_config(tmp_path, "model: {a: 1}\n")
    write_config(tmp_path, "model: {a: 1}\nckpt_path: last\n")
    with pytest.raises(ValueError, match=r"has the config\.yaml of another run, .* --resume auto begins"):
        check_checkpoints("fit", str(tmp_path), None, "model: {a: 2}\n")
    check_checkpoints("fit", str(tmp_path), None, "model: {a: 2}\n", resumes=True)
    write_config(tmp_path, "model: {a: 2}\n")
    assert (tmp_path / "config.yaml").read_text() == "model: {a: 2}\n"
    assert (tmp_path / "config.yaml.old1").read_text() == "model: {a: 1}\n"
    save(tmp_path / "checkpoints" / "last.ckpt")
    for text in ("model: {a: 3}\n", "model: {a: 3}\n", "model: {a: 4}\n"):
        write_config(tmp_path, text)
    assert (tmp_path / "config.yaml").read_text() == "model: {a: 2}\n"
    assert [path.read_text() for path in sorted(tmp_path.glob("config.resumed*"))] == [
        "model: {a: 3}\n",
        "model: {a: 4}\n",
    ]
