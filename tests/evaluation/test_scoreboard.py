"""The scoreboard from evaluations to page: every number, its cost, its protocol and its command; old results too."""

import json
import re
import shutil

import pytest

from longrl.commands.main import main
from longrl.commands.scoreboard import make_scoreboard
from longrl.evaluation.published_figures import read_published
from longrl.evaluation.scoreboard_page import format_cost
from longrl.evaluation.scoreboard_rows import find_evaluations, length_groups, run_names
from tests.evaluation import scripted
from tests.evaluation.scripted import command, evaluated
from tests.evaluation.test_report_page import Tags

PUBLISHED = """
benchmark: [Some Benchmark, SYNTHETIC-videos]
figures:
  - {model: hub/other-7B, accuracy: 71.5, source: "arXiv:0000.00000, Table 1", frames: 512, subtitles: true,
     questions: 100, categories: {Temporal: 60.0}}
  - {model: closed, accuracy: 80, source: a leaderboard}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A policy that was asked with 2 and 4 frames and blind, by the command, and one by an earlier release."""
    folder = tmp_path_factory.mktemp("runs")
    options = ("--name=synthetic videos", "--frames=[2,4]", "--blind_baseline=true")
    command(folder / "a" / "evaluation", *options, policy="Mixed", model="first")
    evaluated(folder / "b" / "evaluation", "--name=synthetic videos", says="<answer>{gold}</answer>", model="second")
    forget_costs(folder / "b" / "evaluation")
    (folder / "published.yaml").write_text(PUBLISHED)
    return folder


def forget_costs(folder):
    """As results were written before costs were recorded."""
    results = json.loads((folder / "results.json").read_text())
    for condition in results["conditions"].values():
        del condition["costs"]
    (folder / "results.json").write_text(json.dumps(results))
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        del line["costs"], line["video_s"]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "timings.jsonl").unlink(missing_ok=True)


def board(runs, out, *more):
    main(["scoreboard", str(runs), "--published", str(runs / "published.yaml"), "--out", str(out), *more])
    return json.loads((out / "scoreboard.json").read_text())


def test_the_page_has_all_rows_with_costs_baselines_and_commands(runs, tmp_path, capsys):
    (group,) = board(runs, tmp_path)["groups"]
    assert f"scoreboard: {tmp_path / 'scoreboard.html'}" in capsys.readouterr().out
    assert group["title"] == "synthetic videos"
    rows = group["rows"]
    assert [(row["run"], row["condition"]) for row in rows] == [
        ("b", "video"), ("a", "2 frames"), ("a", "4 frames"), ("a", "no video"),
    ]  # fmt: skip
    perfect, two, four, blind = rows
    assert [row["scores"]["overall"]["accuracy"] for row in rows] == [1.0, 0.25, 0.25, 0.25]
    assert two["all_scores"]["robust"]["overall"]["accuracy"] == 0.5
    assert [row["costs"]["frames"]["mean"] for row in (two, four, blind)] == [2, 4, 0]
    assert two["costs"]["prompt_tokens"] == {"mean": 10, "total": 80, "n": 8}
    assert two["costs"]["completion_tokens"]["mean"] > 0
    assert perfect["costs"]["frames"]["mean"] > 4  # counted in lines of any release
    assert perfect["costs"]["decode_s"] is perfect["costs"]["encode_flops"] is None
    assert set(two["over_blind"]) >= {"difference", "low", "high"}
    assert two["command"].startswith("python -m longrl evaluate '--policy=")
    assert perfect["command"] is None
    assert two["differences"] == [
        "is first where row 1 is second",
        f"shows 2 frames where row 1 shows {perfect['costs']['frames']['mean']:.0f} "
        f"({perfect['costs']['frames']['mean'] / 2:.3g} times as many)",
    ]

    page = (tmp_path / "scoreboard.html").read_text()
    assert Tags(page).open == []
    assert not re.search(r"https?://|<script|@import|url\(", page)
    for text in ("not recorded", "Accuracy against frames", "By category", "Against published figures"):
        assert text in page
    assert (tmp_path / "accuracy_against_frames.png").read_bytes().startswith(b"\x89PNG")
    assert "| 2: a | 2 frames | first |" in (tmp_path / "scoreboard.md").read_text()


def test_published_figures_stand_beside_ours_and_say_what_differs(runs, tmp_path):
    (group,) = board(runs, tmp_path, "--cost=prompt_tokens", "--score=robust")["groups"]
    pairs = [pair for pair in group["against_published"] if pair["row"] == 2]
    assert group["rows"][1]["condition"] == "2 frames"
    first, second = pairs
    assert first["difference"] == pytest.approx(0.5 - 0.715)
    assert first["low"] < first["difference"] < first["high"]
    assert first["scored_by"] == "the whole answer"
    assert first["differences"] == [
        "is first where the published one is hub/other-7B",
        "shows 2 frames where the published one shows 512 (256 times as many)",
        "reads no subtitles where the published one reads them",
        "asks 8 questions where the published one asks 100",
    ]
    unsaid = ["video tokens", "pixels of a frame", "prompt", "sampling", "length of answers", "scoring"]
    assert first["not_said"] == unsaid
    assert second["differences"] == ["is first where the published one is closed"]
    text = (tmp_path / "scoreboard.md").read_text()
    assert "temporal: " in text.lower()
    assert "where 60.0 is published" in text


def test_costs_that_nobody_recorded_are_said_to_be_missing(runs, tmp_path):
    page = make_scoreboard([str(runs / "b")], cost="prefill_flops", out=str(tmp_path))
    assert "Prefill operations of a question are not recorded in any of these results." in page.read_text()


