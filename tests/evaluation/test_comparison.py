"""Two runs question by question."""

import json

import pytest

from longrl.evaluation.comparison import compare_folders
from longrl.io.jsonl import write_jsonl
from tests.evaluation.scripted import benchmark, command, evaluated, records
from tests.evaluation.test_scores import record


def test_what_a_second_run_gains_is_told_question_by_question(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    evaluated(a, policy="Mixed")  # right, right without tag, wrong, cut off
    evaluated(b, says="<answer>{gold}</answer>")
    found = compare_folders(a, b)["video"]
    ids = [str(item["problem_id"]) for item in records()]
    assert (found.first, found.second) == ("a", "b")
    assert found.strict["overall"].difference == 0.75
    assert found.robust["overall"].difference == 0.5
    assert found.won == [name for n, name in enumerate(ids) if n % 4]
    assert (found.lost, found.left_out) == ([], 0)
    assert set(found.strict) == {"overall", *(item["problem_type"] for item in records())}


def test_evaluate_against_a_run_reports_the_difference(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    evaluated(a, policy="Mixed")
    command(b, f"--against={a}", says="<answer>{gold}</answer>")
    assert json.loads((b / "comparison.json").read_text())["video"]["strict"]["overall"]["difference"] == 0.75
    page = (b / "report.html").read_text()
    assert "b minus a, in percentage points" in page
    assert "Against another run" in page


def test_questions_that_only_one_answered_or_that_differ_are_left_out(tmp_path):
    a, b, changed = tmp_path / "a", tmp_path / "b", records()
    evaluated(a)
    changed[0]["problem"] += "\nE. none"
    evaluated(b, test=benchmark(tmp_path, changed[:6]))
    found = compare_folders(a, b)["video"]
    assert (found.strict["overall"].n, found.left_out) == (5, 3)


def test_a_test_run_is_compared_by_its_predictions(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    right = [item["answer"][8] for item in records()]
    predictions = [record(str(item["problem_id"]), True, answer=right[n]) for n, item in enumerate(records())]
    write_jsonl(a / "predictions.jsonl", predictions)
    evaluated(b, says="<answer>Z</answer>")
    found = compare_folders(a, b)["video"]
    assert found.strict["overall"].difference == -1.0
    write_jsonl(a / "predictions.jsonl", 2 * predictions)
    with pytest.raises(ValueError, match="is there twice"):
        compare_folders(a, b)


def test_samples_of_training_are_no_answers(tmp_path):
    a, b, run = tmp_path / "a", tmp_path / "b", tmp_path / "run"
    evaluated(a)
    evaluated(b)
    write_jsonl(run / "samples.jsonl", [{"step": 10, "id": "0", "completion": "C", "reward": 1.0}])
    with pytest.raises(ValueError, match=r"has no samples\.jsonl of `evaluate` or `test`"):
        compare_folders(a, run)
    predictions = [record(str(item["problem_id"]), True, answer=item["answer"][8]) for item in records()]
    write_jsonl(run / "predictions.jsonl", predictions)
    assert compare_folders(a, run)["video"].strict["overall"].n == len(predictions)
    b.rename(run / "test")
    assert compare_folders(a, run)["video"].strict["overall"].difference == 0.0


def test_one_number_of_frames_is_compared_with_another_if_there_is_no_other_choice(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    evaluated(a, "--frames=[2]")
    evaluated(b, "--frames=[4]")
    assert list(compare_folders(a, b)) == ["2 frames against 4 frames"]
    evaluated(b, "--frames=[4,8]")
    with pytest.raises(ValueError, match=r"no condition is in both runs: .* has 2 frames, .* has 4 frames, 8 frames"):
        compare_folders(a, b)


def test_a_folder_without_answers_is_the_users_mistake(tmp_path):
    with pytest.raises(ValueError, match=r"has no samples\.jsonl of `evaluate` or `test`"):
        compare_folders(tmp_path, tmp_path)


def test_runs_whose_folders_end_alike_are_told_by_what_differs(tmp_path):
    """As `--out runs/NAME/evaluation/video_mme` makes them."""
    for name in "ab":
        evaluated(tmp_path / name / "evaluation" / "mme")
    found = compare_folders(*(tmp_path / name / "evaluation" / "mme" for name in "ab"))["video"]
    assert (found.first, found.second) == ("a/evaluation/mme", "b/evaluation/mme")


def test_two_runs_that_were_not_asked_alike_say_so(tmp_path, capsys):
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    evaluated(a)
    command(b, f"--against={a}", "--protocol.name=other", "--data.video.moments=ends", "--sampling.top_p=0.9",
            "--data.max_prompt_tokens=50", "--data.question_template={problem} Say it.")  # fmt: skip
    assert 'not asked alike: protocol was "longrl", is "other"' in capsys.readouterr().out
    found = compare_folders(a, b)["video"].differences
    assert [text.partition(" was ")[0] for text in found if not text.startswith("prompt.")] == [
        "protocol", "sampling.top_p", "budget.max_prompt_tokens", "reading.question_template", "reading.video.moments",
    ]  # fmt: skip
    assert [text for text in found if text.startswith("prompt.")]
    page = (b / "report.html").read_text()
    assert "not asked alike" in page
    assert "reading.video.moments was" in page
    assert json.loads((b / "comparison.json").read_text())["video"]["differences"] == found
    evaluated(c)
    assert compare_folders(a, c)["video"].differences == []


def test_a_run_of_an_earlier_release_is_compared_in_what_it_wrote(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    evaluated(a)
    evaluated(b, "--sampling.top_p=0.9", "--protocol.name=other")
    results = json.loads((a / "results.json").read_text())
    for name in ("protocol", "budget"):
        del results[name]
    del results["conditions"]["video"]["shown"]
    (a / "results.json").write_text(json.dumps(results))
    assert compare_folders(a, b)["video"].differences == ["sampling.top_p was 1.0, is 0.9"]
