"""Qwen3-VL against transformers' own processor and forward pass, vLLM's positions, and numbers worked out by hand."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

from longrl.engines.hf import HFEngine
from longrl.features.cache import FeatureCache
from longrl.models.qwen3_vl import Qwen3VLFamily
from longrl.packing.pack import pack
from longrl.planning.inputs import ModelSizes
from longrl.types import FrameShard, Media, SamplingParams
from tests.families import cell
from tests.tiny import frames, held, mixed_prompts, qwen3_vl_family, random_completions, row

TEXT = "<video> <image><video>What comes next?"
FRAMES, SPACING = 5, 0.5


def media():
    """Two videos of an odd number of frames and an image, all of sizes that must change."""
    clips = [frames(FRAMES, 60, 90, "v1", spacing=SPACING), frames(FRAMES, 113, 87, "v2", spacing=SPACING)]
    return [clips[0], frames(1, 40, 77, "i1", "image"), clips[1]]


def theirs(family, outer):
    """The processor's inputs for the same chat; without outer marks as its release made them (transformers 4.57)."""
    text = family.tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": " "}, {"type": "image"},
                                      {"type": "video"}, {"type": "text", "text": "What comes next?"}]}],
        tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    if not outer:
        text = text.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
    least, most = family.video_budget(FRAMES)
    metadata = {"total_num_frames": FRAMES, "fps": 1 / SPACING, "duration": 2.5, "frames_indices": list(range(FRAMES))}
    first, image, second = (item.pixels for item in media())
    size = {"shortest_edge": family.min_pixels, "longest_edge": family.max_pixels}
    return family.processor(
        text=[text], images=[image[0]], videos=[first, second], return_tensors="pt", images_kwargs={"size": size},
        videos_kwargs={"video_metadata": [dict(metadata), dict(metadata)], "do_sample_frames": False,
                       "cap_pixels_per_frame": False, "size": {"shortest_edge": least, "longest_edge": most}},
    )  # fmt: skip


def model_of(family, model, experts=False):
    """Stock transformers with the same weights."""
    kind = Qwen3VLMoeForConditionalGeneration if experts else Qwen3VLForConditionalGeneration
    plain = kind._from_config(type(family.config).from_pretrained(family.model_path), attn_implementation="eager")
    plain.load_state_dict(model.state_dict())
    return plain


# ---- prompts ----


@pytest.mark.parametrize("outer", [False, True])
def test_prompt_and_patches_equal_the_processors(outer):
    family = qwen3_vl_family(outer_vision_marks=outer)
    prompt, wanted = family.render(row(), TEXT, media()), theirs(family, outer)
    assert prompt.input_ids.tolist() == wanted["input_ids"][0].tolist()
    first, image, second = prompt.media
    assert torch.equal(torch.cat([first.patches, second.patches]), wanted["pixel_values_videos"])
    assert torch.equal(image.patches, wanted["pixel_values"])
    assert [list(first.grid_thw), list(second.grid_thw)] == wanted["video_grid_thw"].tolist()


def test_every_cell_stands_behind_its_time():
    family = qwen3_vl_family()
    text = family.tokenizer.decode(family.render(row(), "<video>Which?", [frames(3, 32, 32, spacing=1.5)]).input_ids)
    cells = "<0.8 seconds><|vision_start|><|video_pad|><|vision_end|><3.0 seconds><|vision_start|><|video_pad|>"
    assert f"user\n{cells}<|vision_end|>Which?" in text  # 0.75 is 0.8; the third frame fills its cell
    marked = qwen3_vl_family(outer_vision_marks=True)
    text = marked.tokenizer.decode(marked.render(row(), "", [frames(3, 32, 32, spacing=1.5)]).input_ids)
    assert f"<|vision_start|>{cells}<|vision_end|><|vision_end|>" in text


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_a_ranks_frames_are_patched_as_in_the_whole_video(ranks):
    family = qwen3_vl_family(max_video_pixels=7 * 48 * 48)
    clip = frames(7, 87, 113)
    whole = family.patch(clip)
    parts = [family.patch(held(clip, FrameShard(rank, ranks))) for rank in range(ranks)]
    assert torch.equal(torch.cat([part.patches for part in parts if len(part.patches)]), whole.patches)
    assert {(part.grid_thw, part.key) for part in parts} == {(whole.grid_thw, whole.key)}


@pytest.mark.parametrize(
    ("num_frames", "size", "expected"),
    [
        (4, (720, 1280), (640, 1152)),
        (120, (480, 640), (480, 640)),
        (768, (1080, 1920), (576, 1024)),
        (2048, (720, 1280), (352, 608)),
        (2048, (480, 640), (384, 544)),
        (2048, (1280, 720), (608, 352)),
    ],
)
def test_a_budget_in_tokens_gives_the_sizes_of_qwen_vl_utils(num_frames, size, expected):
    """Figures of its `fetch_video` (0.0.14) with total_pixels=224*1024*32*32: at most so many tokens of pairs."""
    tokens = 224 * 1024
    family = qwen3_vl_family(min_pixels=128 * 1024, max_pixels=768 * 1024, max_video_tokens=tokens)
    assert family.frame_size(num_frames, *size) == expected
    assert num_frames // 2 * expected[0] * expected[1] // 1024 <= tokens


