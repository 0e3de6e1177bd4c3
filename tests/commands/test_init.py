"""A folder to start from: what is written, what is said of the user's records, and what is refused."""

from pathlib import Path

import pytest
import yaml

from longrl.commands.init import MODELS, adapted_family, main, write_start
from longrl.io.functions import import_function
from longrl.io.jsonl import read_jsonl, write_jsonl
from longrl.models.base import CausalFamily
from longrl.models.lora import LoRASettings
from longrl.rewards import RewardSum
from longrl.rewards.reward_sum import RewardTerm
from longrl.testing.example_clips import write_example_clips

FILES = {"sft.yaml", "rl.yaml", "family.yaml", "my_rows.py", "my_reward.py", "ask.py", "README.md"}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Four videos with two questions each, in a folder whose name has a blank."""
    folder = tmp_path_factory.mktemp("own") / "my clips"
    write_example_clips(folder, num_videos=4, questions_per_video=2)
    return folder


def configs(folder):
    return [yaml.safe_load((folder / name).read_text()) for name in ("sft.yaml", "rl.yaml")]


def test_a_folder_is_complete_and_says_what_comes_next(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["my run", "--cpu"])
    said = capsys.readouterr().out
    folder = tmp_path / "my run"
    assert {path.name for path in folder.iterdir()} == {*FILES, "questions.jsonl", "videos", "model"}
    assert said.splitlines()[-1] == "next: python -m longrl fit --config 'my run/sft.yaml' --resume auto"
    records = read_jsonl(folder / "questions.jsonl")
    assert [(folder / "videos" / record["video"]).is_file() for record in records] == [True] * 3
    for config in configs(folder):
        assert Path(config["data"]["train"]) == folder / "questions.jsonl"
        assert Path(config["data"]["media_root"]) == folder / "videos"
        assert config["data"]["prompts_per_batch"] == 3
    assert (folder / "model" / "model.safetensors").is_file()
    assert "$" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("model", [*MODELS, "Qwen/Qwen3-VL-4B-Instruct"])
def test_every_model_that_is_offered_has_adapters_that_fit_its_family(model):
    family = adapted_family(model)
    cls = import_function(family["class_path"], "class_path", classes=True)
    made = cls(**family["init_args"] | {"lora": LoRASettings(**family["init_args"]["lora"])})
    assert issubclass(cls, CausalFamily)
    assert made.dtype == "bfloat16"


def test_own_records_are_read_and_no_video_is_trained_on_and_tested(clips, tmp_path):
    said = write_start(str(tmp_path / "run"), videos=str(clips), questions=str(clips / "questions.jsonl"))
    train, test = (read_jsonl(tmp_path / "run" / name) for name in ("train.jsonl", "test.jsonl"))
    assert (len(train), len(test)) == (6, 2)
    assert not {record["video"] for record in train} & {record["video"] for record in test}
    assert "8 of 8 records are read by longrl.datamodules.rows.canonical_row" in said
    assert "4 videos, 18 s long in the median, 20 s at most" in said
    for config in configs(tmp_path / "run"):
        assert config["data"]["media_root"] == str(clips)
        assert config["data"]["row_function"] == "longrl.datamodules.rows.canonical_row"
        assert config["data"]["bad_records"] == "error"


def test_some_videos_are_trained_on_whatever_share_is_kept(clips, tmp_path):
    write_start(str(tmp_path / "run"), questions=str(clips / "questions.jsonl"), test_share=0.99)
    assert [len(read_jsonl(tmp_path / "run" / name)) for name in ("train.jsonl", "test.jsonl")] == [2, 6]


def test_what_is_wrong_with_own_records_is_said(clips, tmp_path):
    records = read_jsonl(clips / "questions.jsonl")
    records[0]["answer"] = "an elephant"
    records[2]["video"] = records[3]["video"] = "gone.mp4"
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "torn.mp4").write_bytes((clips / records[4]["video"]).read_bytes()[:3000])
    records[4]["video"] = str(tmp_path / "clips" / "torn.mp4")
    del records[6]["video"]
    file = write_jsonl(tmp_path / "questions.jsonl", records)
    said = write_start(str(tmp_path / "run"), videos=str(clips), questions=str(file))
    assert "7 of 8 records are read by longrl.datamodules.rows.canonical_row; the first that is not: " in said
    assert "an elephant" in said
    assert "2 of 5 videos cannot be used\n" in said
    assert f"  {clips / 'gone.mp4'}: the file does not exist\n" in said
    assert f"  {tmp_path / 'clips' / 'torn.mp4'}: it cannot be decoded" in said
    assert "4 of 8 records cannot be used, and a run ends above 3 of them and data.max_skipped_share=0.05: " in said
    assert "1 of 8 records name no video: they are asked as text alone" in said


def test_a_few_unusable_records_end_no_run_and_one_in_another_spelling_costs_no_reasoning(clips, tmp_path):
    records = read_jsonl(clips / "questions.jsonl")
    records[0]["Question"] = records[0].pop("question")  # `lmms_eval_row` reads all of them, without their reasoning
    records[2]["video"] = "gone.mp4"
    records[5]["options"] = ", ".join(records[5]["options"])  # and this one without its options
    file = write_jsonl(tmp_path / "questions.jsonl", records)
    said = write_start(str(tmp_path / "run"), videos=str(clips), questions=str(file))
    assert "6 of 8 records are read by longrl.datamodules.rows.canonical_row; the first that is not: " in said
    assert "no record has `reasoning`" not in said
    assert "a run ends above" not in said
    assert [config["data"]["bad_records"] for config in configs(tmp_path / "run")] == ["skip"] * 2


def test_records_without_reasoning_begin_with_rl(clips, tmp_path):
    records = [{**record, "reasoning": None} for record in read_jsonl(clips / "questions.jsonl")]
    file = write_jsonl(tmp_path / "questions.jsonl", records)
    said = write_start(str(tmp_path / "run"), videos=str(clips), questions=str(file))
    assert "no record has `reasoning`" in said
    assert said.splitlines()[-1].endswith("run/rl.yaml --resume auto")
    assert configs(tmp_path / "run")[1]["model"]["init_from"] is None


def test_records_in_another_form_go_through_the_users_function(clips, tmp_path):
    """Which may rename fields; here it does not, so that it is as `canonical_row`."""
    file = write_jsonl(tmp_path / "questions.jsonl", [{"frage": "Wer?", "antwort": "Ann"}] * 4)
    said = write_start(str(tmp_path / "run"), videos=str(clips), questions=str(file))
    assert "0 of 4 records are read; write the function to_row in my_rows.py for them" in said
    path = configs(tmp_path / "run")[0]["data"]["row_function"]
    assert path == f"{tmp_path / 'run' / 'my_rows.py'}:to_row"
    record = read_jsonl(clips / "questions.jsonl")[0]
    row = import_function(path, "data.row_function")(record, 0, str(clips))
    assert row.videos == (str(clips / record["video"]),)
    assert row.reasoning == record["reasoning"]


def test_the_stub_of_a_reward_is_a_term(tmp_path):
    write_start(str(tmp_path / "run"), cpu=True)
    text = (tmp_path / "run" / "rl.yaml").read_text().replace("# - {function", "- {function")
    terms = yaml.safe_load(text)["rollout"]["reward"]["terms"]
    made = RewardSum([RewardTerm(**term) for term in terms])
    assert [part.function.__name__ for part in made.terms][-1] == "my_reward"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model": "qwen9"}, "--model must be one of qwen2_5_vl_3b, .* got 'qwen9'; for weights in a folder"),
        ({"videos": "v"}, "--videos needs --questions.*python -m longrl pipeline all --videos v"),
        ({"questions": "q.parquet"}, "--questions must be a .jsonl.* file, got 'q.parquet'; .*data.train"),
        ({"questions": "none.jsonl"}, "the data file '.*none.jsonl' does not exist"),
        ({"questions": "none.jsonl", "videos": "nowhere"}, "--videos 'nowhere' is no folder"),
        ({"questions": "none.jsonl", "test_share": 1.0}, "--test_share must be at least 0 and below 1, got 1.0"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(options, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=reason):
        write_start("run", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_stays_as_it_is(tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ValueError, match="holds something already, and nothing is replaced; name a new folder"):
        write_start(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
