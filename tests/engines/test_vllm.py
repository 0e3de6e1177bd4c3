"""The real vLLM on a CPU against the trainer's own engine and forward pass."""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from longrl.callbacks.rollout_checks import check_mismatch, engine_logps
from longrl.engines.hf import HFEngine
from longrl.engines.parity import check_rendered_prompts
from longrl.environments.trajectory import begin
from longrl.features.cache import FeatureCache
from longrl.models.internvl import InternVLFamily
from longrl.models.qwen2_vl import Qwen2VLFamily
from longrl.models.qwen3_vl import Qwen3VLFamily
from longrl.models.qwen_omni import QwenOmniFamily
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.models.text import LlamaFamily, TextFamily
from longrl.models.vila import VilaFamily
from longrl.modules.mismatch import Mismatch
from longrl.packing.pack import pack
from longrl.testing.tiny import (
    tiny_internvl,
    tiny_qwen2_5_vl,
    tiny_qwen2_vl,
    tiny_qwen3_vl,
    tiny_qwen_omni,
    tiny_text,
    tiny_vila,
)
from longrl.types import SamplingParams
from tests.distributed import run_distributed
from tests.engines.turn_checks import (
    SAMPLING,
    answers,
    crops,
    often_ending,
    outcome,
    turn_gap,
    with_sampled_placeholders,
)
from tests.families import cell
from tests.tiny import LLAMA_ROPE, SCALES, frames, internvl_prompts, mixed_prompts, omni_prompts, row, sound

vllm_package = pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from longrl.engines.vllm import VLLMEngine  # noqa: E402
from longrl.engines.vllm_options import sampling_arguments  # noqa: E402
from longrl.engines.vllm_steps import keep_random_states  # noqa: E402
from longrl.engines.vllm_turns import turn_request  # noqa: E402

WITH_A_TOWER = pytest.mark.parametrize("started", ["qwen2.5-vl"], indirect=True)
EVERY_MODEL = {
    "qwen2.5": "qwen2", "qwen3": "qwen3", "qwen2.5-vl": "qwen2.5-vl", "qwen3-vl": "qwen3-vl", "nvila": "vila",
    "qwen2.5-omni": "qwen2.5-omni", "llama3": "llama", "longvila-r1": "longvila", "internvl3.5": "internvl",
    "qwen2-vl": "qwen2-vl",
}  # fmt: skip
"""Family -> what `started` begins; the last three differ from others in little and run one test."""
WITH_MEDIA = pytest.mark.parametrize("started", ["qwen2.5-vl", "qwen3-vl", "vila", "qwen2.5-omni"], indirect=True)
OF_TEXT = pytest.mark.parametrize("started", ["qwen2"], indirect=True)
OF_VILA = pytest.mark.parametrize("started", ["vila"], indirect=True)
"""Features that enter among the prompt's embeddings, not as media."""
GREEDY = SamplingParams(1, 24, temperature=0.0)


