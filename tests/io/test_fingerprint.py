"""Fingerprints of weights: other values give another one, another place the same."""

import shutil

import torch

from longrl.io.fingerprint import BLOCK_BYTES, NUM_BLOCKS, files_fingerprint


def test_one_changed_value_in_a_checkpoint_is_seen_and_another_name_is_not(tmp_path):
    weights = {"a": torch.zeros(1000, 1000), "b": torch.zeros(3)}
    torch.save(weights, tmp_path / "last.ckpt")
    before = files_fingerprint(tmp_path / "last.ckpt")
    shutil.copy(tmp_path / "last.ckpt", tmp_path / "other.ckpt")
    assert files_fingerprint(tmp_path / "other.ckpt") == before
    weights["a"][123, 456] = 1e-3
    torch.save(weights, tmp_path / "last.ckpt")
    assert files_fingerprint(tmp_path / "last.ckpt") != before


def test_a_folder_counts_by_the_names_sizes_and_content_of_its_files(tmp_path):
    def written(name: str, *contents: bytes):
        for n, content in enumerate(contents):
            (tmp_path / name / "inner").mkdir(parents=True, exist_ok=True)
            (tmp_path / name / "inner" / f"{n}.bin").write_bytes(content)
        return files_fingerprint(tmp_path / name)

    large = bytes(NUM_BLOCKS * BLOCK_BYTES * 3)
    same = [written(name, b"a", large) for name in ("one", "two")]
    assert same[0] == same[1]
    others = [written("three", b"b", large), written("four", b"a", large + b"\0"), written("five", b"a", b"\1" + large)]
    assert len({same[0], *others}) == 4
