"""Sharded checkpoints that are deleted: never half of one under its name, whenever the run is killed."""

from pathlib import Path

import pytest

from longrl.strategies import mr_sp
from longrl.strategies.mr_sp import MRSPStrategy


def saved(folder: Path) -> Path:
    path = folder / "step=2.ckpt"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"weights")
    (path / "meta.pt").write_bytes(b"all else")
    return path


def test_a_checkpoint_is_deleted_with_all_its_shards(tmp_path):
    MRSPStrategy().remove_checkpoint(saved(tmp_path))
    assert list(tmp_path.iterdir()) == []
    MRSPStrategy().remove_checkpoint(tmp_path / "gone.ckpt")


def test_one_that_was_being_deleted_has_no_name_of_a_checkpoint(tmp_path, monkeypatch):
    def tear(path):
        (path / "meta.pt").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(mr_sp.shutil, "rmtree", tear)
    with pytest.raises(KeyboardInterrupt):
        MRSPStrategy().remove_checkpoint(saved(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == [".step=2.ckpt.partial"]
