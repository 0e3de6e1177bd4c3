"""A few hundred hostile inputs for every parser; `bench/fuzz.py` feeds ten thousand."""

import importlib
import json
import logging
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("fuzz")


def test_no_parser_lets_an_error_escape(fuzz, tmp_path):
    path = tmp_path / "out.json"
    rows = fuzz.main(["--inputs", "60", "--only", "^(?!math)", "--json", str(path)])
    assert len(rows) >= 25
    assert [row["parser"] for row in rows if row["uncaught"]] == []
    hangs = [row for row in rows if row["slowest_ms_per_10kb"] > 1000]  # a busy machine slows all down
    assert hangs == []
    assert json.loads(path.read_text())["rows"] == rows
    assert not logging.getLogger().isEnabledFor(logging.NOTSET)


def test_an_error_and_a_slow_rule_are_found_and_repeatable(fuzz, monkeypatch):
    monkeypatch.setattr(fuzz, "HANGS_S", 0.2)
    calls = []

    def read(text):
        calls.append(text)
        if len(text) == 3:
            raise KeyError(text)
        if len(text) == 4:
            raise ValueError(text)
        while len(text) == 5:
            pass
        return "read"

    parser = fuzz.Parser("p", lambda rng: "x" * rng.randint(1, 5), read, (ValueError,))
    outcome = fuzz.feed(parser, range(12))
    made = [fuzz.input_of(parser, number) for number in range(12)]
    assert set(map(len, made)) == {1, 2, 3, 4, 5}
    assert set(calls) == set(made)
    assert [number for number, _ in outcome.uncaught] == [n for n in range(12) if len(made[n]) == 3]
    assert outcome.refused == sum(len(text) == 4 for text in made)
    assert [number for number, _ in outcome.slow] == [n for n in range(12) if len(made[n]) == 5]
    assert outcome.slowest[0] >= 200
