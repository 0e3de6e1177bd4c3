"""Lengths and seconds for `plan --async`: from files, timelines and metrics whose numbers are known."""

import csv
import random

import pytest
import yaml

from longrl.evaluation.timeline import FILE, step_timeline, timeline_line
from longrl.planning.async_inputs import EngineWork, decoding_seconds, measured_run, quantile_lengths, read_lengths

# ---- files of lengths ----


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("3 4\n5, 6\n\n", [[3, 4], [5, 6]]),
        ("[[3, 4], [5]]", [[3, 4], [5]]),
        ("1\n2\n3\n4\n5\n", [[1, 2], [3, 4]]),
        ("[1, 2, 3]", [[1, 2]]),
        ("7", [[7]]),
    ],
)
def test_lengths_are_read_in_groups(tmp_path, text, groups):
    (tmp_path / "lengths").write_text(text)
    assert read_lengths(tmp_path / "lengths", 2) == groups


@pytest.mark.parametrize("text", ["", "[]", "[[]]", "0", "-3", "many", "[[1, null]]", '["a"]', "[1, {}]", "[" * 5000])
def test_a_file_without_lengths_is_a_mistake(tmp_path, text):
    (tmp_path / "lengths").write_text(text)
    with pytest.raises(ValueError, match="--lengths=.* must hold lengths of completions: numbers of at least 1"):
        read_lengths(tmp_path / "lengths", 2)


# ---- what decoding costs ----


@pytest.mark.parametrize(("token_s", "request_s"), [(0.02, 0.0005), (0.02, 0.0), (0.0, 0.001)])
def test_both_parts_of_a_decoding_step_are_found(token_s, request_s):
    draw = random.Random(1)
    pairs = []
    for _ in range(20):
        depth, tokens = draw.uniform(100, 900), draw.uniform(2000, 9000)
        pairs.append(EngineWork(token_s * depth + request_s * tokens, depth, tokens))
    found = decoding_seconds(pairs)
    assert found[:2] == pytest.approx((token_s, request_s), abs=1e-9)
    assert found[2] == []


def test_lengths_that_do_not_vary_leave_the_cost_of_a_request_open():
    token_s, request_s, notes = decoding_seconds([EngineWork(5.0, 100, 400)] * 10)
    assert (token_s, request_s) == (0.05, 0.0)
    assert notes == ["lengths vary too little to tell what further completions cost a decoding step: taken as nothing"]
    assert decoding_seconds([]) == (None, None, [])


def test_noise_makes_no_part_negative():
    """Longer rollouts that took less time by chance."""
    pairs = [EngineWork(10.0, 100, 1000), EngineWork(9.0, 200, 1000), EngineWork(10.0, 110, 1010)]
    token_s, request_s, _ = decoding_seconds(pairs)
    assert token_s == 0.0
    assert request_s == pytest.approx(9.65e-3, rel=0.01)


def test_lengths_of_given_quantiles():
    points = {0.1: 20.0, 0.5: 100.0, 0.9: 500.0, 1.0: 1000.0}
    assert quantile_lengths(points, 10) == [20, 40, 60, 80, 100, 200, 300, 400, 500, 1000]
    assert quantile_lengths(points, 1) == [1000]
    assert quantile_lengths(points, 20)[0] == 15  # half way to half of the first


# ---- run folders ----


