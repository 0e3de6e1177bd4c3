"""Qwen2.5-Omni through the command line: SFT on sound tracks, GRPO on its checkpoint, an export; features on disk."""

import json

import pytest
import torch

from longrl.commands.main import main
from tests.runs import checkpoint, config, metrics, run
from tests.sounds import write_clip
from tests.tiny import omni_folder

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """6 questions about 3 videos with tracks that are shorter, as long and longer; a fourth is mute."""
    folder = tmp_path_factory.mktemp("clips")
    for number, seconds in enumerate((2.0, 3.0, 4.5, None)):
        write_clip(folder / f"{number}.mp4", 3.0, seconds, hertz=300 + 200 * number)
    asked = {"question": "Which tone?", "options": ["low", "high"], "answer": "low"}
    lines = [json.dumps({"id": n, "video": f"{n % 4}.mp4", **asked}) + "\n" for n in range(7)]
    (folder / "train.jsonl").write_text("".join(lines))
    return folder / "train.jsonl"


def omni_config(stage, clips, **options):
    values = config(stage)
    family = {"model": omni_folder(), "random_init": True, "min_pixels": 784, "max_pixels": 784}
    family |= {"use_audio_in_video": True, **options}
    values["model"]["family"] = {"class_path": "longrl.models.qwen_omni.QwenOmniFamily", "init_args": family}
    values["data"] |= {"train": str(clips), "row_function": "longrl.datamodules.rows.audio_qa_row"}
    values["data"]["max_skipped_share"] = 0.3
    return values


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "audio_tower_trains"])
def test_sft_then_grpo_then_an_exported_folder(frozen, clips, tmp_path):
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    options = {"freeze_audio_encoder": frozen}
    sft = run(tmp_path / "sft", omni_config("sft", clips, **options), "--trainer.max_steps=4")
    skipped = (sft / "skipped.jsonl").read_text()
    assert "3.mp4" in skipped
    assert "no sound track" in skipped
    grpo = run(
        tmp_path / "grpo", omni_config("rl", clips, **options), "--trainer.max_steps=2",
        "--model.optimizer.warmup_steps=0", f"--model.init_from={sft}", "--model.algorithm.kl_coef=0.1",
        "--rollout.sampling.num_generations=6",  # of which some are right
    )  # fmt: skip
    assert float(metrics(grpo)[0, "train/kl_ref"]) == pytest.approx(0, abs=1e-6)  # the reference is the SFT model
    before, after = (checkpoint(folder)["state_dict"] for folder in (sft, grpo))
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed - {"lm_head"} == ({"model"} if frozen else {"model", "audio_tower"})

    out = tmp_path / "exported"
    main(["export", f"--run={grpo}", f"--out={out}"])
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(out)
    assert all(torch.equal(value, after[f"model.{name}"]) for name, value in model.state_dict().items())


def test_a_run_with_features_on_disk_is_a_run_without(clips, tmp_path):
    plain = run(tmp_path / "plain", omni_config("rl", clips), "--trainer.max_steps=3")
    stored = f"--model.feature_cache_dir={tmp_path / 'features'}"
    first = run(tmp_path / "first", omni_config("rl", clips), "--trainer.max_steps=3", stored)
    again = run(tmp_path / "again", omni_config("rl", clips), "--trainer.max_steps=3", stored)
    assert len(list((tmp_path / "features").glob("*.safetensors"))) == 6  # of 3 videos and their tracks
    for name in ("train/loss", "train/grad_norm"):
        values = [[found[step, name] for step in range(3)] for found in map(metrics, (plain, first, again))]
        assert values[0] == values[1] == values[2]
    (folder,) = set(again.glob("**/metrics.csv"))
    assert "throughput/features_from_disk" in folder.read_text()
