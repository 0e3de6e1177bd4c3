"""The script that asks an exported model by transformers alone shows it a video as training did."""

import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.sources import read_video
from tests.datamodules.media.test_video import write
from tests.tiny import qwen2_vl_family, qwen3_5_family, qwen3_vl_family, vl_family

ROOT = Path(__file__).parents[2]
ASK = runpy.run_path(str(ROOT / "longrl" / "commands" / "init_files" / "ask.py"))

VIDEOS = {
    "a phone held upright.mov": {"matrix": (0, 1, -1, 0), "noise": True},
    "turned the other way.mp4": {"matrix": (0, -1, 1, 0), "noise": True},
    "upside down.mp4": {"matrix": (-1, 0, 0, -1), "noise": True},
    "B-frames.mp4": {"bf": "3", "g": "12"},
    "of varying rate.mp4": {"times_ms": [i * 40 if i < 30 else 1200 + (i - 30) * 200 for i in range(40)]},
    "without a number of frames.webm": {"codec": "libvpx-vp9"},
}


@pytest.mark.parametrize("sampling", [VideoSampling(fps=2.0, max_frames=6), VideoSampling(fps=None, num_frames=5)])
@pytest.mark.parametrize("name", VIDEOS)
def test_frames_and_times_are_those_of_training(name, sampling, tmp_path):
    path = write(tmp_path / name, 40, **VIDEOS[name])
    trained = read_video(path, sampling)
    frames, metadata = ASK["read_frames"](str(path), sampling.identity())
    assert torch.equal(torch.from_numpy(frames).permute(0, 3, 1, 2), trained.pixels)
    assert metadata.timestamps == pytest.approx(trained.timestamps, abs=1e-3)


@pytest.mark.parametrize("make_family", [vl_family, qwen2_vl_family, qwen3_vl_family, qwen3_5_family])
@pytest.mark.parametrize("budget", [None, 30_000])
def test_the_processor_makes_of_them_what_the_trainer_does(make_family, budget, tmp_path):
    """Patches of the same size; and the seconds between them, of which Qwen2.5-VL's positions are made."""
    sampling = VideoSampling(fps=1.0)
    path = write(tmp_path / "v.mov", 80, size=(128, 96), **VIDEOS["a phone held upright.mov"])
    family = make_family(max_pixels=8 * 1024, **({"max_video_pixels": budget} if budget else {}))
    media = family.patch(read_video(path, sampling))
    frames, metadata = ASK["read_frames"](str(path), sampling.identity())
    processor = AutoProcessor.from_pretrained(family.model_path)
    limits = {name: getattr(family, name) for name in ("min_pixels", "max_pixels", "max_video_pixels")}
    options = {"do_sample_frames": False, "video_metadata": [metadata]}
    options |= ASK["size_options"](processor, limits, len(frames))
    inputs = processor(text=[processor.video_token], videos=[frames], videos_kwargs=options, return_tensors="pt")
    assert torch.equal(inputs["pixel_values_videos"], media.patches)
    if "second_per_grid_ts" in inputs:
        assert float(inputs["second_per_grid_ts"][0]) == pytest.approx(media.seconds_per_temporal_patch, rel=0.01)
