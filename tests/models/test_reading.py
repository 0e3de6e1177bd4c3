"""What every family says of rows without its weights: grids, keys, identity."""

import dataclasses
import json

import pytest

from longrl.models.text import TextFamily
from tests.families import FAMILIES, SEEING, text_family
from tests.tiny import frames


@pytest.mark.parametrize("name", SEEING)
@pytest.mark.parametrize(("count", "height", "width"), [(1, 17, 23), (5, 60, 90), (8, 480, 640), (9, 30, 200)])
def test_grid_and_key_need_no_pixels(name, count, height, width):
    """And are those of the frames at the encoder's size, and of a part of them."""
    family = FAMILIES[name].make()
    for clip in (frames(count, height, width), frames(1, height, width, "i", "image")):
        item = family.patch(clip)
        outline = family.outline_media(dataclasses.replace(clip, pixels=clip.pixels[:0]))
        part = family.patch(dataclasses.replace(family.resize(clip), pixels=family.resize(clip).pixels[:1]))
        for other in (outline, part):
            assert (other.key, other.grid_thw) == (item.key, item.grid_thw)
            assert (other.timestamps, other.seconds_per_temporal_patch) == (
                item.timestamps,
                item.seconds_per_temporal_patch,
            )
        assert family.grid(len(clip.timestamps), height, width, kind=clip.kind) == item.grid_thw


@pytest.mark.parametrize("name", FAMILIES)
def test_identity_says_what_decides_answers_and_not_how_it_trains(name):
    """The same in every process, and for every way to train."""
    make = FAMILIES[name].make
    trained = make(
        gradient_checkpointing=True, offload_checkpoints=True, mlp_chunk_tokens=8, init_seed=3, init_device="cpu"
    )
    assert json.loads(json.dumps(trained.identity())) == make().identity()
    assert make(chat_template_kwargs={"enable_thinking": False}).identity() != make().identity()
    assert make(dtype="bfloat16").identity() != make().identity()


def tiny_text(base, **options):
    return base(text_family("qwen2").model_path, random_init=True, **options)


class Slow(TextFamily):
    training_options = ("frozen_layers",)

    def __init__(self, model, words=3, frozen_layers=0, **kwargs):
        super().__init__(model, **kwargs)
        self.words = words


class Forgets(TextFamily):
    def __init__(self, model, words=3, **kwargs):
        super().__init__(model, **kwargs)


def test_an_option_of_ones_own_decides_answers_unless_it_is_named_a_training_option():
    default = tiny_text(Slow).identity()
    assert tiny_text(Slow, words=4).identity() == default | {"words": 4}
    assert tiny_text(Slow, frozen_layers=2).identity() == default


def test_an_option_whose_value_nobody_knows_is_refused():
    with pytest.raises(ValueError, match=r"Forgets's option 'words', which is no attribute; set self.words, or name"):
        tiny_text(Forgets).identity()
