"""An evaluation from questions to report: what it counts, that it can be killed, and that it never mixes answers."""

import json
import re

import pytest

from longrl.commands.evaluate import parse_evaluation
from longrl.evaluation.answering import doc_hash, make_portable
from longrl.evaluation.benchmark import Evaluation
from longrl.evaluation.benchmark_report import list_remarks
from longrl.evaluation.outcomes import make_outcome
from longrl.evaluation.records import check_breakdowns
from longrl.io.jsonl import read_jsonl
from longrl.types import Row
from tests.evaluation import scripted
from tests.evaluation.scripted import benchmark, evaluated, questions, records
from tests.evaluation.test_report_page import Tags
from tests.pipeline.running import join, start_child
from tests.runs import ROOT

FILES = ("results.json", "samples.jsonl", "report.html")


def lines(folder, condition="video"):
    return [line for line in read_jsonl(folder / "samples.jsonl") if line["condition"] == condition]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def remove_results(folder):
    """As the message says that results are replaced on purpose."""
    (folder / "results.json").unlink()


def mme(folder):
    """Two videos, one short and one long; VideoMME's fields."""
    return benchmark(
        folder,
        [
            {
                **record, "problem_id": f"{n}", "video_id": f"{n // 4:03}", "duration": ("short", "long")[n // 4],
                "domain": ("Knowledge", "Sports")[n // 4], "task_type": ("Counting", "OCR")[n % 2],
            }
            for n, record in enumerate(records())
        ],
    )  # fmt: skip


# ---- what is counted ----


def test_always_b_is_shown_as_no_better_than_the_majority_answer(tmp_path):
    changed = [{**record, "answer": "B" if n < 5 else "A"} for n, record in enumerate(records())]
    results = evaluated(tmp_path, test=benchmark(tmp_path, changed))["conditions"]["video"]
    assert results["scores"]["overall"]["accuracy"] == results["majority_accuracy"] == 5 / 8
    assert results["majority_letter"] == "B"
    assert results["letters"] == {"answers": {"A": 3, "B": 5}, "predictions": {"B": 8}}
    gain = results["over_majority"]
    assert (gain["difference"], gain["low"], gain["high"], gain["won"], gain["lost"]) == (0, 0, 0, 0, 0)
    page = (tmp_path / "report.html").read_text()
    assert "every answer that names an option says B" in page
    assert "not shown to be better than always saying B, which scores 62.5%" in page


def test_a_policy_that_knows_is_better_than_the_majority_answer(tmp_path):
    results = evaluated(tmp_path, says="<answer>{gold}</answer>")["conditions"]["video"]
    assert results["scores"]["overall"]["accuracy"] == 1.0
    assert results["over_majority"]["low"] > 0
    assert "better than always" not in (tmp_path / "report.html").read_text()


def test_strict_robust_format_and_truncation_are_told_apart(tmp_path):
    results = evaluated(tmp_path, policy="Mixed")["conditions"]["video"]
    assert results["scores"]["overall"]["accuracy"] == 0.25
    assert results["lenient_scores"]["overall"]["accuracy"] == 0.5
    assert results["format_rate"] == 0.5
    assert results["truncation_rate"] == 0.25
    assert results["answered"]["n"] == 4  # with a letter in the tag


def test_scores_come_by_category_and_by_breakdowns_of_the_metadata(tmp_path):
    fields = "--breakdowns=[duration,domain,task_type]"
    row = "--data.row_function=tests.evaluation.scripted.video_mme_like_row"
    results = evaluated(tmp_path, fields, row, test=mme(tmp_path), policy="Mixed")["conditions"]["video"]
    found = {name: {v: (s["accuracy"], s["n"]) for v, s in of.items()} for name, of in results["breakdowns"].items()}
    assert found == {
        "duration": {"short": (0.25, 4), "long": (0.25, 4)},
        "domain": {"Knowledge": (0.25, 4), "Sports": (0.25, 4)},
        "task_type": {"Counting": (0.5, 4), "OCR": (0.0, 4)},
    }
    assert set(results["scores"]) == {"overall", "Knowledge", "Sports"}
    assert {line["video_id"] for line in lines(tmp_path)} == {"000", "001"}
    page = (tmp_path / "report.html").read_text()
    assert all(heading in page for heading in ("By duration", "By domain", "By task type"))


def test_breakdowns_that_no_row_has_are_refused_and_gaps_are_told(tmp_path, caplog):
    row = "--data.row_function=tests.evaluation.scripted.video_mme_like_row"
    file, out = mme(tmp_path), tmp_path / "out"
    with pytest.raises(ValueError, match="^--breakdowns names 'topic', .*: domain, duration, task_type, video_id$"):
        evaluated(out, "--breakdowns=[duration,topic]", row, test=file)
    assert not out.exists()
    rows = [Row(str(n), "?", "A", metadata={"topic": "x"} if n else {}) for n in range(3)]
    check_breakdowns(rows, ["topic"])
    assert "1 of 3 rows have no 'topic'" in caplog.text


def test_questions_on_one_video_widen_the_interval(tmp_path):
    """All right on the first video, all wrong on the second: two clusters say next to nothing."""
    letters = [record["answer"][8] for record in records()]
    changed = [{**r, "answer": "B" if n < 4 else ("A" if letters[n] == "B" else letters[n])} for n, r in
               enumerate(records())]  # fmt: skip
    score = evaluated(tmp_path, test=benchmark(tmp_path, changed))["conditions"]["video"]["scores"]["overall"]
    assert score["accuracy"] == 0.5
    assert score["cluster_high"] - score["cluster_low"] > 1.2 * (score["high"] - score["low"])


def test_a_video_that_does_not_decode_is_counted_as_left_out_and_as_wrong(tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    changed = records()
    file = benchmark(tmp_path, [*changed, {**changed[0], "problem_id": "x", "videos": str(broken)}])
    results = evaluated(tmp_path, "--blind_baseline=true", says="<answer>{gold}</answer>", test=file)
    seen, blind = (results["conditions"][name] for name in ("video", "no video"))
    assert seen["failures"] == {"decode": 1}
    assert (seen["scores"]["overall"]["accuracy"], seen["scores"]["overall"]["n"]) == (1.0, 8)
    wrong = seen["scores_with_failures_as_wrong"]["overall"]
    assert (wrong["accuracy"], wrong["n"]) == (8 / 9, 9)
    assert blind["failures"] == {}
    assert seen["over_blind"]["n"] == 8  # both answered
    last = lines(tmp_path)[-1]
    assert (last["id"], last["error"]) == ("x", "decode")
    assert "resps" not in last
    assert "broken.mp4" in (tmp_path / "skipped.jsonl").read_text()


def test_malformed_records_are_counted(tmp_path):
    file = benchmark(tmp_path, [*records(), {**records()[0], "answer": "<answer>Z</answer>"}])
    results = evaluated(tmp_path, "--data.bad_records=skip", test=file)
    assert results["questions"]["malformed"] == 1
    assert results["questions"]["asked"] == 8


# ---- conditions ----


def test_a_sweep_shows_so_many_frames_and_the_blind_baseline_none(tmp_path):
    results = evaluated(tmp_path, "--frames=[2,4]", "--blind_baseline=true")
    assert list(results["conditions"]) == ["2 frames", "4 frames", "no video"]
    for count in (2, 4):
        for line in lines(tmp_path, f"{count} frames"):
            (indices,), (times,) = line["frame_indices"], line["timestamps"]
            assert len(indices) == len(times) == line["num_frames"] == count
            assert indices == sorted(indices)
    assert all(line["frame_indices"] == [] for line in lines(tmp_path, "no video"))
    assert (tmp_path / "frames.png").read_bytes().startswith(b"\x89PNG")
    assert results["conditions"]["4 frames"]["over_blind"]["difference"] == 0.0


def test_frames_are_shuffled_once_and_not_for_an_endpoint(tmp_path):
    with pytest.raises(ValueError, match=r"model in this process, and Scripted sends pixels; use .*LocalPolicy"):
        evaluated(tmp_path, "--shuffled_baseline=true")
    with pytest.raises(ValueError, match=r"--data\.shuffle_frames=true shows none in order; set one of them"):
        evaluated(tmp_path, "--shuffled_baseline=true", "--data.shuffle_frames=true")
    assert not (tmp_path / "results.json").exists()


def test_frames_and_a_blind_policy_contradict_each_other(tmp_path):
    with pytest.raises(ValueError, match=r"--frames=\[2\] shows frames and data\.blind none"):
        evaluated(tmp_path, "--frames=[2]", "--data.blind=true")


def test_open_ended_answers_are_judged_by_the_reward_and_else_left_out(tmp_path):
    changed = [{**record, "problem": "What happens?", "task": "open_ended", "answer": "tea"} for record in records()]
    file, plain, judged = benchmark(tmp_path, changed), tmp_path / "plain", tmp_path / "judged"
    results = evaluated(plain, test=file, says="<answer>tea</answer>")["conditions"]["video"]
    assert results["failures"] == {"not judged": 8}
    reward = f"--reward={ROOT / 'configs' / 'reward' / 'text_similarity.yaml'}"
    results = evaluated(judged, reward, test=file, says="<answer>tea</answer>")["conditions"]["video"]
    assert results["scores"]["overall"]["accuracy"] == 1.0
    assert results["majority_letter"] is None


def test_grounding_is_reported_by_recall_and_mean_overlap_in_results_and_page(tmp_path):
    changed = [
        {
            **record,
            "problem": "When?",
            "task": "temporal_iou",
            "answer": f"0 to {10 + n} s",
            "problem_type": "ab"[n % 2],
        }
        for n, record in enumerate(records())
    ]
    results = evaluated(tmp_path, test=benchmark(tmp_path, changed), says="<answer>0 to 6 s</answer>")
    graded = results["conditions"]["video"]["graded"]["temporal_iou"]
    overlaps = [6 / (10 + n) for n in range(8)]
    assert graded["mIoU"]["overall"]["accuracy"] == pytest.approx(sum(overlaps) / 8)
    assert graded["mIoU"]["b"]["accuracy"] == pytest.approx(sum(overlaps[1::2]) / 4)
    assert [graded[name]["overall"]["accuracy"] for name in ("R@0.3", "R@0.5", "R@0.7")] == [1.0, 3 / 8, 0.0]
    assert lines(tmp_path)[0]["accuracy"] == [pytest.approx(0.6)]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "video: temporal_iou" in page
    assert "mIoU" in page


# ---- the files ----


def test_a_sample_line_says_what_decided_the_answer(tmp_path):
    evaluated(tmp_path, "--seed=3", "--sampling.max_completion_tokens=7")
    first = lines(tmp_path)[0]
    assert first["doc_id"] == 0
    assert (first["target"], first["resps"], first["filtered_resps"]) == (
        records()[0]["answer"][8], [["<answer>B</answer>"]], ["B"]
    )  # fmt: skip
    assert records()[0]["problem"] in first["input"]
    assert first["sampling"]["max_completion_tokens"] == 7
    assert (first["seed"], first["model"], first["finish_reason"]) == (3, "scripted", ["stop"])
    assert first["decode_backend"].startswith("PyAV")
    assert all(len(first[name]) == 64 for name in ("doc_hash", "prompt_hash"))
    assert first["video_id"].endswith(".mp4")


def test_no_file_names_a_folder_of_this_machine(tmp_path):
    evaluated(tmp_path, "--blind_baseline=true")
    for name in FILES:
        text = (tmp_path / name).read_text()
        assert str(questions().parent) not in text
        assert str(tmp_path) not in text


def test_the_report_is_well_formed_and_loads_nothing(tmp_path):
    evaluated(tmp_path, "--frames=[2,4]", "--blind_baseline=true", policy="Mixed")
    tags = Tags((tmp_path / "report.html").read_text())
    assert tags.open == []
    assert all(source.startswith("data:") for source in tags.sources)
    assert len([source for source in tags.sources if "png" in source]) == 2


# ---- going on, and never mixing ----


@pytest.mark.parametrize("dies_after", [0, 1, 2])
def test_a_killed_evaluation_goes_on_and_leaves_the_same_bytes(tmp_path, dies_after):
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    options = {"policy": "Mixed", "log": str(log)}
    args = ("--blind_baseline=true",)
    evaluated(whole, *args, **options)
    in_one = sorted(log.read_text().split())
    log.unlink()
    child = start_child(["evaluate", *scripted.arguments(killed, *args, dies_after=dies_after, **options)])
    assert join(child) == -9
    evaluated(killed, *args, **options)
    assert sorted(log.read_text().split() if log.exists() else []) == in_one  # nothing asked twice
    for name in FILES:
        assert (whole / name).read_bytes() == (killed / name).read_bytes()


def test_a_torn_line_of_answers_is_asked_again(tmp_path):
    log = tmp_path / "log"
    first = evaluated(tmp_path, log=str(log))
    (journal,) = (tmp_path / "answers").glob("*.jsonl")
    journal.write_bytes(journal.read_bytes()[:-5])
    log.unlink()
    assert evaluated(tmp_path, log=str(log)) == first
    assert len(log.read_text().split()) == 2  # the last batch


CHANGES = {
    "model": {"model": "other"},
    "template": ("--data.question_template=Say: {problem}",),
    "sampling": ("--sampling.temperature=0.5",),
    "seed": ("--seed=1",),
    "frames": ("--data.video.fps=0.5",),
}


@pytest.mark.parametrize("change", CHANGES)
def test_answers_to_another_model_prompt_or_sampling_are_not_taken(tmp_path, change):
    log = tmp_path / "log"
    evaluated(tmp_path, log=str(log))
    log.unlink()
    changed = CHANGES[change]
    args, options = ((), changed) if isinstance(changed, dict) else (changed, {})
    remove_results(tmp_path)
    evaluated(tmp_path, *args, log=str(log), **options)
    assert len(log.read_text().split()) == 8
    log.unlink()
    remove_results(tmp_path)
    evaluated(tmp_path, log=str(log))
    assert not log.exists()  # the first ones are still there


@pytest.mark.parametrize("change", CHANGES)
def test_results_of_another_evaluation_are_not_replaced(tmp_path, change):
    log, changed = tmp_path / "log", CHANGES[change]
    args, options = ((), changed) if isinstance(changed, dict) else (changed, {})
    out = tmp_path / "out"
    evaluated(out, log=str(log))
    before, asked = contents(out), log.read_text()
    told = {
        "model": 'policy.model was "scripted", is "other"', "template": "'video' reading.question_template was",
        "sampling": "sampling.temperature was 0.0, is 0.5", "seed": "seed was 0, is 1",
        "frames": "'video' reading.video.fps was 1.0, is 0.5",
    }  # fmt: skip
    with pytest.raises(ValueError, match=rf"^--out=\S+ has the results of another .*{re.escape(told[change])}.*--out"):
        evaluated(out, *args, log=str(log), **options)
    assert contents(out) == before
    assert log.read_text() == asked


def test_conditions_are_added_and_never_dropped(tmp_path):
    log = tmp_path / "log"
    evaluated(tmp_path, "--frames=[2]", log=str(log))
    log.unlink()
    more = ("--frames=[4,2]", "--blind_baseline=true")
    assert set(evaluated(tmp_path, *more, log=str(log))["conditions"]) == {"2 frames", "4 frames", "no video"}
    assert len(log.read_text().split()) == 16
    with pytest.raises(ValueError, match=r"has the results of .*'4 frames' is not asked; 'no video' is not asked"):
        evaluated(tmp_path, "--frames=[2]")
    evaluated(tmp_path, *more, "--num_cards=0", "--name=renamed")  # how it is shown may change


@pytest.mark.parametrize("left", ["samples.jsonl", "config.yaml"])
def test_a_training_runs_folder_is_none_for_an_evaluation(tmp_path, left):
    """Its samples.jsonl and report.html have the names of an evaluation's."""
    (tmp_path / left).write_text('{"step": 1, "prompt": "x"}\n')
    with pytest.raises(ValueError, match=r"--out=\S+ holds a training run.* such as \S+/evaluation$"):
        evaluated(tmp_path)
    assert (tmp_path / left).read_text() == '{"step": 1, "prompt": "x"}\n'


def test_a_comparison_with_another_evaluation_is_told(tmp_path, caplog):
    for name in "abc":
        evaluated(tmp_path / name)
    evaluated(tmp_path / "c", f"--against={tmp_path / 'a'}")
    assert "compared with" not in caplog.text
    evaluated(tmp_path / "c", f"--against={tmp_path / 'b'}")
    assert "comparison.json compared with a before, now with b" in caplog.text


def test_a_run_is_not_compared_with_itself(tmp_path):
    out = tmp_path / "out"
    evaluated(out)
    before = contents(out)
    with pytest.raises(ValueError, match=r"--against=\S+ is the folder of --out"):
        evaluated(out, f"--against={tmp_path / 'x' / '..' / 'out'}")
    assert contents(out) == before


def test_the_comparison_is_with_what_was_there_at_the_start(tmp_path, monkeypatch):
    """Even if the other run is lost meanwhile."""
    evaluated(tmp_path / "a")
    conditions = Evaluation.conditions

    def then_lost(self):
        (tmp_path / "a" / "samples.jsonl").unlink()
        return conditions(self)

    monkeypatch.setattr(Evaluation, "conditions", then_lost)
    evaluated(tmp_path / "b", f"--against={tmp_path / 'a'}", says="<answer>{gold}</answer>")
    (found,) = json.loads((tmp_path / "b" / "comparison.json").read_text()).values()
    assert (found["first"], found["second"]) == ("a", "b")
    assert found["strict"]["overall"]["difference"] > 0


def test_a_changed_question_or_video_is_asked_again(tmp_path):
    log, changed = tmp_path / "log", records()
    evaluated(tmp_path, log=str(log), test=benchmark(tmp_path, changed))
    log.unlink()
    changed[3]["problem"] = changed[3]["problem"].replace("?", "??")
    with pytest.raises(ValueError, match="has the results of another evaluation .*fingerprint"):
        evaluated(tmp_path, log=str(log), test=benchmark(tmp_path, changed))
    remove_results(tmp_path)
    evaluated(tmp_path, log=str(log), test=benchmark(tmp_path, changed))
    assert log.read_text().split() == [str(changed[3]["problem_id"])]


def test_another_batch_size_takes_the_answers_that_are_there(tmp_path):
    log = tmp_path / "log"
    first = evaluated(tmp_path, log=str(log))
    log.unlink()
    assert evaluated(tmp_path, "--data.eval_prompts_per_batch=2", log=str(log)) == first
    assert not log.exists()


def test_too_many_broken_videos_end_the_run(tmp_path):
    changed = [{**record, "videos": f"/nowhere/{n}.mp4"} for n, record in enumerate(records())]
    file = tmp_path / "lost.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in changed))
    with pytest.raises(ValueError, match=r"data\.max_skipped_share=0\.05"):
        evaluated(tmp_path, test=file)


def test_without_questions_the_error_names_the_option(tmp_path):
    args = [arg for arg in scripted.arguments(tmp_path) if not arg.startswith("--data.test")]
    with pytest.raises(ValueError, match=r"data\.test, which is not set"):
        Evaluation(*parse_evaluation(args)).run()


def test_remarks_say_that_nothing_was_answered():
    assert list_remarks([make_outcome("video", [], {}, {}, {})]) == ["video: no question was answered."]


def test_a_data_set_has_the_same_hashes_wherever_it_lies(tmp_path):
    """Paths in the metadata, too, such as those of subtitles."""
    hashes = []
    for name in ("here", "there"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "7.srt").write_text("")
        row = Row(
            "7", "Which?\nA. x\nB. y", "A", videos=(f"{folder}/7.mp4",), metadata={"subtitles": f"{folder}/7.srt"}
        )
        hashes.append(doc_hash(row))
    assert hashes[0] == hashes[1] != doc_hash(Row("7", "Which?\nA. x\nB. y", "B", videos=("7.mp4",)))
    assert make_portable({"a": (1, "b/c", f"{tmp_path}/here")}) == {"a": [1, "b/c", "here"]}
