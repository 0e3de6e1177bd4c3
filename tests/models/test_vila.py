"""VILA against plain parts: tokens, pixels, projectors, tiles, scales, pooling. Folders: test_vila_folders.py."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from longrl.engines.hf import HFEngine
from longrl.features.cache import FeatureCache
from longrl.models.vila import VilaFamily
from longrl.models.vila_config import DOWNSAMPLING, VilaConfig
from longrl.models.vila_model import Downsample
from longrl.models.vila_tiles import tile_grid
from longrl.packing.pack import pack
from longrl.testing.tiny import tiny_tokenizer, tiny_vila
from longrl.types import FrameShard, SamplingParams
from tests.families import proves
from tests.models.plain_vila import PlainVila, released_pool, squares
from tests.tiny import SCALES, frames, held, row, vila_family, vila_folder


def next_logits(family, model, prompt):
    """[V] of the token after the prompt, by the family."""
    features = FeatureCache(family).get_or_encode(model, [prompt])
    (packed,) = pack([prompt], [[]], 1 << 30)
    with torch.no_grad():
        inputs = family.text_inputs(model, packed, features)
        hidden = family.hidden_states(model, packed.position_ids[:, None], spans=packed.spans, **inputs)
    return hidden[0, -1] @ model.get_output_embeddings().weight.T


def plain_logits(plain, family, text, media_rows):
    """The same from the released way of joining: every media token becomes its rows and text embeddings.

    `media_rows` is a list of tensors and strings for each media token, in order.
    """
    tokenizer = family.tokenizer
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )

    def look_up(ids):
        return plain.llm.model.embed_tokens(torch.tensor(ids, dtype=torch.int64))

    parts, waiting = [], list(media_rows)
    for token in tokenizer(chat, add_special_tokens=False)["input_ids"]:
        if token not in plain.media_tokens:
            parts.append(look_up([token]))
            continue
        for piece in waiting.pop(0):
            parts.append(look_up(tokenizer(piece)["input_ids"]) if isinstance(piece, str) else piece)
    assert not waiting
    with torch.no_grad():
        return plain.llm(inputs_embeds=torch.cat(parts)[None]).logits[0, -1]


def family_and_plain(**values):
    family = vila_family(vila_folder(**values))
    model = family.build()
    return family, model, PlainVila.of(model, family)


def small(image: Image.Image, width: int, height: int) -> torch.Tensor:
    """[3, height, width] as Pillow resizes by default."""
    data = torch.frombuffer(bytearray(image.resize((width, height)).tobytes()), dtype=torch.uint8)
    return data.view(height, width, 3).permute(2, 0, 1)


def picture(clip, place=0) -> Image.Image:
    return Image.fromarray(clip.pixels[place].permute(1, 2, 0).numpy())


# ---- what the language model reads ----


@proves("same logits", "nvila")
@pytest.mark.parametrize("projector", list(DOWNSAMPLING))
def test_logits_are_those_of_the_parts_put_together_as_published(projector):
    """A video of 5 frames and two images, none of the encoder's size."""
    family, model, plain = family_and_plain(projector=projector)
    media = [frames(5, 60, 90, "v"), frames(1, 40, 77, "i", "image"), frames(1, 31, 20, "j", "image")]
    prompt = family.render(row(), "see <video> and <image> <image> then?", media)
    pixels = [torch.stack([small(picture(clip, n), 56, 56) for n in range(len(clip.pixels))]) for clip in media]
    video, first, second = map(plain.frame_rows, pixels)
    rows = [[part for frame in video for part in (frame, "\n")], [first[0], "\n"], [second[0], "\n"]]
    text = "see <vila/video> and <image> <image> then?"
    torch.testing.assert_close(next_logits(family, model, prompt), plain_logits(plain, family, text, rows))


@proves("same logits", "longvila-r1")
@pytest.mark.parametrize(
    ("count", "means"), [(8, ([0, 1, 2, 3], [4, 5, 6, 7])), (6, ([0, 1, 2, 3], [4, 5, 5, 5])), (1, ([0, 0, 0, 0],))]
)
def test_frames_are_pooled_and_the_last_one_fills_up(count, means):
    encoder = {"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": [[4, 2, 1]], "sep_tokens": "end"}
    family, model, plain = family_and_plain(video_encoder=json.dumps(encoder))
    clip = frames(count, 60, 90, "v")
    prompt = family.render(row(), "what?", [clip])
    whole = plain.frame_rows(torch.stack([small(picture(clip, n), 56, 56) for n in range(count)]))
    rows = []
    for chosen in means:
        grid = whole[chosen].mean(0).view(2, 2, -1)  # rows, columns
        rows += [grid.mean(0), "\n"]
    logits = plain_logits(plain, family, "<vila/video>what?", [[*rows, "end"]])
    torch.testing.assert_close(next_logits(family, model, prompt), logits)


