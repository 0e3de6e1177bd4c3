"""Configs with mistakes, and folders of runs that strangers made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fault_cases.fault import Fault, Outcome
from fault_cases.small_runs import Ended, command, fit, text_run

MARK = "hostile_code_ran"


def kept_of(ended: Ended) -> str:
    """What stands in the place of weights."""
    return "said in one line" if "Traceback" not in ended.output else "a traceback"


def with_text(folder: Path, content: bytes) -> Outcome:
    """`fit` with a second config of these bytes."""
    values = text_run(folder)
    (folder / "more.yaml").write_bytes(content)
    ended = fit(folder, values, f"--config={folder / 'more.yaml'}")
    return Outcome(ended.last_line, ended.exit_code, kept_of(ended))


def typo(folder: Path) -> Outcome:
    """A misspelt key."""
    return with_text(folder, b"\ndata:\n  prompts_per_bacth: 2\n")


def no_yaml(folder: Path) -> Outcome:
    """A bracket that is not closed."""
    return with_text(folder, b"data: [1\nmodel: 2\n")


def wrong_type(folder: Path) -> Outcome:
    """A text for a number."""
    return with_text(folder, b"data:\n  prompts_per_batch: many\n")


def unexpected(folder: Path) -> Outcome:
    """An error that nobody foresaw, of the run itself."""
    values = text_run(folder)
    (folder / "run").mkdir(parents=True)

    def break_building() -> None:
        from longrl.modules import policy

        policy.build_from = lambda *args: 1 // 0  # type: ignore[assignment]

    ended = fit(folder, values, before=break_building)
    file = folder / "run" / "traceback.txt"
    kept = "traceback.txt" if file.is_file() and "ZeroDivisionError" in file.read_text() else "no traceback"
    return Outcome(ended.last_line, ended.exit_code, kept)


def strangers_run(folder: Path, **values: Any) -> Path:
    """The folder of a run whose config names code that leaves a mark."""
    run = folder / "given"
    run.mkdir()
    (run / "hostile.py").write_text(f"open({str(folder / MARK)!r}, 'w')\ndef reward(*args): return 1.0\n")
    family = {"class_path": "longrl.models.text.TextFamily", "init_args": {"model": "m"}}
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"family": family}, "wandb_project": "x", **values}))
    return run


def ended_without_mark(ended: Ended, folder: Path) -> Outcome:
    """Whether the code of the folder ran."""
    kept = "the folder's code ran" if (folder / MARK).exists() else "nothing of the folder ran"
    return Outcome(f"{ended.last_line}; {kept}", ended.exit_code, "the folder as it was")


def hostile_reward(folder: Path) -> Outcome:
    """`test` of a folder whose reward is a file beside its config."""
    run = strangers_run(folder, rollout={"reward": {"terms": [{"function": f"{folder}/given/hostile.py:reward"}]}})
    return ended_without_mark(command(["test", f"--run_dir={run}", "--base_weights=true"], folder), folder)


def system_call(folder: Path) -> Outcome:
    """`validate` of a folder whose reward is `os.system`."""
    run = strangers_run(folder, rollout={"reward": {"terms": [{"function": "os.system"}]}})
    return ended_without_mark(command(["validate", f"--run_dir={run}", "--base_weights=true"], folder), folder)


def hostile_family(folder: Path) -> Outcome:
    """`export` of a folder whose family is a class of others."""
    run = strangers_run(folder, model={"family": {"class_path": "hostile.Family", "init_args": {}}})
    return ended_without_mark(command(["export", f"--run={run}", f"--out={folder / 'new'}"], folder), folder)


FAULTS = [
    Fault("configs", "a misspelt key", typo, 2, "more.yaml, line 3: .*did you mean data.prompts_per_batch"),
    Fault("configs", "a config that is no YAML", no_yaml, 2, "more.yaml is no YAML: .*line 2, column 6"),
    Fault("configs", "a text for a number", wrong_type, 2, "more.yaml, line 2: data.prompts_per_batch: .*many"),
    Fault("configs", "an error that nobody foresaw", unexpected, 1, "ZeroDivisionError.*the traceback is in"),
    Fault("configs", "a stranger's run with a reward of its own", hostile_reward, 2, "names the file.*nothing .* ran"),
    Fault("configs", "a stranger's run with os.system as its reward", system_call, 2, "os.system.*nothing .* ran"),
    Fault(
        "configs",
        "a stranger's run with a family of its own",
        hostile_family,
        2,
        "hostile.Family.*nothing .* ran",
    ),
]
