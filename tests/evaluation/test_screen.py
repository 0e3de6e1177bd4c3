"""What a run shows of itself: within the terminal's size, and nothing that a sample could smuggle in."""

import pytest
from rich.cells import cell_len

from longrl.evaluation.alert_rules import RULES
from longrl.evaluation.alerts import Alert
from longrl.evaluation.screen import LABELS, Progress, Sample, number, plain_line, printable, screen
from longrl.evaluation.sparklines import BLOCKS, Curve

HOSTILE = "\x1b[31mred\x1b[2J \x07[bold]b[/bold]\n\r\t\u202eright to left\u200b \ud800 \u89c6\u9891" + "\u4e2d" * 200


def curve(*values: float) -> Curve:
    made = Curve()
    for value in values:
        made.add(value)
    return made


def run(**options) -> Progress:
    known = {
        "run": "runs/demo/rl",
        "step": 60,
        "total": 130,
        "step_s": 3.0,
        "tokens_per_s": 1180.4,
        "phase": "generate",
        "phase_s": 1.3,
        "phases": {"data": 0.01, "generate": 1.44, "update": 1.2},
        "curves": {name: curve(0.25, 0.5, 0.75) for name in LABELS},
        "sample": Sample("q17", HOSTILE, HOSTILE, 1.0),
    }
    return Progress(**(known | options))


ALERTS = [Alert(RULES[0], "train/entropy", 40, 0.12), Alert(RULES[8], "rollout/cut_off", 50, 0.4)] * 2


def test_the_line_of_a_log_has_all_figures():
    assert plain_line(run(curves={"reward/mean": curve(0.5, 0.712), "val/x": curve(12345.0)}, alerts=ALERTS[:2])) == (
        "step 60/130 46% | reward 0.712 | val/x 12345 | 3 s/step 1180 tokens/s | data 0.0 generate 1.4 update 1.2 | "
        "ETA 3 min 30 s | alerts: entropy collapse, truncation"
    )
    assert plain_line(Progress("r", 7)) == "step 7"


@pytest.mark.parametrize(("width", "height"), [(80, 23), (80, 10), (40, 23), (200, 60), (10, 3)])
@pytest.mark.parametrize("alerts", [(), ALERTS[:1], ALERTS])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_screen_stays_within_the_terminal_and_moves_no_cursor(width, height, alerts, encoding):
    text = screen(run(alerts=alerts), width, height, encoding).plain
    text.encode(encoding)
    lines = text.split("\n")
    assert len(lines) <= height
    assert all(cell_len(line) <= max(width, 40) for line in lines)
    assert all(line.isprintable() for line in lines)


def test_a_screen_of_usual_size_has_everything():
    lines = screen(run(alerts=ALERTS[:2]), 80, 23).plain.split("\n")
    assert lines[0].startswith("runs/demo/rl")
    assert lines[0].endswith("step 60/130 46%")
    assert lines[1].endswith("3 s/step 1180 tokens/s  ETA 3 min 30 s")
    assert lines[2] == "now generate 1 s     last generate 1.4 update 1.2"
    assert [line.split()[0] for line in lines[3:11]] == [
        "reward",
        "loss",
        "kl",
        "entropy",
        "tokens",
        "cut",
        "mismatch",
        "grad",
    ]
    assert lines[3].split() == ["reward", BLOCKS[0] + BLOCKS[4] + BLOCKS[7], "0.75", "from", "0.25"]
    assert lines[11] == "! entropy collapse since step 40: token entropy is 0.12 of its start"
    assert lines[12].startswith("  raise model.algorithm.clip_high")
    assert lines[13].startswith("! truncation since step 50")
    assert lines[16] == "sample q17  reward 1"
    assert lines[17].startswith("...")
    assert lines[18].startswith("[31mred [2J [bold]b[/bold] right to left")


def test_the_remedy_of_a_single_alert_is_whole():
    text = " ".join(screen(run(alerts=ALERTS[:1]), 80, 23).plain.split())
    assert RULES[0].knob in text


def test_a_run_that_is_to_end_says_so_below_what_it_does():
    assert screen(run(notice="SIGINT: the run stops"), 80, 23).plain.split("\n")[3] == "SIGINT: the run stops"


def test_rollouts_beside_the_update_say_how_busy_both_sides_are():
    rollouts = {"throughput/trainer_busy": 0.781, "rollout/engine_busy": 0.93, "rollout/groups_ready": 14.0}
    rollouts["rollout/staleness_mean"] = 1.24
    said = "trainer 78% busy, engine 93% busy, staleness 1.2, 14 groups ready"
    assert screen(run(rollouts=rollouts), 80, 23).plain.split("\n")[3] == said
    assert f" | {said} | " in plain_line(run(rollouts=rollouts))
    assert "busy" not in plain_line(run(rollouts={"throughput/trainer_busy": 0.781}))


def test_without_an_end_there_is_no_time_left_and_without_figures_no_error():
    assert Progress("r", 3, None, 1.0).left_s is None
    assert "step 0" in screen(Progress("r")).plain
    assert "(empty)" in screen(Progress("r", sample=Sample("q", "", "", float("nan")))).plain


def test_what_is_not_printable_becomes_space():
    assert printable("a\x00b\n\u202ec\u200bd") == "a b c d"
    assert printable("\u00e9t\u00e9", "ascii") == "?t?"
    assert [number(value) for value in (0.7123, 57.25, 1180.4, 2.1e-5, 3e9)] == [
        "0.712",
        "57.2",
        "1180",
        "2.1e-05",
        "3e+09",
    ]
