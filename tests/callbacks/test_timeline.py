"""`timeline.jsonl`: what a run writes, keeps and takes out, and what reads it."""

import json
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch

from longrl.callbacks import timeline
from longrl.callbacks.background_rollout import BackgroundRollout
from longrl.callbacks.timeline import Timeline, group_lengths, with_data
from longrl.commands.main import main
from longrl.engines.activity import EngineActivity
from longrl.evaluation.timeline import FILE, read_timeline
from longrl.modules.policy import PolicyModule
from longrl.types import Batch, Completion, Group, Prompt, Row
from tests.runs import run, text_config
from tests.tiny import text_family


class Clock:
    now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    for module in ("longrl.callbacks.timeline", "longrl.modules.phase_times"):
        monkeypatch.setattr(f"{module}.time", made)
    return made


def batch(*lengths):
    prompt = Prompt("1", torch.zeros(5), torch.zeros(1, 5), (), Row("1", "", ""))
    return Batch([prompt], groups=[Group(prompt, [completion(length) for length in one]) for one in lengths])


def completion(length):
    return Completion(torch.zeros(length, dtype=torch.long), torch.zeros(length), "", "stop")


class Run:
    """A callback, a module and a folder, without a trainer's loop."""

    def __init__(self, folder, clock, step=0):
        self.clock = clock
        self.trainer = SimpleNamespace(global_step=step, is_global_zero=True, default_root_dir=str(folder))
        self.module = PolicyModule(text_family())
        self.module.phases.spans.rollouts = EngineActivity(clock.perf_counter)
        self.callback = Timeline()
        self.callback.on_train_start(self.trainer, self.module)

    def spend(self, phase, seconds):
        with self.module.phases(phase):
            self.clock.now += seconds

    def end(self, made=None):
        self.trainer.global_step += 1
        self.callback.on_train_batch_end(self.trainer, self.module, None, made or batch([3, 4]), 0)


def test_a_step_is_written_with_its_phases_lengths_and_waits(tmp_path, clock):
    steps = Run(tmp_path, clock)
    clock.now += 0.5
    steps.spend("generate", 2.0)
    steps.spend("update", 1.5)
    steps.end()
    (found,) = read_timeline(tmp_path)
    assert found.step == 1
    assert found.seconds == 4.0
    assert found.trainer == [["data", 0.0, 0.5], ["generate", 0.5, 2.5], ["update", 2.5, 4.0]]
    assert (found.trainer_busy, found.engine_busy) == (0.5, 0.5)
    assert found.lengths == [[3, 4]]
    assert found.prompt_tokens == 5


def test_what_a_validation_does_belongs_to_no_step(tmp_path, clock):
    steps = Run(tmp_path, clock)
    steps.spend("generate", 50.0)
    steps.callback.on_validation_end(steps.trainer, steps.module)
    steps.spend("update", 1.0)
    steps.end()
    steps.end(Batch([batch([1]).prompts[0]]))  # SFT has no rollouts
    (found,) = read_timeline(tmp_path)
    assert (found.seconds, found.trainer_busy) == (1.0, 1.0)


def test_a_rollout_beside_the_update_is_the_engines_time_over_both_steps(tmp_path, clock):
    steps = Run(tmp_path, clock)
    steps.spend("generate", 1.0)
    generated: Future = Future()
    BackgroundRollout(steps.module, None, None, generated)
    steps.spend("update", 2.0)
    steps.end()
    clock.now += 1.0
    generated.set_result([])
    steps.spend("update", 3.0)
    steps.end()
    first, second = read_timeline(tmp_path)
    assert first.engine == [[0.0, 3.0, 1.0]]
    assert second.engine == [[0.0, 1.0, 1.0]]
    assert second.engine_busy == 0.25
    assert second.trainer_busy == 1.0


