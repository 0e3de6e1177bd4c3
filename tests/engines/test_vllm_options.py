"""What vLLM is told, without vLLM."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from longrl.commands import serve
from longrl.engines.expert_record import with_routed_experts
from longrl.engines.server import VLLMServerEngine
from longrl.engines.server_protocol import model_sizes
from longrl.engines.vllm import VLLMEngine
from longrl.engines.vllm_options import check_head_dtypes, engine_arguments
from longrl.types import Completion, SamplingParams
from tests.tiny import omni_family, qwen3_5_family, qwen3_5_text_family, qwen3_vl_family, text_family, vl_family

ENGINE = VLLMEngine(max_model_len=64)
HOUR = 262_144
"""Tokens of 3,600 frames and a question."""


@pytest.fixture
def on_gpu(monkeypatch):
    """A machine that has one, as far as the arguments are concerned."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def sized(max_prompt_tokens, **options):
    engine = VLLMEngine(**options)
    engine.fit_lengths(max_prompt_tokens, 1024)
    return engine


def test_an_hour_enters(on_gpu):
    """The whole video must fit the encoder's cache, which is as large as what vLLM computes together."""
    engine = sized(HOUR)
    told = engine_arguments(vl_family(), engine)
    assert engine.max_length() == told["max_model_len"] == HOUR + 1024
    assert told["max_num_batched_tokens"] == HOUR + 1024
    assert engine.length_limits(SamplingParams(8, 1024))[0].tokens == HOUR + 1024


@pytest.mark.parametrize(("max_prompt_tokens", "given", "wanted"), [(None, None, 32_768), (HOUR, 4096, 4096)])
def test_lengths_that_are_given_or_unlimited_stay(max_prompt_tokens, given, wanted):
    assert sized(max_prompt_tokens, max_model_len=given).max_length() == wanted


def test_text_is_computed_in_chunks_of_vllms_choice(on_gpu):
    assert "max_num_batched_tokens" not in engine_arguments(text_family(), sized(HOUR))


def test_a_video_longer_than_the_encoders_cache_is_refused_before_the_start(on_gpu):
    engine = sized(HOUR, options={"max_num_batched_tokens": 16_384})
    with pytest.raises(ValueError, match=r"max_num_batched_tokens=16384 .* below its max_model_len=263168.*leave"):
        engine_arguments(vl_family(), engine)


def test_no_vision_encoder_is_built_beside_features():
    assert set(engine_arguments(vl_family(), ENGINE)["limit_mm_per_prompt"].values()) == {0}
    assert engine_arguments(qwen3_vl_family(), ENGINE)["skip_mm_profiling"]


@pytest.mark.parametrize("make", [qwen3_5_family, qwen3_5_text_family])
def test_a_hybrid_models_prompt_is_found_again_inside_a_block(make, on_gpu):
    """A block of hundreds of tokens would be computed again for every completion."""
    told = engine_arguments(make(experts=True), ENGINE)
    assert (told["prefix_match_unit"], told["mamba_ssm_cache_dtype"]) == (16, "float32")
    assert "enable_prefix_caching" not in told


def test_a_hybrid_model_that_a_cpu_cannot_run_is_refused_before_the_start(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    family = qwen3_5_family(dtype="bfloat16")
    text = family.config.get_text_config()
    with pytest.raises(ValueError, match=r"both of 64 or of 128, but .* keys of 8 and values of 12 .*hf\.HFEngine"):
        engine_arguments(family, ENGINE)
    text.linear_key_head_dim = text.linear_value_head_dim = 128
    assert engine_arguments(family, ENGINE)["enable_prefix_caching"] is False  # it would need chunks
    family.dtype = "float32"
    with pytest.raises(ValueError, match=r"in bfloat16 .* in float32"):
        engine_arguments(family, ENGINE)
    for experts in (qwen3_5_family(experts=True), qwen3_5_text_family(experts=True)):
        with pytest.raises(ValueError, match=r"has 4 experts; use engine: longrl.engines.hf.HFEngine"):
            engine_arguments(experts, ENGINE)


def test_positions_beyond_the_configs_are_asked_for():
    """The trainer's model reads them; vLLM refuses them."""
    family = vl_family()
    known = family.config.get_text_config().max_position_embeddings
    engine = sized(known)
    override = pickle.loads(pickle.dumps(engine_arguments(family, engine)["hf_overrides"]))
    assert override(copy.deepcopy(family.config)).get_text_config().max_position_embeddings == known + 1024
    assert "hf_overrides" not in engine_arguments(family, sized(known, max_model_len=known))


def test_rotary_embeddings_that_change_with_the_length_are_not_stretched():
    family = text_family()
    family.config.rope_parameters = {**family.config.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(ValueError, match=r"max_model_len=1001024 .* rotary embeddings \(dynamic\) .*HFEngine"):
        engine_arguments(family, sized(1_000_000))


def test_a_servers_lengths_are_those_of_its_run():
    renderer = SimpleNamespace(max_prompt_tokens=HOUR)
    rollout = SimpleNamespace(longest_completion=512)
    parts = SimpleNamespace(
        datamodule=SimpleNamespace(renderer=renderer), planned_run=lambda: SimpleNamespace(rollout=rollout)
    )
    assert serve.fit_lengths(parts, serve.ServerOptions()).max_model_len == HOUR + 512
    assert serve.fit_lengths(parts, serve.ServerOptions(max_model_len=77)).max_model_len == 77


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


def test_vllms_experts_are_those_of_the_layers_that_have_some():
    """vLLM tells of all layers; a prompt's tokens are there whether they were computed or cached."""
    routed = np.random.default_rng(0).integers(0, 200, (5 + 4 - 1, 6, 2)).astype("uint8")
    completion = Completion(torch.arange(4), torch.zeros(4), "", "stop")
    first = with_routed_experts(completion, routed, 5, layers=[1, 4], is_first=True)
    assert first.experts.tolist() == routed[5:, [1, 4]].tolist()
    assert first.prompt_experts.tolist() == routed[:5, [1, 4]].tolist()
    assert with_routed_experts(completion, routed, 5, layers=[1, 4], is_first=False).prompt_experts is None
    for wrong, said in ((None, "none"), (routed[:-1], "those of 7 tokens")):
        with pytest.raises(RuntimeError, match=f"the experts of 8 tokens and returned {said}; set rollout.router_rep"):
            with_routed_experts(completion, wrong, 5, layers=[1, 4], is_first=True)


def test_vllm_is_asked_for_experts_where_they_are_to_be_replayed():
    family = text_family()
    assert "enable_return_routed_experts" not in engine_arguments(family, ENGINE)
    family.router_replay = True
    assert engine_arguments(family, ENGINE)["enable_return_routed_experts"] is True


def test_a_server_says_how_it_computes_the_head_and_the_engines_can():
    family = text_family()
    without = model_sizes(family)
    family.fp32_lm_head = True
    assert {name for name, size in model_sizes(family).items() if without[name] != size} == {"LM head in float32"}
    assert VLLMEngine.supports_fp32_lm_head
    assert VLLMServerEngine.supports_fp32_lm_head
