"""What a diffusion run says before and while it samples."""

import pytest

from longrl.algorithms import Algorithm
from longrl.diffusion.diffusion_module import DiffusionModule
from longrl.diffusion.sampler import DiffusionSampling
from longrl.diffusion.steps import CPS, FlowSDE
from longrl.diffusion.windows import RandomWindow, all_steps
from tests.diffusion.tiny import FAMILIES, fit

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*log_every_n_steps")
FAINT = "its ratios are clipped at once"


@pytest.mark.parametrize(
    ("name", "dynamics", "window", "faint"),
    [
        ("sd3", CPS(0.8), all_steps, ["denoising step 2 ends at sigma 0.00893"]),
        ("sd3", CPS(0.8), RandomWindow(2, end=2), []),
        ("sd3", FlowSDE(0.7), all_steps, []),
        ("wan", CPS(0.8), all_steps, []),
    ],
)
def test_steps_that_draw_too_little_noise_are_named_once(name, dynamics, window, faint, caplog):
    """SD3's schedule of 4 steps ends at 0.0089 and 0, Wan's at 0.5 and 0."""
    sampling = DiffusionSampling(num_generations=2, num_steps=4, guidance_scale=1.0, dynamics=dynamics, window=window)
    module = DiffusionModule(FAMILIES[name](), Algorithm(clip_low=1e-4, clip_high=1e-4))
    fit(module, sampling, steps=2)
    found = [record.message for record in caplog.records if FAINT in record.message]
    assert [text.split(" with noise")[0] for text in found] == faint
    assert all("RandomWindow and init_args.end 2 or less" in text for text in found)
