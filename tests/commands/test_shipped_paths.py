"""Recipes, parts and files of longrl from a folder that has none of them, as with an installed wheel."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace

from longrl.commands.main import main
from longrl.commands.shipped_paths import with_names, with_shipped_files, with_shipped_values
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.pipeline.prompt_folder import Prompts
from longrl.planning.shapes import find_config
from tests.runs import ROOT

RECIPE = str(ROOT / "configs/qwen2_5_vl_7b_longvideo_grpo.yaml")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_recipe_is_found_by_its_name_alone():
    for name in ("qwen2_5_vl_7b_longvideo_grpo", "configs/qwen2_5_vl_7b_longvideo_grpo.yaml", RECIPE):
        assert with_shipped_files(["fit", "--config", name]) == ["fit", "--config", RECIPE]
        assert with_shipped_files(["fit", f"--config={name}"]) == ["fit", f"--config={RECIPE}"]
    assert with_shipped_files(["fit", "-c", "demo/sft"])[-1] == str(ROOT / "configs/demo/sft.yaml")


def test_a_command_finds_its_own_recipes_by_name():
    of_evaluate = str(ROOT / "configs/eval/video_mme.yaml")
    assert with_shipped_files(["evaluate", "--config", "video_mme"])[-1] == of_evaluate
    assert with_shipped_files(["evaluate", "--config", "eval/video_mme"])[-1] == of_evaluate
    prompts = ROOT / "longvideo-reason"
    given = with_shipped_files(["pipeline", "all", "--config", "hosted", "--prompts", "longvideo-reason/prompts"])
    assert given[2:] == ["--config", str(prompts / "configs/hosted.yaml"), "--prompts", str(prompts / "prompts")]


def test_parts_and_folders_behind_options_are_found():
    given = ["fit", "--trainer", "configs/trainer/node.yaml", "--model.init_from=configs/demo/base"]
    places = [f"{ROOT}/configs/trainer/node.yaml", f"--model.init_from={ROOT}/configs/demo/base"]
    assert with_shipped_files(given) == ["fit", "--trainer", *places]
    several = [
        "scoreboard",
        "runs/a",
        "--published",
        "configs/published/lvbench.yaml",
        "configs/published/video_mme.yaml",
    ]
    assert all(Path(path).is_absolute() for path in with_shipped_files(several)[3:])


@pytest.mark.parametrize(
    "args",
    [
        ["export", "--run", "runs/a", "--out", "configs/demo/base"],
        ["fit", "--run_dir=configs/demo", "--wandb_project", "configs"],
        ["recipes", "copy", "configs/trainer/cpu.yaml"],
    ],
)
def test_what_a_command_writes_and_other_values_stay_as_they_are(args):
    assert with_shipped_files(args) == args


def test_what_a_config_writes_stays_and_what_it_reads_is_found(elsewhere):
    values = {"run_dir": "configs/demo", "data": {"train": ["launch/node.sh", {"source": "configs/demo/base"}]}}
    found = with_shipped_values(values, elsewhere)
    assert found["run_dir"] == "configs/demo"
    assert found["data"]["train"] == ["launch/node.sh", {"source": str(ROOT / "configs/demo/base")}]


def test_what_classes_name_by_themselves_is_found_too():
    assert Prompts("longvideo-reason/prompts").folder == ROOT / "longvideo-reason/prompts"
    family = find_config(Qwen2_5_VLFamily("Qwen/Qwen2.5-VL-7B-Instruct"))
    assert family.config.text_config.num_hidden_layers == 28


def test_the_working_folders_own_file_wins(elsewhere):
    (elsewhere / "configs/trainer").mkdir(parents=True)
    (elsewhere / "configs/trainer/node.yaml").write_text("{}")
    (elsewhere / "demo").mkdir()  # a folder is no config
    (elsewhere / "mine").write_text("{}")
    args = ["fit", "--config", "mine", "--trainer", "configs/trainer/node.yaml"]
    assert with_shipped_files(args) == args


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--config", "qwen2_5_vl_7b_grpo"], "nor a recipe of longrl; did you mean .*qwen2_5_vl_7b_hour_grpo"),
        (["--config=mine.yaml"], r"--config mine\.yaml is neither a file"),
        (["--trainer", "configs/trainer/nod.yaml"], r"--trainer .*did you mean configs/trainer/node\.yaml"),
    ],
)
def test_an_unknown_name_is_refused_with_near_ones(option, message):
    with pytest.raises(ValueError, match=message):
        main(["fit", *option])


def test_a_printed_config_names_what_ships_and_reads_the_same_again(elsewhere, capsys):
    """Parts of a file outside `configs/` are those that ship, and its values are no places on this machine."""
    mine = {
        "model": {"algorithm": "configs/algorithm/gspo.yaml"},
        "rollout": {"reward": "configs/reward/think_answer.yaml"},
    }
    (elsewhere / "own").mkdir()
    (elsewhere / "own/mine.yaml").write_text(yaml.safe_dump(mine))
    printed = []
    for files in (["demo/common", "own/mine.yaml"], ["printed.yaml"]):
        with pytest.raises(SystemExit):
            main(
                [
                    "fit",
                    *[f"--config={file}" for file in files],
                    "--model.init_from=configs/demo/base",
                    "--print_config",
                ]
            )
        printed.append(capsys.readouterr().out)
        (elsewhere / "printed.yaml").write_text(printed[-1])
    values = yaml.safe_load(printed[0])
    assert printed[0] == printed[1]
    assert values["model"]["family"]["init_args"]["model"] == values["model"]["init_from"] == "configs/demo/base"
    assert str(ROOT) not in printed[0]
    assert values["model"]["algorithm"]["surrogate"] == "longrl.algorithms.sequence_clipped"


def test_names_are_given_back_in_whatever_a_config_holds():
    place = with_shipped_files(["fit", "--model.init_from", "configs/demo/base"])[-1]
    config = Namespace(a=Namespace(b=[place, 1]), c={"d": place}, e="other")
    assert with_names(config) == Namespace(
        a=Namespace(b=["configs/demo/base", 1]), c={"d": "configs/demo/base"}, e="other"
    )
    assert config.c == {"d": place}


def test_a_run_goes_on_in_another_folder_by_the_config_that_it_saved(elsewhere, monkeypatch):
    """Which calls what ships by its name, so that it holds where longrl lies elsewhere."""
    row = {"problem": "What is 1 + 1?\nA. 2\nB. 3", "answer": "A", "reasoning": "1 + 1 = 2"}
    rows = elsewhere / "rows.jsonl"
    rows.write_text("".join(json.dumps(row | {"problem_id": number}) + "\n" for number in range(4)))
    data = [f"--data.train={rows}", "--data.prompts_per_batch=2", "--checkpoint.every_n_train_steps=1", "--view=off"]
    main(["fit", "--config=demo/common", "--config=demo/sft", *data, "--run_dir=run", "--trainer.max_steps=1"])
    (elsewhere / "later").mkdir()
    shutil.move("run", elsewhere / "later/run")
    monkeypatch.chdir(elsewhere / "later")
    main(["fit", "--config=run/config.yaml", "--resume=auto", "--trainer.max_steps=2"])
    begun, resumed = (yaml.safe_load(Path("run", name).read_text()) for name in ("config.yaml", "config.resumed1.yaml"))
    assert begun["model"] == resumed["model"]
    assert begun["model"]["family"]["init_args"]["model"] == "configs/demo/base"
    assert (begun["trainer"].pop("max_steps"), resumed["trainer"].pop("max_steps")) == (1, 2)
    assert begun["trainer"] == resumed["trainer"]