def family_of(kind: str, folder: Path):
    """Heads of 32, the smallest that vLLM's CPU kernels know; fewer positions in the config than prompts have."""
    wide = {"hidden_size": 192, "max_position_embeddings": 256}
    if kind == "qwen2.5-vl":
        made = tiny_qwen2_5_vl(folder, text=wide)
        sizes = {"min_pixels": 28 * 28, "max_pixels": 56 * 56}
        return Qwen2_5_VLFamily(str(made), random_init=True, freeze_vision_encoder=False, **sizes)
    if kind == "qwen2-vl":
        made = tiny_qwen2_vl(folder, text=wide)
        sizes = {"min_pixels": 28 * 28, "max_pixels": 56 * 56}
        return Qwen2VLFamily(str(made), random_init=True, freeze_vision_encoder=False, **sizes)
    if kind == "qwen2.5-omni":
        made = tiny_qwen_omni(folder, text=wide)
        sizes = {"min_pixels": 28 * 28, "max_pixels": 56 * 56}
        omni = QwenOmniFamily(
            str(made), random_init=True, freeze_vision_encoder=False, freeze_audio_encoder=False, **sizes
        )
        omni.fp32_lm_head = True  # in float32 no difference; the family changes the engine's config, too
        return omni
    if kind == "vila":
        made = tiny_vila(folder, text=wide, projector="mlp_downsample", **SCALES)
        return VilaFamily(str(made), random_init=True, freeze_vision_encoder=False, freeze_projector=False)
    if kind == "longvila":
        made = tiny_vila(folder, text=wide)
        return VilaFamily(
            str(made), random_init=True, freeze_vision_encoder=False, freeze_projector=False, pool_frames=4
        )
    if kind == "qwen3-vl":
        made = tiny_qwen3_vl(folder, text=wide)
        sizes = {"min_pixels": 32 * 32, "max_pixels": 64 * 64}
        return Qwen3VLFamily(str(made), random_init=True, freeze_vision_encoder=False, **sizes)
    if kind == "internvl":
        made = tiny_internvl(folder, text=wide)
        trained = {"freeze_vision_encoder": False, "freeze_projector": False}
        return InternVLFamily(str(made), random_init=True, max_tiles=4, **trained)
    if kind == "llama":
        return LlamaFamily(str(tiny_text(folder, kind, **wide, rope_parameters=LLAMA_ROPE)), random_init=True)
    return TextFamily(str(tiny_text(folder, kind, **wide)), random_init=True)


def engine() -> VLLMEngine:
    small = {"block_size": 32, "seed": 0}
    return VLLMEngine(max_model_len=2048, max_num_seqs=16, kv_cache_gib=0.0625, enforce_eager=True, options=small)


@pytest.fixture(scope="module", params=[*EVERY_MODEL.values()][:-3])
def started(request, tmp_path_factory):
    family = family_of(request.param, tmp_path_factory.mktemp("model"))
    made = engine()
    made.start(family)
    yield family, made
    made.close()


def prompts_of(family):
    if not family.media_token_ids():
        return [family.render(row(str(i)), "Which one? " * (1 + 2 * i)) for i in range(3)]
    if family.supports_audio:
        wide = [
            frames(3, 28, 112, "wide"),
            sound(0.3, "its track", is_video_track=True),
        ]  # the grid is wider than the sound
        return [*omni_prompts(family), family.render(row("wide"), "<video>?", wide)]
    if isinstance(family, InternVLFamily):
        return internvl_prompts(family)
    clips = [frames(40, key="long"), frames(5, 60, 90, key="v9")]
    long = family.render(row("long"), "What? <video> and <video>", clips)
    return [*mixed_prompts(family), long]  # 20 cells at 1.4 s: time counts further than the grid is wide


def trainer_logp(family, model, prompts, features, completions, temperature=1.0):
    (packed,) = pack(prompts, [[c.token_ids for c in own] for own in completions], 1 << 30)
    with torch.no_grad():
        return family.forward(model, packed, features, temperature).logp


def gap(family, model, prompts, features, completions, temperature=1.0) -> float:
    said = torch.cat([c.logprobs for own in completions for c in own])
    return float((said - trainer_logp(family, model, prompts, features, completions, temperature)).abs().max())


@pytest.mark.parametrize("started", [cell("vLLM", *item) for item in EVERY_MODEL.items()], indirect=True)
def test_the_engine_is_the_trainer_after_every_step(started):
    family, vllm = started
    model = family.build()
    prompts = prompts_of(family)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(3):
        features = FeatureCache(family).get_or_encode(model, prompts)
        vllm.sync(family, model, step)
        wanted = HFEngine().generate(family, model, prompts, features, GREEDY, seed=0)
        found = vllm.generate(family, model, prompts, features, GREEDY, seed=0)
        assert [[c.token_ids.tolist() for c in own] for own in found] == [
            [c.token_ids.tolist() for c in own] for own in wanted
        ]
        assert gap(family, model, prompts, features, found) < 1e-4
        (packed,) = pack(prompts, [[c.token_ids for c in own] for own in found], 1 << 30)
        family.forward(model, packed, features).logp.mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("started", ["qwen2.5-vl", "qwen3-vl"], indirect=True)
