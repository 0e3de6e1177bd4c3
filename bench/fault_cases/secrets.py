"""Keys in the environment, and where they must not turn up."""

from __future__ import annotations

import os
from pathlib import Path

from fault_cases.fault import Fault, Outcome
from fault_cases.small_runs import command, fit, text_run

CANARY = "sk-canary-0123456789"
VARIABLES = ("OPENAI_API_KEY", "WANDB_API_KEY", "HF_TOKEN", "LONGRL_SERVER_KEY", "VLLM_API_KEY")


def set_keys() -> None:
    """The environment of a user with keys."""
    os.environ.update(dict.fromkeys(VARIABLES, CANARY))


def found_in(folder: Path) -> str:
    """Files below a folder that hold the key."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    found = [file.name for file in files if CANARY.encode() in file.read_bytes()]
    return f"the key is in {', '.join(found)}" if found else f"the key is in none of {len(files)} files"


def ordinary_run(folder: Path) -> Outcome:
    """An RL run; all that it leaves is searched, its output included."""
    ended = fit(folder, text_run(folder, "rl", steps=2), "--wandb=offline", before=set_keys)
    return Outcome(found_in(folder), ended.exit_code, f"wandb: {bool(list(folder.rglob('*.wandb')))}")


def error_with_a_key(folder: Path) -> Outcome:
    """An error whose text has the key, as those of HTTP libraries may."""

    def break_building() -> None:
        set_keys()
        from longrl.modules import policy

        def build(*args: object) -> None:
            raise RuntimeError(f"sent Authorization: Bearer {CANARY}")

        policy.build_from = build  # type: ignore[assignment]

    values = text_run(folder)
    (folder / "run").mkdir(parents=True)
    ended = fit(folder, values, before=break_building)
    return Outcome(f"{found_in(folder)}; {ended.last_line}", ended.exit_code, "traceback.txt")


def key_as_an_option(folder: Path) -> Outcome:
    """A key in the place of the name of its variable."""
    args = ["pipeline", "caption", f"--videos={folder}", f"--out={folder / 'out'}"]
    captioner = [f"--captioner.key_variable={CANARY}", "--captioner.model=m"]
    ended = command([*args, *captioner], folder)
    return Outcome(f"{found_in(folder)}; {ended.last_line}", ended.exit_code, "nothing asked")


FAULTS = [
    Fault(
        kind="secrets",
        fault="keys in the environment of a run, with wandb offline",
        does=ordinary_run,
        exit_code=0,
        seen="the key is in none of",
        limit_s=180.0,
        quick=False,
    ),
    Fault("secrets", "an error that tells a key", error_with_a_key, 1, r"in none of .*Bearer \[a key\]"),
    Fault("secrets", "a key as the name of its variable", key_as_an_option, 2, "in none of .*must name an environment"),
]