def write_run(folder, rows, timeline=(), **rollout):
    version = folder / "logs" / "version_0"
    version.mkdir(parents=True)
    with (version / "metrics.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["step", *rows[0]])
        table.writeheader()
        table.writerows({"step": step, **row} for step, row in enumerate(rows))
    (folder / "config.yaml").write_text(yaml.safe_dump({"rollout": rollout}))
    if timeline:
        (folder / FILE).write_text("".join(f"{timeline_line(step)}\n" for step in timeline))
    return folder


ROLLOUT = {"rollout/groups_kept": 2.0}


def test_a_timeline_says_lengths_phases_and_what_decoding_costs(tmp_path):
    """On two ranks: 0.1 s a step and 0.01 s for each completion; 1 s of sync, 0.5 s of rewards, updates of 3 s."""
    draw = random.Random(0)
    steps = []
    for step in range(12):
        lengths = [[draw.randint(5, 90), draw.randint(5, 90)]]
        sampling = 0.1 * max(lengths[0]) + 0.01 * 2 * sum(lengths[0])
        phases = [("sync", 0.0, 1.0), ("generate", 1.0, 1 + sampling), ("reward", 1 + sampling, 1.5 + sampling)]
        steps.append(step_timeline(step, 4.5 + sampling, phases, None, ranks=2, lengths=lengths, prompt_tokens=7.0))
    found = measured_run(write_run(tmp_path, [ROLLOUT], steps))
    assert (found.token_s, found.request_s) == pytest.approx((0.1, 0.01), rel=1e-3)
    assert (found.update_s, found.other_s, found.sync_s) == pytest.approx((3.0, 0.5, 1.0), abs=1e-3)
    assert found.groups_per_step == 2
    assert found.groups == [step.lengths[0] for step in steps]
    assert found.prompt_tokens == 7.0


def test_a_rollout_ahead_is_put_together_from_two_steps(tmp_path):
    """Completions of step i begin in step i - 1: 4 s there, 1 s here."""
    spans = [(0.0, 1.0), (6.0, 10.0)]
    steps = [step_timeline(step, 10.0, [("generate", 0.0, 1.0)], None, spans, lengths=[[50]]) for step in range(5)]
    found = measured_run(write_run(tmp_path, [ROLLOUT], steps, max_staleness=1))
    assert found.token_s == pytest.approx(5.0 / 50)


def test_counted_requests_say_how_many_decode_together(tmp_path):
    """400 tokens of a step in 8 s at 5 requests: 80 decoding steps of 0.1 s."""
    requests = [(0.0, 8.0, 5)]
    steps = [step_timeline(step, 10.0, [], requests, lengths=[[100] * 4]) for step in range(5)]
    found = measured_run(write_run(tmp_path, [ROLLOUT], steps, max_staleness=2))
    assert found.token_s == pytest.approx(0.1)
    assert found.most_requests == 5


def of_metrics(p50=100.0):
    return {
        "rollout/groups_kept": 5.0,
        "rollout/prompts_drawn": 8.0,
        "rollout/resample_rounds": 1.0,
        "rollout/completion_tokens_p10": 20.0,
        "rollout/completion_tokens_p50": p50,
        "rollout/completion_tokens_p90": 500.0,
        "rollout/completion_tokens_max": 1000.0,
        "time/step": 30.0,
        "time/generate": 20.0,
        "time/sync": 1.0,
        "time/reward": 2.0,
    }


def test_a_run_of_before_has_quantiles_alone(tmp_path):
    rows = [of_metrics()] * 3
    found = measured_run(write_run(tmp_path, rows, sampling={"num_generations": 5}))
    assert found.groups_per_step == 4
    assert all(len(group) == 5 for group in found.groups)
    assert sorted(length for group in found.groups[:4] for length in group)[-1] == 1000
    assert found.token_s == pytest.approx(20.0 / 1000)
    assert (found.update_s, found.other_s, found.sync_s) == (7.0, 2.0, 1.0)
    assert f"there is no {FILE}: lengths are drawn from the quantiles in metrics.csv" in found.notes


@pytest.mark.parametrize(
    ("rows", "rollout", "said"),
    [
        ([{"train/loss": 1.0}], {}, "is no run of RL: it has no rollouts"),
        ([ROLLOUT], {}, f"has neither a {FILE} nor rollout/completion_tokens_p10 in its metrics"),
        ([of_metrics()], {"overlap": True}, f"has no {FILE} and was sampled during updates"),
        ([of_metrics()], {"max_staleness": 3}, f"has no {FILE} and was sampled during updates"),
    ],
)
def test_a_run_that_does_not_tell_is_refused_with_the_reason(tmp_path, rows, rollout, said):
    with pytest.raises(ValueError, match=said):
        measured_run(write_run(tmp_path, rows, **rollout))


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no metrics\.csv; name the run_dir of a training run"):
        measured_run(tmp_path)
