"""Qwen3.5 in the real vLLM on a CPU, which runs the rule in bfloat16 alone: its rounding is measured beside."""

from __future__ import annotations

import copy

import pytest
import torch

from longrl.engines.parity import check_rendered_prompts
from longrl.features.cache import FeatureCache
from longrl.models.qwen3_5 import PREFIX_TOKENS, Qwen3_5Family, Qwen3_5TextFamily
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.packing.pack import pack
from longrl.testing.tiny import tiny_qwen3_5, tiny_qwen3_5_text
from longrl.types import SamplingParams
from tests.distributed import run_distributed
from tests.engines.turn_checks import SAMPLING as TURNS, answers, often_ending
from tests.families import cell, text_prompts
from tests.tiny import frames, mixed_prompts, row

vllm_package = pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from longrl.engines.vllm import VLLMEngine  # noqa: E402
from longrl.engines.vllm_options import completion_fields, make_completion  # noqa: E402

SIZES = {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "hidden_size": 192, "max_position_embeddings": 256}
"""6 value heads on 2 key heads, of sizes that vLLM's CPU kernels know; fewer positions than prompts have."""
SAMPLING = SamplingParams(3, 24)


def family_of(name, folder, cls=Qwen3_5Family):
    """With the head in float32: rounded logits would hide what layers compute."""
    if name == "qwen3.5-text":
        family = Qwen3_5TextFamily(str(tiny_qwen3_5_text(folder, **SIZES)), random_init=True, dtype="bfloat16")
    else:
        made = tiny_qwen3_5(folder, text=SIZES, experts=name == "qwen3.5-moe")
        sizes = {"min_pixels": 32 * 32, "max_pixels": 64 * 64}
        family = cls(str(made), random_init=True, freeze_vision_encoder=False, dtype="bfloat16", **sizes)
    family.fp32_lm_head = True
    return family


def prompts_of(family):
    if not family.media_token_ids():
        return text_prompts(family)
    clips = [frames(90, key="long"), frames(5, 60, 90, key="v9")]
    return [*mixed_prompts(family), family.render(row("long"), "What? <video> and <video>", clips)]  # 918 tokens


def engine(**options):
    options = {"block_size": 32, "seed": 0, **options}
    return VLLMEngine(max_model_len=2048, max_num_seqs=16, kv_cache_gib=0.0625, enforce_eager=True, options=options)


def update(model, seed):
    """Changes every weight, those of the rule and its convolution, which start small, by more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if name.endswith(("A_log", "dt_bias", "conv1d.weight")) else 0.05
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def gaps(family, model, prompts, features, completions):
    """Mean distances to log-probabilities in float32: the engine's, and that of the trainer's own bfloat16."""
    (packed,) = pack(prompts, completions, 1 << 30)
    said = torch.cat([c.logprobs for own in completions for c in own])
    exact = copy.deepcopy(model).float()
    with torch.no_grad():
        own = family.forward(model, packed, features).logp
        wanted = family.forward(exact, packed, {key: value.float() for key, value in features.items()}).logp
    return float((said - wanted).abs().mean()), float((own - wanted).abs().mean())


def sampled(vllm, family, model, prompts, features):
    return vllm.generate(family, model, prompts, features, SAMPLING, seed=0)


@pytest.fixture(scope="module", params=["qwen3.5-text", "qwen3.5"])
def started(request, tmp_path_factory):
    family = family_of(request.param, tmp_path_factory.mktemp("model"))
    made = engine()
    made.start(family)
    yield family, made
    made.close()


@pytest.mark.parametrize("started", [cell("vLLM", name) for name in ("qwen3.5-text", "qwen3.5")], indirect=True)
def test_the_engine_is_the_trainer_after_every_update_within_bfloat16(started):
    family, vllm = started
    model, prompts = family.build(), prompts_of(family)
    for step in range(3):
        update(model, step)
        features = FeatureCache(family).get_or_encode(model, prompts)
        if step:
            stale, noise = gaps(family, model, prompts, features, sampled(vllm, family, model, prompts, features))
            assert stale > 10 * noise
        vllm.sync(family, model, step)
        check_rendered_prompts(prompts, vllm.rendered_prompts(family, prompts, features), features)
        found, noise = gaps(family, model, prompts, features, sampled(vllm, family, model, prompts, features))
        assert found < 1.5 * noise

    features = dict(features)
    groups = often_ending(family, prompts[:2])
    vllm.generate_turns(family, model, groups, features, TURNS, 3, answers(family, model, features))
    found, noise = gaps(family, model, prompts[:2], features, completed(groups))
    assert found < 1.5 * noise


def completed(groups):
    return [[trajectory.completion() for trajectory in group] for group in groups]


class Loaded(Qwen3_5Family):
    """Of an engine that reads its weights from files and never gets others."""

    def engine_options(self):
        options = Qwen2_5_VLFamily.engine_options(self)
        return {**options, "load_format": "auto", "enable_prefix_caching": False, "mamba_ssm_cache_dtype": "float32"}


def gaps_of_experts(folder):
    """Of an engine in a process of its own: vLLM's groups of ranks for experts are made with the first model."""
    family = family_of("qwen3.5-moe", folder, Loaded)
    model, prompts = family.build(), prompts_of(family)
    update(model, 0)
    family.save_weights(model, folder)
    vllm = engine()
    vllm.start(family)
    features = FeatureCache(family).get_or_encode(model, prompts)
    return gaps(family, model, prompts, features, sampled(vllm, family, model, prompts, features))


