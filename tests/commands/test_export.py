"""What stands beside the weights of an export; the rest is tested in test_cli.py and models/test_family_runs.py."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from longrl.commands.export import export_run
from longrl.models.lora import LoRASettings
from longrl.models.vila import VilaFamily
from tests.families import FAMILIES
from tests.runs import saved_run

OWN = {"eos_token_id": [5, 6], "temperature": 0.7, "top_p": 0.8}


def family_in(folder, name, **options):
    """A family of a folder of its own, so that a file may be added."""
    made = FAMILIES[name].make()
    shutil.copytree(made.model_path, folder)
    return type(made)(str(folder), random_init=True, **options)


@pytest.mark.parametrize(("name", "part"), [("qwen3", ""), ("qwen2.5-vl", ""), ("qwen2.5-omni", ""), ("nvila", "llm")])
def test_the_models_own_generation_config_goes_along(name, part, tmp_path):
    family = family_in(tmp_path / "model", name)
    (tmp_path / "model" / part / "generation_config.json").write_text(json.dumps(OWN))
    export_run(str(saved_run(tmp_path / "run", family)), str(tmp_path / "out"))
    assert json.loads(Path(tmp_path, "out", part, "generation_config.json").read_text()) == OWN


@pytest.mark.parametrize(("name", "part"), [("qwen3", ""), ("qwen2.5-vl", ""), ("nvila", "llm")])
def test_adapters_bring_alpha_and_the_models_generation_config(name, part, tmp_path):
    """So that whoever loads them scales and ends as the run did."""
    settings = LoRASettings(rank=2, alpha=7, target_modules=("q_proj", "up_proj"))
    family = family_in(tmp_path / "model", name, lora=settings)
    (tmp_path / "model" / part / "generation_config.json").write_text(json.dumps(OWN))
    run = saved_run(tmp_path / "run", family)
    out = tmp_path / "adapter"
    export_run(str(run), str(out), adapter=True)
    assert json.loads((out / "generation_config.json").read_text()) == OWN
    described = json.loads((out / "adapter_config.json").read_text())
    assert {name: described[name] for name in ("r", "lora_alpha", "use_rslora", "lora_dropout", "bias")} == {
        "r": 2, "lora_alpha": 7, "use_rslora": False, "lora_dropout": 0.0, "bias": "none",
    }  # fmt: skip
    assert described["base_model_name_or_path"] == str(tmp_path / "model")
    held = {name.split(".")[-3] for name in load_file(out / "adapter_model.safetensors")}
    assert held == {"q_proj", "up_proj"}
    export_run(str(run), str(tmp_path / "merged"))
    assert json.loads(Path(tmp_path, "merged", part, "generation_config.json").read_text()) == OWN


# ---- code that a folder names ----

MAP = {"AutoConfig": "configuration_vila.VILAConfig", "AutoModel": "modeling_vila.VILAForCausalLM",
       "AutoProcessor": "elsewhere/repo--processing.VILAProcessor"}  # fmt: skip
NEVER_RUN = "raise RuntimeError('this code must not run')\n"


def named_code(folder, config="config.json", auto_map=MAP):
    path = folder / config
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))


def test_an_exported_vila_folder_has_the_released_code_that_it_names(tmp_path, caplog):
    family = family_in(tmp_path / "model", "nvila")
    named_code(tmp_path / "model")
    for name in ("configuration_vila.py", "modeling_vila.py", "mm_utils.py"):  # the last is what the others import
        (tmp_path / "model" / name).write_text(NEVER_RUN)
    export_run(str(saved_run(tmp_path / "run", family)), str(tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == {
        "configuration_vila.py", "modeling_vila.py", "mm_utils.py",
    }  # fmt: skip
    assert (tmp_path / "out" / "modeling_vila.py").read_text() == NEVER_RUN
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == MAP
    assert "name code" not in caplog.text
    VilaFamily(str(tmp_path / "out")).build()


def test_code_that_is_not_there_is_named_with_what_to_do(tmp_path, caplog):
    family = family_in(tmp_path / "model", "nvila")
    named_code(tmp_path / "model")
    (tmp_path / "model" / "modeling_vila.py").write_text(NEVER_RUN)
    export_run(str(saved_run(tmp_path / "run", family)), str(tmp_path / "out"))
    assert "configuration_vila.py; transformers loads the export only with it, so add the .py files" in caplog.text
    assert str(tmp_path / "model") in caplog.text
    assert (tmp_path / "out" / "modeling_vila.py").is_file()


def test_a_folder_that_names_no_code_gets_none(tmp_path):
    family = family_in(tmp_path / "model", "qwen3")
    (tmp_path / "model" / "notes.py").write_text(NEVER_RUN)
    export_run(str(saved_run(tmp_path / "run", family)), str(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.py"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_text_model_with_code_of_its_own_keeps_it(tmp_path):
    family = family_in(tmp_path / "model", "qwen3")
    named_code(tmp_path / "model", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    (tmp_path / "model" / "modeling_mine.py").write_text(NEVER_RUN)
    export_run(str(saved_run(tmp_path / "run", family)), str(tmp_path / "out"))
    assert (tmp_path / "out" / "modeling_mine.py").read_text() == NEVER_RUN


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