def test_the_pixel_budget_is_the_processors_over_the_whole_video():
    """So with max_video_pixels=25165824 and no other limit the sizes are the released processor's."""
    budget = 16 * 96 * 96
    family = qwen3_vl_family(min_pixels=1024, max_pixels=1 << 30, max_video_pixels=budget)
    size = {"shortest_edge": 4096, "longest_edge": budget}
    grids = []
    for clip in (frames(4, 150, 250), frames(17, 150, 250), frames(60, 150, 250)):
        wanted = family.processor.video_processor(
            [clip.pixels], size=size, do_sample_frames=False, cap_pixels_per_frame=False, return_tensors="pt"
        )
        grids.append(family.patch(clip).grid_thw)
        assert list(grids[-1]) == wanted["video_grid_thw"][0].tolist()
    assert grids == [(2, 8, 14), (9, 4, 6), (30, 2, 4)]
    assert qwen3_vl_family(max_pixels=64 * 64).video_budget(10) == (10 * 32 * 32, 10 * 64 * 64)


def test_a_video_of_one_frame_is_one_cell():
    family = qwen3_vl_family()
    item = family.patch(frames(1, 60, 90))
    assert item.grid_thw[0] == 1
    assert len(item.patches) == item.grid_thw[1] * item.grid_thw[2]


# ---- positions ----


def test_positions_by_hand():
    """Text, two cells of 1 x 2 tokens behind a time of one token, text; every cell ends at its own largest position."""
    family = qwen3_vl_family()
    config = family.config
    cell = [7, config.vision_start_token_id, *[config.video_token_id] * 2, config.vision_end_token_id]
    video = Media("video", torch.zeros(0), (2, 2, 4), 60.0, (30.0, 90.0), "k")
    found = family.position_ids(torch.tensor([1, 2, *cell, *cell, 3]), [video])
    assert found.tolist() == [
        [0, 1, 2, 3, 4, 4, 6, 7, 8, 9, 9, 11, 12],
        [0, 1, 2, 3, 4, 4, 6, 7, 8, 9, 9, 11, 12],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
    ]


def test_positions_equal_transformers():
    family = qwen3_vl_family()
    inputs = theirs(family, outer=False)
    wanted, _ = family.build().model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"], inputs["video_grid_thw"]
    )
    assert torch.equal(family.render(row(), TEXT, media()).position_ids, wanted[:, 0])


@pytest.mark.vllm
@pytest.mark.parametrize("outer", [False, True])
def test_positions_equal_vllms(outer):
    released = pytest.importorskip("vllm.model_executor.models.qwen3_vl").Qwen3VLForConditionalGeneration
    family = qwen3_vl_family(outer_vision_marks=outer, max_pixels=96 * 96)
    prompt = family.render(row(), "<video> and <image>", [frames(50, 60, 90, "long"), media()[1]])
    ids, features, start = prompt.input_ids.tolist(), [], 0
    for item in prompt.media:
        token, expanded = family.media_token_ids()[item.kind], family.placeholder_ids(item)
        offset = ids.index(token, start) - expanded.index(token)
        start = offset + len(expanded)
        data = {f"{item.kind}_grid_thw": SimpleNamespace(data=torch.tensor(item.grid_thw))}
        features.append(SimpleNamespace(modality=item.kind, mm_position=SimpleNamespace(offset=offset), data=data))
    wanted, _ = released._get_mrope_input_positions(ids, features, family.config)
    assert torch.equal(prompt.position_ids, wanted)


# ---- the model ----


@pytest.mark.parametrize("experts", [cell("same logits", "qwen3-vl", False), cell("same logits", "qwen3-vl-moe", True)])
@pytest.mark.parametrize("outer", [False, True])
def test_log_probabilities_equal_transformers_from_pixels(experts, outer):
    """Its processor, its positions, its forward with DeepStack; our prompt, features and packed forward."""
    family = qwen3_vl_family(experts, outer_vision_marks=outer)
    model = family.build()
    inputs, (answers,) = theirs(family, outer), random_completions(family, [[6, 3]])
    prompt = family.render(row(), TEXT, media())
    (packed,) = pack([prompt], [answers], 10_000)
    with torch.no_grad():
        found = family.forward(model, packed, FeatureCache(family).get_or_encode(model, [prompt])).logp
        wanted = [answer_logps(model_of(family, model, experts), inputs, answer) for answer in answers]
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-5, atol=1e-5)


