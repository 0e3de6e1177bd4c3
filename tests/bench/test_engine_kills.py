"""Rollout servers that are killed at random moments, in a quick form."""

import importlib
import json
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.mark.slow
def test_a_run_whose_servers_are_killed_comes_to_its_end(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCH)
    script = importlib.import_module("engine_kills")
    path = tmp_path / "out.json"
    script.main(["--quick", "--kills=2", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [(row["max_staleness"], row["lost"], row["steps"]) for row in rows] == [(0, 0, 8), (2, 0, 8)]
    assert [row["same_as_undisturbed"] for row in rows] == ["yes", "-"]
