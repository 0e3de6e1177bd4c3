"""The memory that the documents promise is what `python -m longrl plan` says today."""

import json
import re

import pytest

from longrl.commands.main import main
from tests.runs import ROOT

HOUR = (
    "--devices=8", "--rollout.engine=configs/rollout/hf.yaml", "--model.optimizer.offload=false", "--frames=3600",
    "--frame_size=720x720", "--data.prompts_per_batch=1",
    "--model.family.init_args.max_pixels=112896", "--model.family.init_args.max_video_pixels=406425600",
)  # fmt: skip
HOW_TO = "docs/how_to.md"
RESULTS = "docs/results.md"
PUBLISHED = {
    "qwen2_5_vl_3b_hour_grpo": [([], HOW_TO, r"\((\d+) and \d+ GiB by `plan`\)")],
    "qwen2_5_vl_7b_hour_grpo": [([], HOW_TO, r"\(\d+ and (\d+) GiB by `plan`\)")],
    "qwen2_5_vl_3b_hour_grpo_lora": [([], HOW_TO, r"`..._3b_hour_grpo_lora.yaml` on one GPU \((\d+) GiB\)")],
    "qwen2_5_vl_7b_longvideo_grpo_lora": [
        ([], HOW_TO, r"no reference model, (\d+) GiB of one GPU of 80 GB by `plan`"),
    ],
    "qwen2_5_vl_7b_longvideo_grpo": [
        ([], HOW_TO, r"where the full run needs (\d+) and its moments in host memory"),
        (["--sp=8", *HOUR], RESULTS, r"needs\s(\d+) GiB per GPU on one node of 8 x 80 GB with 8 ranks per sequence"),
        (["--sp=1", *HOUR], RESULTS, r"and (\d+) GiB with one\srank and all in one piece"),
    ],
}
"""{recipe: [options, file, pattern of the number]}; tests/planning/test_recipes.py has the recipes' own headers."""


def needed(recipe, folder, *args):
    """GiB of the largest phase, of one device."""
    folder.mkdir()
    config, found = ROOT / "configs" / f"{recipe}.yaml", folder / "plan.json"
    main(["plan", "--config", str(config), "--hardware=H100", "--json", str(found), *args])
    phases = json.loads(found.read_text())["bytes_per_device"]
    return max(sum(parts.values()) for parts in phases.values()) / 2**30


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_promised_memory(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for number, (args, file, pattern) in enumerate(PUBLISHED[recipe]):
        text = (ROOT / file).read_text()
        (promised,) = re.findall(pattern, text)
        assert abs(needed(recipe, tmp_path / str(number), *args) - int(promised)) <= 0.5, (file, pattern)
