"""`python -m longrl plan --async` on given numbers; tests/callbacks/test_timeline.py has it on a run."""

import json

import pytest

from longrl.commands.main import main

GIVEN = ("--groups=8", "--token_s=1.0", "--update_s=4.0", "--sync_s=0.5")


@pytest.fixture
def lengths(tmp_path):
    """One completion of 16 takes 20 times as long as the others."""
    path = tmp_path / "lengths.txt"
    path.write_text("1\n" * 15 + "20\n")
    return f"--lengths={path}"


def plan(tmp_path, *args):
    main(["plan", "--async", *args, "--num_generations=1", "--json", str(tmp_path / "plan.json")])
    return json.loads((tmp_path / "plan.json").read_text())


def test_a_long_tail_pays_and_the_last_line_says_which_staleness(tmp_path, lengths, capsys):
    found = plan(tmp_path, lengths, *GIVEN, "--max_staleness=[2,8]")
    assert [row["max_staleness"] for row in found["rows"]] == [0, 2, 8]
    assert found["advised"] == 8
    start, _, best = found["rows"]
    assert best["seconds_per_step"] == pytest.approx(4.5)
    assert best["trainer_busy"] == pytest.approx(1.0)
    assert start["seconds_per_step"] > 3 * best["seconds_per_step"]
    assert found["workload"]["slots"] == 8
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == found["verdict"]
    assert found["verdict"].startswith("rollout.max_staleness: 8 pays: ")
    assert "note: 8 completions decode at once, as many as a step has or had; --slots says otherwise" in shown


def test_the_same_numbers_make_the_same_plan_and_another_seed_another(tmp_path, lengths):
    first = plan(tmp_path, lengths, *GIVEN, "--slots=4")
    assert plan(tmp_path, lengths, *GIVEN, "--slots=4") == first  # or the file would be refused
    with pytest.raises(ValueError, match="exists and holds another result"):
        plan(tmp_path, lengths, *GIVEN, "--slots=4", "--seed=1")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "needs RUN or --lengths, --groups, --token_s, --update_s; give what is missing"),
        (("--groups=0",), "--groups must be at least 1, got 0"),
        (("--max_staleness=[-1]",), "--max_staleness must be at least 0, got -1"),
        ((*GIVEN, "LENGTHS", "--prefill_tokens_per_s=0"), "--prefill_tokens_per_s must be above 0"),
        ((*GIVEN, "LENGTHS", "--sync_s=-1"), "--sync_s must be at least 0"),
    ],
)
def test_what_is_missing_or_impossible_is_one_line(tmp_path, lengths, args, said):
    with pytest.raises(ValueError, match=said):
        plan(tmp_path, *(lengths if arg == "LENGTHS" else arg for arg in args))
