"""Checksums: a file that is not as it was written is named, and so is what is wrong with it."""

import io
import json
import logging
import random

import pytest
import torch

from longrl.io.checksums import CHECKSUMS, SummedFile, check_folder, check_zip, file_checksum, write_checksums


def flipped(content: bytes, index: int) -> bytes:
    return content[:index] + bytes([content[index] ^ 0x10]) + content[index + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "is empty: 0 bytes"),
        (lambda content: content[: len(content) // 2], "is torn or damaged"),
        (lambda content: content[:-1], "is torn or damaged"),
        (lambda content: random.Random(0).randbytes(3000), "is no checkpoint"),
        (lambda content: b"a text", "is no checkpoint"),
    ],
    ids=["empty", "half", "last byte missing", "garbage", "text"],
)
@pytest.mark.parametrize("contents", [True, False])
def test_what_is_no_whole_file_is_named_also_without_reading_it(tmp_path, damage, message, contents):
    path = tmp_path / "last.ckpt"
    torch.save({"weights": torch.ones(9)}, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"last.ckpt {message}"):
        check_zip(path, contents=contents)


def test_sums_are_made_while_a_file_is_written(tmp_path):
    path = tmp_path / "shard"
    with path.open("wb") as file:
        summed = SummedFile(file)
        torch.save(torch.randn(1000), summed)
        summed.write(b"more")
    assert summed.checksum() == file_checksum(path)
    assert file_checksum(path).bytes == path.stat().st_size


def test_the_first_error_of_the_system_is_kept():
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    summed = SummedFile(Full())
    with pytest.raises((RuntimeError, OSError)):
        torch.save(torch.randn(1000), summed)
    assert summed.error is not None
    assert summed.error.errno == 28


def exported(folder):
    (folder / "text").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    (folder / "text" / "config.json").write_text("{}")
    write_checksums(folder)
    return folder


def test_a_folder_is_compared_file_by_file(tmp_path):
    folder = exported(tmp_path / "export")
    check_folder(folder)
    (folder / "notes.txt").write_text("a user may add files")
    check_folder(folder)

    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(flipped(content, 100))
    check_folder(folder, contents=False)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: its content has checksum \w{8}, \w{8} was"):
        check_folder(folder)
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="model.safetensors is torn: it has 255 bytes of 256"):
        check_folder(folder, contents=False)
    file.unlink()
    with pytest.raises(ValueError, match="is incomplete: model.safetensors is missing"):
        check_folder(folder, contents=False)


def test_ranks_share_the_reading(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}").write_bytes(b"12345")
    write_checksums(folder)
    (folder / "2").write_bytes(b"12346")
    check_folder(folder, part=1, num_parts=2)
    with pytest.raises(ValueError, match="2 is damaged"):
        check_folder(folder, part=0, num_parts=2)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": [1]}', '{"files": {"a": {}}}', "[" * 100_000])
def test_sums_that_cannot_be_read_are_an_error(tmp_path, content):
    folder = exported(tmp_path / "export")
    (folder / CHECKSUMS).write_text(content)
    with pytest.raises(ValueError, match=f"{CHECKSUMS} is damaged"):
        check_folder(folder)


def test_a_folder_without_sums_is_said_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    check_folder(tmp_path)
    check_folder(tmp_path)
    assert len([line for line in caplog.messages if CHECKSUMS in line]) == 1


def test_known_sums_are_not_made_again(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    known = file_checksum(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"2")
    write_checksums(tmp_path, {"a": known})
    assert json.loads((tmp_path / CHECKSUMS).read_text())["files"]["a"]["crc32"] == known.crc32
