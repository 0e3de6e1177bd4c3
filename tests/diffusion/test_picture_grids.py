"""Which steps leave pictures, and what is in the files."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from longrl.diffusion.diffusion_module import DiffusionModule
from longrl.diffusion.picture_grids import PictureGrids, sample_caption
from longrl.rewards import RewardSum, RewardTerm
from longrl.types import Row


@dataclass
class Sample:
    frames: torch.Tensor


@dataclass
class Batch:
    groups: list | None


def group(name: str, num_samples: int = 3, num_frames: int = 1):
    """Sample n has level 20 n, and one line more in white for each frame; the last sample's reward fails."""
    samples = [Sample(torch.full((num_frames, 3, 8, 8), 20 * n, dtype=torch.uint8)) for n in range(num_samples)]
    for sample in samples:
        for number in range(1, num_frames):
            sample.frames[number, :, :number] = 255
    row = Row(id=name, problem=f"prompt {name}", answer="")
    made = SimpleNamespace(prompt=SimpleNamespace(id=name, row=row), completions=samples)

    def brightness(frames, row):
        value = float(frames[0].double().mean())
        if value == 20 * (num_samples - 1):
            raise ValueError("too bright")
        return value

    RewardSum([RewardTerm(brightness, 2.0), RewardTerm(lambda frames, row: 1.0, name="one")]).score([made])
    return made


class Policy(DiffusionModule):
    """Decodes what has its frames already."""

    def __init__(self, steps_per_rollout: int = 1) -> None:
        torch.nn.Module.__init__(self)
        self.steps_per_rollout = steps_per_rollout

    def decode_samples(self, samples):
        return torch.stack([sample.frames for sample in samples])


def trainer(folder: Path, *loggers, step: int = 0) -> SimpleNamespace:
    return SimpleNamespace(default_root_dir=str(folder), is_global_zero=True, global_step=step, loggers=list(loggers))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "pictures").glob("*"))


def train(callback: PictureGrids, run: SimpleNamespace, steps_per_rollout: int, until: int) -> None:
    batch, policy = Batch([group("a")]), Policy(steps_per_rollout)
    while run.global_step < until:
        callback.on_train_batch_start(run, policy, batch, 0)
        run.global_step += steps_per_rollout
        callback.on_train_batch_end(run, policy, None, batch, 0)


@pytest.mark.parametrize(("steps_per_rollout", "shown"), [(1, [0, 5, 10]), (4, [0, 8]), (6, [0, 6])])
def test_the_first_rollout_and_those_that_begin_at_or_behind_a_multiple_are_shown(tmp_path, steps_per_rollout, shown):
    train(PictureGrids(every_n_steps=5), trainer(tmp_path), steps_per_rollout, until=11)
    assert names(tmp_path) == ["samples.jsonl", *(f"step_{step:06}.png" for step in shown)]


def test_only_validation_is_shown_with_zero_and_only_by_one_rank(tmp_path):
    train(PictureGrids(every_n_steps=0), trainer(tmp_path), 1, until=3)
    other = trainer(tmp_path)
    other.is_global_zero = False
    train(PictureGrids(every_n_steps=1), other, 1, until=3)
    assert not (tmp_path / "pictures").exists()


def test_a_validation_shows_the_first_prompts_of_its_batches(tmp_path):
    callback, run = PictureGrids(num_prompts=3, num_samples=2, tile=8), trainer(tmp_path, step=40)
    for first in ("ab", "cd"):
        callback.on_validation_batch_end(run, None, None, Batch([group(name) for name in first]), 0)
    callback.on_validation_end(run, Policy())
    callback.on_validation_end(run, Policy())  # nothing is kept for the next one
    assert names(tmp_path) == ["samples.jsonl", "val_000040.png"]
    lines = [json.loads(line) for line in (tmp_path / "pictures" / "samples.jsonl").read_text().splitlines()]
    assert [(line["id"], line["sample"]) for line in lines] == [(name, n) for name in "abc" for n in (0, 1)]
    assert lines[1] == {
        "file": "val_000040.png", "step": 40, "id": "a", "prompt": "prompt a", "sample": 1, "reward": 41.0,
        "valid": True, "parts": {"brightness": 20.0, "one": 1.0},
    }  # fmt: skip


