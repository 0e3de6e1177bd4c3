"""What stands beside the weights of an export; the rest is tested in test_cli.py and models/test_family_runs.py."""

import json
import shutil
from pathlib import Path

import pytest

from longrl.commands.export import export_run
from tests.families import FAMILIES
from tests.runs import saved_run

OWN = {"eos_token_id": [5, 6], "temperature": 0.7, "top_p": 0.8}


def family_in(folder, name):
    """A family of a folder of its own, so that a file may be added."""
    made = FAMILIES[name].make()
    shutil.copytree(made.model_path, folder)
    return type(made)(str(folder), random_init=True)


@pytest.mark.parametrize(("name", "part"), [("qwen3", ""), ("qwen2.5-vl", ""), ("qwen2.5-omni", ""), ("nvila", "llm")])
def test_the_models_own_generation_config_goes_along(name, part, tmp_path):
    family = family_in(tmp_path / "model", name)
    (tmp_path / "model" / part / "generation_config.json").write_text(json.dumps(OWN))
    export_run(str(saved_run(tmp_path / "run", family)), str(tmp_path / "out"))
    assert json.loads(Path(tmp_path, "out", part, "generation_config.json").read_text()) == OWN


def test_a_model_without_one_gets_transformers(tmp_path):
    family = family_in(tmp_path / "model", "qwen3")
    export_run(str(saved_run(tmp_path / "run", family)), str(tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found["eos_token_id"] == family.tokenizer.eos_token_id


def test_weights_that_are_not_there_are_told_by_the_option_that_names_them(tmp_path, monkeypatch):
    run = saved_run(tmp_path / "run", FAMILIES["qwen3"].make())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^--checkpoint='run/nothere.ckpt' does not exist; give a checkpoint file"):
        export_run(str(run), "out", checkpoint="run/nothere.ckpt")
    for path in run.glob("checkpoints/*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"^--run='\S+' holds neither checkpoints/last.ckpt"):
        export_run(str(run), "out")