def test_requests_that_a_driver_counts_are_the_engines_time(tmp_path, clock):
    steps = Run(tmp_path, clock)
    activity = EngineActivity(clock.perf_counter)
    steps.module.phases.spans.follow(activity)
    activity.note(6)
    clock.now += 1.0
    activity.note(0)
    activity.take()  # for the metrics of its driver
    steps.spend("generate", 4.0)
    steps.end()
    steps.spend("generate", 2.0)
    activity.note(3)
    steps.spend("update", 2.0)
    steps.end()
    first, second = read_timeline(tmp_path)
    assert first.engine == [[0.0, 1.0, 6.0]]
    assert (first.engine_busy, first.both_idle) == (0.2, 0.8)
    assert second.engine == [[2.0, 4.0, 3.0]]
    assert second.both_idle == 0.5


def test_a_run_that_goes_on_writes_its_steps_anew(tmp_path, clock):
    steps = Run(tmp_path, clock)
    for _ in range(3):
        steps.spend("update", 1.0)
        steps.end()
    again = Run(tmp_path, clock, step=1)
    assert [step.step for step in read_timeline(tmp_path)] == [1]
    again.spend("update", 7.0)
    again.end()
    assert [step.seconds for step in read_timeline(tmp_path)] == [1.0, 7.0]


def test_the_file_stays_small(tmp_path, clock, monkeypatch):
    steps = Run(tmp_path, clock)
    monkeypatch.setattr(timeline, "MAX_BYTES", 2000)
    for _ in range(40):
        steps.spend("update", 1.0)
        steps.end()
        assert (tmp_path / FILE).stat().st_size <= 2000
    found = [step.step for step in read_timeline(tmp_path)]
    assert found == list(range(found[0], 41))
    assert 3 < len(found) < 20


def test_lengths_are_those_of_whole_groups(monkeypatch):
    monkeypatch.setattr(timeline, "MAX_LENGTHS", 4)
    assert group_lengths(batch([1, 2], [3, 4], [5])) == [[1, 2], [3, 4]]
    assert group_lengths(batch([1, 2, 3, 4, 5], [6])) == [[1, 2, 3, 4, 5]]


def test_a_checkpoint_comes_before_the_wait_for_the_batch():
    assert with_data([("save", 0.0, 2.0), ("encode", 3.0, 4.0)])[-1] == ("data", 2.0, 3.0)
    assert with_data([])[-1] == ("data", 0.0, 0.0)


def test_a_run_of_the_command_is_drawn_and_planned_from_its_folder(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "problem": "1 + 1?", "answer": "2"}\n' * 8)
    values = text_config(tmp_path / "rows.jsonl", "rl")
    values["trainer"] |= {"max_steps": 4}
    values["rollout"] |= {"max_resample_rounds": 0}
    folder = run(tmp_path / "run", values)
    found = read_timeline(folder)
    assert [step.step for step in found] == [1, 2, 3, 4]
    for step in found:
        assert {phase for phase, _, _ in step.trainer} >= {"generate", "update"}
        assert 0 < step.engine_busy < 1
        assert step.engine_busy == pytest.approx(1 - step.trainer_busy, abs=0.01)
        assert [len(group) for group in step.lengths] == [2, 2]

    main(["report", str(folder)])
    page = (folder / "report.html").read_text()
    assert "<h2>Timeline</h2>" in page
    assert "both idle" in page
    assert (folder / "timeline.png").exists()

    capsys.readouterr()
    main(["plan", "--async", str(folder), "--max_staleness=[0,2]", "--json", str(tmp_path / "plan.json")])
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert capsys.readouterr().out.splitlines()[-1] == plan["verdict"]
    assert plan["workload"]["groups_per_step"] == 2
    assert plan["workload"]["slots"] == 4
    start, other = plan["rows"]
    measured = sum(step.seconds for step in found) / len(found)
    assert start["seconds_per_step"] == pytest.approx(measured, rel=0.9)  # medians of four steps, the first one slow
    assert other["max_staleness"] == 2
