"""bench/selection.py: its fields at sizes that take seconds, and what its published rows show."""

import json
from pathlib import Path

import pytest

PUBLISHED = Path(__file__).parents[2] / "bench" / "results" / "selection.json"
FIELDS = ["selection", "frames", "found", "low", "high", "n", "decode_s", "tokens"]


def test_every_selection_has_its_rows_and_a_curve(import_bench, tmp_path, monkeypatch):
    bench = import_bench("selection")
    monkeypatch.setattr(import_bench("selection_clip"), "BATCH", 4)
    sizes = bench.Sizes(videos=2, seconds=32, steps=2, frames=(2, 4), timed=1)
    bench.main(["--json", str(tmp_path / "selection.json")], sizes)
    rows = json.loads((tmp_path / "selection.json").read_text())["rows"]
    assert [list(row) for row in rows] == [FIELDS] * 14
    assert [row["frames"] for row in rows[:2] + rows[-2:]] == [2, 4, 10, 12]
    # Two frames of 56 x 56 are 4 tokens; of the overview 1, and an image is 4.
    assert [row["tokens"] for row in rows[:2] + rows[-2:]] == [4, 8, 4 + 8, 4 + 16]
    assert all(row["low"] <= row["found"] <= row["high"] and row["decode_s"] > 0 for row in rows)
    names = dict.fromkeys(row["selection"].replace("_", " ") for row in rows)
    assert all(f"<!-- {name} -->" in (tmp_path / "selection.svg").read_text() for name in names)


def test_the_fewest_frames_that_find_a_share(import_bench):
    bench = import_bench("selection")
    rows = [{"selection": "a", "frames": frames, "found": found} for frames, found in ((2, 0.3), (4, 0.6), (8, 0.5))]
    assert [bench.fewest_frames(rows, "a", target) for target in (0.2, 0.5, 0.9)] == [2, 4, None]


@pytest.mark.parametrize("name", ["similarity", "coverage"])
def test_published_selections_by_the_question_find_events_at_a_quarter_of_uniform_samplings_frames(name):
    rows = json.loads(PUBLISHED.read_text())["rows"]
    assert min(row["n"] for row in rows) >= 100
    found = {(row["selection"], row["frames"]): row for row in rows}
    for target in (0.25, 0.5, 0.9):
        uniform, asking = (
            min(frames for (each, frames), row in found.items() if each == one and row["found"] >= target)
            for one in ("uniform", name)
        )
        assert asking <= uniform / 4
        assert found[name, asking]["low"] > found["uniform", asking]["high"]  # no accident
