"""VILA through the command line: SFT, then GRPO on its checkpoint, then an ordinary folder."""

import pytest
import torch

from longrl.commands.main import main
from longrl.models.vila import VilaFamily
from tests.runs import checkpoint, config, metrics, run
from tests.tiny import vila_folder

pytestmark = pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")


def vila_config(stage, **options):
    values = config(stage)
    family = {"model": vila_folder(), "random_init": True, "pool_frames": 2, **options}
    values["model"]["family"] = {"class_path": "longrl.models.vila.VilaFamily", "init_args": family}
    return values


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "projector_trains"])
def test_sft_then_grpo_then_an_exported_folder(frozen, tmp_path):
    sft = run(tmp_path / "sft", vila_config("sft", freeze_projector=frozen), "--trainer.max_steps=2")
    grpo = run(
        tmp_path / "grpo", vila_config("rl", freeze_projector=frozen),
        "--trainer.max_steps=1", "--model.optimizer.warmup_steps=0", f"--model.init_from={sft}",
        "--model.algorithm.kl_coef=0.1", "--model.algorithm.select=longrl.algorithms.drop_uniform",
    )  # fmt: skip
    said = metrics(grpo)
    assert float(said[0, "train/kl_ref"]) == pytest.approx(0, abs=1e-6)  # the reference is the SFT model
    before, after = (checkpoint(folder)["state_dict"] for folder in (sft, grpo))
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == ({"llm"} if frozen else {"llm", "mm_projector"})

    out = tmp_path / "exported"
    main(["export", f"--run={grpo}", f"--out={out}"])
    model = VilaFamily(str(out)).build()
    assert all(torch.equal(value, after[f"model.{name}"]) for name, value in model.state_dict().items())
