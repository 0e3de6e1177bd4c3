"""Code that an export's configs name: which files these are, and what is said of those that nobody has."""

import json

import pytest

from longrl.models.remote_code import copy_named_code

CODE = "raise RuntimeError('this code must not run')\n"


def exported(folder, **files):
    """An export with these configs; values are their `auto_map`."""
    folder.mkdir()
    for name, auto_map in files.items():
        (folder / f"{name}.json").write_text(json.dumps({"auto_map": auto_map}))
    return folder


def test_all_python_files_of_the_model_come_along_in_their_folders(tmp_path):
    model = tmp_path / "model"
    (model / "parts").mkdir(parents=True)
    for name in ("modeling_x.py", "parts/helper.py"):
        (model / name).write_text(CODE)
    (model / "notes.txt").write_text("not code")
    out = exported(tmp_path / "out", config={"AutoModel": "modeling_x.X"})
    copy_named_code(str(model), out)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == [
        "config.json", "modeling_x.py", "parts/helper.py",
    ]  # fmt: skip


def test_an_export_within_the_models_folder_is_not_copied_into_itself(tmp_path):
    (tmp_path / "modeling_x.py").write_text(CODE)
    out = exported(tmp_path / "out", config={"AutoModel": "modeling_x.X", "AutoConfig": "lost.X"})
    for _ in range(2):
        copy_named_code(str(tmp_path), out)
    assert sorted(path.name for path in out.rglob("*")) == ["config.json", "modeling_x.py"]


def test_tokenizers_and_processors_name_code_too(tmp_path, caplog):
    out = exported(
        tmp_path / "out", tokenizer_config={"AutoTokenizer": ["tokenization_x.Slow", None]},
        processor_config={"AutoProcessor": "processing_x.P"}, config={"AutoModel": "other/place--modeling_y.Y"},
    )  # fmt: skip
    (tmp_path / "model").mkdir()
    copy_named_code(str(tmp_path / "model"), out)
    assert "processing_x.py, tokenization_x.py" in caplog.text
    assert "modeling_y" not in caplog.text  # transformers fetches it from that repository


@pytest.mark.parametrize("auto_map", [None, {}])
def test_without_named_code_nothing_is_looked_for(tmp_path, auto_map, caplog):
    copy_named_code("owner/that-is-nowhere", exported(tmp_path / "out", config=auto_map))
    assert not caplog.text


def test_code_of_a_hub_that_cannot_be_reached_is_named(tmp_path, caplog):
    copy_named_code("owner/that-is-nowhere", exported(tmp_path / "out", config={"AutoModel": "modeling_x.X"}))
    assert "the code of owner/that-is-nowhere cannot be fetched" in caplog.text
    assert "not in owner/that-is-nowhere: modeling_x.py" in caplog.text
