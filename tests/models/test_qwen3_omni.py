"""Qwen3-Omni's thinker: what differs from Qwen2.5-Omni. Against transformers in test_omni_families.py."""

from types import SimpleNamespace

import pytest
import torch

from longrl.engines.hf import HFEngine
from longrl.engines.vllm_options import engine_arguments, sampling_arguments
from longrl.features.cache import FeatureCache
from longrl.models.planning_sizes import AudioSizes
from longrl.models.qwen3_omni import Qwen3OmniFamily
from longrl.packing.pack import pack
from longrl.planning.shapes import find_config
from longrl.testing.tiny import tiny_qwen3_omni
from longrl.types import AudioClip, Media, SamplingParams, UnusableSample
from tests.models.omni_cases import with_biases
from tests.tiny import frames, omni_prompts, qwen3_omni_family, row, sound

GREEDY = SamplingParams(1, 24, 0.0)


def video(seconds, sound_tokens, cells=3, height=2, width=4):
    """Temporal patches of height x width / 4 tokens, `seconds` apart."""
    times = tuple(seconds * (index + 0.5) for index in range(cells))
    return Media("video", torch.zeros(0), (cells, height, width), seconds, times, "v", sound_tokens=sound_tokens)


# ---- positions worked out by hand ----


def test_sound_stands_between_temporal_patches_by_time():
    """Cells of two tokens at 0, 2.6 and 5.2; sound at 0, 1, ... 7."""
    family, item = qwen3_omni_family(), video(0.2, 8)
    tokens = family.media_token_ids()
    seen, heard = [tokens["video"]] * 2, tokens["audio"]
    start, end = family.config.audio_start_token_id, family.config.audio_end_token_id
    assert family.placeholder_ids(item) == [start, *seen, *[heard] * 3, *seen, *[heard] * 3, *seen, *[heard] * 2, end]
    block, length = family._block(item)
    times = [0, 1, 1, 1, 2, 3, 3.6, 3.6, 4, 5, 6, 6.2, 6.2, 7, 8, 9]
    torch.testing.assert_close(block[0], torch.tensor(times, dtype=block.dtype), rtol=0, atol=1e-6)
    assert block[1].tolist() == [0, 1, 1, 1, 2, 3, 1, 1, 4, 5, 6, 1, 1, 7, 8, 9]
    assert block[2].tolist() == [0, 1, 2, 1, 2, 3, 1, 2, 4, 5, 6, 1, 2, 7, 8, 9]
    assert length == 10  # vision end follows audio end


def test_a_cell_at_the_very_time_of_a_sound_comes_first_and_the_text_goes_on_behind_the_last_piece():
    """Cells at 0, 13 and 26 of a sound that ends at 13; the wide grid of the first ones is no matter."""
    family, item = qwen3_omni_family(), video(1.0, 14, width=80)
    kinds = [(kind, piece.start, piece.stop) for kind, piece in family._pieces(item)]
    assert kinds == [("video", 0, 40), ("audio", 0, 13), ("video", 40, 80), ("audio", 13, 14), ("video", 80, 120)]
    assert family._block(item)[1] == 1 + 40 + 1  # of the last cell, at 26 but 40 wide
    assert family._block(video(1.0, 40, width=80))[1] == 40 + 2  # of the sound


@pytest.mark.parametrize("whole", [False, True])
def test_text_goes_on_at_a_fraction_and_completions_too(whole):
    family = qwen3_omni_family(whole_positions=whole)
    prompt = family.render(row(), "<video>?", [frames(5, 32, 32, spacing=0.35)])
    cells = 13 * 0.7
    first = family.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    start = int((prompt.input_ids == first).nonzero()[0])
    found = prompt.position_ids[0, start : start + 4] - start
    wanted = [0, cells, 2 * cells, 2 * cells + 1]
    assert prompt.position_ids.dtype == (torch.int64 if whole else torch.float32)
    torch.testing.assert_close(found.float(), torch.tensor(wanted).floor() if whole else torch.tensor(wanted))
    (packed,) = pack([prompt], [[torch.arange(3)]], 1000)
    behind = packed.position_ids[:, -4:]
    assert torch.equal(behind[0], behind[1])
    torch.testing.assert_close(behind[0] - behind[0, 0], torch.arange(4).to(behind), rtol=0, atol=2e-5)


