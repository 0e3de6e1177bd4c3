"""Grids of samples: their sizes, where each pixel of a sample is, and what the report takes."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from longrl.evaluation.report_page import Report, write_report
from longrl.evaluation.sample_grids import (
    CAPTION_SIZE,
    GAP,
    PROMPT_SIZE,
    PromptSamples,
    animated_grid,
    encode_images,
    frame_image,
    is_video,
    picture_grid,
    saved_grids,
)

HEAD = round(1.3 * PROMPT_SIZE) + 4  # one line and the gap below it
FOOT = 2 + round(1.3 * CAPTION_SIZE)


def level(value: int, num_frames: int = 1, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.full((num_frames, 3, height, width), value, dtype=torch.uint8)


def ramp(num_frames: int) -> torch.Tensor:
    """Frame number f has level 10 f."""
    return torch.cat([level(10 * number) for number in range(num_frames)])


def row(*samples: torch.Tensor, prompt: str = "p") -> PromptSamples:
    return PromptSamples(prompt, samples, [f"{number}" for number in range(len(samples))])


def pixel(image: Image.Image, left: int, top: int) -> tuple[int, ...]:
    return image.getpixel((left, top))


# ---- pictures ----


def test_samples_stand_side_by_side_and_prompts_below_each_other():
    grid = picture_grid([row(level(10), level(20), level(30)), row(level(40), level(50), level(60))], tile=160)
    assert grid.width == 3 * 160 + 2 * GAP + 2 * GAP
    line = HEAD + 160 + FOOT
    assert grid.height == 2 * line + 2 * GAP + 2 * GAP
    for number, value in enumerate([10, 20, 30, 40, 50, 60]):
        left = GAP + (number % 3) * (160 + GAP)
        top = GAP + (number // 3) * (line + 2 * GAP) + HEAD
        for x, y in ((left, top), (left + 159, top + 159)):
            assert pixel(grid, x, y) == (value,) * 3
        assert pixel(grid, left - 1, top) == (255,) * 3
        assert pixel(grid, left, top + 160) == (255,) * 3


def test_prompts_with_one_sample_each_fill_a_line_of_four():
    grid = picture_grid([row(level(10 * number)) for number in range(6)], tile=160)
    assert grid.size == (4 * 160 + 3 * GAP + 2 * GAP, 2 * (HEAD + 160 + FOOT) + 2 * GAP + 2 * GAP)
    top = GAP + HEAD + 160 + FOOT + 2 * GAP + HEAD
    assert [pixel(grid, GAP + number * (160 + GAP), GAP + HEAD)[0] for number in range(4)] == [0, 10, 20, 30]
    assert [pixel(grid, GAP + number * (160 + GAP), top)[0] for number in range(4)] == [40, 50, 255, 255]
    pairs = picture_grid([row(level(1), level(2))] * 2, tile=160)
    assert pairs.width == 4 * 160 + 3 * GAP + 2 * GAP


def test_the_pixels_of_a_small_picture_stay_squares():
    frame = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)
    found = torch.from_numpy(np.array(frame_image(frame, 20))).permute(2, 0, 1)
    assert torch.equal(found, frame.repeat_interleave(4, -1).repeat_interleave(4, -2))  # 5 * 4 <= 20 < 5 * 5


def test_a_large_picture_keeps_its_shape():
    assert frame_image(level(7, 1, 100, 300)[0], 60).size == (60, 20)


def test_prompts_and_captions_are_drawn_and_long_ones_end_in_dots():
    def ink(prompt: str) -> int:
        grid = np.array(picture_grid([PromptSamples(prompt, [level(255)], [""])]))
        return int((grid < 128).any(-1).sum())

    assert ink("") == 0 < ink("a cat") < ink("a cat on a mat")
    assert ink("word " * 40) == ink("word " * 400)
    captioned = np.array(picture_grid([PromptSamples("", [level(255)], ["0.5"])]))
    assert (captioned[-GAP - FOOT :] < 200).any()


# ---- videos ----


def test_a_contact_sheet_has_a_sample_per_line_and_its_frames_from_first_to_last():
    grid = picture_grid([row(ramp(9), ramp(2))], tile=16, max_frames=5)
    assert grid.width == 5 * 16 + 4 * GAP + 2 * GAP
    head = grid.height - 2 * GAP - 2 * (16 + FOOT) - GAP
    tops = [GAP + head, GAP + head + 16 + FOOT + GAP]
    lefts = [GAP + number * (16 + GAP) for number in range(5)]
    assert [pixel(grid, left, tops[0])[0] for left in lefts] == [0, 20, 40, 60, 80]
    assert [pixel(grid, left, tops[1])[0] for left in lefts] == [0, 10, 255, 255, 255]


def test_an_animation_shows_every_moment_and_the_last_frame_of_what_has_ended():
    rows = [row(ramp(4), ramp(2))]
    moments = animated_grid(rows, tile=160)
    lefts = [GAP, GAP + 160 + GAP]
    assert [[pixel(image, left, GAP + HEAD)[0] for left in lefts] for image in moments] == [
        [0, 0], [10, 10], [20, 10], [30, 10],
    ]  # fmt: skip
    assert is_video(rows)
    assert not is_video([row(level(1))])


@pytest.mark.parametrize("kind", ["webp", "gif"])
def test_animations_hold_all_frames_at_their_rate(kind):
    file = encode_images(animated_grid([row(ramp(4))]), kind, fps=5)
    with Image.open(io.BytesIO(file)) as image:
        assert (image.format, image.n_frames, image.info["loop"]) == (kind.upper(), 4, 0)
        image.seek(3)
        image.load()
        assert image.info["duration"] == 200
        assert abs(image.convert("RGB").getpixel((GAP + 80, GAP + HEAD + 80))[0] - 30) <= 2


def test_a_png_holds_the_grid_to_the_last_bit():
    grid = picture_grid([row(level(3))])
    assert np.array_equal(np.array(Image.open(io.BytesIO(encode_images([grid], "png")))), np.array(grid))


# ---- in the report ----


def save(folder, *names: str) -> None:
    (folder / "pictures").mkdir(exist_ok=True)
    for number, name in enumerate(names):
        kind = name.rpartition(".")[2]
        grids = animated_grid([row(ramp(3))]) if kind == "webp" else [picture_grid([row(level(number))])]
        (folder / "pictures" / name).write_bytes(encode_images(grids, kind))


def test_the_first_the_last_and_some_between_are_chosen_of_training_and_of_validation(tmp_path):
    assert saved_grids(tmp_path) == []
    save(tmp_path, *(f"step_{step:06}.png" for step in (5, 10, 15)))
    assert [picture.title for picture in saved_grids(tmp_path, count=2)] == [
        "Training samples after step 5", "Training samples after step 15",
    ]  # fmt: skip
    save(tmp_path, *(f"val_{step:06}.png" for step in range(0, 70, 10)), "val_000060.webp")
    grids = saved_grids(tmp_path)[3:]
    assert [picture.title for picture in grids] == [f"Validation samples after step {step}" for step in (0, 30, 60)]
    assert [picture.kind for picture in grids] == ["png", "png", "webp"]


def test_the_report_has_a_section_of_pictures_that_needs_no_other_file(tmp_path):
    save(tmp_path, "val_000010.png", "val_000020.png", "val_000020.webp")
    grids = saved_grids(tmp_path)
    text = write_report(tmp_path, Report("t", pictures=grids)).read_text()
    assert "<h2>Pictures</h2>" in text
    assert "Validation samples after step 10" in text
    assert text.count('src="data:image/png;base64,') == text.count('src="data:image/webp;base64,') == 1
    assert f'width="{grids[0].width}"' in text
    assert "Pictures" not in write_report(tmp_path / "none", Report("t")).read_text()
