"""Which models the text family reads."""

import pytest

from longrl.models.text import TextFamily
from longrl.models.tiny import tiny_text
from tests.tiny import text_family


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_qwen_is_read(model_type):
    assert text_family(model_type).build().config.model_type == model_type


@pytest.mark.parametrize("model_type", ["llama", "granite", "olmo2", "phi"])
def test_another_model_is_refused_before_it_is_built(tmp_path, monkeypatch, model_type):
    family = TextFamily(str(tiny_text(tmp_path, model_type)), random_init=True)
    monkeypatch.setattr(TextFamily, "auto_class", lambda self: pytest.fail("the model was built"))
    with pytest.raises(ValueError, match=f"reads models of type qwen2 and qwen3, but .* is a {model_type}; name a"):
        family.build()
