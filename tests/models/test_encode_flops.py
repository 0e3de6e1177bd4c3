"""Operations of encoders: by hand, and as `longrl plan` counts them for the same video."""

import pytest
import torch

from longrl.models.encode_flops import EncodeCost, hearing_flops, seeing_flops
from longrl.models.planning_sizes import AudioSizes, VisionSizes
from longrl.planning import flops
from longrl.planning.inputs import ModelSizes, Plan
from longrl.planning.run_plan import video_outline
from longrl.types import Frames, Media
from tests.tiny import omni_family, text_family, vila_family, vl_family

SIZES = VisionSizes(
    width=2, mlp_width=4, num_layers=5, num_full_layers=2, window_patches=6, patch_values=3, merge=4
)  # fmt: skip


def pooled_family():
    """Every frame is encoded, whatever becomes of its features."""
    return vl_family(temporal_pool=2, spatial_pool=2)


def test_seeing_by_hand():
    """Of 20 patches each sees 6 in three layers and 10 in two."""
    assert seeing_flops(SIZES, 100, 20, 10) == 20 * (2 * 100 + 4 * 2 * (3 * 6 + 2 * 10))


def test_hearing_by_hand():
    sizes = AudioSizes(width=2, mlp_width=4, states_per_token=2, convolved_values=1)
    assert hearing_flops(sizes, 100, 7) == 2 * 100 * 7 * 2


@pytest.mark.parametrize("make", [vl_family, vila_family, omni_family, pooled_family])
def test_a_video_costs_what_the_planner_says(make):
    family = make()
    item = video_outline(family, 8, 112, 84)
    sizes = ModelSizes.from_family(family)
    plan = Plan(
        sizes,
        media_tokens=family.num_features(item),
        spatial_patches=item.grid_thw[1] * item.grid_thw[2],
        encoded_patches=family.encoded_patches(item),
        pooled_frames=item.temporal_patch_size // sizes.vision_encoder.frames_per_patch,
    )
    cost = EncodeCost.of(family, family.build())
    assert cost.flops(family, item) == pytest.approx(flops.encode_flops(plan))
    image = family.outline_media(Frames("image", torch.zeros(1, 3, 112, 84, dtype=torch.uint8), (0.0,), "image"))
    assert cost.flops(family, image) > 0
    if make is pooled_family:
        assert cost.flops(family, item) == cost.flops(vl_family(), video_outline(vl_family(), 8, 112, 84))


def test_a_model_without_encoders_costs_nothing():
    family = text_family()
    cost = EncodeCost.of(family, family.build())
    assert (cost.num_params, cost.vision) == (0, None)


def test_a_sound_costs_by_its_tokens():
    family = omni_family()
    cost = EncodeCost.of(family, family.build())
    sound = Media("audio", torch.zeros(0, 128), (1, 100, 1), 0.0, (), "sound")
    wanted = 2 * 25 * family.audio_sizes().states_per_token * cost.num_audio_params
    assert cost.flops(family, sound) == wanted > 0