def test_pooled_features_stand_where_vllm_puts_them(started):
    """Of frames of 3 x 3 features: pools in space that are not full, and of seven temporal patches one alone."""
    family, vllm = started
    side = 28 if type(family) is Qwen2_5_VLFamily else 32
    sizes = {"min_pixels": side * side, "max_pixels": 9 * side * side, "temporal_pool": 2, "spatial_pool": 2}
    pooled = type(family)(family.model_path, random_init=True, **sizes)
    model = pooled.build()
    prompts = [*mixed_prompts(pooled), pooled.render(row("odd"), "<video> <video>?", [frames(14, 96, 96), frames(5)])]
    features = FeatureCache(pooled).get_or_encode(model, prompts)
    vllm._step = None
    vllm.sync(pooled, model, 7)
    found = vllm.generate(pooled, model, prompts, features, GREEDY, seed=0)
    assert gap(pooled, model, prompts, features, found) < 1e-4


def test_merged_features_stand_where_they_say(tmp_path):
    """A vLLM that positions are given to; Qwen2-VL's and Qwen2.5-VL's class alone differs, and were seen to agree."""
    plain = family_of("qwen3-vl", tmp_path)
    sizes = {"min_pixels": 32 * 32, "max_pixels": 96 * 96, "max_kept_tokens": 30, "merge_window": 4}
    family = type(plain)(plain.model_path, random_init=True, **sizes)
    model = family.build()
    prompts = [*mixed_prompts(family), family.render(row("odd"), "<video> <video>?", [frames(14, 60, 90), frames(5)])]
    features = FeatureCache(family).get_or_encode(model, prompts)
    vllm = engine()
    vllm.start(family)
    try:
        vllm.sync(family, model, 0)
        read, rows = family.as_read(prompts, features)
        check_rendered_prompts(read, vllm.rendered_prompts(family, prompts, features), rows)
        found = vllm.generate(family, model, prompts, features, GREEDY, seed=0)
    finally:
        vllm.close()
    assert gap(family, model, prompts, features, found) < 1e-4


@pytest.fixture
def in_step(started):
    """Family, engine, model with features and weights of step 100, and prompts."""
    family, vllm = started
    model = family.build()
    prompts = prompts_of(family)
    features = FeatureCache(family).get_or_encode(model, prompts)
    vllm._step = None
    vllm.sync(family, model, 100)
    return family, vllm, model, prompts, features


def test_log_probabilities_are_those_of_the_distribution_that_was_sampled(in_step):
    family, vllm, model, prompts, features = in_step
    sampling = SamplingParams(3, 6, temperature=0.7)
    found = vllm.generate(family, model, prompts, features, sampling, seed=5)
    assert [len(own) for own in found] == [3] * len(prompts)
    assert gap(family, model, prompts, features, found, temperature=0.7) < 1e-4


def test_any_end_token_ends_a_completion(in_step):
    """Another one than the tokenizer's, which is one that the model is known to sample."""
    family, vllm, model, prompts, features = in_step
    ((plain,), *_) = vllm.generate(family, model, prompts, features, GREEDY, seed=0)
    ids = plain.token_ids.tolist()
    twice = copy.copy(family)
    twice.end_token_ids = (family.tokenizer.eos_token_id, ids[-1])
    ((ended,), *_) = vllm.generate(twice, model, prompts, features, GREEDY, seed=0)
    assert ended.token_ids.tolist() == ids[: ids.index(ids[-1]) + 1]
    assert ended.finish_reason == "stop"