def answer_logps(plain, inputs, answer):
    inputs, count = dict(inputs), len(answer)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer[None]], 1)
    inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, count))
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    logits = plain(**inputs).logits[0, -count - 1 : -1]
    return logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0]


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_greedy_tokens_equal_transformers_generate(experts):
    family = qwen3_vl_family(experts)
    model, prompt = family.build(), family.render(row(), TEXT, media())
    features = FeatureCache(family).get_or_encode(model, [prompt])
    ((found,),) = HFEngine().generate(family, model, [prompt], features, SamplingParams(1, 12, 0.0), seed=0)
    plain, inputs = model_of(family, model, experts), theirs(family, outer=False)
    eos = family.tokenizer.eos_token_id
    wanted = plain.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=eos, pad_token_id=eos)
    assert found.token_ids.tolist() == wanted[0, inputs["input_ids"].shape[1] :].tolist()


def test_features_are_the_towers_of_all_levels_side_by_side():
    family = qwen3_vl_family()
    model, prompts = family.build(), mixed_prompts(family)
    item = prompts[0].media[0]
    output = model.model.visual(item.patches, grid_thw=torch.tensor([item.grid_thw]), return_dict=True)
    (found,) = family.encode_media(model, [item])
    assert torch.equal(found, torch.cat([output.pooler_output, *output.deepstack_features], -1))
    assert found.shape == (family.num_features(item), family.feature_size)
    cached = FeatureCache(family).get_or_encode(model, prompts)
    for key, fresh in zip(cached, family.encode_media(model, [x for p in prompts for x in p.media]), strict=True):
        torch.testing.assert_close(cached[key], fresh, rtol=1e-5, atol=1e-6)


def test_every_level_reaches_the_log_probabilities():
    family = qwen3_vl_family()
    model, prompts = family.build(), mixed_prompts(family)[:1]
    features = FeatureCache(family).get_or_encode(model, prompts)
    (packed,) = pack(prompts, random_completions(family, [[5]]), 10_000)
    with torch.no_grad():
        whole = family.forward(model, packed, features).logp
        for level in range(3):
            columns = slice(48 * level, 48 * (level + 1))
            without = {key: value.clone() for key, value in features.items()}
            for value in without.values():
                value[:, columns] = 0
            assert float((family.forward(model, packed, without).logp - whole).abs().max()) > 1e-4, level


def test_no_mask_is_made():
    """[L, L] numbers of a long video would not fit anywhere."""
    family = qwen3_vl_family()
    model, prompts, seen = family.build(), mixed_prompts(family), []
    family.layers(model)[0].register_forward_pre_hook(
        lambda layer, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    features = FeatureCache(family).get_or_encode(model, prompts)
    HFEngine().generate(family, model, prompts, features, SamplingParams(2, 3), seed=0)
    (packed,) = pack(prompts, random_completions(family, [[2, 3], [1], [4]]), 10_000)
    family.forward(model, packed, features)
    assert [mask.numel() for mask in seen] == [0] * 4


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_weights_are_the_same_after_writing_and_loading(tmp_path, experts):
    family = qwen3_vl_family(experts)
    model = family.build()
    model.save_pretrained(tmp_path)
    family.save_processing(tmp_path)
    loaded = Qwen3VLFamily(str(tmp_path), freeze_vision_encoder=False).build().state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


# ---- the engine's side ----


def test_requests_have_one_placeholder_per_medium_and_names_that_tell_times_apart():
    family = qwen3_vl_family()
    features = {}

    def request(spacing):
        clips = [frames(count, 60, 90, name, spacing=spacing) for count, name in ((5, "a"), (8, "b"))]
        prompt = family.render(row(), "<video>x<video>", clips)
        features.update({x.key: torch.zeros(family.num_features(x), family.feature_size) for x in prompt.media})
        return prompt, family.engine_request(prompt, features)

    prompt, found = request(0.5)
    text = family.tokenizer.decode(found["prompt_token_ids"])
    assert "user\n<|video_pad|>x<|video_pad|><|im_end|>" in text
    times = found["multi_modal_data"]["video"]["timestamps"]
    assert [tuple(time.tolist()) for time in times] == [item.timestamps for item in prompt.media]
    other = request(0.7)[1]["multi_modal_uuids"]["video"]
    assert len({*found["multi_modal_uuids"]["video"], *other}) == 4


def test_the_towers_weights_stay_and_experts_go_over_as_released():
    family = qwen3_vl_family(experts=True)
    assert family.engine_weight("model.visual.deepstack_merger_list.0.norm.weight") is None
    weight = torch.arange(24).reshape(2, 3, 4)
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    assert torch.equal(family.engine_tensor(name, weight), weight.transpose(1, 2))


def test_plans_count_the_experts_that_a_row_goes_through():
    sizes = ModelSizes.from_family(qwen3_vl_family(experts=True))
    assert sizes.mlp_width == 2 * 32
    assert sizes.expert_params == 3 * 4 * 3 * 48 * 32  # layers, experts, matrices
    assert sizes.used_params == sum(sizes.layer_params) - sizes.expert_params / 2


def test_sizes_count_all_levels_of_features():
    sizes = ModelSizes.from_family(qwen3_vl_family())
    assert (sizes.feature_size, sizes.hidden) == (3 * 48, 48)
    assert (sizes.vision_encoder.num_full_layers, sizes.vision_encoder.num_layers) == (3, 3)
    assert dataclasses.asdict(sizes)["head_norms"]
