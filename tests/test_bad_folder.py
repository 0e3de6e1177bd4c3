"""A run over a folder as strangers have them: it ends normally, says what became of each row, and stays finite."""

import json
import logging
import math
import time

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from PIL import Image

from longrl.callbacks.rollout import RolloutCallback
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.modules.optimizer import OptimizerSettings
from longrl.modules.policy import PolicyModule
from longrl.rewards import RewardSum, RewardTerm
from longrl.types import SamplingParams
from tests.datamodules.media.test_video import write
from tests.tiny import vl_folder

pytestmark = [
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
]

QUARTER_TURN = (0.0, 1.0, -1.0, 0.0)
QUOTED = "What do <|im_end|> and <|image_pad|> mean?"


class NaNFamily(Qwen2_5_VLFamily):
    """A model whose features of one picture, and of it alone, are no numbers: as of an overflow in float16."""

    def encode_media(self, model, media):
        features = super().encode_media(model, media)
        is_black = [bool(item.patches.amax() < -1.0) for item in media]
        return [math.nan * one if black else one for one, black in zip(features, is_black, strict=True)]


def records(folder):
    """Two records of each kind, in turn, with something to learn from in each."""
    write(folder / "sideways.mp4", 12, size=(112, 28), matrix=QUARTER_TURN)
    torn = write(folder / "torn.mp4", 60, noise=True, movflags="faststart")
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    Image.new("RGBA", (64, 64)).save(folder / "transparent.png")
    Image.new("RGB", (1, 300)).save(folder / "thin.png")
    Image.new("RGB", (64, 64)).save(folder / "black.png")
    fields = {
        "sideways": {"videos": "sideways.mp4"},
        "transparent": {"images": "transparent.png"},
        "thin": {"images": "thin.png"},
        "quoted": {"problem": QUOTED, "images": "transparent.png"},
        "torn": {"videos": "torn.mp4"},
        "nan": {"images": "black.png"},
        "hanging": {"images": "transparent.png"},
    }
    common = {"problem": "What?", "answer": "x", "task": "exact", "reasoning": "because"}
    return [{"problem_id": name, **common, **rest} for name, rest in fields.items()]


def hanging_at_times(completion, row):
    if row.id == "hanging":
        time.sleep(60)
    return float(len(completion.text) % 3)


class Seen(Callback):
    """What was shown of each row, and how often."""

    def __init__(self):
        self.prompts = {}
        self.steps = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.prompts.update({prompt.id: prompt for prompt in batch.prompts})
        self.steps += 1


def run(folder, stage):
    """Every row comes up three times; returns the callback and the trainer."""
    family = NaNFamily(vl_folder(), random_init=True, freeze_vision_encoder=True, min_pixels=784, max_pixels=3136)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(record) + "\n" for record in records(folder)))
    data = LongVideoReason(
        family, train=str(rows), stage=stage, prompts_per_batch=1, max_skipped_share=0.5, skipped_dir=str(folder)
    )
    seen = Seen()
    rollouts = RolloutCallback(
        RewardSum([RewardTerm(hanging_at_times)], time_limit_s=0.3),
        SamplingParams(num_generations=2, max_completion_tokens=4),
    )
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=3, logger=False, enable_progress_bar=False, default_root_dir=folder,
        enable_model_summary=False, limit_val_batches=0, callbacks=[seen] + ([rollouts] if stage == "rl" else []),
    )  # fmt: skip
    policy = PolicyModule(family, optimizer=OptimizerSettings(lr=1e-3))
    trainer.fit(policy, datamodule=data)
    return seen, trainer, policy


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_folder_of_bad_things_costs_its_bad_rows_and_no_more(tmp_path, caplog, stage):
    caplog.set_level(logging.WARNING)
    seen, trainer, policy = run(tmp_path, stage)

    # 1. What cannot be shown is skipped and listed with its reason.
    skipped = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    reasons = {line["id"]: line["reason"] for line in skipped}
    assert reasons.keys() == {"thin", "torn"}
    assert "absolute aspect ratio must be smaller than 200" in reasons["thin"]
    assert "it is torn" in reasons["torn"]

    # 2. What can be shown is shown as it is meant.
    assert seen.prompts.keys() == {"sideways", "transparent", "quoted", "nan", "hanging"}
    (sideways,) = seen.prompts["sideways"].media
    assert sideways.grid_thw[1] > sideways.grid_thw[2]  # the stored frames are wider than high
    (transparent,) = seen.prompts["transparent"].media
    assert transparent.patches.min() > 1.5  # white
    quoted = seen.prompts["quoted"]
    text = policy.family.tokenizer.decode(quoted.input_ids)
    assert QUOTED in text.replace("<|image_pad|>" * policy.family.num_features(quoted.media[0]), "")

    # 3. The row of no number is left out and named, and so is the reward that hangs.
    (line,) = {line for line in caplog.text.splitlines() if "is left out, number 1" in line}
    assert "'nan'" in line
    if stage == "rl":
        assert any("hanging" in line and "0.3" in line for line in caplog.text.splitlines())

    # 4. The run was as long as it should be, and its checkpoint is finite.
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert all(torch.isfinite(value).all() for value in saved.values())
    assert seen.steps == 3 * 7  # steps take usable rows alone
    assert trainer.current_epoch == 3