def test_completions_depend_on_seed_and_number_alone(in_step):
    family, vllm, model, prompts, features = in_step
    sampling = SamplingParams(4, 6)

    def ids(chosen, seed, first=0, count=4):
        params = SamplingParams(count, 6)
        answers = vllm.generate(family, model, chosen, features, params, seed, first)
        return [[c.token_ids.tolist() for c in own] for own in answers]

    whole = ids(prompts, seed=5)
    assert ids(prompts[:1], seed=5) == whole[:1]
    assert ids(prompts, seed=5, first=1, count=2) == [own[1:3] for own in whole]
    assert ids(prompts, seed=6) != whole
    assert sampling.num_generations == 4


def test_the_trainers_random_numbers_are_left_alone(in_step):
    family, vllm, model, prompts, features = in_step
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    vllm.generate(family, model, prompts, features, SamplingParams(2, 4), seed=1)
    vllm.rendered_prompts(family, prompts, features)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_random_numbers_go_on_as_they_were_after_an_error_too():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    def fail():
        with keep_random_states():
            random.seed(1)
            np.random.seed(1)
            torch.manual_seed(1)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_turns_are_the_trainers(in_step, monkeypatch):
    """Crops, two tools in one turn, as many turns as each trajectory likes; read from vLLM's prefix cache."""
    family, vllm, model, prompts, features = in_step
    features = dict(features)
    read = []
    step = vllm._llm.llm_engine.step

    def counting_step():
        outputs = step()
        read.extend((len(output.prompt_token_ids), output.num_cached_tokens) for output in outputs if output.finished)
        return outputs

    monkeypatch.setattr(vllm._llm.llm_engine, "step", counting_step)
    groups = often_ending(family, prompts[:2])
    vllm.generate_turns(family, model, groups, features, SAMPLING, 3, answers(family, model, features))
    assert [[len(trajectory.turns) for trajectory in group] for group in groups] == [[1, 3, 5]] * 2
    assert turn_gap(family, model, groups, features) < 1e-4

    # A later turn finds whole blocks of what came before it, but for its last token; beside embeddings vLLM knows
    # tokens that it sampled from those of a prompt.
    in_embeddings = isinstance(family, (VilaFamily, InternVLFamily))
    cached = dict(read)
    for trajectory in (one for group in groups for one in group[1:]):
        known = len(trajectory.prompt.input_ids)
        for own, shown in zip(trajectory.turns[:-1:2], trajectory.turns[1::2], strict=True):
            length = known + own.num_tokens + shown.num_tokens
            assert cached[length] >= (known if in_embeddings else known + own.num_tokens - 1) // 32 * 32
            known = length

    # Equal seeds, equal draws, whatever the batch; and a completion of one turn is the one that `generate` draws.
    again = often_ending(family, prompts[:1], dataclasses.replace(SAMPLING, num_generations=2), first=1)
    vllm.generate_turns(family, model, again, features, SAMPLING, 3, answers(family, model, features))
    assert outcome(again) == [outcome(groups)[0][1:]]
    plain = begin(prompts, SamplingParams(2, 6), max_turns=4)
    vllm.generate_turns(family, model, plain, features, SamplingParams(2, 6), 5, answers(family, model, features))
    wanted = vllm.generate(family, model, prompts, features, SamplingParams(2, 6), seed=5)
    assert outcome(plain) == [[(one.token_ids.tolist(), 1) for one in own] for own in wanted]


