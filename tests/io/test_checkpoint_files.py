"""What is at a checkpoint's path is whole and runs no code, or is refused in one line that names the file."""

import os
import pickle
import shutil

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from longrl.io.checkpoint_files import (
    META,
    METADATA,
    check_checkpoint,
    load_shards,
    load_state,
    read_metadata,
    trust_checkpoints,
)
from longrl.io.checksums import write_checksums


class Hostile:
    """Its pickle makes a file when it is read."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


@pytest.fixture
def shards(tmp_path):
    """A model and its optimizer after one step, in types that runs use."""
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    state = model.state_dict() | {"half": torch.ones(3, dtype=torch.bfloat16), "bytes": torch.ones(3).byte()}
    folder = tmp_path / "last.ckpt"
    saved = {"state_dict": state, "optimizer_0": get_optimizer_state_dict(model, optimizer)}
    dcp.save(saved, checkpoint_id=folder, no_dist=True)
    torch.save({"global_step": 1}, folder / META)
    return folder


def test_a_file_is_read_with_its_weights(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"a": torch.ones(3)}, "global_step": 2}, path)
    check_checkpoint(path)
    assert torch.equal(load_state(path)["state_dict"]["a"], torch.ones(3))


def test_no_changed_byte_changes_what_is_loaded(tmp_path):
    path = tmp_path / "last.ckpt"
    weights = torch.arange(40.0)
    torch.save({"state_dict": {"a": weights}, "global_step": 3}, path)
    content = path.read_bytes()
    begin = content.index(weights.numpy().tobytes())
    found = set()
    tried = range(0, len(content), 3)
    for index in tried:
        path.write_bytes(content[:index] + bytes([content[index] ^ 0x10]) + content[index + 1 :])
        try:
            check_checkpoint(path)
        except ValueError:
            found.add(index)
            continue
        # Padding between entries, or dates.
        loaded = torch.load(path, weights_only=True)
        assert torch.equal(loaded["state_dict"]["a"], weights)
        assert loaded["global_step"] == 3
    assert {index for index in tried if begin <= index < begin + 160} <= found


def test_a_tensor_that_calls_itself_a_folder_is_found(tmp_path):
    """torch would return memory as it was before, and no error."""
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"a": torch.arange(40.0)}}, path)
    content = bytearray(path.read_bytes())
    name = content.rindex(b"last/data/0")  # in the directory; 8 bytes before it are the entry's attributes
    content[name - 8] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(ValueError, match="the content of last/data/0 is not what was written"):
        check_checkpoint(path)


@pytest.mark.parametrize("content", [{}, [1], torch.ones(3), {"state_dict": 3}, {"state_dict": {"a": "b"}}])
def test_a_file_of_something_else_is_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="other.ckpt is no checkpoint of a run: it must be a dict with the weights"):
        check_checkpoint(tmp_path / "other.ckpt")


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="gone.ckpt does not exist"):
        check_checkpoint(tmp_path / "gone.ckpt")
    with pytest.raises(ValueError, match=f"is a folder and no whole checkpoint: it has no {META}"):
        check_checkpoint(tmp_path)


def test_a_hostile_file_is_refused_by_the_name_that_it_asks_for_unless_it_is_trusted(tmp_path):
    path, sentinel = tmp_path / "last.ckpt", tmp_path / "sentinel"
    torch.save({"state_dict": {}, "callbacks": Hostile(sentinel)}, path)
    with pytest.raises(ValueError, match=r"is refused: reading it would import posix.mkdir.*--trust_checkpoint true"):
        check_checkpoint(path)
    assert not sentinel.exists()
    trust_checkpoints()
    try:
        check_checkpoint(path)
    finally:
        trust_checkpoints(False)
    assert sentinel.exists()  # the trap works


def test_shards_are_read_as_they_were_written(shards):
    check_checkpoint(shards)
    state = {"state_dict": {"weight": torch.zeros(4, 4), "half": torch.zeros(3, dtype=torch.bfloat16)}}
    load_shards(state, shards, alone=True)
    plain = {"state_dict": {"weight": torch.zeros(4, 4)}}
    dcp.load(plain, checkpoint_id=shards, no_dist=True)
    assert torch.equal(state["state_dict"]["weight"], plain["state_dict"]["weight"])
    assert state["state_dict"]["half"].tolist() == [1, 1, 1]


def test_hostile_metadata_is_refused_wherever_it_is_read(shards, tmp_path):
    sentinel = tmp_path / "sentinel"
    (shards / METADATA).write_bytes(pickle.dumps(Hostile(sentinel)))
    for read in (check_checkpoint, read_metadata, lambda folder: load_shards({"a": torch.ones(1)}, folder, alone=True)):
        with pytest.raises(ValueError, match=r"\.metadata is refused: reading it would import posix.mkdir"):
            read(shards)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"cbuiltins\neval\n.",
        b"ctorch\nload\n.",
        b"ctorch.distributed.checkpoint.metadata\nos.system\n.",
        b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93.",
    ],
)
def test_modules_of_allowed_classes_open_no_other_door(shards, pickled):
    (shards / METADATA).write_bytes(pickled)
    with pytest.raises(ValueError, match="is refused: reading it would import"):
        read_metadata(shards)


def test_values_beside_tensors_run_no_code(tmp_path):
    """torch itself reads these with `weights_only=False`."""
    sentinel = tmp_path / "sentinel"
    folder = tmp_path / "shards"
    dcp.save({"optimizer_0": {"lr": Hostile(sentinel)}}, checkpoint_id=folder, no_dist=True)
    with pytest.raises(ValueError, match="shards is refused: reading it would import posix.mkdir"):
        load_shards({"optimizer_0": {"lr": 0.0}}, folder, alone=True)
    assert not sentinel.exists()
    dcp.load({"optimizer_0": {"lr": 0.0}}, checkpoint_id=folder, no_dist=True)
    assert sentinel.exists()  # the trap works


def test_shards_outside_their_folder_are_refused(shards, tmp_path):
    metadata = read_metadata(shards)
    shutil.copy(shards / "__0_0.distcp", tmp_path / "elsewhere")
    for entry in metadata.storage_data.values():
        entry.relative_path = "../elsewhere"
    (shards / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="shards must lie beside it, got '../elsewhere'"):
        check_checkpoint(shards)


@pytest.mark.parametrize("cut", [0, 100, 1000])
def test_damaged_metadata_is_one_error(shards, cut):
    content = (shards / METADATA).read_bytes()
    (shards / METADATA).write_bytes(content[:cut])
    with pytest.raises(ValueError, match=r"\.metadata is damaged"):
        check_checkpoint(shards)


def test_torn_shards_are_found_with_and_without_checksums(shards):
    shard = shards / "__0_0.distcp"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"__0_0.distcp is torn or missing: it has \d+ bytes, but the checkpoint"):
        check_checkpoint(shards)
    shard.write_bytes(content)
    write_checksums(shards)
    check_checkpoint(shards)
    index = len(content) // 2
    shard.write_bytes(content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :])
    with pytest.raises(ValueError, match="__0_0.distcp is damaged: its content has checksum"):
        check_checkpoint(shards)
