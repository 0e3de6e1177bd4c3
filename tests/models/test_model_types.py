"""A folder of another model than the family's is refused by the `model_type` of its config.json."""

import importlib
import json
import pkgutil

import pytest

import longrl.models
from longrl.models.base import CausalFamily
from longrl.models.model_types import shipped_families
from longrl.models.qwen3_5 import Qwen3_5Family
from longrl.models.qwen3_vl import Qwen3VLFamily
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.models.text import TextFamily
from longrl.planning import shapes
from longrl.testing.tiny import tiny_text
from tests.families import FAMILIES
from tests.tiny import omni_folder, qwen3_5_folder, qwen3_5_text_folder, qwen3_vl_folder, text_folder, vl_folder


def test_every_family_with_model_types_is_found_and_no_type_is_read_by_two():
    modules = [name for _, name, _ in pkgutil.iter_modules(longrl.models.__path__) if not name.endswith("_vllm")]
    found = {
        value
        for name in modules
        for value in vars(importlib.import_module(f"longrl.models.{name}")).values()
        if isinstance(value, type) and issubclass(value, CausalFamily) and value.model_types
    }
    assert set(shipped_families()) == found
    types = [name for kind in shipped_families() for name in kind.model_types]
    assert len(types) == len(set(types))


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"nvila", "longvila-r1"}))  # VILA's config is its own
def test_every_family_reads_its_own(name):
    family = FAMILIES[name].make()
    assert family.config.model_type in family.model_types


@pytest.mark.parametrize(
    ("kind", "folder", "remedy"),
    [
        (Qwen3_5Family, qwen3_vl_folder, "qwen3_vl; set .* longrl.models.qwen3_vl.Qwen3VLFamily"),
        (Qwen3_5Family, qwen3_5_text_folder, "qwen3_5_text; set .* longrl.models.qwen3_5.Qwen3_5TextFamily"),
        (Qwen3VLFamily, vl_folder, "qwen2_5_vl; set .* longrl.models.qwen_vl.Qwen2_5_VLFamily"),
        (Qwen3VLFamily, qwen3_5_folder, "qwen3_5; set .* longrl.models.qwen3_5.Qwen3_5Family"),
        (Qwen2_5_VLFamily, omni_folder, "qwen2_5_omni; set .* longrl.models.qwen_omni.QwenOmniFamily"),
        (Qwen2_5_VLFamily, text_folder, "qwen2; set .* longrl.models.text.TextFamily"),
    ],
)
def test_the_family_that_reads_a_folder_is_named_before_anything_else_of_it_is_read(kind, folder, remedy):
    family = kind(folder())
    with pytest.raises(ValueError, match=f"{kind.__name__} reads models of type .* is a {remedy}"):
        family.media_token_ids()
    with pytest.raises(ValueError, match=remedy):
        family.build()


def test_a_model_that_no_family_reads_has_another_remedy(tmp_path):
    family = Qwen3_5Family(str(tiny_text(tmp_path, "qwen3_next")))
    with pytest.raises(ValueError, match="is a qwen3_next; no family of longrl reads it; .* or write a family"):
        family.build()


def test_a_family_of_ones_own_reads_whatever_it_says(tmp_path):
    class Any(TextFamily):
        model_types = ()

    class Olmo(TextFamily):
        model_types = ("olmo2",)

    folder = str(tiny_text(tmp_path, "olmo2"))
    assert Any(folder).config.model_type == Olmo(folder).config.model_type == "olmo2"
    with pytest.raises(ValueError, match="Olmo reads models of type olmo2, but .* is a qwen2"):
        assert Olmo(text_folder("qwen2")).config


def test_a_plan_refuses_it_too(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "FOLDER", tmp_path)
    folder = tmp_path / "some" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_next"}))
    with pytest.raises(ValueError, match="is a qwen3_next; no family of longrl reads it"):
        shapes.find_config(Qwen3_5Family("some/model"))