def test_a_run_without_results_is_refused(tmp_path, runs):
    with pytest.raises(ValueError, match="has no results of `evaluate` or `test`"):
        find_evaluations([tmp_path])
    assert find_evaluations([runs, runs / "a" / "evaluation"]) == [runs / "a" / "evaluation", runs / "b" / "evaluation"]


def test_runs_go_by_what_tells_them_apart(tmp_path):
    folders = [tmp_path / name for name in ("x/evaluation/mme", "y/evaluation/mme", "z/test")]
    assert run_names(folders[:2]) == ["x", "y"]
    assert run_names([folders[0], tmp_path / "x/evaluation/lvb"]) == ["mme", "lvb"]
    assert run_names([folders[2]]) == ["z"]


def test_lengths_make_three_groups_and_blind_questions_have_their_videos():
    lines = [{"doc_hash": str(n), "video_s": [60.0 * n]} for n in range(1, 10)]
    lines += [{"doc_hash": "3", "video_s": []}, {"doc_hash": "x"}]
    groups = length_groups(lines)
    assert list(dict.fromkeys(groups.values())) == ["below 4 min", "4 min to 7 min", "from 7 min"]
    assert [groups[str(n)] for n in (1, 3, 4, 6, 7)] == [
        "below 4 min", "below 4 min", "4 min to 7 min", "4 min to 7 min", "from 7 min",
    ]  # fmt: skip
    assert length_groups([{"doc_hash": str(n), "video_s": [9.0]} for n in range(5)]) == {}


def test_a_breakdown_by_duration_and_lengths_of_videos_are_groups(tmp_path):
    changed = [
        {**record, "video_id": f"{n // 4}", "duration": ("short", "long")[n // 4], "domain": "x", "task_type": "y"}
        for n, record in enumerate(scripted.records())
    ]
    test = scripted.benchmark(tmp_path, changed)
    row = "--data.row_function=tests.evaluation.scripted.video_mme_like_row"
    evaluated(tmp_path / "out", "--breakdowns=[duration]", row, test=test, policy="Mixed")
    make_scoreboard([str(tmp_path / "out")], out=str(tmp_path / "page"))
    (group,) = json.loads((tmp_path / "page" / "scoreboard.json").read_text())["groups"]
    assert {name: list(values) for name, values in group["rows"][0]["groups"].items()} == {
        "duration": ["long", "short"]
    }


def test_costs_are_told_in_units():
    shown = {1.5: "1.5", 12345.0: "12,345"}
    assert {value: format_cost("frames", value) for value in shown} == shown
    assert format_cost("prefill_flops", 3.14e12) == "3.14 TFLOP"
    assert format_cost("decode_s", 0.01234) == "0.0123 s"
    assert format_cost("encode_flops", None) == "not recorded"


# ---- published figures ----


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"accuracy": 165.1}, r"figures\[0\]\.accuracy must be at least 0 and at most 100, got 165.1"),
        ({"accuracy": True}, "accuracy must be a number, got True"),
        ({"source": None}, "it lacks source"),
        ({"framse": 8}, "unknown framse; a figure has accuracy, source, "),
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"subtitles": "yes"}, "subtitles must be true or false, got 'yes'"),
        ({"prompt": 3}, "prompt must be a text, got 3"),
        ({"categories": {"a": 101}}, r"categories\.a must be at least 0 and at most 100"),
        ({"categories": [1]}, "categories must be a mapping"),
    ],
)
def test_a_figure_that_is_wrong_is_refused_by_name(tmp_path, changed, message):
    figure = {"model": "m", "accuracy": 50, "source": "s"} | changed
    figure = {name: value for name, value in figure.items() if value is not None}
    (tmp_path / "x.yaml").write_text(json.dumps({"benchmark": "b", "figures": [figure]}))
    with pytest.raises(ValueError, match=message):
        read_published([tmp_path / "x.yaml"])


@pytest.mark.parametrize("text", ["[]", "benchmark: b", "{benchmark: b, figures: []}", "a: [b"])
def test_a_file_of_another_kind_is_refused(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"x\.yaml"):
        read_published([tmp_path])
    with pytest.raises(ValueError, match="is no YAML file and no folder of such"):
        read_published([tmp_path / "absent.yaml"])


def test_breakdowns_are_by_the_score_that_is_shown(runs, tmp_path):
    """Answers of half of the questions have a letter behind no tag: strict 25%, robust 50%."""
    shutil.copytree(runs / "a", tmp_path / "a")
    shutil.copy(runs / "published.yaml", tmp_path)
    folder = tmp_path / "a" / "evaluation"
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        line["breakdowns"] = {"kind": ["any", "robust"] if line["robust_accuracy"] else ["any", "wrong"]}  # both count
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = json.loads((folder / "results.json").read_text())
    strict = {"accuracy": 0.5, "low": 0.0, "high": 1.0, "n": 4}
    for condition in results["conditions"].values():
        condition["breakdowns"] = {"kind": {"any": strict, "robust": strict, "wrong": strict}}
    (folder / "results.json").write_text(json.dumps(results))
    for score, wanted in (("strict", (0.5, 0.5, 0.5)), ("robust", (0.5, 1.0, 0.0))):
        (group,) = board(tmp_path, tmp_path / score, f"--score={score}")["groups"]
        (row,) = (row for row in group["rows"] if row["condition"] == "2 frames")
        by_kind = row["groups"]["kind"]
        assert tuple(by_kind[kind]["accuracy"] for kind in ("any", "robust", "wrong")) == wanted
