"""BRISQUE by its package; skipped without the `brisque` extra, which is not in requirements/cpu.lock (it compiles)."""

import io
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from longrl.diffusion.rewards.quality import Brisque
from longrl.rewards import RewardSum, RewardTerm
from longrl.types import Row

ROW = Row(id="1", problem="a picture", answer="")
has_brisque = pytest.mark.skipif(find_spec("brisque") is None, reason="needs the brisque extra")


def natural() -> Image.Image:
    """Noise with the 1/f spectrum of photographs, 256 x 256."""
    frequency = np.fft.fftfreq(256)
    radius = np.hypot(frequency[:, None], frequency[None])
    radius[0, 0] = 1
    noise = np.fft.ifft2(np.fft.fft2(np.random.default_rng(0).normal(size=(256, 256))) / radius**1.2).real
    grey = (255 * (noise - noise.min()) / np.ptp(noise)).astype(np.uint8)
    return Image.fromarray(np.repeat(grey[..., None], 3, -1))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    image.save(buffer := io.BytesIO(), "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def frames(*images: Image.Image) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


@has_brisque
def test_distortions_cost_and_the_reward_is_the_packages_score():
    from brisque import BRISQUE

    reward, image = Brisque(), natural()
    clean, worse, worst = (reward(frames(one), ROW) for one in (image, jpeg(image, 50), jpeg(image, 5)))
    blurred = reward(frames(image.filter(ImageFilter.GaussianBlur(3))), ROW)
    assert clean == pytest.approx(1 - BRISQUE().score(np.array(image)) / 100)
    assert clean > worse > worst
    assert clean > blurred
    assert reward(frames(image, jpeg(image, 5)), ROW) == pytest.approx((clean + worst) / 2)


@has_brisque
def test_a_plain_picture_has_none():
    (value,) = Brisque().score_all([torch.full((1, 3, 64, 64), 90, dtype=torch.uint8)], [ROW])
    assert isinstance(value, ValueError)


def test_without_its_package_the_run_ends(monkeypatch):
    monkeypatch.setattr("longrl.diffusion.rewards.required_packages.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"Brisque needs brisque and cv2.*longrl\[brisque\]"):
        RewardSum([RewardTerm(Brisque())]).prepare()
