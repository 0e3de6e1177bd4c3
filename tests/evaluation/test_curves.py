"""Reading metrics.csv and drawing curves."""

import io

import pytest

from longrl.evaluation.charts import _bars, plot_accuracies, plot_frame_sweep
from longrl.evaluation.curves import (
    PANELS,
    Panel,
    find_metrics,
    matching_columns,
    plot_curves,
    read_metrics,
    short_name,
    smoothed,
)
from longrl.evaluation.scores import wilson_interval


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_rows_of_one_step_are_merged_and_empty_and_odd_cells_left_out(tmp_path):
    path = write(
        tmp_path / "metrics.csv",
        "epoch,step,train/loss,val/accuracy,train/kl\n0,0,2.0,,nan\n0,1,1.5,,inf\n0,1,,0.25,text\n0,,9,9,9\n1,2,1.0,,\n",
    )
    assert read_metrics(path) == {"train/loss": {0: 2.0, 1: 1.5, 2: 1.0}, "val/accuracy": {1: 0.25}}


def test_a_later_version_wins_where_both_have_a_step(tmp_path):
    first = write(tmp_path / "version_0" / "metrics.csv", "step,loss\n0,3\n1,2\n2,9\n")
    second = write(tmp_path / "version_1" / "metrics.csv", "step,loss,reward\n2,1,0.5\n3,0.5,0.6\n")
    assert read_metrics([first, second]) == {"loss": {0: 3, 1: 2, 2: 1, 3: 0.5}, "reward": {2: 0.5, 3: 0.6}}


def test_versions_are_found_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 0, 2):
        write(tmp_path / f"version_{number}" / "metrics.csv", "step\n")
    assert [path.parent.name for path in find_metrics(tmp_path)] == ["version_0", "version_2", "version_10"]


def test_an_empty_file_has_no_metrics_and_no_figure(tmp_path):
    assert read_metrics(write(tmp_path / "metrics.csv", "")) == {}
    assert plot_curves({}) is None
    assert plot_curves({"unknown": {0: 1.0}}) is None


@pytest.mark.parametrize(
    ("column", "title"),
    [
        ("train/reward", "Reward"),
        ("reward_mean", "Reward"),
        ("reward/mean", "Reward"),
        ("reward/think_answer_format", "Format"),
        ("seconds/reward", "Time per step"),
        ("rollout/cut_off", "Cut off"),
        ("val/accuracy/spatial", None),
        ("train/accuracy", "Accuracy"),
        ("rewards/accuracy", "Accuracy"),
        ("val/accuracy/overall", "Accuracy"),
        ("train/loss_step", "Loss"),
        ("train/entropy", "Entropy"),
        ("train/kl", "KL to the reference"),
        ("train/kl_ref", "KL to the reference"),
        ("train/approx_kl", None),
        ("train/completion_tokens", "Completion length"),
        ("train/grad_norm", "Gradient norm"),
        ("lr-AdamW", "Learning rate"),
        ("time/generate_s", "Time per step"),
        ("train/encode_s", "Time per step"),
        ("time/step_s", None),
        ("train/reward_std", None),
    ],
)
def test_each_column_finds_its_panel(column, title):
    titles = [panel.title for panel in PANELS if matching_columns({column: {0: 1.0}}, panel)]
    assert titles == ([] if title is None else [title])


def test_a_metric_logged_per_step_and_per_epoch_is_drawn_once():
    metrics = {"loss_step": {0: 1.0}, "loss_epoch": {0: 1.0}, "val/loss_epoch": {0: 1.0}}
    assert matching_columns(metrics, Panel("Loss", r"(^|/)loss$")) == ["loss_step", "val/loss_epoch"]


def test_curves_are_drawn_with_missing_columns_and_few_or_many_points():
    metrics = {
        "train/reward": {step: step / 100 for step in range(100)},
        "train/loss": {3: 1.0},
        "time/encode_s": dict.fromkeys(range(100), 0.1),
        "time/update_s": dict.fromkeys(range(0, 100, 7), 0.3),
    }
    figure = plot_curves(metrics)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Reward", "Loss", "Time per step (s)"]
    png = io.BytesIO()
    figure.savefig(png)
    assert png.getvalue().startswith(b"\x89PNG")


def test_smoothing_keeps_a_line_a_line_and_the_length():
    assert smoothed([2.0] * 50) == pytest.approx([2.0] * 50)
    line = [float(i) for i in range(60)]
    assert smoothed(line)[20:40] == pytest.approx(line[20:40])
    assert len(smoothed([1.0, 2.0])) == 2


def test_short_names_leave_out_what_all_share():
    names = ["train/time/encode_s", "train/time/update_s"]
    assert [short_name(name, names) for name in names] == ["encode", "update"]
    assert short_name("train/loss", ["train/loss"]) == "loss"
    assert short_name("val/accuracy", ["val/accuracy", "train/accuracy"]) == "val/accuracy"


def test_bars_have_the_height_and_the_interval_of_the_scores():
    scores = {
        "sft": {"spatial": {"accuracy": 0.4, "low": 0.3, "high": 0.6, "n": 9}},
        "rl": {"overall": {"accuracy": 0.8, "low": 0.7, "high": 0.9, "n": 9}},
    }
    axes = plot_accuracies(scores, chance=0.25).axes[0]
    assert [round(patch.get_height(), 6) for patch in axes.patches] == [40.0, 80.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["overall", "spatial"]


def test_a_category_that_is_all_right_or_all_wrong_is_drawn_whatever_its_size():
    """Rounding put the share of 309 of these sizes beside its interval, and matplotlib refuses bars of less than 0."""
    for n in range(1, 1001):
        for correct in (0, n // 2, n):
            low, high = wilson_interval(correct, n)
            _, (below, above) = _bars([{"accuracy": correct / n, "low": low, "high": high}])
            assert below[0] >= 0
            assert above[0] >= 0
    # A result file of the release before that was mended, and the mean of clusters.
    odd = {"accuracy": 1.0, "low": 1.0000000000000002, "high": 0.9999999999999999, "n": 5}
    plot_accuracies({"rl": {"overall": odd}})
    plot_frame_sweep({8: odd, 16: odd})