@WITH_MEDIA
def test_turns_are_read_at_the_trainers_positions_and_sampled_placeholders_are_tokens(in_step):
    family, vllm, model, prompts, features = in_step
    features = dict(features)
    script = crops(family, count=lambda trajectory: 2)
    groups = [[with_sampled_placeholders(family, prompt)] for prompt in prompts[:2]]
    vllm.generate_turns(family, model, groups, features, SAMPLING, 3, answers(family, model, features, script))
    num_given = groups[0][0].turns[0].num_tokens
    assert turn_gap(family, model, groups, features, num_given) < 1e-4
    for ((trajectory,),) in zip(groups, strict=True):
        so_far, request = trajectory.so_far(), turn_request(family, trajectory, features)
        assert len(request["sampled_placeholders"]) >= len(family.media_token_ids())
        check_rendered_prompts([so_far], [vllm._rendered_prompt(so_far, request)], features)


@WITH_A_TOWER
def test_turns_share_their_media_and_a_crop_does_not_keep_the_video_before_it(in_step, monkeypatch):
    """Each request brings all features so far, in one tensor of which vLLM would keep slices."""
    family, vllm, model, _, _ = in_step
    prompt = family.render(row("long"), "What?", [frames(90, 60, 60, "an hour")])
    features = dict(FeatureCache(family).get_or_encode(model, [prompt]))
    given = []
    add = vllm._llm.llm_engine.add_request
    monkeypatch.setattr(
        vllm._llm.llm_engine,
        "add_request",
        lambda name, rendered, *args: (given.append(rendered), add(name, rendered, *args)),
    )
    groups = often_ending(family, [prompt])
    vllm.generate_turns(family, model, groups, features, SAMPLING, 3, answers(family, model, features))
    items = [item for rendered in given for of_kind in rendered["mm_kwargs"].values() for item in of_kind]
    assert len(given) == 6
    assert len(items) == 6 + 4 + 1  # the video in each, crops in three, a zoom in one
    assert len({id(item) for item in items}) == 1 + len({item.key for one in groups[0] for item in one.media})
    rows = [item["video_embeds"].data for item in items if "video_embeds" in item]
    assert all(each.untyped_storage().nbytes() <= 2 * each.nbytes for each in rows)


@OF_TEXT
def test_an_answer_that_comes_late_stops_nobody(in_step):
    family, vllm, model, prompts, _ = in_step
    groups = often_ending(family, prompts)
    every = [trajectory for group in groups for trajectory in group]
    late = groups[0][1]

    twice = crops(family, count=lambda trajectory: 2)

    def script(trajectory):
        deadline = time.monotonic() + 60
        while trajectory is late and not all(one.finish_reason for one in every if one is not late):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return twice(trajectory)

    vllm.generate_turns(family, model, groups, {}, SAMPLING, 3, answers(family, model, {}, script))
    assert all(trajectory.finish_reason for trajectory in every)
    assert turn_gap(family, model, groups, {}) < 1e-4


