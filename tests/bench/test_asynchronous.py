"""The bench of rollouts beside the update: which commands it runs, and what it reads of them."""

import json
from pathlib import Path

import pytest

from tests.bench.stand_ins import option, write_scores

PACES = []
"""Of the servers that were started."""


class Servers:
    """Servers that nobody asks."""

    def __init__(self, configs, weights_folder, log, **options):
        self.options = options

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def start(self):
        PACES.append(self.options)
        return f"http://127.0.0.1:{8000 + len(PACES)}"


@pytest.fixture
def script(import_bench, monkeypatch):
    script = import_bench("asynchronous")
    monkeypatch.setattr(script, "EngineServers", Servers)
    return script


def test_runs_differ_in_staleness_alone_and_wait_as_long_as_their_metrics_say(script, tmp_path, monkeypatch):
    commands = []

    def run(command):
        commands.append(command)
        folder = Path(option(command, "run_dir") or tmp_path)
        if command[0] == "test":
            write_scores(command)
        elif option(command, "rollout.max_staleness"):
            waited = {"0": 3, "1": 2, "2": 1}[option(command, "rollout.max_staleness")]
            (folder / "logs" / "version_0").mkdir(parents=True)
            lines = ["step,time/step,time/generate,rollout/cut_share", f"0,4,{waited},0.25", f"1,6,{waited},0.75"]
            (folder / "logs" / "version_0" / "metrics.csv").write_text("\n".join(lines) + "\n")

    monkeypatch.setattr("demo_runs.run_command", run)
    monkeypatch.setattr("demo_runs.tempfile.mkdtemp", lambda prefix: str(tmp_path / "runs"))
    rows = script.main(["--quick", "--json", str(tmp_path / "out.json")])

    fits = [command for command in commands if option(command, "rollout.max_staleness")]
    assert len({tuple(sorted(without_places(command))) for command in fits}) == 1
    assert {option(command, "model.init_from") for command in fits} == {str(tmp_path / "runs" / "sft")}
    assert all(len(json.loads(option(command, "rollout.engine.urls"))) == 2 for command in fits)
    assert all(pace == {"seconds_per_token": 0.002, "tail": 0.8} for pace in PACES)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["rows"] == rows
    assert [(row["max_staleness"], row["trainer_busy"], row["steps"]) for row in rows] == [
        (0, 0.4, 2), (1, 0.6, 2), (2, 0.8, 2),
    ]  # fmt: skip
    assert list(rows[0]) == ["max_staleness", "trainer_busy", "steps", "seconds", "accuracy", "low", "high", "n"]
    assert [row["cut_share"] for row in written["ages"]] == [0.5, 0.5, 0.5]
    assert {row["dropped"] for row in written["ages"]} == {""}, "what was not measured is not 0"


def without_places(command):
    """The options that are the same in all runs."""
    own = ("--run_dir", "--rollout.max_staleness", "--rollout.engine.urls", "--rollout.engine.weights_folder")
    return [word for word in command if not word.startswith(own)]
