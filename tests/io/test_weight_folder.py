"""Weights of Hugging Face folders: an export by its checksums, any other by the headers of its files."""

import pytest
import torch
from safetensors.torch import save_file

from longrl.io.weight_folder import check_weight_files, read_json_object, write_weight_checksums


@pytest.fixture
def folder(tmp_path):
    save_file({"a": torch.arange(100.0)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-1], lambda content: b"\xff" * 300])
def test_torn_weights_are_named_without_checksums(folder, damage):
    check_weight_files(folder)
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="model.safetensors is torn or no safetensors file"):
        check_weight_files(folder)


def test_one_changed_byte_of_an_export_is_found_and_an_edited_config_is_not(folder):
    write_weight_checksums(folder)
    (folder / "config.json").write_text('{"edited": true}')
    check_weight_files(folder)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-9] + b"\x01" + content[-8:])
    with pytest.raises(ValueError, match="model.safetensors is damaged: its content has checksum"):
        check_weight_files(folder)


def test_a_hub_id_has_no_files_here():
    check_weight_files("owner/no-such-model")


@pytest.mark.parametrize(("content", "message"), [("", "is no JSON"), ("[1]", "got list"), ("\xff", "is no JSON")])
def test_json_that_is_no_object_is_named(folder, content, message):
    (folder / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=f"config.json .*{message}|config.json {message}"):
        read_json_object(folder / "config.json")
