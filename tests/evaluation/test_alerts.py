"""Alerts over curves whose medians are worked out by hand, and none over healthy ones."""

import math
import random

import pytest
import torch

from longrl.evaluation.alert_rules import KEPT, RULES, Trace, drop_from_peak, level, share_of_start, spike
from longrl.evaluation.alerts import Alert, AlertWatch, alerts_of


def trace(values) -> Trace:
    made = Trace()
    for value in values:
        made.add(value)
    return made


def told(column, values, **others) -> list[tuple[str, int]]:
    """Names and steps of the alerts of a run whose rewards are well."""
    watch = AlertWatch()
    found = []
    for step, value in enumerate(values):
        found += watch.update(step, {"reward/mean": 0.5, column: value, **others})
    return [(alert.rule.name, alert.step) for alert in found]


# ---- measures ----


def test_the_share_of_the_start_compares_medians_of_ten():
    # Median of the first ten: (4 + 6) / 2 = 5; of the last ten: (1 + 2) / 2 = 1.5.
    first, last = [1, 2, 3, 4, 4, 6, 7, 8, 9, 900], [0, 0, 0, 0, 1, 2, 3, 3, 3, 3]
    assert share_of_start(trace(first + last)) == pytest.approx(0.3)
    assert share_of_start(trace(first + last[:-1])) is None
    assert share_of_start(trace(first + last), floor=15.0) == pytest.approx(0.1)


def test_the_drop_is_from_the_best_median_not_from_the_best_step():
    values = [0.5] * 10 + [0.75] * 10 + [1.0] + [0.5] * 10
    assert drop_from_peak(trace(values)) == pytest.approx(0.25)
    assert level(trace(values)) == 0.5
    assert level(trace(values[:9])) is None


def test_a_spike_is_measured_by_the_median_before_it():
    assert spike(trace([2.0] * 20 + [30.0])) == 15.0
    assert spike(trace([2.0] * 19 + [30.0])) is None
    assert spike(trace([0.0] * 20 + [30.0])) is None


def test_a_trace_leaves_out_what_is_no_number_and_stays_small():
    kept = trace([math.nan, math.inf, *map(float, range(1000))])
    assert kept.count == 1000
    assert kept.start == list(map(float, range(10)))
    assert kept.recent == list(map(float, range(1000 - KEPT, 1000)))


# ---- each rule ----


COLLAPSES = [
    # Ten of the new value are needed for a median, six of them for it to be the new one: the median of 4 old and 6 new
    # values is new. The first 15 steps are old, so the 6th new one is step 20.
    ("entropy collapse", "train/entropy", [1.0] * 15 + [0.1] * 10, 20),
    ("entropy explosion", "train/entropy", [1.0] * 15 + [5.0] * 10, 20),
    ("no reward variance", "reward/std_in_group", [0.4] * 15 + [0.0] * 10, 20),
    ("length explosion", "rollout/completion_tokens", [100.0] * 15 + [400.0] * 10, 20),
    ("length shrinkage", "rollout/completion_tokens", [100.0] * 15 + [20.0] * 10, 20),
    ("format drop", "reward/think_answer_format", [0.2] * 10 + [0.9] * 10 + [0.6] * 10, 25),
    ("mismatch growth", "train/mismatch_mean", [0.004] * 15 + [0.02] * 10, 20),
    ("gradient spike", "train/grad_norm", [1.0] * 25 + [11.0] + [1.0] * 5, 25),
    ("truncation", "rollout/cut_off", [0.1] * 15 + [0.4] * 10, 20),
    ("failed rewards", "rollout/failed_rewards", [0.0] * 15 + [0.3] * 10, 20),
    ("failing tools", "rollout/tool_errors", [0.2] * 15 + [0.7] * 10, 20),
    ("prompts given up", "rollout/asked_again", [0.0] * 15 + [1.0] * 10, 20),
    ("idle engine", "rollout/engine_busy", [0.9] * 15 + [0.3] * 10, 20),
    # Seconds of 10: 0.8 * (1 - 100 / 500) is beyond a half, 0.3 of that is not.
    ("idle trainer", "time/generate", [3.0] * 15 + [8.0] * 10, 20),
    ("stale mismatch", "train/mismatch_mean_staleness_2", [0.01] * 15 + [0.07] * 10, 20),
]
BESIDE = {
    "prompts given up": {"rollout/dropped": 1.0, "rollout/prompts_drawn": 16.0},
    "idle engine": {"rollout/staleness_share_1": 0.5},
    "idle trainer": {"time/step": 10.0, "rollout/completion_tokens": 100.0, "rollout/completion_tokens_max": 500.0},
    "stale mismatch": {"train/mismatch_mean_staleness_0": 0.01, "train/mismatch_mean_staleness_1": math.nan},
}
"""Metrics that a rule reads beside the one that turns."""


@pytest.mark.parametrize(("name", "column", "values", "step"), COLLAPSES, ids=[case[0] for case in COLLAPSES])
def test_a_collapse_is_told_once_where_the_median_has_turned(name, column, values, step):
    assert told(column, values, **BESIDE.get(name, {})) == [(name, step)]


