"""Qwen2-VL's positions and sizes against transformers', vLLM's, and numbers worked out by hand."""

from types import SimpleNamespace

import pytest
import torch

from longrl.planning.inputs import ModelSizes
from tests.tiny import frames, qwen2_vl_family, row, vl_family


def prompt_of(family, count=6):
    clips = [frames(1, 60, 90, "i", "image"), frames(count, 60, 90, "v", spacing=7.0)]
    return family.render(row(), "x <image> y <video> z", clips)


def test_temporal_patches_are_one_position_apart_whatever_their_seconds():
    family = qwen2_vl_family()
    (video,) = (item for item in prompt_of(family).media if item.kind == "video")
    assert video.grid_thw == (3, 2, 4)
    assert video.seconds_per_temporal_patch > 10
    tokens = [1, *[family.config.video_token_id] * 6, 2]
    found = family.position_ids(torch.tensor(tokens), [video])
    assert found[0].tolist() == [0, 1, 1, 2, 2, 3, 3, 4]
    assert found[2].tolist() == [0, 1, 2, 1, 2, 1, 2, 4]


def test_positions_equal_transformers_where_it_agrees_with_the_released_code():
    """As of Qwen2.5-VL: transformers 5.19 goes on behind a video at max(h, w)."""
    family = qwen2_vl_family()
    prompt = prompt_of(family)
    kinds = torch.zeros_like(prompt.input_ids)
    kinds[prompt.input_ids == family.config.image_token_id] = 1
    kinds[prompt.input_ids == family.config.video_token_id] = 2
    wanted, _ = family.build().model.get_rope_index(
        prompt.input_ids[None],
        mm_token_type_ids=kinds[None],
        image_grid_thw=torch.tensor([prompt.media[0].grid_thw]),
        video_grid_thw=torch.tensor([prompt.media[1].grid_thw]),
    )
    last = int((kinds == 2).nonzero()[-1])
    assert torch.equal(prompt.position_ids[:, : last + 1], wanted[:, 0, : last + 1])


@pytest.mark.vllm
def test_positions_equal_vllms():
    released = pytest.importorskip("vllm.model_executor.models.qwen2_vl").Qwen2VLForConditionalGeneration
    family = qwen2_vl_family()
    prompt = prompt_of(family, count=50)
    ids, features, start = prompt.input_ids.tolist(), [], 0
    for item in prompt.media:
        offset = ids.index(family.media_token_ids()[item.kind], start)
        start = offset + family.num_features(item)
        data = {f"{item.kind}_grid_thw": SimpleNamespace(data=torch.tensor(item.grid_thw))}
        features.append(SimpleNamespace(modality=item.kind, mm_position=SimpleNamespace(offset=offset), data=data))
    model = SimpleNamespace(config=family.config)
    model.iter_mm_grid_thw = lambda given: released.iter_mm_grid_thw(model, given)
    wanted, _ = released.get_mrope_input_positions(model, ids, features)
    assert torch.equal(prompt.position_ids, wanted)


def test_vllm_is_told_no_times():
    """It would refuse them."""
    family = qwen2_vl_family()
    prompt = prompt_of(family)
    features = {item.key: torch.zeros(family.num_features(item), 48) for item in prompt.media}
    data = family.engine_request(prompt, features)["multi_modal_data"]
    assert data["video"].keys() == {"video_embeds", "video_grid_thw"}


def test_sizes_of_the_encoder_have_other_names():
    sizes, older = (ModelSizes.from_family(make()) for make in (vl_family, qwen2_vl_family))
    assert older.vision_encoder.width == 32
    assert older.vision_encoder.mlp_width == 64
    assert older.vision_encoder.num_full_layers == older.vision_encoder.num_layers == 2
    assert older.layer_params == sizes.layer_params
