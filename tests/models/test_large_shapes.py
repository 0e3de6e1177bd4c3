"""The largest models of each family: what `build` makes of the released sizes, without a byte of weights.

Names and shapes are compared with those of the released files, as test_released.py writes them out, and the number of
parameters with the published one, which the model hub counts in these files: a wrong size would show in it. Of
Qwen2.5-VL-72B no published count was found; its sizes are the 32B's kind.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from longrl.models.qwen2_vl import Qwen2VLFamily
from longrl.models.qwen3_5 import Qwen3_5Family
from longrl.models.qwen3_vl import Qwen3VLFamily
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.planning.shapes import build_on_meta
from tests.models.test_released import (
    Shapes,
    qwen2_5_vl,
    qwen2_vl,
    qwen2_vl_7b,
    qwen3_5,
    qwen3_vl,
    qwen3_vl_30b_a3b,
    released,
)


def sized(
    config: dict[str, Any], hidden: int, layers: int, heads: int, key_heads: int, vision: int = 0, **text: Any
) -> dict[str, Any]:
    """The config with another text stack, features of its width, and perhaps an encoder with wider MLPs."""
    inner = config.get("text_config", config)
    inner |= {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    inner |= {"num_key_value_heads": key_heads} | text
    if "max_window_layers" in inner:
        inner["max_window_layers"] = layers
    encoder = config["vision_config"]
    encoder["hidden_size" if "embed_dim" in encoder else "out_hidden_size"] = hidden
    if vision:
        encoder["intermediate_size"] = vision
    return config


def qwen3_5_397b() -> dict[str, Any]:
    config = released("Qwen3.5-35B-A3B")
    more = {"num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 1024}
    more |= {"shared_expert_intermediate_size": 1024, "linear_num_value_heads": 64}
    kinds = config["text_config"]["layer_types"][:4] * 15
    return sized(config, 4096, 60, 32, 2, layer_types=kinds, **more)


SEEN = "Qwen2.5-VL-7B-Instruct"
CASES = {
    "Qwen2-VL-2B": (
        Qwen2VLFamily, qwen2_vl, 2_208_985_600,
        lambda: sized(qwen2_vl_7b(), 1536, 28, 12, 2, intermediate_size=8960, vocab_size=151_936)
        | {"tie_word_embeddings": True},
    ),
    "Qwen2-VL-7B": (Qwen2VLFamily, qwen2_vl, 8_291_375_616, qwen2_vl_7b),
    "Qwen2-VL-72B": (
        Qwen2VLFamily, qwen2_vl, 73_405_560_320, lambda: sized(qwen2_vl_7b(), 8192, 80, 64, 8, intermediate_size=29_568)
    ),
    "Qwen2.5-VL-32B": (
        Qwen2_5_VLFamily, qwen2_5_vl, 33_452_718_336,
        lambda: sized(released(SEEN), 5120, 64, 40, 8, intermediate_size=27_648, vision=3456),
    ),
    "Qwen2.5-VL-72B": (
        Qwen2_5_VLFamily, qwen2_5_vl, 73_410_777_344,
        lambda: sized(released(SEEN), 8192, 80, 64, 8, intermediate_size=29_568, vision=3456),
    ),
    "Qwen3-VL-32B": (
        Qwen3VLFamily, qwen3_vl, 33_357_390_064,
        lambda: sized(released("Qwen3-VL-8B-Instruct"), 5120, 64, 64, 8, intermediate_size=25_600),
    ),
    "Qwen3-VL-235B-A22B": (
        Qwen3VLFamily, qwen3_vl, 235_670_022_896,
        lambda: sized(qwen3_vl_30b_a3b(), 4096, 94, 64, 4, moe_intermediate_size=1536, intermediate_size=12_288),
    ),
    "Qwen3.5-397B-A17B": (Qwen3_5Family, qwen3_5, 403_397_928_944, qwen3_5_397b),
}  # fmt: skip
"""Model -> family, what its files hold, their number of parameters, its config."""


def as_built(names: Shapes) -> Shapes:
    """The same by transformers' names since 4.52, experts [out, in]; without what a family leaves out."""
    found: Shapes = {}
    for name, shape in names.items():
        if name.startswith("visual."):
            name = f"model.{name}"
        elif name.startswith("model.") and not name.startswith(("model.language_model.", "model.visual.")):
            name = name.replace("model.", "model.language_model.", 1)
        found[name] = shape
    return found


@pytest.mark.parametrize("model", CASES)
def test_a_large_model_has_the_names_and_shapes_of_its_released_files(model, tmp_path):
    kind, names, count, make = CASES[model]
    config = make()
    (tmp_path / "config.json").write_text(json.dumps(config))
    family = kind(str(tmp_path), dtype="bfloat16")
    wanted = names(config)
    assert sum(map(math.prod, wanted.values())) == count
    kept = {name: shape for name, shape in wanted.items() if not name.startswith(family.ignored_weight_prefixes)}
    built = dict(build_on_meta(family).named_parameters())
    found = {name: tuple(family.engine_tensor(name, weight).shape) for name, weight in built.items()}
    assert found == as_built(kept)