@OF_TEXT
def test_an_error_of_an_answer_leaves_vllm_idle(in_step):
    family, vllm, model, prompts, _ = in_step
    failing = answers(family, model, {}, crops(family, count=lambda trajectory: 1 // trajectory.number))
    with pytest.raises(ZeroDivisionError):
        vllm.generate_turns(family, model, often_ending(family, prompts), {}, SAMPLING, 3, failing)
    assert not vllm._llm.llm_engine.has_unfinished_requests()
    vllm.reset_caches()
    found = vllm.generate(family, model, prompts, {}, GREEDY, seed=0)
    assert gap(family, model, prompts, {}, found) < 1e-4


def test_weights_go_over_once_per_step(in_step):
    family, vllm, model, _, _ = in_step
    count = vllm.num_syncs
    vllm.sync(family, model, 100)
    assert vllm.num_syncs == count
    vllm.sync(family, model, 101)
    assert vllm.num_syncs == count + 1


def test_the_engine_reads_prompts_as_the_trainer_does(in_step):
    family, vllm, _, prompts, features = in_step
    check_rendered_prompts(prompts, vllm.rendered_prompts(family, prompts, features), features)


@WITH_A_TOWER
def test_a_video_at_another_speed_is_noticed_before_the_first_step(in_step):
    family, vllm, _, prompts, features = in_step
    slow = [dataclasses.replace(p, media=tuple(slower(item) for item in p.media)) for p in prompts]
    with pytest.raises(RuntimeError, match="read the same prompts differently") as error:
        check_rendered_prompts(prompts, vllm.rendered_prompts(family, slow, features), features)
    assert "position_ids: from [0, " in str(error.value)


def slower(media):
    return dataclasses.replace(media, seconds_per_temporal_patch=media.seconds_per_temporal_patch * 3)


@WITH_A_TOWER
def test_the_tower_never_runs_in_the_engine(in_step):
    family, vllm, model, prompts, features = in_step

    def refuse(*args):
        raise AssertionError("the engine encodes")

    (hook,) = vllm._llm.apply_model(lambda engines: engines.visual.register_forward_pre_hook(refuse))
    try:
        vllm.reset_caches()
        vllm.generate(family, model, prompts, features, GREEDY, seed=0)
    finally:
        hook.remove()


@WITH_A_TOWER
def test_features_of_a_frozen_tower_outlive_a_sync(in_step):
    family, vllm, model, prompts, features = in_step
    family.media_encoders(model)[0].requires_grad_(False)
    for step in (1, 2):
        vllm.generate(family, model, prompts, features, GREEDY, seed=0)
        with torch.no_grad():
            for parameter in family.layers(model)[0].parameters():
                parameter *= 1.1
        vllm.sync(family, model, 200 + step)
        found = vllm.generate(family, model, prompts, features, GREEDY, seed=0)
        assert gap(family, model, prompts, features, found) < 1e-4


def test_a_prompt_that_is_too_long_names_both_limits(in_step):
    family, vllm, model, prompts, features = in_step
    with pytest.raises(ValueError, match=r"has \d+ tokens, .* above 2048, the max_model_len of VLLMEngine; raise"):
        vllm.generate(family, model, prompts, features, SamplingParams(1, 2040), seed=0)


def test_an_engine_that_dies_says_how_to_go_on(in_step, monkeypatch):
    family, vllm, model, prompts, features = in_step

    def die(*args, **kwargs):
        raise MemoryError("no room")

    monkeypatch.setattr(vllm._llm, "generate", die)
    with pytest.raises(RuntimeError, match=r"failed while answering \d+ prompts .*no room.* --ckpt_path"):
        vllm.generate(family, model, prompts, features, GREEDY, seed=0)


def test_a_forgotten_cache_is_caught(in_step, monkeypatch):
    """Weights go over, but keys and values of the old ones stay; in a run: tests/engines/test_vllm_runs.py."""
    family, vllm, model, prompts, features = in_step
    prompts = [*prompts, family.render(row("repeated"), "Which one? " * 30)]  # vLLM keeps whole blocks of 32 tokens
    vllm.generate(family, model, prompts, features, GREEDY, seed=0)
    with torch.no_grad():
        for parameter in family.layers(model)[0].parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(vllm._llm, "reset_prefix_cache", lambda: True)
    vllm.sync(family, model, 102)
    found = vllm.generate(family, model, prompts, features, GREEDY, seed=0)
    tokens = Mismatch(engine_logps(found), trainer_logp(family, model, prompts, features, found))
    with pytest.raises(RuntimeError, match=r"engine and trainer disagree by up to .*max_mismatch=0\.01"):
        check_mismatch(tokens, prompts, found, max_mismatch=0.01)
    monkeypatch.undo()
    vllm.reset_caches()
    found = vllm.generate(family, model, prompts, features, GREEDY, seed=0)
    check_mismatch(
        Mismatch(engine_logps(found), trainer_logp(family, model, prompts, features, found)),
        prompts,
        found,
        max_mismatch=1e-4,
    )


@OF_VILA
def test_the_same_tokens_with_other_features_are_another_prompt(in_step):
    """A warm prefix cache: blocks are told apart by their embeddings, and found again by them."""
    family, vllm, model, _, _ = in_step
    clips = [frames(40, key=key) for key in ("first", "second")]  # 200 tokens, 6 blocks of 32
    prompts = [family.render(row("same"), "What?", [clip]) for clip in clips]
    assert torch.equal(prompts[0].input_ids, prompts[1].input_ids)
    features = FeatureCache(family).get_or_encode(model, prompts)
    answers = []
    for prompt in (*prompts, prompts[0]):
        found = vllm.generate(family, model, [prompt], features, GREEDY, seed=0)
        assert gap(family, model, [prompt], features, found) < 1e-4
        answers.append(engine_logps(found))
    assert not torch.allclose(answers[0], answers[1], atol=1e-3)
    torch.testing.assert_close(answers[0], answers[2])


@OF_VILA
def test_a_repeated_prompt_is_read_from_the_prefix_cache(in_step):
    family, vllm, model, _, _ = in_step
    prompt = family.render(row("again"), "What?", [frames(40, key="again")])
    features = FeatureCache(family).get_or_encode(model, [prompt])
    params = vllm_package.SamplingParams(max_tokens=1)
    cached = [
        vllm._llm.generate([family.engine_request(prompt, features)], params, use_tqdm=False)[0].num_cached_tokens
        for _ in range(2)
    ]
    assert cached == [0, len(prompt.input_ids) // 32 * 32]


def test_features_in_equals_pixels_in(tmp_path):
    """Against vLLM with weights from a folder: its own processor, encoder and positions, on the frames."""
    from vllm.model_executor.layers import rotary_embedding

    rotary_embedding._ROPE_DICT.clear()  # kept by the process: those of an encoder that was left out hold no numbers
    family = family_of("qwen2.5-vl", tmp_path)
    model = family.build()
    model.save_pretrained(tmp_path)
    # 56 x 56: neither processor resizes them; times that float32 holds exactly, for vLLM's processor makes them that.
    clip = frames(24, key="clip", spacing=0.375)
    prompt = family.render(row("clip"), "What?", [clip])
    features = FeatureCache(family).get_or_encode(model, [prompt])
    vllm = engine()
    vllm.options |= {"load_format": "auto", "limit_mm_per_prompt": {"video": 1}}  # with its own encoder
    vllm.start(family)
    (wanted,) = vllm.generate(family, model, [prompt], features, GREEDY, seed=0)
    times = clip.timestamps
    metadata = {
        "total_num_frames": len(times), "fps": (len(times) - 1) / (times[-1] - times[0]), "duration": times[-1],
        "frames_indices": list(range(len(times))), "video_backend": "test", "do_sample_frames": False,
    }  # fmt: skip
    request = {
        "prompt_token_ids": family.engine_request(prompt, features)["prompt_token_ids"],
        "multi_modal_data": {"video": [(clip.pixels.permute(0, 2, 3, 1).numpy(), metadata)]},
        "mm_processor_kwargs": {"size": {"shortest_edge": family.min_pixels, "longest_edge": family.max_pixels}},
    }
    params = vllm_package.SamplingParams(**sampling_arguments(family, prompt, GREEDY, 0, 0))
    (found,) = vllm._llm.generate([request], params, use_tqdm=False)
    vllm.close()
    assert found.prompt_token_ids == prompt.input_ids.tolist()
    assert list(found.outputs[0].token_ids) == wanted[0].token_ids.tolist()
    said = [next(iter(at.values())).logprob for at in found.outputs[0].logprobs]
    torch.testing.assert_close(torch.tensor(said), wanted[0].logprobs, atol=1e-4, rtol=0)


# ---- engines that do not start, and engines at rest ----


def test_a_missing_vllm_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"VLLMEngine needs vllm.*pip install -e ..\[vllm\].*HFEngine"):
        engine().start(family_of("qwen2", tmp_path))


def test_another_version_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("vllm.__version__", "0.9.1")
    with pytest.raises(ImportError, match=r"written for vllm 0\.32\.0, got 0\.9\.1; install 0\.32\.0"):
        engine().start(family_of("qwen2", tmp_path))


def test_starting_leaves_the_trainers_random_numbers_alone(tmp_path):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    made = engine()
    made.start(family_of("qwen2", tmp_path))
    made.close()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_a_model_vllm_does_not_know_is_named(tmp_path):
    family = family_of("qwen2", tmp_path)
    assert family.config  # as every run has read it
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("Qwen2ForCausalLM", "NobodysModel").replace('"qwen2"', '"nobody"'))
    with pytest.raises(RuntimeError, match=r"(?s)vLLM could not start for .*nobody.*HFEngine") as error:
        engine().start(family)
    assert str(tmp_path) in str(error.value)


def test_a_cache_too_small_for_a_prompt_says_what_to_change(tmp_path):
    tiny = VLLMEngine(max_model_len=32_768, kv_cache_gib=0.0005, enforce_eager=True, options={"block_size": 32})
    with pytest.raises(RuntimeError, match=r"could not start .*lower max_model_len"):
        tiny.start(family_of("qwen2", tmp_path))


class Recorder:
    """Stands for vLLM and keeps the order of what it is asked."""

    def __init__(self):
        self.calls = []
        self.llm_engine = self

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, *args, *kwargs.values())) or True


