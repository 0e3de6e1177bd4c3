"""Counting the calls of a made-up package; the step itself is a slow test."""

import importlib
import json
import sys
import textwrap
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
SOURCES = {
    "__init__.py": "",
    "first.py": """
        from dataclasses import dataclass
        from made_up import second

        @dataclass
        class Thing:
            value: int

        def hook():
            second.leaf()
            second.inner()
            return sum(own(x) for x in second.items())

        def own(x):
            double = lambda y: 2 * y
            return double(Thing(x).value)
        """,
    "second.py": """
        class Loader:
            def __iter__(self):
                for _ in range(2):
                    yield leaf()

        def items():
            yield from (1, 2)

        def inner():
            import made_up.third
            [leaf() for _ in range(2)]

        def leaf():
            return 1
        """,
    "third.py": "class Body:\n    x = 1\n",
}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("trace_step")


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "made_up"
    folder.mkdir()
    for name, source in SOURCES.items():
        (folder / name).write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "made_up"]:
        del sys.modules[name]


@pytest.fixture
def recorder(script, package):
    return script.Recorder(package)


def test_functions_come_in_the_order_of_first_calls_and_bodies_are_none(recorder, package):
    first = importlib.import_module("made_up.first")
    assert recorder.run("hook", first.hook) == 6
    assert [str(function).rpartition(":")[0] for function in recorder.phases["hook"].functions] == [
        "first.py:hook", "second.py:leaf", "second.py:inner", "second.py:items", "first.py:own",
        "first.py:own.<lambda>",
    ]  # fmt: skip


def test_depth_counts_comprehensions_and_only_frames_of_ours(recorder, script, package):
    """hook 0, genexpr 1, own 2, lambda 3; a call through `sorted` adds no frame."""
    first = importlib.import_module("made_up.first")
    recorder.run("hook", first.hook)
    assert recorder.phases["hook"].deepest == 3
    recorder.run("other", lambda: sorted([1], key=first.own))
    assert recorder.phases["other"].deepest == 1


def test_the_summary_counts_stays_in_files_and_functions_once(recorder, script, package):
    first = importlib.import_module("made_up.first")
    recorder.run("hook", first.hook)
    recorder.run("own", first.own, 1)
    found = script.summary(recorder.phases)
    hook, own = found["phases"].values()
    assert (hook["functions"], hook["files"], hook["file_changes"]) == (6, 2, 3)
    assert (own["functions"], own["files"], own["file_changes"], own["deepest"]) == (2, 1, 1, 1)
    assert (found["functions"], found["files"], found["file_changes"], found["deepest"]) == (6, 2, 4, 3)
    assert own["path"] == ["first.py:own:14", "first.py:own.<lambda>:15"]
    assert [*script.readable({"own": recorder.phases["own"]})] == ["\nown", "  first.py  own:14, own.<lambda>:15"]


def test_a_loader_is_traced_only_while_it_makes_a_batch(recorder, package):
    second = importlib.import_module("made_up.second")
    for _ in recorder.iterate("loader", second.Loader.__iter__, second.Loader()):
        second.inner()
    names = [function.name for function in recorder.phases["loader"].functions]
    assert names == ["__iter__", "leaf"]
    assert sys.getprofile() is None


def test_a_hook_is_a_phase_of_its_name_and_is_put_back(recorder, package):
    second = importlib.import_module("made_up.second")
    method = second.Loader.__iter__
    with recorder.hook(second.Loader, "__iter__"):
        next(second.Loader().__iter__())
    assert second.Loader.__iter__ is method
    assert list(recorder.phases) == ["__iter__"]


@pytest.mark.slow
def test_a_step_of_the_demo_has_three_phases(script, tmp_path):
    path = tmp_path / "out.json"
    script.main(["--json", str(path)])
    found = json.loads(path.read_text())
    assert list(found["phases"]) == ["loader", "on_train_batch_start", "training_step"]
    for phase in found["phases"].values():
        assert phase["functions"] == len(phase["path"]) > phase["files"] > 1
        assert phase["file_changes"] >= phase["files"]
    assert str(tmp_path) not in path.read_text()
