"""Text in pictures: edit distances by hand, and the real reader on drawn pictures."""

from importlib.util import find_spec

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from longrl.diffusion.rewards.ocr import OcrMatch, comparable_text, edit_distance, quoted_text, text_similarity
from longrl.rewards import RewardSum, RewardTerm
from longrl.types import Row

has_reader = pytest.mark.skipif(
    find_spec("rapidocr") is None or find_spec("onnxruntime") is None, reason="needs the diffusion-rewards extra"
)


def row(prompt: str, answer: str = "") -> Row:
    return Row(id="1", problem=prompt, answer=answer)


def drawn(*lines: str) -> torch.Tensor:
    """[1, 3, 192, 256] uint8: black text on white."""
    image = Image.new("RGB", (256, 192), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=40)
    for number, line in enumerate(lines):
        draw.text((16, 24 + 72 * number), line, fill="black", font=font)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(192, 256, 3).permute(2, 0, 1)[None]


@pytest.mark.parametrize(
    ("wanted", "read", "whole", "anywhere"),
    [
        ("kitten", "sitting", 3, 2),
        ("abc", "", 3, 3),
        ("abc", "abc", 0, 0),
        ("abc", "xxabcxx", 4, 0),
        ("abc", "xxabxx", 4, 1),
        ("", "abc", 3, 0),
    ],
)
def test_edit_distances_of_the_whole_and_of_the_best_part(wanted, read, whole, anywhere):
    assert edit_distance(wanted, read) == whole
    assert edit_distance(wanted, read, anywhere=True) == anywhere


def test_similarity_never_falls_below_zero():
    assert text_similarity("open", "open24") == pytest.approx(1 - 2 / 6)
    assert text_similarity("a very long other text", "open") == 0.0


@pytest.mark.parametrize(
    ("read", "released", "paper"),
    [
        ("hello world", 1.0, 1.0),
        ("say hello world now", 1.0, 0.4),
        ("hello wor", 0.8, 0.8),
        ("xhello worx", 0.7, 0.7),
        ("a poster with a great many other words", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_a_picture_that_holds_the_text_earns_one_by_the_released_rule(read, released, paper):
    """Figures of the released `OcrScorer` for the prompt 'a sign with "Hello World"'."""
    wanted = comparable_text(quoted_text('a sign with "Hello World"'))
    assert text_similarity(comparable_text(read), wanted, contained=True) == pytest.approx(released)
    assert text_similarity(comparable_text(read), wanted) == pytest.approx(paper)


def test_videos_may_earn_the_mean_of_the_frames_that_earn_anything(monkeypatch):
    """Figures of the released `OcrScorer_video_or_image`."""
    monkeypatch.setattr(OcrMatch, "read_text", lambda self, frame: "open" if frame.any() else "something else")
    frames = torch.zeros(4, 3, 1, 1, dtype=torch.uint8)
    frames[1] = 1
    wanted = row('a neon sign "OPENS"')
    assert OcrMatch()(frames, wanted) == pytest.approx(0.8 / 4)
    assert OcrMatch(contained=False, earning_frames=True)(frames, wanted) == pytest.approx(0.8)
    assert OcrMatch(earning_frames=True)(torch.zeros(2, 3, 1, 1, dtype=torch.uint8), wanted) == 0.0


def test_text_is_compared_without_case_spaces_and_width():
    assert comparable_text(" Op En\n\uff12\uff14 \u00c9") == comparable_text("open24e\u0301")


def test_quotes_of_several_kinds_hold_the_text():
    assert quoted_text('a sign "Open" over \u201c24 h\u201d') == "Open 24 h"
    with pytest.raises(ValueError, match="must hold its text in double quotes, got 'no quotes'"):
        quoted_text("no quotes")


@pytest.fixture(scope="module")
def reward() -> OcrMatch:
    found = OcrMatch(num_threads=1)
    found.prepare()
    return found


@has_reader
def test_a_drawn_sign_is_read(reward):
    frames = drawn("Hello", "World")
    assert reward(frames, row('a sign with "hello world" on it')) == 1.0
    assert reward(frames, row("a sign", answer="Hello")) == 1.0
    assert OcrMatch(contained=False, num_threads=1)(frames, row("", answer="Hello")) == 0.0  # 5 too many of 5
    assert reward(frames, row('a sign that says "Help"')) < 0.5
    assert OcrMatch(contained=False, anywhere=True, num_threads=1)(frames, row("", answer="world")) == 1.0


@has_reader
def test_a_video_counts_the_mean_and_an_empty_frame_nothing(reward):
    frames = torch.cat([drawn("OPEN"), drawn()])
    assert reward(frames, row('"open"')) == 0.5


@has_reader
def test_a_prompt_without_text_fails_alone(reward):
    (first, second) = reward.score_all([drawn("OPEN"), drawn("OPEN")], [row("open"), row('"open"')])
    assert isinstance(first, ValueError)
    assert second == 1.0


def test_without_its_packages_the_run_ends_and_nothing_is_masked(monkeypatch):
    monkeypatch.setattr("longrl.diffusion.rewards.required_packages.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"OcrMatch needs rapidocr and onnxruntime.*longrl\[diffusion-rewards\]"):
        RewardSum([RewardTerm(OcrMatch())]).score([])