def test_a_run_that_goes_on_repeats_no_record(tmp_path):
    """Killed after 4 rollouts, resumed from the checkpoint of 2 that was saved behind their validation."""
    for first, last in ((0, 4), (2, 5)):
        callback, run = PictureGrids(every_n_steps=1, num_samples=1, tile=8), trainer(tmp_path, step=first)
        callback.on_train_start(run, Policy())
        while run.global_step < last:
            train(callback, run, 1, until=run.global_step + 1)
            callback.on_validation_batch_end(run, None, None, Batch([group("a")]), 0)
            callback.on_validation_end(run, Policy())
    lines = [json.loads(line) for line in (tmp_path / "pictures" / "samples.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == [
        f"{stage}_{step:06}.png" for done in range(5) for stage, step in (("step", done), ("val", done + 1))
    ]


def test_a_caption_says_reward_and_parts_and_a_failure_is_no_zero():
    sample = {"reward": 0.5, "valid": True, "parts": {"colour": 0.25, "ocr": 1.0}}
    assert sample_caption(sample) == "0.500, colour 0.25, ocr 1.00"
    assert sample_caption(sample | {"parts": {"colour": 0.5}}) == "0.500"
    assert sample_caption(sample | {"valid": False}) == "reward failed"


def test_a_video_leaves_a_contact_sheet_and_an_animation(tmp_path):
    callback, run = PictureGrids(fps=4), trainer(tmp_path, step=7)
    callback.on_validation_batch_end(run, None, None, Batch([group("a", num_frames=3)]), 0)
    callback.on_validation_end(run, Policy())
    assert names(tmp_path) == ["samples.jsonl", "val_000007.png", "val_000007.webp"]
    with Image.open(tmp_path / "pictures" / "val_000007.webp") as animation:
        assert animation.n_frames == 3
    with Image.open(tmp_path / "pictures" / "val_000007.png") as sheet:
        assert sheet.width > 3 * 160


def test_batches_without_groups_leave_nothing(tmp_path):
    callback, run = PictureGrids(every_n_steps=1), trainer(tmp_path, step=1)
    callback.on_train_batch_end(run, Policy(), None, Batch(None), 0)
    callback.on_validation_batch_end(run, None, None, Batch(None), 0)
    callback.on_validation_end(run, Policy())
    assert not (tmp_path / "pictures").exists()


class Wandb(WandbLogger):
    """Notes what it is given, and makes the objects that the real one would send."""

    def __init__(self) -> None:
        self.logged: dict[str, tuple[list, int, dict]] = {}

    def log_metrics(self, metrics, step=None):
        self.logged |= {name: (values, step) for name, values in metrics.items()}


def test_weights_and_biases_gets_the_grid_and_the_animation(tmp_path):
    logger = Wandb()
    callback, run = PictureGrids(), trainer(tmp_path, logger, step=7)
    callback.on_validation_batch_end(run, None, None, Batch([group("a", num_frames=3)]), 0)
    callback.on_validation_end(run, Policy())
    assert {name: step for name, (_, step) in logger.logged.items()} == {"pictures/val": 7, "videos/val": 7}
    ((picture,), _), ((video,), _) = logger.logged["pictures/val"], logger.logged["videos/val"]
    sheet = Image.open(tmp_path / "pictures" / "val_000007.png")
    assert (type(picture).__name__, picture.image.size) == ("Image", sheet.size)
    with Image.open(io.BytesIO(Path(video._path).read_bytes())) as animation:
        assert (animation.format, animation.n_frames) == ("GIF", 3)


def test_impossible_settings_are_errors():
    with pytest.raises(ValueError, match="must be at least 1.*got 0, 4, 160, 6, 8.0 and 50"):
        PictureGrids(num_prompts=0)
