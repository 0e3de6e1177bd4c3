"""How a checkpoint of one file is read: nothing in it runs, and nothing keeps the file in use."""

import os
from pathlib import Path

import fsspec
import pytest
import torch

from longrl.callbacks.checkpoint import AtomicCheckpointIO


class Hostile:
    """Its pickle makes a folder when it is read."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_what_an_address_holds_is_not_unpickled(tmp_path):
    with fsspec.open("memory://hostile.ckpt", "wb") as file:
        torch.save({"state_dict": Hostile(tmp_path / "RUN")}, file)
    with pytest.raises(Exception, match="mkdir"):
        AtomicCheckpointIO().load_checkpoint("memory://hostile.ckpt")
    assert not (tmp_path / "RUN").exists()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_a_file_that_is_replaced_later_gives_its_place_back(tmp_path):
    path = tmp_path / "last.ckpt"
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(5000)}}
    AtomicCheckpointIO().save_checkpoint(
        {"state_dict": {"w": torch.ones(5000)}, "optimizer_states": [{"state": moments}]}, path
    )
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert loaded["state_dict"]["w"].sum() == 5000
    del loaded["state_dict"]  # which the model has copied
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert torch.equal(loaded["optimizer_states"][0]["state"][0]["exp_avg"], torch.ones(5000))
