"""Videos to data set to trained model, with a server that fails, and a process that is killed."""

import json
import random
import time
from pathlib import Path

import pytest
from pyarrow import parquet

from longrl.commands.main import main
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.io.append_log import AppendLog
from longrl.pipeline.step_run import FILES, STEPS
from tests.pipeline.running import Scripted, arguments, files, join, kill, start_child, videos
from tests.runs import checkpoint, config, run
from tests.tiny import vl_family

FAULTS = 0.15
NUM_KILLS = 6


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
    assert {"429", "500", "cut", "html", "hang", "drop"} <= {outcome for _, outcome in calls}
    counts = {step: report(out, step)["counts"] for step in STEPS}
    steps = ("caption", "timeline", "question", "rewrite", "filter")
    assert all(sum(counts[step].get(kind, 0) for step in steps) for kind in ("refused", "no json", "empty"))
    assert report(out, "validate")["counts"]["rejected"] == len(lines(out / "5_questions.rejected.jsonl")) > 0
    answered = [entry for entry in AppendLog(out / "responses").read() if entry["key"]]
    failed = [entry for entry in AppendLog(out / "responses").read() if not entry["key"]]
    assert {entry["key"] for entry in answered} == {key for key, outcome in calls if outcome == "answered"}
    assert len(answered) + len(failed) == len(calls)  # every reply is kept, and every failure
    assert sum(report(out, step)["calls"].get("failed attempts", 0) for step in steps) == len(failed)
    assert {"timeout", "connection", "garbled", "http 429", "http 500"} <= {entry["kind"] for entry in failed}


def test_no_call_is_made_twice_and_a_second_run_makes_none(made):
    out, calls = made
    answered = [key for key, outcome in calls if outcome == "answered"]
    assert len(answered) - len(set(answered)) <= late(out, calls)
    before = files(out / "dataset")
    with Scripted() as server:
        main(arguments("all", out, server.url, videos()))
        assert server.calls() == []
    assert files(out / "dataset") == before


def late(out: Path, calls: list) -> int:
    """Answers that came after the client's timeout, as they do on a busy machine."""
    timeouts = [entry for entry in AppendLog(out / "responses").read() if entry.get("kind") == "timeout"]
    return max(0, len(timeouts) - sum(outcome == "hang" for _, outcome in calls))


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
        vl_family(),
        **{name: str(out / "dataset" / f"{split}.{suffix}") for name, split in sources.items()},
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
    values["data"] |= {
        "train": str(out / "dataset" / "sft.parquet"),
        "video": {"fps": 1.0},
    }
    folder = run(tmp_path / "sft", values)
    assert checkpoint(folder)["global_step"] == 2
    values = config("rl")
    values["model"]["init_from"] = str(folder)
    values["data"] |= {"test": str(out / "dataset" / "eval.jsonl")}
    reward = {"class_path": "longrl.rewards.judge.TextSimilarity"}
    values["rollout"]["reward"] = {"terms": [{"function": reward, "name": "accuracy"}]}
    values["trainer"]["callbacks"].append({"class_path": "longrl.callbacks.evaluation.EvaluationReport"})
    args = [*_given(tmp_path / "test", values), f"--run_dir={tmp_path / 'test'}"]
    main(["test", *args])
    samples = lines(tmp_path / "test" / "test" / "samples.jsonl")
    assert {line["id"] for line in samples} == {row["problem_id"] for row in lines(out / "dataset" / "eval.jsonl")}


def _given(folder: Path, values: dict) -> list[str]:
    import yaml

    folder.mkdir()
    (folder / "given.yaml").write_text(yaml.safe_dump(values))
    return ["--config", str(folder / "given.yaml")]


# ---- kill -9 ----


@pytest.mark.slow
def test_kill_9_at_random_points_of_each_step_changes_nothing_and_repeats_no_call(made):
    """Six times in each step. Only calls that were under way, whose answers nobody got, may be made again."""
    wanted, rng = files(made[0] / "dataset"), random.Random(0)
    out = made[0].with_name("killed")  # beside the other: paths of videos are relative
    num_kills = 0
    with Scripted(FAULTS, delay_s=0.02) as server:
        for step in STEPS:
            for _ in range(NUM_KILLS):
                num_kills += kill_once(step, out, server, rng)
            assert join(start_child(arguments(step, out, server.url, videos()))) == 0
        calls, repeated = server.calls(), sum(count - 1 for count in server.answered().values())
    assert num_kills == NUM_KILLS * len(STEPS)
    assert repeated <= 4 * num_kills + late(out, calls)  # concurrency is 4
    assert files(out / "dataset") == wanted


def kill_once(step: str, out: Path, server: Scripted, rng: random.Random) -> int:
    """Starts a step until it has been killed before its end; 1 then."""
    args, longest_s = arguments(step, out, server.url, videos()), 0.3
    for _ in range(20):
        stored = {entry["key"] for entry in AppendLog(out / "responses").read()}
        before = server.answered()
        child = start_child(args)
        _wait(child, server, len(before) + rng.randint(1, 12), rng.uniform(0.0, longest_s), step)
        kill(child)
        status = join(child)
        assert not stored & (server.answered() - before).keys(), "what is on disk was asked for again"
        if status == -9:
            return 1
        assert status == 0
        longest_s *= 0.7  # it had ended
    return 0


def _wait(child: int, server: Scripted, num_answers: int, at_most_s: float, step: str) -> None:
    """For so many answers where a step makes calls, and a while where it makes none (any more)."""
    while step in ("caption", "question", "rewrite", "filter") and not _gone(child):
        before = server.answered().total()
        if before >= num_answers:
            return
        time.sleep(0.05)
        if server.answered().total() == before:
            break
    time.sleep(at_most_s)


def _gone(child: int) -> bool:
    """Whether a child has ended, without taking its status."""
    return Path(f"/proc/{child}/stat").read_text().split(") ")[1].startswith("Z")
