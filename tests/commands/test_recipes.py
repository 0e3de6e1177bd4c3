import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

from longrl.commands.main import main
from longrl.commands.recipes import copy_recipe, listing
from longrl.commands.shipped_paths import with_shipped_files
from longrl.io.recipe_heads import read_head
from tests.runs import ROOT

GRPO = "qwen2_5_vl_7b_longvideo_grpo"
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_list_has_every_recipe_with_what_it_is_and_needs():
    names = [line for line in listing().splitlines() if line and not line.startswith((" ", "parts", "run one"))]
    assert names == [path.stem for path in RECIPES]
    text = listing()
    assert "GRPO with Qwen2.5-VL 7B on LongVideo-Reason, from the SFT run." in text
    assert "needs: a GPU of 80 GB and 60 GB of host memory, or one of 141 GB; the run of" in text
    assert "algorithm/ " in text.splitlines()[-2]


def test_every_recipe_says_what_it_is_needs_and_how_it_is_launched():
    for path in [*RECIPES, *(ROOT / "configs/eval").glob("*.yaml")]:
        head = read_head(path)
        name = path.relative_to(ROOT).as_posix()
        assert head.summary.endswith("."), name
        assert head.needs or path not in RECIPES, name
        assert f"--config {name}" in head.launch, name


def test_a_word_finds_parts_evaluations_and_scripts():
    assert "\ntrainer/node\n" in f"\n{listing('trainer')}"
    assert "eval/mlvu\n" in listing("MLVU")
    assert "launch/slurm.sbatch\n    Starts a run on SLURM" in listing("slurm")
    with pytest.raises(ValueError, match=r"no file of longrl has 'zebra'"):
        listing("zebra")


def test_show_prints_a_file_as_it_ships(capsys):
    main(["recipes", "show", GRPO])
    assert capsys.readouterr().out == (ROOT / f"configs/{GRPO}.yaml").read_text()


def test_a_copy_keeps_comments_and_says_the_next_command(elsewhere, capsys):
    main(["recipes", "copy", GRPO, "mine/grpo.yaml"])
    assert capsys.readouterr().out == ("wrote mine/grpo.yaml\nrun it:  python -m longrl fit --config mine/grpo.yaml\n")
    own = (elsewhere / "mine/grpo.yaml").read_text().splitlines()
    shipped = (ROOT / f"configs/{GRPO}.yaml").read_text().splitlines()
    changed = [(before, after) for before, after in zip(shipped, own, strict=True) if before != after]
    assert all("mine/grpo.yaml" in after or "configs/" in after for _, after in changed)
    assert "  reward: configs/reward/think_answer.yaml  # 0.9 * right answer + 0.1 * form, as Long-RL" in own


def test_a_copy_is_the_same_run(capsys):
    """Its parts are those that ship, also from a folder of its own."""
    copy_recipe(GRPO, "mine/")
    printed = []
    for config in (GRPO, f"mine/{GRPO}.yaml"):
        with pytest.raises(SystemExit):
            main(["fit", "--config", config, "--print_config"])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_a_part_in_another_folder_keeps_what_it_names(elsewhere):
    assert "python -m longrl evaluate --config video_mme.yaml" in copy_recipe("eval/video_mme")
    assert yaml.safe_load((elsewhere / "video_mme.yaml").read_text())["policy"] == "configs/policy/vllm.yaml"
    assert "--trainer own.yaml" in copy_recipe("configs/trainer/cpu.yaml", "own.yaml")


def test_the_command_of_a_copy_can_be_typed(elsewhere):
    assert "--config 'my runs/sft.yaml'\n" in copy_recipe("demo/sft", "my runs/")


def test_scripts_and_folders_are_copied_as_they_are(elsewhere):
    copy_recipe("launch/torchrun.sh")
    assert os.access("torchrun.sh", os.X_OK)
    assert copy_recipe("configs/demo", "own.demo") == "wrote own.demo/\n"
    shipped, own = ((folder / "common.yaml").read_text() for folder in (ROOT / "configs/demo", elsewhere / "own.demo"))
    assert own == shipped.replace("../reward/", "configs/reward/")  # what is not copied along is found all the same
    assert copy_recipe("longvideo-reason/prompts") == "wrote prompts/\n"
    assert (elsewhere / "prompts/caption.txt").read_bytes() == (
        ROOT / "longvideo-reason/prompts/caption.txt"
    ).read_bytes()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["copy", GRPO], "is there already, and is not replaced; name another place"),
        (["copy", GRPO, "mine.txt"], r"must end in '\.yaml', got mine\.txt"),
        (["copy", GRPO, "/proc/none/mine.yaml"], "TO=/proc/none cannot be written"),
        (["copy", "qwen_7b_grpo"], "nor a recipe of longrl; did you mean"),
        (["show", "configs/../pyproject.toml"], "nor a recipe of longrl"),
        (["sho"], "invalid choice: 'sho'"),
    ],
)
def test_mistakes_are_told_with_a_remedy(elsewhere, args, message):
    (elsewhere / f"{GRPO}.yaml").write_text("mine: 1\n")
    with pytest.raises(ValueError, match=message):
        main(["recipes", *args])
    assert (elsewhere / f"{GRPO}.yaml").read_text() == "mine: 1\n"


def test_the_commands_of_the_page_on_recipes_work(capsys):
    """Those of `recipes` run; of the others the files are found."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/recipes.md").read_text(), re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line, comments=True)[1:] for block in blocks for line in block.splitlines()]
    assert len(commands) > 8
    for args in commands:
        if args[0] == "recipes":
            main(args)
        else:
            config = with_shipped_files(args)[args.index("--config") + 1]
            assert Path(config).is_file()
    assert Path("configs/reward/think_answer.yaml").is_file()
    assert Path("prompts/trace.txt").is_file()
