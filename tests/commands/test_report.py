"""The report of one run, from what it left in its folder."""

import json
import re

import pytest
import torch
import yaml

from longrl.commands.main import main
from longrl.commands.report import compare_runs, report_run
from longrl.evaluation.sample_grids import PromptSamples, encode_images, picture_grid
from longrl.evaluation.timeline import FILE, step_timeline, timeline_line


def test_curves_and_pictures_of_a_run_are_on_one_page(tmp_path):
    run = tmp_path / "my_run"
    (run / "logs" / "version_0").mkdir(parents=True)
    (run / "logs" / "version_0" / "metrics.csv").write_text(
        "step,reward/mean,reward/mean_colour,reward/std_in_group\n0,0.1,0.2,0.3\n1,0.3,0.4,0.3\n"
    )
    (run / "pictures").mkdir()
    grid = picture_grid([PromptSamples("p", [torch.zeros(1, 3, 8, 8, dtype=torch.uint8)], ["0.5"])])
    for step in (0, 50, 100):
        (run / "pictures" / f"val_{step:06}.png").write_bytes(encode_images([grid], "png"))
    main(["report", "--run", str(run), "--num_sheets", "2"])
    text = (run / "report.html").read_text()
    assert "<h1>my_run</h1>" in text
    assert "Learning curves: my_run" in text
    assert "after step 0<" in text
    assert "after step 100<" in text
    assert "after step 50<" not in text
    assert (run / "curves_my_run.png").exists()


def test_the_page_of_an_evaluation_is_not_replaced(tmp_path):
    (tmp_path / "logs" / "version_0").mkdir(parents=True)
    (tmp_path / "logs" / "version_0" / "metrics.csv").write_text("step,reward/mean\n0,0.1\n")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds the results of an evaluation \(results\.json\), whose report\.html"):
        report_run(str(tmp_path))


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds neither a metrics.csv nor pictures; name the run_dir"):
        report_run(str(tmp_path))


def a_run(folder, num_steps, entropy, **settings):
    """Metrics, config and samples of a run whose text is hostile."""
    (folder / "logs" / "version_0").mkdir(parents=True)
    lines = [f"{step},0.5,{entropy if step > num_steps // 2 else 1.0},2.0" for step in range(num_steps)]
    table = "\n".join(["step,reward/mean,train/entropy,time/generate", *lines, "7,0."])
    (folder / "logs" / "version_0" / "metrics.csv").write_text(table)
    (folder / "config.yaml").write_text(yaml.safe_dump({"run_dir": str(folder), **settings}))
    sample = {"step": 3, "problem": "Which? " * 200, "completion": "<script>alert(1)</script>", "reward": 0.25}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + '\n{"completion": "to')
    return str(folder)


def test_several_runs_are_compared_on_one_page(tmp_path, capsys):
    first = a_run(tmp_path / "a" / "rl", 60, 0.05, lr="<b>0.1</b>", same=1)
    second = a_run(tmp_path / "b" / "rl", 30, 0.9, lr="0.2", same=1)
    main(["report", first, second, "--out", str(tmp_path / "page")])
    text = (tmp_path / "page" / "report.html").read_text()
    assert capsys.readouterr().out == f"report: {tmp_path / 'page' / 'report.html'}\n"
    assert "<h1>a/rl and b/rl</h1>" in text
    headings = re.findall("<h2>(.*?)</h2>", text)
    assert headings == [
        "Learning curves", "Alerts", "Final values", "Speed and memory", "What differs in the configs", "Last samples",
        "How this was made",
    ]  # fmt: skip
    assert "entropy collapse: token entropy is 0.05 of its start" in text
    assert "<td>&lt;b&gt;0.1&lt;/b&gt;</td>" in text
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "<td>train/entropy</td><td>0.05</td><td>0.9</td>" in text
    assert "<td>same</td>" not in text
    assert 'class="chart"' in text
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", text)  # it opens offline


def test_the_page_of_several_runs_lies_in_the_first_and_leaves_its_report(tmp_path):
    first, second = a_run(tmp_path / "one", 5, 1.0), a_run(tmp_path / "two", 5, 1.0)
    (tmp_path / "one" / "report.html").write_text("its own")
    assert compare_runs([first, second]) == tmp_path / "one" / "comparison" / "report.html"
    assert (tmp_path / "one" / "report.html").read_text() == "its own"
    assert "Nothing but their folders." in (tmp_path / "one" / "comparison" / "report.html").read_text()


def test_one_run_has_its_alerts_too(tmp_path):
    text = report_run(a_run(tmp_path / "one", 60, 0.05)).read_text()
    assert re.findall("<h2>(.*?)</h2>", text) == [
        "Alerts", "Final values", "Speed and memory", "Last samples", "Learning curves: one", "How this was made",
    ]  # fmt: skip


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    run = a_run(tmp_path / "one", 5, 1.0)
    with pytest.raises(ValueError, match="each run is named once"):
        compare_runs([run, f"{run}/"])
    with pytest.raises(ValueError, match="is no folder"):
        compare_runs([run, str(tmp_path / "none")])
    with pytest.raises(ValueError, match="--num_sheets must be at least 0, got -1"):
        report_run(run, num_sheets=-1)
    with pytest.raises(SystemExit):
        main(["report"])
    assert "name the folder of a run" in capsys.readouterr().err


def test_each_run_has_its_timeline_and_the_ages_of_its_tokens(tmp_path):
    """Runs of one name in two folders, of which one has rollouts beside the update."""
    runs = [a_run(tmp_path / place / "run", 3, 1.0) for place in ("a", "b")]
    for place in ("a", "b"):
        step = step_timeline(1, 4.0, [("generate", 0.0, 3.0)], [(0.0, 2.0, 5)])
        (tmp_path / place / "run" / FILE).write_text(f"{timeline_line(step)}\n")
    (tmp_path / "b" / "run" / "logs" / "version_0" / "metrics.csv").write_text(
        "step,rollout/staleness_share_0,rollout/staleness_share_1,train/mismatch_mean_staleness_1\n0,0.25,0.75,0.01\n"
    )
    text = compare_runs(runs).read_text()
    assert re.findall(r"<h2>((?:Timeline|Staleness)[^<]*)</h2>", text) == [
        "Timeline: a/run", "Timeline: b/run", "Staleness: b/run"
    ]  # fmt: skip
    assert text.count("<td>25 %</td><td>50 %</td><td>25 %</td>") == 4
    assert sorted(path.name for path in (tmp_path / "a" / "run" / "comparison").glob("*.png")) == [
        "learning_curves.png", "staleness_b_run.png", "timeline_a_run.png", "timeline_b_run.png"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("config.yaml", "holds a run without a step that was logged"),
        ("tensorboard/events.out.tfevents.1", "holds metrics for TensorBoard alone"),
        ("else", "holds neither a metrics.csv nor pictures"),
    ],
)
def test_a_run_without_metrics_says_why(tmp_path, file, said):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(ValueError, match=said):
        report_run(str(tmp_path))
