"""Checkpoints and weights that a run is given and that are torn, foreign or hostile: refused in one line, by name."""

import json
import logging
import os
import pickle
import random
import shutil

import pytest
import torch
from torch.distributed import checkpoint as dcp

from longrl.callbacks import checkpoint as saving
from longrl.commands.evaluate import main as evaluate
from longrl.commands.export import export_run
from longrl.io import disk_space
from longrl.io.checkpoint_files import META, METADATA, trust_checkpoints
from tests.runs import run, text_config

LAST = "checkpoints/last.ckpt"


class Hostile:
    """Its pickle makes a folder when it is read."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.makedirs, (str(self.sentinel), 0o777, True)


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("".join(json.dumps({"problem": f"{n} + 1?", "answer": str(n + 1)}) + "\n" for n in range(4)))
    values = text_config(rows)
    values["trainer"] |= {"max_steps": 1}
    return values


@pytest.fixture(scope="module")
def trained(tmp_path_factory, values):
    return run(tmp_path_factory.mktemp("trained") / "run", values)


def damaged(trained, tmp_path, damage):
    path = tmp_path / "given.ckpt"
    path.write_bytes(damage((trained / LAST).read_bytes()))
    return path


DAMAGES = {
    "zero": (lambda content: b"", "given.ckpt is empty"),
    "half": (lambda content: content[: len(content) // 2], "given.ckpt is torn"),
    "last byte": (lambda content: content[:-1], "given.ckpt is torn"),
    "garbage": (lambda content: random.Random(1).randbytes(5000), "given.ckpt is no checkpoint"),
    "flipped": (
        lambda content: content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1])
        + content[len(content) // 2 + 1 :],
        "given.ckpt is damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("option", "damage"),
    [
        ("--ckpt_path", "half"),
        ("--ckpt_path", "flipped"),
        ("--model.init_from", "zero"),
        ("--model.init_from", "last byte"),
        ("--model.init_from", "garbage"),
    ],
)
def test_a_damaged_file_is_refused_by_name(trained, tmp_path, values, option, damage):
    change, message = DAMAGES[damage]
    path = damaged(trained, tmp_path, change)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", values, f"{option}={path}")


@pytest.mark.parametrize("option", ["--ckpt_path", pytest.param("--model.init_from", marks=pytest.mark.slow)])
def test_another_models_checkpoint_is_refused(trained, tmp_path, values, option):
    saved = torch.load(trained / LAST, weights_only=True)
    name = next(iter(saved["state_dict"]))
    saved["state_dict"]["model.other"] = saved["state_dict"].pop(name)
    torch.save(saved, tmp_path / "given.ckpt")
    with pytest.raises(ValueError, match=f"{option.strip('-')}=.*given.ckpt' holds another model .*other is unknown"):
        run(tmp_path / "run", values, f"{option}={tmp_path / 'given.ckpt'}")


def hostile_file(trained, tmp_path):
    saved = torch.load(trained / LAST, weights_only=True)
    saved["callbacks"]["Strange"] = Hostile(tmp_path / "sentinel")
    torch.save(saved, tmp_path / "given.ckpt")
    return tmp_path / "given.ckpt"


def hostile_shards(trained, tmp_path):
    saved = torch.load(trained / LAST, weights_only=True)
    folder = tmp_path / "given.ckpt"
    dcp.save({"state_dict": saved.pop("state_dict")}, checkpoint_id=folder, no_dist=True)
    torch.save(saved, folder / META)
    (folder / METADATA).write_bytes(pickle.dumps(Hostile(tmp_path / "sentinel")))
    return folder


@pytest.mark.parametrize(
    ("reader", "make"),
    [
        ("export", hostile_file),
        ("export", hostile_shards),
        ("evaluate", hostile_file),
        ("evaluate", hostile_shards),
        ("--ckpt_path", hostile_shards),
        ("--model.init_from", hostile_file),
        ("--resume", hostile_file),
        pytest.param("--resume", hostile_shards, marks=pytest.mark.slow),
    ],
)
def test_a_hostile_checkpoint_runs_nothing(trained, tmp_path, values, make, reader):
    path = make(trained, tmp_path)
    refused = pytest.raises(
        ValueError, match="refused: reading it would import os.makedirs|a checkpoint of several ranks"
    )
    if reader == "export":
        with refused:
            export_run(str(trained), str(tmp_path / "out"), checkpoint=str(path))
    elif reader == "evaluate":
        with refused:
            evaluate(evaluation(tmp_path, values, path))
    elif reader == "--resume":
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        path.rename(tmp_path / "run" / LAST)
        with refused:
            run(tmp_path / "run", values, "--resume=auto")
    else:
        with refused:
            run(tmp_path / "run", values, f"{reader}={path}")
    assert not (tmp_path / "sentinel").exists()


def evaluation(tmp_path, values, path):
    """Arguments of `evaluate` for the weights of a checkpoint."""
    family = json.dumps(values["model"]["family"])
    policy = ["--policy=longrl.evaluation.local_policy.LocalPolicy", f"--policy.init_args.family={family}"]
    shown = ["--sampling.num_generations=1", "--sampling.max_completion_tokens=2", f"--out={tmp_path / 'answers'}"]
    return [*policy, f"--policy.init_args.weights={path}", f"--data.test={values['data']['train']}", *shown]


def test_an_evaluation_reads_one_that_is_trusted(trained, tmp_path, values):
    evaluate([*evaluation(tmp_path, values, hostile_file(trained, tmp_path)), "--trust_checkpoint=true"])
    trust_checkpoints(False)
    assert (tmp_path / "sentinel").exists()
    assert (tmp_path / "answers" / "results.json").exists()


def test_one_that_is_trusted_is_read(trained, tmp_path, values):
    path = hostile_file(trained, tmp_path)
    export_run(str(trained), str(tmp_path / "out"), checkpoint=str(path), trust_checkpoint=True)
    assert (tmp_path / "sentinel").exists()  # the trap works
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, trained):
    folder = tmp_path_factory.mktemp("exported") / "out"
    export_run(str(trained), str(folder))
    return folder


def test_an_export_with_a_changed_byte_is_refused(exported, tmp_path, values):
    out = shutil.copytree(exported, tmp_path / "out")
    run(tmp_path / "before", values, f"--model.init_from={out}")
    content = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: its content has checksum"):
        run(tmp_path / "run", values, f"--model.init_from={out}")


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is no JSON"), ('{"model_type": "nothing"}', "describes no model")],
)
def test_a_config_that_is_none_is_named(exported, tmp_path, values, content, message):
    out = shutil.copytree(exported, tmp_path / "out")
    (out / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"config.json {message}"):
        run(tmp_path / "run", values, f"--model.init_from={out}")


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(tmp_path, values, monkeypatch):
    values = values | {"trainer": values["trainer"] | {"max_steps": 2}, "checkpoint": {"every_n_train_steps": 1}}
    real = saving.save_file

    def full(content, path):
        if path.exists():
            raise OSError(28, "No space left on device")
        real(content, path)

    monkeypatch.setattr(saving, "save_file", full)
    with pytest.raises(ValueError, match=r"last.ckpt could not be written \(No space left .*go on with --ckpt_path"):
        run(tmp_path / "run", values)
    assert torch.load(tmp_path / "run" / LAST, weights_only=True)["global_step"] == 1


def test_little_room_is_said_before_the_first_step_and_before_a_save(tmp_path, values, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(disk_space, "free_bytes", lambda folder: 1000)
    run(tmp_path / "run", values)
    lines = [line for line in caplog.messages if "GiB are free" in line]
    assert len(lines) == 2
    assert "for 2 checkpoints of" in lines[0]
    assert "for the next checkpoint" in lines[1]


def test_the_estimate_is_close_to_what_is_written(trained, tmp_path, values, monkeypatch):
    told = []
    monkeypatch.setattr(saving, "tell_missing_space", lambda folder, needed, *words: told.append(needed))
    run(tmp_path / "run", values)
    size = (tmp_path / "run" / LAST).stat().st_size
    assert 0.7 * size < told[-1] < 1.5 * size