def test_experts_from_an_exported_folder_are_the_trainers(tmp_path):
    """Handing weights over is another matter: vLLM 0.32 on a CPU packs experts for its kernel only once."""
    ((found, noise),) = run_distributed(gaps_of_experts, 1, str(tmp_path))
    assert found < 1.5 * noise


def computed_tokens(vllm):
    """Prompt tokens that vLLM has computed so far, by its own counter."""
    return next(
        metric.value
        for metric in vllm._llm.get_metrics()
        if metric.name == "vllm:prompt_tokens_by_source" and metric.labels["source"] == "local_compute"
    )


def test_a_prompt_is_prefilled_once_per_group(tmp_path):
    """With the cache that a GPU has; on a CPU samples are then without a seed, for vLLM could not draw them."""
    family = family_of("qwen3.5", tmp_path)
    model, prompts = family.build(), prompts_of(family)
    update(model, 0)
    features = FeatureCache(family).get_or_encode(model, prompts)
    vllm = engine(enable_prefix_caching=True, enable_chunked_prefill=True, disable_log_stats=False)
    vllm.sync(family, model, 0)
    assert vllm._llm.llm_engine.vllm_config.cache_config.block_size > 400  # as many keys as a state is large
    params = vllm_package.SamplingParams(n=3, max_tokens=24, logprobs=0, ignore_eos=True)
    for prompt in prompts:
        before = computed_tokens(vllm)
        (output,) = vllm._llm.generate([family.engine_request(prompt, features)], params, use_tqdm=False)
        length = len(prompt.input_ids)
        # What is behind the prefix is computed by each; it may begin in the middle of a video.
        behind = length - (length - 1) // PREFIX_TOKENS * PREFIX_TOKENS
        assert computed_tokens(vllm) - before == length + 2 * behind
        group = [make_completion(family, completion_fields(each)) for each in output.outputs]
        found, noise = gaps(family, model, [prompt], features, [group])
        assert found < 1.5 * noise

    # A later turn goes on from the state behind the prompt of the one before: what was sampled is computed again.
    features = dict(features)
    greedy = SamplingParams(1, 60, temperature=0.0)
    groups = often_ending(family, prompts[-1:], greedy, first=2, among=12)
    before = computed_tokens(vllm)
    vllm.generate_turns(family, model, groups, features, greedy, 0, answers(family, model, features))
    ((trajectory,),) = groups
    known = len(trajectory.prompt.input_ids)
    wanted = known - cached(known)  # the prompt was computed above
    for own, shown in zip(trajectory.turns[:-1:2], trajectory.turns[1::2], strict=True):
        length = known + own.num_tokens + shown.num_tokens
        wanted += length - cached(known)
        known = length
    assert len(trajectory.turns) == 5
    assert computed_tokens(vllm) - before == wanted
    found, noise = gaps(family, model, prompts[-1:], features, completed(groups))
    assert found < 1.5 * noise
    vllm.close()


def cached(length):
    """Tokens of a prompt that has been computed behind which vLLM has kept states."""
    return (length - 1) // PREFIX_TOKENS * PREFIX_TOKENS