# ---- sound ----


def test_a_sound_is_what_it_is_alone():
    """transformers' encoder pads a shorter one to the longest of its call, which changes the end of it."""
    family = qwen3_omni_family()
    encoder = with_biases(family.build()).audio_tower
    media = [family.patch(sound(0.57, "short")), family.patch(sound(2.3, "long"))]
    found = family.encode_media(SimpleNamespace(visual=None, audio_tower=encoder), media)
    for item, rows in zip(media, found, strict=True):
        alone = encoder(item.patches.T, feature_lens=torch.tensor([len(item.patches)])).last_hidden_state
        torch.testing.assert_close(rows[:, : alone.shape[1]], alone, rtol=1e-5, atol=1e-6)
        assert not rows[:, alone.shape[1] :].any()  # nothing for the layers of DeepStack
    together = torch.cat([item.patches for item in media]).T
    padded = encoder(together, feature_lens=torch.tensor([57, 230])).last_hidden_state
    assert not torch.allclose(padded[: len(found[0])], found[0][:, : padded.shape[1]], atol=1e-4)


def test_a_sound_that_is_too_short_for_a_spectrogram_is_skipped():
    family = qwen3_omni_family()
    assert len(family.patch(AudioClip(torch.ones(201), 201, "shortest")).patches) == 1
    with pytest.raises(UnusableSample, match="a sound of 200 samples at 16000 Hz is too short .* 201 and more; leave"):
        family.render(row(), "<audio>?", [AudioClip(torch.ones(200), 200, "shorter")])


# ---- the released model ----


def test_a_plan_is_told_of_experts_and_both_encoders():
    family = find_config(Qwen3OmniFamily("Qwen/Qwen3-Omni-30B-A3B-Instruct", use_audio_in_video=True))
    text, vision = family.planning_sizes()
    assert (text.num_experts, text.hidden, text.head_size) == (128, 2048, 128)
    assert (vision.width, vision.num_full_layers, vision.merge) == (1152, 27, 4)
    assert family.feature_size == 4 * 2048
    convolved = 2 * 480 * 64 * 50 // 13
    assert family.audio_sizes() == AudioSizes(
        width=1280, mlp_width=5120, states_per_token=1, convolved_values=convolved
    )
    assert family.sound_tokens(60.0) == 13 * 60 + 2
    assert family._window_size == 800
    assert family._window_tokens == 104


# ---- vLLM ----


def test_vllm_is_refused_where_it_would_go_wrong(monkeypatch):
    with pytest.raises(ValueError, match="vLLM on a CPU goes wrong.*has 4 experts; use engine"):
        qwen3_omni_family(whole_positions=True).engine_options()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"vLLM has whole positions only.*set model\.family\.init_args\.whole_pos"):
        qwen3_omni_family().engine_options()


