"""Recipes and demos of flow models as the command line reads them; recipes train tiny pipelines."""

import re
from pathlib import Path

import pytest

from longrl.commands.diffusion import DiffusionCLI
from longrl.commands.main import main
from longrl.diffusion.rollout_callback import DiffusionRolloutCallback
from tests.diffusion.tiny import sd3_folder, wan_folder
from tests.test_configs import CONFIGS, FLOW, ON_CPU, built, files, raw

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
]
RECIPES = [path for path in FLOW if path.parent == CONFIGS]


def alone(path: Path) -> list[str]:
    """For a recipe of several ranks: what makes it one of one."""
    option = "--trainer.strategy.init_args.sequence_parallel_size=1"
    return [option] if "strategy" in raw(path)["trainer"] else []


@files(FLOW)
def test_a_config_is_read_whole_and_its_algorithm_fits_its_sampling(path):
    cli = built("--config", path, ON_CPU, *alone(path), cli=DiffusionCLI)
    (rollout,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, DiffusionRolloutCallback)]
    if cli.model.objective is None:
        cli.model.algorithm.validate_steps(rollout.sampling.num_generations, cli.model.steps_per_rollout)
    else:
        cli.model.objective.validate(cli.model.algorithm, rollout.sampling)
    assert rollout.eval_sampling.window is None
    cli.datamodule.read(("train", "val"))
    assert len(cli.datamodule.rows["train"]) >= cli.datamodule.prompts_per_batch


@files(RECIPES)
def test_a_recipe_says_how_it_is_launched(path):
    header, name = path.read_text().partition("\nrun_dir:")[0], path.stem
    for wanted in (
        "# Needs:",
        f"python -m longrl diffusion fit --config configs/{name}.yaml",
        "# Override:",
        "--ckpt_path",
    ):
        assert wanted in header
    assert raw(path)["run_dir"] == f"runs/{name}"


@files(RECIPES)
def test_the_options_of_a_recipes_header_exist(path):
    lines = re.sub(r"\n#  +--", " --", path.read_text().partition("\nrun_dir:")[0]).splitlines()
    examples = [re.findall(r"(--[\w.]+) ([^\s()]+)", line) for line in lines if ": " in line and "... --" in line]
    assert len(examples) >= 3
    for example in examples:
        args = [part for pair in example if pair[0] != "--ckpt_path" for part in pair]
        if args:
            built("--config", path, ON_CPU, *alone(path), *args, "--trainer.accelerator=cpu", cli=DiffusionCLI)


@files(RECIPES)
def test_a_recipe_takes_a_step_with_a_tiny_pipeline(path, tmp_path):
    video = "wan" in path.stem
    init_args = {"model": wan_folder() if video else sd3_folder(), "height": 32, "width": 32, "max_text_tokens": 8}
    sizes = {**init_args, **({"num_frames": 5} if video else {})}
    trainer = DiffusionCLI.run([
        "fit", f"--config={path}", ON_CPU, f"--run_dir={tmp_path}", "--trainer.max_steps=1",
        *(f"--model.family.init_args.{name}={value}" for name, value in sizes.items()),
        "--model.family.init_args.dtype=float32", "--model.family.init_args.frozen_dtype=float32",
        f"--data.train={CONFIGS / 'demo' / 'prompts.txt'}", "--data.prompts_per_batch=2", "--data.val=null",
        "--data.row_function=longrl.diffusion.prompt_rows.prompt_row", "--trainer.strategy=auto",
        "--rollout.sampling.num_generations=2", "--rollout.samples_per_batch=4",
        '--rollout.reward={"terms": [{"function": "tests.diffusion.tiny.redness"}]}',
    ]).trainer  # fmt: skip
    assert trainer.global_step == 1 or trainer.global_step == raw(path)["model"]["mini_batches_per_rollout"]
    assert float(trainer.logged_metrics["train/grad_norm"]) > 0


@files(FLOW)
def test_a_config_that_still_says_policy_is_read_as_well(path, tmp_path):
    old = path.with_name(f"{path.stem}_old.yaml")  # beside the files that it names
    old.write_text(path.read_text() + "policy: flow\n")
    try:
        found = built("--config", old, ON_CPU, *alone(path), cli=DiffusionCLI).config
    finally:
        old.unlink()
    assert "policy" not in found


def test_a_diffusion_model_predicts_nothing():
    with pytest.raises(ValueError, match="use `test` or `validate`"):
        main(["diffusion", "predict"])


def test_a_window_of_ones_own_is_named_by_its_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def second(num_steps, rollout, seed):\n    return range(1, 2)\n")
    recipe = next(path for path in RECIPES if "sd3" in path.name)
    options = (f"--rollout.sampling.window={path}:second", "--rollout.eval_sampling.window=null")
    cli = built("--config", recipe, ON_CPU, *alone(recipe), *options, cli=DiffusionCLI)
    rollout = next(item for item in cli.trainer.callbacks if isinstance(item, DiffusionRolloutCallback))
    assert rollout.sampling.window(10, 0, 0) == range(1, 2)
    assert rollout.eval_sampling.window is None
