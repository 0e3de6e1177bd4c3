import json
import re
from pathlib import Path

import pytest

from longrl.commands.demo import _Demo, run_demo
from longrl.io.stop_signals import StopRun

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_demo_runs_from_data_to_report(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run_demo(out=str(tmp_path / "demo"), num_train_videos=8, num_eval_videos=4, max_steps=1)
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert set(results) == {"base", "sft", "rl", "blind", "seconds"}
    assert set(results["seconds"]) == {"pretrain", "sft", "rl", "evaluate"}
    for run in ("base", "sft", "rl", "blind"):
        assert set(results[run]) == {"overall", "temporal", "spatial", "goal and purpose", "plot and narrative"}
        assert results[run]["overall"]["n"] == 16
        assert all(score["low"] <= score["accuracy"] <= score["high"] for score in results[run].values())
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("data:image/png;base64") >= 3
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # nothing is fetched


def test_a_base_model_made_before_is_set_aside(tmp_path, monkeypatch):
    """Before the export, which refuses to overwrite it."""
    commands = []
    monkeypatch.setattr(_Demo, "_run", lambda self, *command: commands.append(command))
    for _ in range(2):
        (tmp_path / "base").mkdir()
        assert _Demo(tmp_path).pretrain() == tmp_path / "base"
        assert not (tmp_path / "base").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"base.old1", "base.old2"}
    assert commands[-1][0] == "export"


def test_an_interrupted_demo_goes_on_with_the_stage_that_it_was_in(tmp_path, monkeypatch):
    """By the same command; with other options it begins anew."""
    commands = []

    def run(self, *command):
        commands.append(command)
        if command[0] == "fit":
            (tmp_path / "sft").mkdir(exist_ok=True)
        if len(commands) == 2:
            raise StopRun(3)

    monkeypatch.setattr(_Demo, "_run", run)

    def stages(**options):
        commands_before = len(commands)
        demo = _Demo(tmp_path, options=options)
        demo.make_data(1, 1)
        demo.fit("sft", "sft.yaml")
        return [command[0] for command in commands[commands_before:]]

    with pytest.raises(StopRun):
        stages(pretrain=False)
    assert stages(pretrain=False) == ["fit"]
    assert commands[-1][-1] == "--resume=auto"
    assert not (tmp_path / "sft.old1").exists()
    assert stages(pretrain=False) == []
    assert stages(pretrain=True) == ["synthetic", "fit"]
    assert (tmp_path / "sft.old1").exists()
