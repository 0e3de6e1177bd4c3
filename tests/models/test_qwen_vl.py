import pickle

import pytest
import torch
import transformers
from packaging.version import Version

from longrl.types import Media
from tests.tiny import frames, row, vl_family


def medium(kind, grid, seconds=0.0):
    return Media(kind, torch.zeros(0), grid, seconds, (), "k")


def test_text_after_a_video_goes_on_behind_its_last_second():
    # 2 text tokens, a video of 3 cells of 1 x 2 tokens every 1.4 s at 2 positions per second, 1 text token.
    # Time runs 0, 2.8 -> 2, 5.6 -> 5 from position 2, so the text after it stands at 2 + 5 + 1 = 8.
    # transformers 5.19 puts it at 2 + max(1, 2) = 4.
    family = vl_family()
    family.config.vision_config.tokens_per_second = 2
    ids = torch.tensor([1, 2, *[family.config.video_token_id] * 6, 3])
    found = family.position_ids(ids, [medium("video", (3, 2, 4), 1.4)])
    assert found.tolist() == [
        [0, 1, 2, 2, 4, 4, 7, 7, 8],
        [0, 1, 2, 2, 2, 2, 2, 2, 8],
        [0, 1, 2, 3, 2, 3, 2, 3, 8],
    ]


def test_text_after_an_image_goes_on_behind_its_longer_side():
    family = vl_family()
    image = family.config.image_token_id
    ids = torch.tensor([1, *[image] * 6, 2, image, 3])
    media = [medium("image", (1, 4, 6)), medium("image", (1, 2, 2))]
    found = family.position_ids(ids, media)
    assert found.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5, 6],
        [0, 1, 1, 1, 2, 2, 2, 4, 5, 6],
        [0, 1, 2, 3, 1, 2, 3, 4, 5, 6],
    ]


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.19"), reason="transformers before 5.19 rounds times")
def test_positions_equal_transformers_where_it_agrees_with_the_released_code():
    """For an image, and up to the end of a video, transformers 5.19 counts like Qwen; a difference there is ours."""
    family = vl_family()
    model = family.build()
    prompt = family.render(row(), "x <image> y <video> z", [frames(1, 60, 90, "i", "image"), frames(6, 60, 90, "v")])
    kinds = torch.zeros_like(prompt.input_ids)
    kinds[prompt.input_ids == family.config.image_token_id] = 1
    kinds[prompt.input_ids == family.config.video_token_id] = 2
    theirs, _ = model.model.get_rope_index(
        prompt.input_ids[None],
        mm_token_type_ids=kinds[None],
        image_grid_thw=torch.tensor([prompt.media[0].grid_thw]),
        video_grid_thw=torch.tensor([prompt.media[1].grid_thw]),
        second_per_grid_ts=torch.tensor([prompt.media[1].seconds_per_temporal_patch]),
    )
    last = int((kinds == 2).nonzero()[-1])
    assert torch.equal(prompt.position_ids[:, : last + 1], theirs[:, 0, : last + 1])


def test_patches_equal_the_models_own_processor():
    family, clip = vl_family(), frames(6, 60, 90, "v")
    media = family.patch(clip)
    theirs = family.processor(
        text=["<|vision_start|><|video_pad|><|vision_end|>"],
        videos=[clip.pixels],
        do_sample_frames=False,
        size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56},
        cap_pixels_per_frame=False,
        return_tensors="pt",
    )
    assert torch.equal(media.patches, theirs["pixel_values_videos"])
    assert [list(media.grid_thw)] == theirs["video_grid_thw"].tolist()
    prompt = family.render(row(), "", [clip])
    assert (prompt.input_ids == family.config.video_token_id).sum() == (
        theirs["input_ids"] == family.config.video_token_id
    ).sum()


def test_cells_have_the_mean_time_of_their_frames_and_an_odd_frame_fills_its_cell():
    media = vl_family().patch(frames(5, spacing=0.5))
    assert media.timestamps == pytest.approx((0.25, 1.25, 2.0))
    assert media.seconds_per_temporal_patch == pytest.approx(1.0)


def test_a_video_budget_shrinks_frames_but_not_below_the_minimum():
    family = vl_family(min_pixels=28 * 28, max_pixels=112 * 112, max_video_pixels=8 * 56 * 56)
    grids = [family.patch(frames(count, 112, 112)).grid_thw for count in (2, 8, 100)]
    assert grids == [(1, 8, 8), (4, 4, 4), (50, 2, 2)]


@pytest.mark.parametrize(
    ("num_frames", "size", "expected"),
    [(4, (1080, 1920), (560, 1008)), (120, (480, 640), (476, 644)), (768, (720, 1280), (336, 644)),
     (768, (480, 640), (420, 560))],
)  # fmt: skip
def test_a_budget_in_tokens_gives_the_sizes_of_qwen_vl_utils(num_frames, size, expected):
    """Figures of its `fetch_video` (0.0.14) with total_pixels=115200*28*28, which pairs of frames share."""
    family = vl_family(min_pixels=128 * 784, max_pixels=768 * 784, max_video_tokens=115_200)
    assert family.frame_size(num_frames, *size) == expected
    twice = vl_family(min_pixels=128 * 784, max_pixels=768 * 784, max_video_pixels=2 * 115_200 * 784)
    assert twice.frame_size(num_frames, *size) == expected
    with pytest.raises(ValueError, match="max_video_tokens must be at least 1, got 0"):
        vl_family(max_video_tokens=0)


def test_the_models_own_placeholder_is_text_in_a_question():
    family = vl_family()
    prompt = family.render(row(), "look: <|video_pad|>", [frames(4)])
    assert int((prompt.input_ids == family.config.video_token_id).sum()) == family.num_features(prompt.media[0])
    assert "look: <|video_pad|><|im_end|>" in family.tokenizer.decode(prompt.input_ids)


def test_a_template_that_writes_a_placeholder_too_many_is_refused():
    family = vl_family()
    family.tokenizer.chat_template += "<|video_pad|>"
    with pytest.raises(ValueError, match="row 'a' renders to 2 media placeholders for 1 media"):
        family.render(row(), "look", [frames(4)])


def test_tags_must_name_the_media_in_order():
    with pytest.raises(ValueError, match=r"media \['video'\] but its text places \['image'\]"):
        vl_family().render(row(), "<image> what?", [frames(4)])


def test_a_family_travels_to_workers_without_its_tokenizer():
    family = vl_family()
    assert family.tokenizer is not None
    copy = pickle.loads(pickle.dumps(family))
    assert "tokenizer" not in vars(copy)
    assert copy.max_pixels == family.max_pixels


def test_a_missing_folder_is_named():
    family = vl_family()
    family.model_path = "./nowhere"
    with pytest.raises(ValueError, match=r"model='./nowhere' is no folder with a config.json"):
        family.build()


def test_encoding_in_small_calls_changes_nothing():
    family = vl_family()
    model = family.build()
    media = [family.patch(frames(4, key=name)) for name in "abc"]
    together = family.encode_media(model, media)
    family.max_patches_per_encode = 1
    for one, other in zip(together, family.encode_media(model, media), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
