"""Runs that are ended at random moments, in a quick form."""

import importlib
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("random_kills")


@pytest.mark.slow
def test_runs_ended_at_random_moments_come_to_the_end_of_undisturbed_ones(script, tmp_path):
    path = tmp_path / "out.json"
    script.main(["--quick", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert sum(row["kills"] for row in rows) == script.QUICK_KILLS
    assert all(row["same_end"] and row["all_documented"] for row in rows)


@pytest.mark.parametrize(
    ("codes", "documented"),
    [([75], True), ([-9], True), ([143, 1], True), ([0], False), ([1], False), ([75, 0], False)],
)
def test_a_part_that_was_ended_has_a_code_of_the_documents(script, codes, documented):
    assert script.is_documented(codes) is documented