@proves("same logits", "longvila-r1")
def test_longer_videos_are_pooled_more():
    """LongVILA-R1's rule for each video of a prompt by itself: 4 frames of 5, 8 of 300."""
    family = vila_family(pool_frames="by_length")
    model, lengths = family.build(), (5, 300)
    plain = PlainVila.of(model, family)
    clips = [frames(count, 56, 56, f"v{count}") for count in lengths]
    prompt = family.render(row(), "what?", clips)
    assert [(item.grid_thw[0], item.temporal_patch_size) for item in prompt.media] == [(2, 4), (38, 8)]
    rows = []
    for clip, size in zip(clips, (4, 8), strict=True):
        whole = plain.frame_rows(clip.pixels)
        filled = torch.cat([whole, whole[-1:].expand(-len(whole) % size, -1, -1)])
        rows.append([part for own in filled.split(size) for part in (own.mean(0), "\n")])
    logits = plain_logits(plain, family, "<vila/video><vila/video>what?", rows)
    torch.testing.assert_close(next_logits(family, model, prompt), logits)


@pytest.mark.parametrize(
    ("count", "pool"), [(1, 4), (256, 4), (257, 8), (512, 8), (513, 16), (1024, 16), (1025, 32), (3600, 32)]
)
def test_the_released_rule_of_pooling(count, pool):
    family = vila_family(pool_frames="by_length")
    assert family.temporal_patch_size.of(count) == released_pool(count) == pool
    item = family.patch(without_pixels(frames(1, 56, 56), count))
    assert (item.grid_thw[0], item.temporal_patch_size) == (-(-count // pool), pool)


def without_pixels(clip, count):
    """The outline of a video of so many frames."""
    return dataclasses.replace(clip, pixels=clip.pixels[:0], timestamps=tuple(map(float, range(count))))


@pytest.mark.parametrize(
    ("encoder", "pools"),
    [
        (None, [1, 1]),
        ({"_target_": "x.BasicVideoEncoder"}, [1, 1]),
        ({"_target_": "x.TSPVideoEncoder"}, [4, 8]),  # without sizes it is LongVILA-R1's
        ({"_target_": "x.TSPVideoEncoder", "pool_sizes": [[8, 1, 1]]}, [8, 8]),
    ],
)
def test_pooling_by_what_the_config_says(encoder, pools):
    values = {} if encoder is None else {"video_encoder": json.dumps(encoder)}
    family = vila_family(vila_folder(**values))
    assert [family.temporal_patch_size.of(count) for count in (8, 300)] == pools


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_a_video_by_cells_of_its_length(size):
    family = vila_family(pool_frames="by_length")
    clip = frames(270, 56, 56, "v")
    whole = family.patch(clip)
    parts = [family.patch(held(clip, FrameShard(rank, size), family.temporal_patch_size)) for rank in range(size)]
    assert torch.equal(torch.cat([part.patches for part in parts if len(part.patches)]), whole.patches)
    assert all(len(part.patches) % 8 == 0 for part in parts[:-1])  # a cell is never cut


@pytest.mark.parametrize(
    ("height", "width", "grid"), [(56, 56, (1, 1)), (60, 200, (1, 3)), (200, 60, (3, 1)), (90, 119, (2, 3))]
)
def test_a_lone_image_becomes_tiles_and_a_thumbnail(height, width, grid):
    """`image_aspect_ratio: dynamic`: each tile is an image of its own, and "\\n" follows it in the text too."""
    family, model, plain = family_and_plain(image_aspect_ratio="dynamic", max_tiles=6)
    clip = frames(1, height, width, "i", "image")
    prompt = family.render(row(), "what is here?", [clip])
    rows, columns = grid
    large = small(picture(clip), columns * 56, rows * 56)
    parts = [large[:, y * 56 : y * 56 + 56, x * 56 : x * 56 + 56] for y in range(rows) for x in range(columns)]
    parts += [small(picture(clip), 56, 56)] if rows * columns > 1 else []
    text = "<image>\n" * len(parts) + "what is here?"
    found = [[tile, "\n"] for tile in plain.frame_rows(torch.stack(parts))]
    torch.testing.assert_close(next_logits(family, model, prompt), plain_logits(plain, family, text, found))
    assert prompt.media[0].grid_thw == (1, 4 * rows, 4 * columns)


def test_several_images_are_not_cut():
    family, model, plain = family_and_plain(image_aspect_ratio="dynamic", max_tiles=6)
    clips = [frames(1, 60, 200, name, "image") for name in "ij"]
    prompt = family.render(row(), "what?", clips)
    rows = plain.frame_rows(torch.stack([small(picture(clip), 56, 56) for clip in clips]))
    logits = plain_logits(plain, family, "<image><image>what?", [[rows[0], "\n"], [rows[1], "\n"]])
    torch.testing.assert_close(next_logits(family, model, prompt), logits)


@proves("same logits", "nvila")
@pytest.mark.parametrize(("output", "projector"), [(-1, "mlp_downsample"), (0, "mlp_downsample_2x2_fix")])
def test_scales_of_an_image_lie_side_by_side_before_the_projector(output, projector):
    """`dynamic_s2`, by hand: maps of 1, 2 x 2 and rows x columns tiles, resized to one of them, projected by tiles."""
    family, model, plain = family_and_plain(**SCALES, s2_resize_output_to_scale_idx=output, projector=projector)
    clip = frames(1, 60, 100, "i", "image")
    prompt = family.render(row(), "what?", [clip])
    rows, columns = tile_grid(60, 100, 56, min_tiles=9, max_tiles=12)
    cut = []
    for down, across in ((1, 1), (2, 2), (rows, columns)):
        large = small(picture(clip), across * 56, down * 56)
        cut += [large[:, y * 56 : y * 56 + 56, x * 56 : x * 56 + 56] for y in range(down) for x in range(across)]
    result = plain.image_rows(torch.stack(cut), rows, columns)
    logits = plain_logits(plain, family, "<image>what?", [[result, "\n"]])
    torch.testing.assert_close(next_logits(family, model, prompt), logits)


def test_a_frame_of_a_model_with_scales_has_its_one_scale_for_all():
    family, model, plain = family_and_plain(**SCALES)
    clip = frames(3, 60, 90, "v")
    rows = plain.frame_rows(torch.stack([small(picture(clip, n), 56, 56) for n in range(3)]))
    found = family.encode_media(model, [family.patch(clip)])[0]
    torch.testing.assert_close(found, rows.flatten(0, 1))


# ---- pieces, by hand ----


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("side", [3, 4, 6])
def test_squares_of_patches_become_one_with_zeros_outside(side, k):
    features = torch.randn(2, side * side, 5)
    torch.testing.assert_close(Downsample(k)(features), squares(features, k))


@pytest.mark.parametrize(
    ("height", "width", "fewest", "most", "grid"),
    [
        (448, 448, 1, 12, (1, 1)),
        (960, 960, 1, 12, (3, 3)),  # 921,600 pixels are more than half of the 1,806,336 of 3 x 3
        (900, 900, 1, 12, (2, 2)),  # 810,000 are not
        (600, 600, 1, 12, (1, 1)),  # 360,000 are less than half of the 802,816 of 2 x 2
        (1080, 1920, 1, 12, (2, 4)),  # 1.78 is nearer to 2 than to 3 / 2, and large enough for 8 tiles
        (100, 1500, 1, 12, (1, 12)),
        (448, 448, 9, 12, (3, 3)),
        (1080, 1920, 9, 12, (3, 4)),
    ],
)
def test_tiles_have_the_nearest_ratio(height, width, fewest, most, grid):
    assert tile_grid(height, width, 448, min_tiles=fewest, max_tiles=most) == grid


def test_tokens_of_a_frame_are_those_of_the_released_models():
    """256 of 448 pixels with 2 x 2, 121 with 3 x 3 (Long-RL counts 257 and 122 with the line end), 196 of 384."""
    big = {"image_size": 448, "patch_size": 14}
    for projector, size, tokens in (
        ("mlp_downsample_2x2_fix", 448, 256),
        ("mlp_downsample_3x3_fix", 448, 121),
        ("mlp_downsample", 384, 196),
    ):
        folder = vila_folder_of(projector, big | {"image_size": size})
        assert VilaConfig(folder).tokens_per_frame == tokens


def vila_folder_of(projector, vision):
    import tempfile

    return tiny_vila(tempfile.mkdtemp(), vision=vision, projector=projector)


def test_media_tokens_may_lie_behind_the_embedding(tmp_path):
    """NVILA-8B: 151648 rows, the video token is 151650; it is added when the tokenizer is read."""
    tokenizer = tiny_tokenizer()
    rows = len(tokenizer)
    folder = tiny_vila(tmp_path, text={"vocab_size": rows})
    tiny_tokenizer().save_pretrained(folder / "llm")
    family = VilaFamily(str(folder), random_init=True)
    assert family.media_token_ids() == {"image": rows + 1, "video": rows + 2}
    model, prompt = family.build(), family.render(row(), "what?", [frames(3)])
    logits = next_logits(family, model, prompt)
    plain = PlainVila.of(model, family)
    assert int(prompt.input_ids.max()) == rows + 2
    torch.testing.assert_close(logits, plain(prompt.input_ids[None], prompt.media).logits[0, -1])


@pytest.mark.parametrize("clips", [0, 1])
def test_a_special_token_behind_the_embedding_is_text_in_a_question_and_else_read_as_token_0(tmp_path, clips):
    folder = tiny_vila(tmp_path, text={"vocab_size": len(tiny_tokenizer())})
    tiny_tokenizer().save_pretrained(folder / "llm")
    family = VilaFamily(str(folder), random_init=True)
    model = family.build()
    prompt = family.render(row(), "what is <vila/sentinel>?", [frames(3)] * clips)
    behind = len(tiny_tokenizer())
    assert behind not in prompt.input_ids
    first = prompt.input_ids == prompt.input_ids[-2]
    prompt = dataclasses.replace(prompt, input_ids=prompt.input_ids.where(~first, behind))
    features = FeatureCache(family).get_or_encode(model, [prompt])
    found = []
    for ids in (prompt.input_ids, prompt.input_ids.where(prompt.input_ids != behind, 0)):
        (packed,) = pack([dataclasses.replace(prompt, input_ids=ids)], [[torch.tensor([5, 6])]], 1 << 30)
        found.append(family.forward(model, packed, features).logp)
    assert torch.equal(*found)


def test_the_text_between_frames_follows_the_current_weights():
    family = vila_family()
    model, prompt = family.build(), family.render(row(), "what?", [frames(3)])
    features = FeatureCache(family).get_or_encode(model, [prompt])
    (packed,) = pack([prompt], [[]], 1 << 30)
    before = family.text_inputs(model, packed, features)["inputs_embeds"][0]
    (newline,) = family.tokenizer("\n")["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[newline] += 1
    changed = (family.text_inputs(model, packed, features)["inputs_embeds"][0] != before).any(1)
    assert torch.equal(changed, prompt.input_ids == newline)
    assert changed.sum() >= 3


def test_encoding_in_small_calls_changes_nothing():
    family = vila_family()
    model = family.build()
    media = [family.patch(frames(5, 60, 90, key=name)) for name in "ab"]
    together = family.encode_media(model, media)
    family.max_frames_per_encode = 2
    for one, other in zip(together, family.encode_media(model, media), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("frozen", "trains", "with_gradient"),
    [
        ({"freeze_vision_encoder": True, "freeze_projector": True}, False, set()),
        ({"freeze_vision_encoder": True, "freeze_projector": False}, True, {"mm_projector"}),
        ({"freeze_vision_encoder": False, "freeze_projector": True}, True, {"vision_tower"}),
        ({}, True, {"mm_projector", "vision_tower"}),
    ],
)
def test_features_have_gradients_where_something_trains(frozen, trains, with_gradient):
    family = vila_family(**frozen)
    model = family.build()
    assert bool(family.trained_encoders(model)) is trains
    (features,) = family.encode_media(model, [family.patch(frames(3))])
    assert features.requires_grad is trains
    if trains:
        features.square().sum().backward()
    found = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found == with_gradient


def test_the_transformers_engine_generates_what_plain_greedy_decoding_does():
    family = vila_family()
    model, prompt = family.build(), family.render(row(), "what?", [frames(5, 60, 90)])
    features = FeatureCache(family).get_or_encode(model, [prompt])
    ((found,),) = HFEngine().generate(family, model, [prompt], features, SamplingParams(1, 6, temperature=0.0), 0)
    plain, ids = PlainVila.of(model, family), prompt.input_ids
    for token in found.token_ids:
        logits = plain(ids[None], prompt.media).logits[0, -1]
        assert int(logits.argmax()) == int(token)
        ids = torch.cat([ids, token[None]])


@pytest.mark.parametrize("values", [{}, {"image_aspect_ratio": "dynamic"}, SCALES], ids=["resize", "dynamic", "s2"])
def test_a_rank_without_pixels_renders_the_same_prompt(values):
    family = vila_family(vila_folder(**values), pool_frames=2)
    media = [frames(5, 60, 90, "v"), frames(1, 60, 200, "i", "image")]
    whole = family.render(row(), "see <video> and <image>", media)
    for shard in (FrameShard(0, 2), FrameShard(1, 2)):
        part = family.render(row(), "see <video> and <image>", [held(item, shard, 2) for item in media])
        assert torch.equal(part.input_ids, whole.input_ids)
        for mine, theirs in zip(part.media, whole.media, strict=True):
            assert (mine.key, mine.grid_thw, mine.timestamps) == (theirs.key, theirs.grid_thw, theirs.timestamps)
        assert [len(item.patches) > 0 for item in part.media] == [True, shard.rank == 1]
