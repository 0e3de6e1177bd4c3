"""What vLLM is told, without vLLM."""

import copy
import pickle

import pytest

from longrl.engines.server import VLLMServerEngine
from longrl.engines.server_protocol import model_sizes
from longrl.engines.vllm import VLLMEngine
from longrl.engines.vllm_options import check_head_dtypes, engine_arguments
from tests.tiny import omni_family, text_family

ENGINE = VLLMEngine()


def config_of(family):
    """A model's config as vLLM has it after its `hf_overrides`, which travels to other processes."""
    override = pickle.loads(pickle.dumps(engine_arguments(family, ENGINE)["hf_overrides"]))
    return override(copy.deepcopy(family.config))


@pytest.mark.parametrize("make", [text_family, pytest.param(omni_family, marks=pytest.mark.vllm)])
def test_the_head_in_float32_is_asked_for_beside_what_a_family_changes(make):
    family = make()
    before = engine_arguments(family, ENGINE).get("hf_overrides")
    family.fp32_lm_head = True
    found = config_of(family)
    assert found.head_dtype == found.get_text_config().head_dtype == "float32"
    if before is not None:
        assert found.architectures == before(copy.deepcopy(family.config)).architectures


def test_a_head_in_another_precision_than_the_runs_is_refused():
    family = text_family()
    check_head_dtypes(family, ["torch.bfloat16"])
    family.fp32_lm_head = True
    check_head_dtypes(family, ["torch.float32"])
    for found, named in ((["torch.float32", "torch.bfloat16"], r"torch\.bfloat16"), ([], "no LogitsProcessor")):
        with pytest.raises(ValueError, match=f"fp32_lm_head=true needs logits in float32, but vLLM .* {named}"):
            check_head_dtypes(family, found)


def test_a_server_says_how_it_computes_the_head_and_the_engines_can():
    family = text_family()
    without = model_sizes(family)
    family.fp32_lm_head = True
    assert {name for name, size in model_sizes(family).items() if without[name] != size} == {"LM head in float32"}
    assert VLLMEngine.supports_fp32_lm_head
    assert VLLMServerEngine.supports_fp32_lm_head