@pytest.mark.vllm
def test_vllm_is_given_the_trainers_positions_rows_and_names(monkeypatch):
    """As vLLM cuts a request into items, without an engine."""
    from longrl.models import qwen3_omni_vllm
    from longrl.models.qwen_omni_vllm import FeatureParser, media_fields

    family = qwen3_omni_family(whole_positions=True)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        config = family.engine_options()["hf_overrides"](family.config)
    assert config.architectures == [qwen3_omni_vllm.ARCHITECTURE]
    assert config.thinker_config.text_config.num_experts == 4

    model, prompt = family.build(), omni_prompts(family)[0]
    features = FeatureCache(family).get_or_encode(model, [prompt])
    request = family.engine_request(prompt, features)
    parsed = FeatureParser(expected_hidden_size=family.feature_size).parse_mm_data(request["multi_modal_data"])
    kinds = {token: kind for kind, token in family.media_token_ids().items()}
    specs, columns, offset, index = [], [], 0, dict.fromkeys(parsed, 0)
    for token in request["prompt_token_ids"]:
        kind = kinds.get(token)
        if kind is None:
            offset += 1
            continue
        fields = media_fields(request["multi_modal_data"][kind])
        item = {
            name: field.build_elems(name, request["multi_modal_data"][kind][name])[index[kind]]
            for name, field in fields.items()
        }
        index[kind] += 1
        columns.append(item[f"{kind}_embeds"].data)
        specs.append(SimpleNamespace(modality=kind, mm_position=SimpleNamespace(offset=offset), data=item))
        offset += len(columns[-1])
    assert index == {kind: parsed.get_count(kind) for kind in parsed}
    positions, _ = qwen3_omni_vllm.OmniFeatures.get_mrope_input_positions(None, prompt.input_ids.tolist(), specs)
    assert torch.equal(positions, prompt.position_ids)

    # The rows' first columns are embedded, the others handed to the first layers.
    (packed,) = pack([prompt], [[]], 10_000)
    wanted = family.text_inputs(model, packed, features)
    kept = {}
    layers = SimpleNamespace(
        language_model=SimpleNamespace(embed_input_ids=model.get_input_embeddings()),
        _embed_text_input_ids=lambda ids, embed, is_multimodal: embed(ids),
        _set_deepstack_input_embeds=lambda rows: kept.update(rows=rows),
        deepstack_num_level=2,
    )
    mask = wanted["visual_pos_masks"][0]
    found = qwen3_omni_vllm.OmniFeatures.embed_input_ids(layers, prompt.input_ids, columns, is_multimodal=mask)
    assert torch.equal(found, wanted["inputs_embeds"][0])
    assert torch.equal(kept["rows"][:, mask], torch.stack(wanted["deepstack_visual_embeds"]))
    assert not kept["rows"][:, ~mask].any()

    name = family.engine_weight("model.layers.0.mlp.experts.gate_up_proj")
    mapped = qwen3_omni_vllm.OmniFeatures.hf_to_vllm_mapper.apply_list([name])
    assert mapped == ["language_model.model.layers.0.mlp.experts.gate_up_proj"]
    assert family.engine_weight("audio_tower.proj1.weight") is None


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_answers_as_the_trainer_with_the_weights_it_was_started_with(monkeypatch, tmp_path):
    """On a CPU, where it cannot be given new ones. Tokens and log-probabilities, of tracks among videos too."""
    import vllm

    monkeypatch.setattr("longrl.models.qwen3_omni.refuse_experts_on_a_cpu", lambda family: None)
    made = tiny_qwen3_omni(tmp_path / "model", text={"hidden_size": 192, "moe_intermediate_size": 64})
    options = {"min_pixels": 32 * 32, "max_pixels": 64 * 64, "whole_positions": True}
    model = Qwen3OmniFamily(str(made), random_init=True, **options).build()
    Qwen3OmniFamily(str(made), **options).export(model, tmp_path / "released")
    family = Qwen3OmniFamily(str(tmp_path / "released"), **options)
    prompts = omni_prompts(family)
    features = FeatureCache(family).get_or_encode(model, prompts)
    wanted = HFEngine().generate(family, model, prompts, features, GREEDY, seed=0)

    small = {"block_size": 32, "seed": 0, "load_format": "auto"}
    sizes = SimpleNamespace(
        max_model_len=2048, max_num_seqs=16, enforce_eager=True, gpu_memory_utilization=0.5, kv_cache_gib=0.0625,
        options=small,
    )  # fmt: skip
    llm = vllm.LLM(**engine_arguments(family, sizes))
    requests = [family.engine_request(prompt, features) for prompt in prompts]
    params = [vllm.SamplingParams(**sampling_arguments(family, prompt, GREEDY, 0, 0)) for prompt in prompts]
    for (ours,), answer in zip(wanted, llm.generate(requests, params, use_tqdm=False), strict=True):
        (theirs,) = answer.outputs
        assert list(theirs.token_ids) == ours.token_ids.tolist()
        logps = [at[token].logprob for token, at in zip(theirs.token_ids, theirs.logprobs, strict=True)]
        torch.testing.assert_close(torch.tensor(logps), ours.logprobs, rtol=0, atol=1e-5)