def test_signs_of_asynchronous_rollouts_are_of_runs_that_have_them():
    """An engine at rest is no sign at k = 0, a trainer that waits none above; without old tokens there is no ratio."""
    tails = BESIDE["idle trainer"]
    assert told("rollout/engine_busy", [0.1] * 20) == []
    assert told("time/generate", [9.0] * 20, **tails, **{"rollout/staleness_share_1": 1.0}) == []
    assert told("train/mismatch_mean_staleness_0", [0.5] * 20) == []
    assert told("train/mismatch_mean_staleness_1", [0.02] * 20, **{"train/mismatch_mean_staleness_0": 1e-6}) == []
    assert told("rollout/dropped", [4.0] * 20, **{"rollout/prompts_drawn": 0.0}) == []


def test_every_rule_has_such_a_case_and_says_cause_and_option():
    assert [rule.name for rule in RULES] == [case[0] for case in COLLAPSES]
    for rule in RULES:
        text = str(Alert(rule, "column", 7, 0.5))
        assert text.startswith(f"{rule.name} at step 7 (column): ")
        assert rule.cause in text
        assert any(group in rule.knob for group in ("model.", "rollout."))


def test_rules_of_rl_say_nothing_in_sft_where_the_entropy_falls_by_design():
    watch = AlertWatch()
    for step, value in enumerate([1.0] * 15 + [0.01] * 30):
        assert watch.update(step, {"train/entropy": value, "train/loss": value}) == []
    spikes = [watch.update(100 + step, {"train/grad_norm": value}) for step, value in enumerate([1.0] * 20 + [50.0])]
    assert [alert.rule.name for alert in spikes[-1]] == ["gradient spike"]


def test_a_metric_that_was_never_there_or_never_a_number_is_no_alert():
    assert told("train/entropy", [math.nan] * 40) == []
    assert told("train/other", [0.0] * 40) == []


def test_an_alert_that_comes_and_goes_is_told_once_and_ends_after_calm():
    # 0.15 begins it once there are 20 steps; 0.25 is no longer beyond `enter`, but not calm either.
    wavers = [1.0] * 10 + [0.15] * 10 + ([0.25] * 10 + [0.15] * 10) * 3
    assert told("train/entropy", wavers) == [("entropy collapse", 19)]
    recovers = [*wavers, *([1.0] * 30), *([0.1] * 10)]
    assert [name for name, _ in told("train/entropy", recovers)] == ["entropy collapse"] * 2


def test_spikes_close_to_one_another_are_one_alert():
    assert told("train/grad_norm", [1.0] * 20 + [20.0, 1.0, 1.0, 30.0, 1.0]) == [("gradient spike", 20)]


# ---- healthy runs ----


@pytest.mark.parametrize("seed", range(8))
def test_a_healthy_noisy_run_has_no_alert(seed):
    """Learning as it should be: entropy falls to a third, length grows by half, every metric is noisy."""
    rng = random.Random(seed)
    watch = AlertWatch()
    for step in range(600):
        done = step / 600
        metrics = {
            "reward/mean": 0.3 + 0.5 * done + rng.gauss(0, 0.08),
            "reward/format": min(1.0, 0.3 + done + rng.gauss(0, 0.08)),
            "reward/std_in_group": max(0.0, 0.4 - 0.25 * done + rng.gauss(0, 0.06)),
            "train/entropy": 0.6 * 3**-done * math.exp(rng.gauss(0, 0.2)),
            "train/grad_norm": math.exp(rng.gauss(0, 0.5)),
            "train/mismatch_mean": 0.002 * (1 + done) * math.exp(rng.gauss(0, 0.3)),
            "rollout/completion_tokens": 200 * (1 + done / 2) * math.exp(rng.gauss(0, 0.15)),
            "rollout/cut_off": max(0.0, rng.gauss(0.05, 0.05)),
            "rollout/failed_rewards": 0.0,
        }
        assert watch.update(step, metrics) == []


# ---- state ----


def test_a_watch_goes_on_from_its_state(tmp_path):
    values = [1.0] * 12 + [0.1] * 20 + [1.0] * 30 + [0.1] * 20
    whole = told("train/entropy", values)
    assert len(whole) == 2
    for cut in (5, 17, 25, 50):
        watch, found = AlertWatch(), []
        for step, value in enumerate(values):
            if step == cut:
                torch.save(watch.state_dict(), tmp_path / "state.pt")
                watch = AlertWatch()
                watch.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            found += watch.update(step, {"reward/mean": 0.5, "train/entropy": value})
        assert [(alert.rule.name, alert.step) for alert in found] == whole, cut


def test_alerts_that_are_ignored_are_not_told_and_unknown_ones_refused():
    watch = AlertWatch(ignore=["truncation"])
    for step in range(30):
        assert watch.update(step, {"reward/mean": 0.5, "rollout/cut_off": 1.0}) == []
    with pytest.raises(ValueError, match="there is no alert collapse to ignore; there are: entropy collapse, "):
        AlertWatch(ignore=["collapse"])


def test_the_alerts_of_a_run_are_found_in_its_curves():
    steps = range(0, 300, 10)
    curves = {
        "reward/mean": dict.fromkeys(steps, 0.5),
        "train/entropy": {step: 1.0 if step < 150 else 0.05 for step in steps},
        "lr": dict.fromkeys(steps, 0.1),
    }
    assert [(alert.rule.name, alert.step) for alert in alerts_of(curves)] == [("entropy collapse", 200)]
