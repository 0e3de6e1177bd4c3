"""Rewards of pixels: every number by hand."""

import io

import pytest
import torch
from PIL import Image

from longrl.diffusion.rewards.colour import PALETTE, ColourPlace, ColourShare, MeanColour
from longrl.diffusion.rewards.generation import (
    MotionAmount,
    compressibility,
    incompressibility,
    mean_motion,
    temporal_smoothness,
)
from longrl.rewards.reward_sum import frame_indices
from longrl.types import Row


def row(prompt: str = "a picture") -> Row:
    return Row(id="1", problem=prompt, answer="")


def plain(colour: str | tuple[int, int, int], num_frames: int = 1, height: int = 8, width: int = 8) -> torch.Tensor:
    """[F, 3, H, W] uint8 in one colour."""
    values = torch.tensor(PALETTE[colour] if isinstance(colour, str) else colour, dtype=torch.uint8)
    return values.view(1, 3, 1, 1).repeat(num_frames, 1, height, width)


def levels(*values: int) -> torch.Tensor:
    """A grey video, one level per frame."""
    return torch.cat([plain((value, value, value)) for value in values])


# ---- which frames ----


def test_frames_are_chosen_by_their_number_alone():
    assert frame_indices(10, "every 4") == [0, 4, 8]
    assert frame_indices(3, "all") == frame_indices(3, "every 1") == [0, 1, 2]
    assert (frame_indices(5, "first"), frame_indices(5, "last"), frame_indices(1, "last")) == ([0], [4], [0])
    assert frame_indices(2, "every 100") == [0]


@pytest.mark.parametrize("wrong", ["every 0", "every", "middle", "every -2", ""])
def test_another_choice_of_frames_is_an_error(wrong):
    with pytest.raises(ValueError, match="all, first, last or 'every N'"):
        frame_indices(4, wrong)


# ---- colours ----


def test_the_mean_colour_is_one_minus_the_mean_distance_of_the_channels():
    assert MeanColour("red")(plain("red"), row()) == 1.0
    assert MeanColour("black")(plain("white"), row()) == 0.0
    half = torch.cat([plain("black"), plain((255, 0, 0))])  # mean (127.5, 0, 0)
    assert MeanColour("black")(half, row()) == pytest.approx(1 - 127.5 / 3 / 255)


@pytest.mark.parametrize("colour", PALETTE)
def test_every_colour_is_nearest_to_itself_and_is_read_from_the_prompt(colour):
    prompt = row(f"A {colour.upper()}, not a beige or {'red' if colour != 'red' else 'blue'} square")
    assert ColourShare()(plain(colour), prompt) == 1.0
    assert MeanColour()(plain(colour), prompt) == 1.0
    assert [name for name in PALETTE if ColourShare(name)(plain(colour), row()) > 0] == [colour]


def test_the_share_counts_pixels_of_all_frames():
    frames = plain("blue", num_frames=2)
    frames[0, :, :2] = plain("red")[0, :, :2]  # 2 of 8 lines of the first frame
    assert ColourShare("red")(frames, row()) == 2 / 16
    assert ColourShare("blue")(frames, row()) == 14 / 16


@pytest.mark.parametrize(("place", "lines"), [("left", (..., slice(0, 4))), ("top", (..., slice(0, 4), slice(None)))])
def test_a_place_gives_one_where_the_colour_is_and_half_where_it_is_nowhere(place, lines):
    frames = plain("white")
    assert ColourPlace("red", place)(frames, row()) == 0.5
    frames[lines] = plain("red")[lines]
    other = {"left": "right", "top": "bottom"}[place]
    assert ColourPlace("red", place)(frames, row()) == 1.0
    assert ColourPlace("red", other)(frames, row()) == 0.0
    assert ColourPlace()(frames, row(f"something red at the {place}, blue at the {other}")) == 1.0
    assert ColourPlace("red", place)(plain("red"), row()) == 0.5


def test_the_middle_line_of_an_odd_picture_belongs_to_no_half():
    frames = plain("white", height=3, width=5)
    frames[..., 2] = plain("red", height=3)[..., 0]
    assert ColourPlace("red", "left")(frames, row()) == 0.5
    frames[..., 1] = frames[..., 2]
    assert ColourPlace("red", "left")(frames, row()) == 0.75


def test_unknown_colours_and_prompts_without_one_are_errors():
    with pytest.raises(ValueError, match="must be one of black.*got 'crimson'"):
        ColourShare("crimson")
    with pytest.raises(ValueError, match="'a reddish dog' names none of black"):
        MeanColour()(plain("red"), row("a reddish dog"))
    with pytest.raises(ValueError, match="names none of left, right"):
        ColourPlace("red")(plain("red"), row())


# ---- bytes ----


def test_compressibility_is_minus_the_kilobytes_of_jpeg_quality_95():
    noise = torch.randint(0, 256, (2, 3, 32, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sizes = []
    for frame in noise:
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(buffer := io.BytesIO(), format="JPEG", quality=95)
        sizes.append(buffer.tell())
    assert incompressibility(noise, row()) == pytest.approx(sum(sizes) / 2 / 1000)
    assert compressibility(noise, row()) == -incompressibility(noise, row())
    assert incompressibility(noise[:1], row()) > incompressibility(plain("red", 1, 32, 48), row())


# ---- motion ----


def test_a_steady_change_is_smooth_and_flicker_is_not():
    assert temporal_smoothness(levels(10, 20, 30, 40), row()) == 1.0
    assert temporal_smoothness(levels(7, 7, 7), row()) == 1.0
    assert temporal_smoothness(levels(0, 255, 0, 255), row()) == 0.0
    assert temporal_smoothness(levels(0, 0, 51, 51), row()) == pytest.approx(1 - 51 / 510)  # |51| and |-51|


def test_motion_is_the_mean_difference_and_pays_up_to_enough():
    frames = levels(0, 51, 0)
    assert mean_motion(frames) == pytest.approx(0.2)
    assert MotionAmount(enough=0.4)(frames, row()) == pytest.approx(0.5)
    assert MotionAmount(enough=0.1)(frames, row()) == 1.0
    assert MotionAmount()(levels(9, 9), row()) == 0.0
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\], got 0"):
        MotionAmount(0)


def test_too_few_frames_are_an_error_not_a_zero():
    with pytest.raises(ValueError, match="temporal_smoothness needs at least 3 frames, got 2"):
        temporal_smoothness(levels(1, 2), row())
    with pytest.raises(ValueError, match="motion needs at least 2 frames, got 1"):
        MotionAmount()(levels(1), row())
