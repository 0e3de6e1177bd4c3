"""What is read of runs that were killed, go on, or are odd."""

import itertools
import json
import math

import pytest

from longrl.evaluation.overlaid_curves import overlaid_charts, plot_overlaid
from longrl.evaluation.run_records import (
    TAIL_BYTES,
    RunRecord,
    differences,
    final_value,
    last_samples,
    read_run,
    read_settings,
    seconds_per_step,
    short_names,
)


def record(tmp_path, name="run", **settings) -> RunRecord:
    return RunRecord(name, tmp_path / name, {}, settings)


def test_names_are_as_short_as_tells_runs_apart():
    assert short_names(["/a/b/rl", "/a/c/sft"]) == ["rl", "sft"]
    assert short_names(["/a/b/rl", "/a/c/rl", "/a/c/sft"]) == ["b/rl", "c/rl", "c/sft"]


def test_only_settings_that_differ_are_shown_and_none_of_the_folder(tmp_path):
    one = record(tmp_path, lr="0.1", same="x", run_dir="a", only="1")
    other = record(tmp_path, lr="0.2", same="x", run_dir="b", long="y" * 999)
    assert differences([one, other]) == [
        ["long", "-", "y" * 300 + "..."],
        ["lr", "0.1", "0.2"],
        ["only", "1", "-"],
    ]


@pytest.mark.parametrize("content", [b"", b"- a", b"a: [", b"!!python/object/apply:os.system ['true']", b"\xff\xfe"])
def test_a_config_that_is_none_has_no_settings(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    assert read_settings(tmp_path / "config.yaml") == {}
    assert read_settings(tmp_path / "none.yaml") == {}


def test_aliases_that_mean_millions_of_settings_are_not_followed(tmp_path):
    lines = ["a: &a {k: 1}"]
    for before, name in itertools.pairwise("abcdefgh"):
        lines.append(f"{name}: &{name} {{{', '.join(f'k{number}: *{before}' for number in range(9))}}}")
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    assert read_settings(tmp_path / "config.yaml") == {}


def test_settings_are_named_by_dots(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {lr: 1.0e-3, betas: [1, 2], none: null, empty: {}}\nseed: a\n")
    assert read_settings(tmp_path / "config.yaml") == {
        "model.lr": "0.001",
        "model.betas": "[1, 2]",
        "model.none": "null",
        "model.empty": "{}",
        "seed": "a",
    }


def test_the_last_samples_are_read_and_torn_lines_left_out(tmp_path):
    path = tmp_path / "samples.jsonl"
    line = json.dumps({"completion": "x" * 1000})
    path.write_text("\n".join([line] * (TAIL_BYTES // 1000)) + '\n[1]\n{"completion": "last"}\n{"completion": "to')
    assert [sample["completion"][:4] for sample in last_samples(path, 2)] == ["xxxx", "last"]
    assert last_samples(tmp_path / "none.jsonl", 2) == []


def test_a_torn_table_with_odd_numbers_is_read_as_far_as_it_is_one(tmp_path):
    folder = tmp_path / "logs" / "version_0"
    folder.mkdir(parents=True)
    cells = b"step,reward/mean,time/step\n0,0.5,2\n1,nan,\n2,inf,4\nx,1,1\n3,0.7,\xff\n4,0.9\n5,0.\x00"
    (folder / "metrics.csv").write_bytes(cells + b'\n6,"' + b"9" * 200_000)
    run = read_run(tmp_path)
    assert run.metrics["reward/mean"] == {0: 0.5, 3: 0.7, 4: 0.9}
    assert (run.num_steps, seconds_per_step(run.metrics)) == (4, 3.0)
    assert run.alerts == []


def test_a_final_value_is_the_mean_of_ten():
    assert final_value({step: float(step) for step in range(20)}) == pytest.approx(14.5)
    assert math.isnan(final_value({}))


def test_a_step_takes_what_its_phases_take_where_nobody_timed_it():
    assert seconds_per_step({"time/generate": {0: 1.0, 1: 2.0, 2: 3.0}, "time/update": {0: 1.0, 1: 1.0}}) == 3.0
    assert math.isnan(seconds_per_step({}))


def test_runs_of_other_steps_and_metrics_lie_over_one_another():
    runs = {
        "one": {"reward/mean": {0: 0.1, 1: 0.2}, "time/encode": {0: 1.0}, "time/generate": {0: 2.0, 1: 2.0}},
        "two": {"reward/mean": {500: 0.3}, "train/entropy": {500: 0.1}, "reward/style": {1: 0.0}, "reward/x": {1: 0.0}},
        "none": {},
    }
    charts = overlaid_charts(runs)
    assert charts["Reward"] == ("", {"one": {0: 0.1, 1: 0.2}, "two": {500: 0.3}})
    assert charts["Entropy"] == ("nats", {"two": {500: 0.1}})
    assert charts["Time per step"] == ("s", {"one": {0: 3.0, 1: 2.0}})
    assert set(charts) == {
        "Reward", "Entropy", "Time per step", "Parts of the reward: style", "Parts of the reward: x"
    }  # fmt: skip
    figure = plot_overlaid(runs)
    assert len(figure.axes) == 5
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]
    colors = {line.get_color() for axes in figure.axes for line in axes.get_lines()}
    assert len(colors) == 2
    assert plot_overlaid({"none": {}}) is None


def test_more_runs_than_colours_differ_in_their_dashes():
    figure = plot_overlaid({f"run {number}": {"reward/mean": {0: 0.0, 1: 1.0}} for number in range(9)})
    looks = [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()]
    assert len(set(looks)) == 9


def test_a_hostile_run_costs_nothing(tmp_path):
    text = "n0: &n0 [1, 2]\n" + "".join(f"n{n + 1}: &n{n + 1} [{', '.join([f'*n{n}'] * 4)}]\n" for n in range(20))
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "below" / "metrics.csv").mkdir(parents=True)
    (tmp_path / "metrics.csv").write_text("step,loss\n1,2\n1e300,3\n99999999999999999999,4\n")
    found = read_run(tmp_path)
    assert found.settings == {}
    assert found.metrics == {"loss": {1: 2.0}}