def test_memory_goes_back_and_forth_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    family, vllm = family_of("qwen2", tmp_path), VLLMEngine()
    model, vllm._sleeps, vllm._llm = family.build(), True, Recorder()
    vllm.sync(family, model, 0)
    vllm.sleep()
    vllm.sleep()
    vllm.sync(family, model, 0)  # its weights are gone, so the same step goes over again
    names = [call[:2] if call[0] in ("wake_up", "sleep") else call[0] for call in vllm._llm.calls]
    caches = ["reset_prefix_cache", "reset_encoder_cache"]
    woken = [("wake_up", ["weights"]), "collective_rpc", ("wake_up", ["kv_cache"])]
    assert names == ["collective_rpc", *caches, ("sleep", 2), *woken, *caches]
    assert vllm.num_syncs == 2


class Loaded(Qwen3VLFamily):
    """Of an engine that reads its weights from files and never gets others."""

    def engine_options(self):
        return {**Qwen2_5_VLFamily.engine_options(self), "limit_mm_per_prompt": {"image": 64, "video": 64}}


def gap_of_experts(folder: str) -> float:
    """Of an engine in a process of its own: vLLM's groups of ranks for experts are made with the first model."""
    tiny_qwen3_vl(folder, text={"hidden_size": 192}, experts=True)
    family = Loaded(folder, random_init=True, min_pixels=32 * 32, max_pixels=64 * 64)
    model, prompts = family.build(), prompts_of(family)
    family.save_weights(model, folder)
    vllm = engine()
    vllm.options["load_format"] = "auto"
    vllm.start(family)
    features = FeatureCache(family).get_or_encode(model, prompts)
    return gap(family, model, prompts, features, vllm.generate(family, model, prompts, features, GREEDY, seed=0))


def test_experts_from_an_exported_folder_are_the_trainers(tmp_path):
    """Handing weights over is another matter: vLLM 0.32 on a CPU packs experts for its kernel only once."""
    (found,) = run_distributed(gap_of_experts, 1, str(tmp_path))
    assert found < 1e-4


@pytest.mark.skipif(torch.cuda.is_available(), reason="of CPUs")
def test_an_engine_that_cannot_take_new_experts_does_not_start(tmp_path):
    family = Qwen3VLFamily(str(tiny_qwen3_vl(tmp_path, experts=True)), random_init=True)
    with pytest.raises((RuntimeError, ValueError), match=r"has 4 experts; use engine: longrl.engines.hf.HFEngine"):
        engine().start(family)
