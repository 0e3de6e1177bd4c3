"""Videos to data set to trained model, with a server that fails, and a process that is killed."""

import json
import random
import time
from pathlib import Path

import pytest
from pyarrow import parquet

from longrl.chat.journal import Journal
from longrl.cli import main
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.pipeline.workspace import FILES, STEPS
from tests.pipeline.running import Scripted, arguments, files, join, kill, start_child, videos
from tests.runs import checkpoint, config, run
from tests.tiny import vl_family

FAULTS = 0.15
NUM_KILLS = 10


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def report(out: Path, step: str) -> dict:
    return json.loads((out / "reports" / f"{step}.json").read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All steps at once, with faults."""
    out = tmp_path_factory.mktemp("made") / "out"
    with Scripted(FAULTS) as server:
        main(arguments("all", out, server.url, videos()))
        calls = server.calls()
    return out, calls


def test_captions_timelines_and_questions_say_what_the_videos_show(made):
    out, _ = made
    stories = {record["videos"].split("/")[-1]: record for record in lines(videos().parent / "train.jsonl")}
    timelines = lines(out / FILES["timeline"])
    assert len(timelines) == 5
    for video in timelines:
        shown = " ".join(entry["text"] for entry in video["entries"])
        assert stories[video["video"]]["reasoning"].startswith(shown)  # describe(story) and a deduction
        edges = [video["entries"][0]["start_s"], *(entry["end_s"] for entry in video["entries"])]
        assert edges == [2.5 * i for i in range(len(edges))]
    asked = lines(out / FILES["validate"])
    assert {record["category"] for record in asked} == {"temporal", "goal and purpose", "spatial", "plot and narrative"}
    assert {record["kind"] for record in asked} == {"multiple_choice", "open_ended"}
    known = {(name, record["problem"].split("\n")[0]) for name, record in stories.items()}
    assert known & {(record["video"], record["question"]) for record in asked}


def test_every_fault_of_the_server_is_counted_and_nothing_is_lost(made):
    out, calls = made
    outcomes = [outcome for _, outcome in calls]
    assert {"429", "500", "cut", "html", "hang", "drop"} <= set(outcomes)
    steps = ("caption", "timeline", "question", "rewrite", "filter")
    assert sum(report(out, step)["calls"].get("failed attempts", 0) for step in steps) == len(calls) - outcomes.count(
        "answered"
    )
    counts = {step: report(out, step)["counts"] for step in STEPS}
    assert counts["question"]["refused"]
    assert counts["question"]["no json"]
    assert sum(counts[step].get("empty", 0) for step in steps)
    assert report(out, "validate")["counts"]["rejected"] == len(lines(out / "5_questions.rejected.jsonl")) > 0
    answered = [entry for entry in Journal(out / "responses").read() if entry["key"]]
    failed = [entry for entry in Journal(out / "responses").read() if not entry["key"]]
    assert len(answered) == outcomes.count("answered")  # every raw response is kept,
    assert len(failed) == len(calls) - len(answered)  # and every failure
    assert {"timeout", "connection", "garbled", "http 429", "http 500"} <= {entry["kind"] for entry in failed}


def test_no_call_is_made_twice_and_a_second_run_makes_none(made):
    out, calls = made
    answered = [key for key, outcome in calls if outcome == "answered"]
    assert len(set(answered)) == len(answered)
    before = files(out / "dataset")
    with Scripted() as server:
        main(arguments("all", out, server.url, videos()))
        assert server.calls() == []
    assert files(out / "dataset") == before


def test_no_video_is_in_two_splits_and_letters_are_dealt_evenly(made):
    out, _ = made
    splits = {split: lines(out / "dataset" / f"{split}.jsonl") for split in ("sft", "rl", "eval")}
    shown = [{row["videos"] for row in rows} for rows in splits.values()]
    assert all(shown)
    assert sum(map(len, shown)) == len(set().union(*shown))
    for rows in splits.values():
        letters = [row["answer"] for row in rows if row["task"] == "multiple_choice"]
        counts = [letters.count(f"<answer>{letter}</answer>") for letter in "ABCD"]
        assert max(counts) - min(counts) <= 1
    for split, rows in splits.items():
        assert parquet.read_table(out / "dataset" / f"{split}.parquet").to_pylist() == rows


def test_datasets_reads_the_folder_with_its_card(made, tmp_path):
    import datasets

    out, _ = made
    found = datasets.load_dataset(str(out / "dataset"), cache_dir=str(tmp_path))
    assert {split: len(rows) for split, rows in found.items()} == {
        split: len(lines(out / "dataset" / f"{split}.jsonl")) for split in ("sft", "rl", "eval")
    }


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_data_module_loads_every_split_as_it_is(made, suffix):
    out, _ = made
    sources = {"train": "rl", "val": "eval"}
    module = LongVideoReason(
        vl_family(), **{name: str(out / "dataset" / f"{split}.{suffix}") for name, split in sources.items()}
    )
    module.setup("fit")
    for name, split in sources.items():
        rows = module.datasets[name].rows
        wanted = lines(out / "dataset" / f"{split}.jsonl")
        assert [row.id for row in rows] == [record["problem_id"] for record in wanted]
        assert [row.task for row in rows] == [record["task"] for record in wanted]
        assert all(Path(row.videos[0]).is_file() for row in rows)
        assert len(module.skips(name)) == 0


def test_sft_trains_on_the_result_and_is_evaluated_on_the_eval_split(made, tmp_path):
    out, _ = made
    values = config("sft")
    values["trainer"]["max_steps"] = 2
    values["model"]["max_tokens_per_micro_batch"] = 1000
    values["data"] |= {"train": str(out / "dataset" / "sft.parquet"), "video": {"fps": 1.0}}
    folder = run(tmp_path / "sft", values)
    assert checkpoint(folder)["global_step"] == 2
    values = config("rl")
    values["model"]["init_from"] = str(folder)
    values["data"]["test"] = str(out / "dataset" / "eval.jsonl")
    reward = {"class_path": "longrl.rewards.judge.TextSimilarity"}
    values["trainer"]["callbacks"][-1]["init_args"]["reward"] = {"terms": [{"function": reward, "name": "accuracy"}]}
    values["trainer"]["callbacks"].append({"class_path": "longrl.callbacks.evaluation.EvaluationReport"})
    args = [*_given(tmp_path / "test", values), f"--run_dir={tmp_path / 'test'}"]
    main(["test", *args])
    predictions = lines(tmp_path / "test" / "predictions.jsonl")
    assert {record["id"] for record in predictions} == {
        row["problem_id"] for row in lines(out / "dataset" / "eval.jsonl")
    }


def _given(folder: Path, values: dict) -> list[str]:
    import yaml

    folder.mkdir()
    (folder / "given.yaml").write_text(yaml.safe_dump(values))
    return ["--config", str(folder / "given.yaml")]


# ---- kill -9 ----


@pytest.mark.slow
def test_kill_9_at_random_points_of_each_step_changes_nothing_and_repeats_no_call(made):
    """Ten times in each step. A call that was under way at the kill was never answered; no other one is made again."""
    wanted, rng = files(made[0] / "dataset"), random.Random(0)
    out = made[0].with_name("killed")  # beside the other: paths of videos are relative
    num_kills = dict.fromkeys(STEPS, 0)
    with Scripted(FAULTS, delay_s=0.02) as server:
        for step in STEPS:
            args = arguments(step, out, server.url, videos())
            while num_kills[step] < NUM_KILLS:
                stored = set(Journal(out / "responses").open()._places) if out.exists() else set()
                before = server.answered()
                child = start_child(args)
                if step in ("caption", "question", "rewrite", "filter"):
                    wait = rng.randint(1, 3 if step != "filter" else 12)
                    target = len(server.calls()) + wait
                    deadline = time.monotonic() + 20
                    while len(server.calls()) < target and time.monotonic() < deadline:
                        if _gone(child):
                            break
                        time.sleep(0.002)
                else:
                    time.sleep(rng.uniform(0.0, 0.15))
                kill(child)
                status = join(child)
                asked = server.answered() - before
                assert not stored & asked.keys(), "what is on disk was asked for again"
                if status == 0:
                    break
                assert status == -9
                num_kills[step] += 1
            assert join(start_child(args)) == 0
        repeated = {key: count - 1 for key, count in server.answered().items() if count > 1}
    assert sum(repeated.values()) <= 4 * sum(num_kills.values())  # calls that were under way: at most `concurrency`
    assert files(out / "dataset") == wanted
    assert min(num_kills.values()) >= 1
    assert sum(num_kills.values()) >= 5 * NUM_KILLS


def _gone(child: int) -> bool:
    """Whether a child has ended, without taking its status."""
    return Path(f"/proc/{child}/stat").read_text().split(") ")[1].startswith("Z")
